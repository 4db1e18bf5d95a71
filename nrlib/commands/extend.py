"""`nrlib extend`: one run from the shell, its figures, and the extended model as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..architecture import text_config
from ..config import CORPUS_ROLES, RunConfig, absolute_path, flat_values, make_config, parameters
from ..errors import ConfigError
from ..model_card import BACKBONE_FOLDER, CardDetails, write_model_card
from ..notebook_parameters import Parameter, convert_value
from ..profiles import PRESETS
from ..runs import Log, check_run
from ..storage import atomic_directory, cache_directory, results_directory
from ..tracking import check_tracker, log_directory, tracking

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ..records import Record
    from ..texts import PreparedText

CONFIG_FILE = "run.json"  # beside a saved model: the configuration it was made with

_MEANING = {
    "unseen_original": ("original domain, outside the proxy", "unseen_original"),
    "proxy": ("original domain, the proxy", "proxy"),
    "new": ("new domain", "new_domain"),
}
_TO_CHOOSE_BY = {
    "unseen_original_validation": ("validation: original, outside the proxy", "unseen_original"),
    "new_validation": ("validation: new domain", "new_domain"),
}


def merge_changes(named: Mapping[str, Any], assignments: Mapping[str, str]) -> dict[str, Any]:
    """Options and `-p name=value` texts as changes for `make_config`, which reports unknown names.

    Raises
    ------
    ConfigError
        For a wrong type, or a parameter given both ways.
    """
    known = parameters()
    changes = {name: value for name, value in named.items() if value is not None}
    for name, text in assignments.items():
        if name in changes:
            raise ConfigError(f"{name} is given by an option and by -p {name}={text}. Give it once.")
        if name == "profile":
            raise ConfigError(f"-p profile={text} comes too late for the other defaults. Use --profile {text}.")
        field = known.get(name)
        if field is not None:
            declared = Parameter(name, type(field.default).__name__, field.default, field.metadata["description"])
            changes[name] = convert_value(declared, text)
        else:
            changes[name] = text
    return changes


def preset_values(name: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset; without a name the recommended ones, if `changes` leave a gate that they can be used on.

    Raises
    ------
    ConfigError
        For an unknown name.
    """
    if name is None:
        is_gated = changes.get("method", "neutral_residues") == "neutral_residues" and changes.get("gate") != "none"
        return PRESETS["recommended"] if is_gated else {}
    if name not in PRESETS:
        raise ConfigError(f"preset = {name!r} is unknown. Allowed: {', '.join(PRESETS)}.")
    return PRESETS[name]


def explain_parameters(profile: str) -> str:
    """Every parameter with its value in a profile, what it allows and what it means."""
    values = flat_values(make_config(profile, **preset_values(None, {})))
    lines = []
    for name, field in parameters().items():
        choices, minimum, maximum = (field.metadata.get(key) for key in ("choices", "minimum", "maximum"))
        allowed = ", ".join(choices) if choices else type(field.default).__name__
        if minimum is not None:
            allowed += f" from {minimum:g} to {maximum:g}" if maximum is not None else f", at least {minimum:g}"
        lines.append(f"{name} = {values[name]!r}  ({allowed})\n    {field.metadata['description']}")
    return "\n".join(lines)


def extend_and_report(
    profile: str,
    changes: Mapping[str, Any],
    folder: Path | None = None,
    log_to: str | None = None,
    language: Sequence[str] | None = None,
    license: str | None = None,
) -> str:
    """Check everything, then make or load the run, save the model if a folder is given, and say what came out.

    Parameters
    ----------
    language, license : for the card of a model that is saved.
    """
    if folder is None and (language or license):
        raise ConfigError(
            "--language and --license go into the card of a saved model. Say where to save it: --save FOLDER."
        )
    if log_to is not None:
        check_tracker(log_to)
    config = make_config(profile, **{name: absolute_path(name, value) for name, value in changes.items()})
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--save {folder}: it is there already and is not an empty folder. Give a new name.")
    if folder is not None and config.method.method == "gated_lora":
        raise ConfigError(
            "--save: gated_lora stands here for comparison and has no file format of its own. Leave --save out, or choose "
            "another method, for example neutral_residues or lora."
        )
    check_run(config)
    from ..records import readable_records
    from ..runs import run_or_load, stored_record

    is_trained = folder is not None or stored_record(config) is None
    tracker = tracking(log_to, config.run_id, flat_values(config)) if log_to and is_trained else nullcontext()
    with tracker as log:
        record = (
            run_or_load(config, log=log) if folder is None else _run_and_save(config, folder, log, language, license)
        )
    report = _report(record, readable_records())
    if not is_trained:
        report += "\nloaded:    the run was made before, and nothing was trained"
    if log_to is not None:
        where = f" (tensorboard --logdir {log_directory()})" if log_to == "tensorboard" else ""
        report += f"\nlogged to  {log_to}{where}" if is_trained else "\nnot logged: the run was made before"
    return report if folder is None else f"{report}\n{_how_to_load(config, folder)}"


def _run_and_save(
    config: RunConfig, folder: Path, log: Log | None, language: Sequence[str] | None, license: str | None
) -> Record:
    """Like `run_or_load`, but a stored record does not spare the training: the model is wanted."""
    from ..backbone import delete_checkpoint
    from ..distributed import is_first_process, whole_weights
    from ..records import save_record
    from ..runs import run_and_keep, stored_record
    from ..texts import prepare_text

    record, model = run_and_keep(config, log=log)
    weights = whole_weights(model)
    if not is_first_process():
        return record
    details = _card_details(record)
    details = replace(details, language=language or details.language, license=license)
    _save(model, weights, record, prepare_text(config.data, config.backbone), folder, details)
    if stored_record(config) is None:
        save_record(record)
    delete_checkpoint(config.run_id)
    return record


