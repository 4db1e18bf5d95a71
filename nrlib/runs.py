"""One run: load its record, or train, measure and record it. A killed run resumes from its checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import count_weights
from .backbone import (
    backbone_shape,
    check_context_length,
    checkpoint_hooks,
    delete_checkpoint,
    get_backbone,
    weights_fingerprint,
)
from .batches import MixedBatches, TokenStream, evaluation_batches
from .config import RunConfig
from .corpora import check_spec, load_corpus
from .distributed import (
    check_division,
    first_process_first,
    is_first_process,
    n_processes,
    shard,
    shards_models,
)
from .errors import ConfigError
from .evaluation import bits_per_byte, drift, evaluate, forgetting, logits_function
from .machine import explained_evaluation_shortage, explained_shortage
from .methods import apply_method, count_extra_weights, rival
from .penalties import Penalty, kl_penalty, per_step
from .records import (
    RESULT_VERSION,
    Record,
    check_clean_tree,
    collect_provenance,
    git_state,
    is_publishing,
    load_record,
    save_record,
    write_counts,
)
from .storage import fingerprint
from .texts import TEST_SETS, VALIDATION_SETS, PreparedText, prepare_text
from .tokenization import beginning_token, load_tokenizer
from .training import TrainingState, train

BEGINNING = "bos_token_id"  # in the record of a backbone loaded by name

Log = Callable[[int, Mapping[str, float]], None]
WHOLE_COPIES = ("weight_interpolation", "elastic_weight_consolidation")


def run_or_load(config: RunConfig, *, notebook: str = "", progress: bool = True, log: Log | None = None) -> Record:
    """The stored record of `config`, or a new run of it, whose steps are given to `log` (see `training.Hooks`)."""
    record = stored_record(config)
    if record is None:
        if is_publishing():
            check_clean_tree()
        record, _ = run_and_keep(config, notebook=notebook, progress=progress, log=log)
        if is_first_process():
            record = keep_record(record)
            delete_checkpoint(config.run_id)
    return record


def keep_record(record: Record) -> Record:
    """Store a record, unless there is one of the same run: then that stands and is returned, since a cluster may run a
    task twice or store it on a disk that is not the collector's."""
    stored = stored_record(record.run_config)
    if stored is None:
        save_record(record)
    return stored or record


def stored_record(config: RunConfig) -> Record | None:
    """The stored record of `config`, unless files it was made from have changed since, or it was made before windows of
    text began as the backbone's tokenizer begins a text."""
    record = load_record(config)
    if record is not None:
        name = config.backbone.backbone_name
        if name and BEGINNING not in record.provenance and beginning_token(load_tokenizer(name)) is not None:
            return None
        for role, spec in dataclasses.asdict(config.data).items():
            if not str(spec).startswith("file:"):
                continue
            if load_corpus(spec, progress=False).fingerprint[:16] != record.provenance["corpora"][role]["fingerprint"]:
                return None
        if record.provenance.get("backbone") != weights_fingerprint(config.backbone.backbone_name):
            return None
    return record


def check_run(config: RunConfig) -> None:
    """Everything about a run that can be checked before any work: corpora by name, layers and budget on a model without
    weights.

    Raises
    ------
    ConfigError, CorpusError, BackboneError
        In words: what was given, what is allowed, what to do.
    """
    for spec in (config.data.original, config.data.proxy, config.data.unseen_original, config.data.new_domain):
        if spec:
            check_spec(spec)
    if shards_models() and config.method.method in WHOLE_COPIES:
        raise ConfigError(
            f"method = {config.method.method!r} keeps whole copies of the backbone's weights, which --parallel fsdp spreads "
            "over the processes. Use --parallel ddp, or another method."
        )
    _n_steps(config)
    check_division(config.training.batch_size, config.training.accumulation_steps)
    shape = backbone_shape(config)
    check_context_length(config, shape)
    if config.backbone.backbone_name:
        load_tokenizer(config.backbone.backbone_name)
    with torch.device("meta"):
        apply_method(shape, config.method, config.seed)


def run(config: RunConfig, *, notebook: str = "", progress: bool = True) -> Record:
    """Train and measure, without storing the result."""
    record, _ = run_and_keep(config, notebook=notebook, progress=progress)
    if is_first_process():
        delete_checkpoint(config.run_id)
        write_counts(trained=[config.run_id])
    return record


def run_and_keep(
    config: RunConfig, *, notebook: str = "", progress: bool = True, log: Log | None = None
) -> tuple[Record, nn.Module]:
    """Train and measure; returns the trained model too. The caller deletes the checkpoint when the result is safe."""
    git_at_start = git_state()
    check_run(config)
    with first_process_first():
        text = prepare_text(config.data, config.backbone, progress and is_first_process())
    make_batches(config, text)  # text that is too short costs no backbone
    backbone = get_backbone(config, text, progress)
    n_backbone = count_weights(backbone)
    # Before the training, so that memory too small for bits per byte is found out first.
    before = backbone_metrics(config, text, None if shards_models() else backbone)
    model, state = extend(config, text, backbone, progress, log)
    names = (*TEST_SETS, *VALIDATION_SETS)
    with explained_evaluation_shortage(config.training.context_length):
        after, statistics = evaluate(model, text.held_out, names, config.training.context_length)
    device = next(model.parameters()).device
    results = {
        "bits_per_byte": _rounded(after),
        "backbone_bits_per_byte": _rounded(before),
        "forgetting": _rounded(
            {n: forgetting(after[n], before[n]) for n in ("unseen_original", "proxy") if n in after}
        ),
        "drift": _measure_drift(config, text, model),
        "n_backbone_weights": n_backbone,
        "n_extra_weights": count_extra_weights(model, n_backbone),
        "tokens_per_second": round(config.training.n_tokens / state.seconds),
        "gate_statistics": [row for row in statistics if row["text"] in TEST_SETS],
    }
    provenance = collect_provenance(config, text.corpora, device, state.seconds, git_at_start)
    if weights := weights_fingerprint(config.backbone.backbone_name):
        provenance["backbone"] = weights
    if config.backbone.backbone_name:
        provenance[BEGINNING] = text.new.bos_token_id
    if n_processes() > 1:
        provenance["n_processes"] = n_processes()
    return Record(config.run_id, notebook, config.to_dict(), results, state.curve, provenance), model


