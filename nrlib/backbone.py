"""The backbone: a small Llama-shaped decoder trained here and cached, or any causal language model by name."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .architecture import text_config
from .batches import MixedBatches
from .config import RunConfig, TrainingConfig
from .distributed import first_process_first, is_first_process, shards_models
from .errors import BackboneError, ConfigError, WeightsError
from .hub import find, why_not_loaded
from .losses import ORIGINAL
from .machine import pick_device, seeded
from .storage import atomic_directory, atomic_path, cache_directory, fingerprint
from .texts import PreparedText
from .training import Hooks, train
from .weights import check_fit, shapes_differ

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKBONE_VERSION = 1
PRETRAINING_BATCH_SIZE = 16
N_SAMPLES, SAMPLE_BYTES = 64, 65_536  # of each file of weights


def get_backbone(config: RunConfig, text: PreparedText, progress: bool = True) -> PreTrainedModel:
    """The backbone of a run, in evaluation mode and float32 if it was trained here.

    Raises
    ------
    BackboneError
        When a named model cannot be had or is not a causal language model.
    """
    if config.backbone.backbone_name:
        model = load_backbone(config.backbone.backbone_name)
    else:
        folder = backbone_directory(config, text)
        if not folder.exists():
            _pretrain(config, text, folder, progress)
        model = load_backbone(str(folder))
    # A model that one device may be too small for stays in main memory until it is sharded, and a quantised one is where
    # its library needs it.
    if not shards_models() and getattr(model, "hf_quantizer", None) is None:
        model = model.to(pick_device())
    return model.eval()


def weights_fingerprint(name: str) -> str | None:
    """What tells the weights in a local folder from others that lay there before: the sizes of its files and samples of
    their bytes. None for a name on the hub, and for a backbone that is trained here.

    Reading all of a large model would take longer than a run that is only looked up.
    """
    folder = Path(name)
    if not name or not folder.is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = path.stat().st_size if path.exists() else 0
        found.update(f"{path.name} {size}".encode())
        if size:
            with path.open("rb") as file:
                for place in range(0, size, max(1, size // N_SAMPLES)):
                    file.seek(place)
                    found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def load_backbone(name: str) -> PreTrainedModel:
    """A causal language model from a local folder or the hub.

    Raises
    ------
    BackboneError
        When it cannot be had, or lets a token see the tokens after it.
    WeightsError
        When its weights are no safetensors, or do not fit the model its configuration describes.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_progress_bar = logging.is_progress_bar_enabled()
    if Path(name).exists():  # one bar for each run of a sweep says nothing; a download's bar does
        logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            find(name),
            dtype=torch.float32,  # AdamW needs full-precision weights
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and raised below
            output_loading_info=True,
        )
    except Exception as error:  # hub errors come in a dozen classes
        if "safetensors" in str(error):
            raise WeightsError(_not_safetensors(name)) from error
        raise BackboneError(why_not_loaded("causal language model", name, error)) from error
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    _check_weights(model, name, report)
    check_is_causal(model, name)
    return model


def _not_safetensors(name: str) -> str:
    return (
        f"{name!r} has no weights in safetensors; a pickle (pytorch_model.bin), which can run any code when it is read, is "
        "not loaded. If you trust it, convert it once: AutoModelForCausalLM.from_pretrained(name)"
        ".save_pretrained(folder), and the same for its tokenizer; then give the folder."
    )


def _check_weights(model: PreTrainedModel, name: str, report: dict[str, Any]) -> None:
    """Raise WeightsError for what would otherwise stay random. Weights without a place (another task's head) may be there."""
    weights = model.state_dict()
    mismatched = [  # transformers 4 gives the names alone
        shapes_differ(key, None, weights[key].shape) if isinstance(key, str) else shapes_differ(*key)
        for key in report["mismatched_keys"]
    ]
    if report["missing_keys"] or mismatched:
        check_fit(
            repr(name),
            type(model).__name__,
            missing=report["missing_keys"],
            unexpected=report["unexpected_keys"],
            mismatched=mismatched,
            remedy="Check that config.json and the weights come from the same model.",
        )


@torch.no_grad()
def check_is_causal(model: PreTrainedModel, name: str) -> None:
    """Raise BackboneError unless the logits of a token do not depend on the tokens after it."""
    problem = "is an encoder-decoder model" if getattr(model.config, "is_encoder_decoder", False) else ""
    if not problem:
        was_training = model.training
        model.eval()
        tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=next(model.parameters()).device)
        logits = model(input_ids=tokens).logits[:, :3]
        model.train(was_training)
        if not torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-6):  # the rows differ in their last token only
            problem = "lets a token see the tokens after it, as masked language models do"
    if problem:
        raise BackboneError(_not_causal(model, name, problem))


def _not_causal(model: PreTrainedModel, name: str, problem: str) -> str:
    return (
        f"{name!r} ({type(model).__name__}) {problem}; neutral residues here extend causal language models only. "
        "Choose a decoder such as Llama, Gemma, Mistral, Qwen or GPT-2."
    )