def _save(
    model: nn.Module,
    weights: dict[str, Tensor] | None,
    record: Record,
    text: PreparedText,
    folder: Path,
    details: CardDetails,
) -> None:
    """Adapter (or, after fine-tuning, model), tokenizer and configuration; a backbone that was trained here lies beside
    them with its tokenizer. The trained weights are given if the model is sharded."""
    from peft import PeftModel

    from ..backbone import get_backbone
    from ..peft_method import NeutralResiduesConfig

    config = record.run_config
    sizes = text_config(model)
    text.tokenizer.model_max_length = getattr(sizes, "max_position_embeddings", int(1e30))  # packed text is longer
    with atomic_directory(folder) as temporary:
        text.tokenizer.save_pretrained(temporary)
        (temporary / CONFIG_FILE).write_text(json.dumps(_settings(config), indent=2) + "\n", encoding="utf-8")
        if not config.backbone.backbone_name:
            get_backbone(config, text, progress=False).save_pretrained(temporary / BACKBONE_FOLDER)
            text.tokenizer.save_pretrained(temporary / BACKBONE_FOLDER)
        if not isinstance(model, PeftModel):
            cast("PreTrainedModel", model).save_pretrained(temporary, state_dict=weights)
            return
        if not config.backbone.backbone_name:
            model.peft_config["default"].base_model_name_or_path = str(folder.absolute() / BACKBONE_FOLDER)
        # No method here trains embeddings apart.
        model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=weights)
        options = model.peft_config["default"]
        if isinstance(options, NeutralResiduesConfig):
            write_model_card(options, temporary, details)


def _settings(config: RunConfig) -> dict[str, Any]:
    """The configuration; of a backbone given by name its name alone, since the other fields describe one trained here."""
    settings = config.to_dict()
    if config.backbone.backbone_name:
        settings["backbone"] = {"backbone_name": config.backbone.backbone_name}
    return settings


def _card_details(record: Record) -> CardDetails:
    from ..records import readable_records
    from ..tables import flat_records

    row = flat_records([record], readable_records())[0]
    specs = {role: row[role] for role in CORPUS_ROLES if row[role]}
    languages = {
        spec.removeprefix("debian-docs:").partition("/")[0]
        for spec in specs.values()
        if spec.startswith("debian-docs:")
    }
    after, before = row["bits_per_byte"], row["backbone_bits_per_byte"]
    return CardDetails(
        language=sorted(languages),
        bits_per_byte=[
            (meaning, _without_path(row[role]), before[name], after[name])
            for name, (meaning, role) in _MEANING.items()
            if name in after
        ],
        forgetting=row["forgetting"],
        learning=row["learning"],
        corpora={role.replace("_", " "): _without_path(spec) for role, spec in specs.items()},
    )


def _without_path(spec: str) -> str:
    """A corpus as a card names it: of a path the last folder and the files, since the rest is this machine's own."""
    kind, _, rest = spec.partition(":")
    return f"file:{'/'.join(Path(rest).parts[-2:])}" if kind == "file" else spec


def _how_to_load(config: RunConfig, folder: Path) -> str:
    lines = [f"saved in {folder}; in Python:", "    import nrlib", "    from transformers import AutoModelForCausalLM"]
    if not (folder / "adapter_config.json").exists():
        return "\n".join([*lines[:1], lines[2], f"    model = AutoModelForCausalLM.from_pretrained({str(folder)!r})"])
    backbone = config.backbone.backbone_name or str(folder / BACKBONE_FOLDER)
    lines += [
        f"    model = AutoModelForCausalLM.from_pretrained({backbone!r})",
        f"    model.load_adapter({str(folder)!r})",
    ]
    return "\n".join(lines)


def _report(record: Record, others: list[Record]) -> str:
    from ..tables import flat_records

    row = flat_records([record], others)[0]
    lines = [f"{'bits per byte (lower is better)':42s} before   after  held-out part of"]
    for name, (meaning, role) in (_MEANING | _TO_CHOOSE_BY).items():
        if name in row["bits_per_byte"]:
            before, after = row["backbone_bits_per_byte"][name], row["bits_per_byte"][name]
            lines.append(f"{meaning:42s} {before:6.3f}  {after:6.3f}  {row[role]}")
    forgetting = f"forgetting {row['forgetting']:.2%} outside the proxy"
    if row["forgetting_proxy"] is not None:
        forgetting += f", {row['forgetting_proxy']:.2%} on the proxy"
    lines.append(forgetting)
    if row["learning"] is not None:
        lines.append(f"learning   {row['learning']:.1%} of fine-tuning's gain")
    else:
        lines.append(
            "learning   needs a fine-tuning to compare with: run the command again, without --save and with --method fine_tuning"
        )
    lines.append(f"{row['extra_weights']:.1%} extra weights, {row['seconds']:.0f} s of training on {row['device']}")
    folders = (results_directory(), cache_directory() / "records")
    path = next((p for folder in folders if (p := folder / f"{record.run_id}.json").exists()), None)
    lines.append(f"record:    {path}")
    return "\n".join(lines)