def make_batches(config: RunConfig, text: PreparedText) -> MixedBatches:
    """The training data of a run.

    Raises
    ------
    CorpusError
        When the text is too short for one batch.
    """
    c = config.training
    return MixedBatches(
        text.new,
        text.proxy,
        mix_ratio=c.mix_ratio,
        n_steps=_n_steps(config),
        batch_size=c.batch_size,
        context_length=c.context_length,
        seed=config.seed,
    )


def extend(
    config: RunConfig, text: PreparedText, backbone: nn.Module, progress: bool = True, log: Log | None = None
) -> tuple[nn.Module, TrainingState]:
    """Teach the backbone, which is taken over, the new domain; returns the trained model and its learning curve."""
    c, method = config.training, config.method
    made_from = [RESULT_VERSION, text.corpora, *(git_state() if is_publishing() else ())]
    if weights := weights_fingerprint(config.backbone.backbone_name):
        made_from.append(weights)
    if text.new.bos_token_id is not None:  # a checkpoint from before windows began with it is of other data
        made_from.append(text.new.bos_token_id)
    batches = make_batches(config, text)
    model = _spread(apply_method(backbone, method, config.seed))

    def measure() -> dict[str, float]:
        with explained_evaluation_shortage(c.context_length):
            values, _ = evaluate(model, text.held_out, VALIDATION_SETS, c.context_length)
        return {f"bits_per_byte_{name}": value for name, value in _rounded(values).items()}

    with explained_shortage(c.batch_size, c.context_length, c.accumulation_steps):
        state = train(
            model,
            batches,
            c,
            local_loss=method.local_loss,
            local_loss_weight=method.local_loss_weight,
            penalty=make_penalty(config, model, text.proxy, lambda: get_backbone(config, text, progress=False)),
            hooks=checkpoint_hooks(config.run_id, fingerprint(made_from), measure=measure, log=log),
            description=config.run_id,
            progress=progress,
        )
    if finish := getattr(rival(method.method), "finish", None):
        finish(model, get_backbone(config, text, progress=False), method)
    return model, state


def _spread(model: Any) -> Any:
    """The model, in a run that shards its models spread over the processes."""
    return shard(model) if shards_models() else model


def make_penalty(
    config: RunConfig, model: nn.Module, proxy: TokenStream | None, load_backbone: Callable[[], nn.Module]
) -> Penalty | None:
    """The further term of the loss that the method of a run asks for, if any.

    Parameters
    ----------
    proxy : original-domain training text, which a run with a penalty has.
    load_backbone : makes a backbone like the one that `model` was; called only where the model itself no longer holds it.
    """
    if make_term := getattr(rival(config.method.method), "make_penalty", None):
        assert proxy is not None  # RunConfig checks it
        sequences = evaluation_batches(proxy, config.training.context_length, batch_size=1)
        return per_step(make_term(model, load_backbone(), config.method, sequences))
    if config.method.kl_weight > 0:
        return kl_penalty(_logits_before(model, load_backbone), config.method.kl_weight)
    return None


def _n_steps(config: RunConfig) -> int:
    c = config.training
    tokens_per_step = c.batch_size * c.context_length
    if c.n_tokens < tokens_per_step:
        raise ConfigError(
            f"n_tokens = {c.n_tokens} is less than one batch of batch_size = {c.batch_size} sequences of "
            f"context_length = {c.context_length} ({tokens_per_step} tokens). Train for longer."
        )
    return c.n_tokens // tokens_per_step


def backbone_metrics(config: RunConfig, text: PreparedText, backbone: nn.Module | None = None) -> dict[str, float]:
    """Bits per byte of the backbone, loaded unless it is given, on every held-out text; kept in memory, since all runs of a
    sweep share it."""
    weights = weights_fingerprint(config.backbone.backbone_name)
    key = (config.data, config.backbone, weights, config.training.context_length, config.training.precision)
    if key not in _BACKBONE_METRICS:
        with explained_evaluation_shortage(config.training.context_length):
            if backbone is None:
                backbone = _spread(get_backbone(config, text, progress=False))
            _BACKBONE_METRICS[key] = {
                name: bits_per_byte(backbone, stream, config.training.context_length)
                for name, stream in text.held_out.items()
            }
    return _BACKBONE_METRICS[key]


_BACKBONE_METRICS: dict[Any, dict[str, float]] = {}


def _measure_drift(config: RunConfig, text: PreparedText, model: nn.Module) -> dict[str, float]:
    names = [name for name in ("unseen_original", "proxy") if name in text.held_out]
    with explained_evaluation_shortage(config.training.context_length):
        before = _logits_before(model, lambda: get_backbone(config, text, progress=False))
        return _rounded({n: drift(model, before, text.held_out[n], config.training.context_length) for n in names})


def _logits_before(model: Any, load_backbone: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    if not hasattr(model, "disable_adapter"):  # fine-tuning has changed the backbone itself
        return logits_function(_spread(load_backbone()))

    def logits(inputs: Tensor) -> Tensor:
        with model.disable_adapter():
            return logits_function(model)(inputs)

    return logits


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}