def backbone_directory(config: RunConfig, text: PreparedText) -> Path:
    """Where a backbone trained here is cached, by everything that determines it."""
    c = config.training
    key = [BACKBONE_VERSION, PRETRAINING_BATCH_SIZE, config.to_dict()["backbone"], c.context_length]
    key += [text.corpora["original"]["fingerprint"], fingerprint(text.pretraining.tokens.tolist(), 16), c.precision]
    return cache_directory() / "backbones" / fingerprint(key, 16)


def build_backbone(config: RunConfig, vocabulary_size: int, eos_token_id: int) -> PreTrainedModel:
    """An untrained Llama-shaped decoder; its weights depend on `pretraining_seed` alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    b = config.backbone
    shape = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=b.d_model,
        intermediate_size=b.ffn_width,
        num_hidden_layers=b.n_layers,
        num_attention_heads=b.n_heads,
        max_position_embeddings=max(1024, 2 * config.training.context_length),
        tie_word_embeddings=True,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )
    with seeded(b.pretraining_seed):
        return LlamaForCausalLM(shape)


def backbone_shape(config: RunConfig) -> PreTrainedModel:
    """The backbone on the meta device: modules and sizes without weights, so that a mistake costs no work."""
    b = config.backbone
    if not b.backbone_name:
        if b.d_model % (2 * b.n_heads):
            raise ConfigError(
                f"n_heads = {b.n_heads} does not split d_model = {b.d_model} into heads of an even width, which rotary "
                "positions need. Choose n_heads so that d_model is a multiple of 2 · n_heads."
            )
        with torch.device("meta"):
            return build_backbone(config, b.vocabulary_size, 0)
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    try:
        shape = AutoConfig.from_pretrained(find(b.backbone_name))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
    except Exception as error:
        raise BackboneError(why_not_loaded("causal language model", b.backbone_name, error)) from error
    # Masked models load as causal ones and see the future all the same. The test proper needs weights: `check_is_causal`.
    if shape.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(shape, "is_decoder", False):
        raise BackboneError(_not_causal(model, b.backbone_name, "is a masked language model"))
    return model


def check_context_length(config: RunConfig, backbone: PreTrainedModel) -> None:
    """Raise ConfigError if the sequences of a run are longer than the backbone has positions."""
    n_positions = getattr(text_config(backbone), "max_position_embeddings", None)
    if n_positions is not None and config.training.context_length > n_positions:
        raise ConfigError(
            f"context_length = {config.training.context_length} is more than the {n_positions} positions of the backbone "
            f"{config.backbone.backbone_name!r}. Give at most {n_positions}."
        )


def _pretrain(config: RunConfig, text: PreparedText, folder: Path, progress: bool) -> None:
    model = build_backbone(config, len(text.tokenizer), text.tokenizer.eos_token_id).to(pick_device())
    c = config.training
    n_steps = -(-config.backbone.pretraining_tokens // (PRETRAINING_BATCH_SIZE * c.context_length))
    settings = TrainingConfig(
        n_tokens=config.backbone.pretraining_tokens,
        context_length=c.context_length,
        batch_size=PRETRAINING_BATCH_SIZE,
        learning_rate=config.backbone.pretraining_learning_rate,
        mix_ratio=0.0,
        weight_decay=0.1,
        precision=c.precision,
    )
    batches = MixedBatches(
        text.pretraining,
        None,
        mix_ratio=0.0,
        n_steps=n_steps,
        batch_size=PRETRAINING_BATCH_SIZE,
        context_length=c.context_length,
        seed=config.backbone.pretraining_seed,
        new_is=ORIGINAL,
    )
    checkpoint = checkpoint_hooks(f"backbone-{folder.name}")
    train(model, batches, settings, hooks=checkpoint, description="pretrain the backbone", progress=progress)
    with first_process_first():
        if is_first_process():
            with atomic_directory(folder) as temporary:
                model.save_pretrained(temporary)
                text.tokenizer.save_pretrained(temporary)
            delete_checkpoint(f"backbone-{folder.name}")


def _checkpoint_path(name: str) -> Path:
    return cache_directory() / "checkpoints" / f"{name}.pt"


def checkpoint_hooks(name: str, made_from: str = "", **hooks: Any) -> Hooks:
    """Hooks that keep a checkpoint in the cache under `name`; one made from other code or text is not loaded."""
    path = _checkpoint_path(name)

    def save(state: dict[str, Any]) -> None:
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:  # a handle reports a full disk in words
            torch.save({**state, "made_from": made_from}, handle)

    def load() -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever a damaged archive makes torch and pickle raise
            warnings.warn(
                f"The checkpoint {path} is damaged ({type(error).__name__}); the run starts over.", stacklevel=2
            )
            path.unlink()
            return None
        if state.pop("made_from", "") == made_from:
            return state
        warnings.warn(f"The checkpoint {path} was made from other code or text; the run starts over.", stacklevel=2)
        return None

    return Hooks(save=save, load=load, **hooks)


def delete_checkpoint(name: str) -> None:
    """Remove the checkpoint of a finished run."""
    _checkpoint_path(name).unlink(missing_ok=True)
