"""`nrlib evaluate`: a backbone, and what it became, on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architecture import text_config
from ..config import absolute_path
from ..corpora import check_spec
from ..errors import ConfigError
from ..harness_tasks import check_harness, check_hub, check_task_names, paper_tasks
from .extend import CONFIG_FILE

if TYPE_CHECKING:
    from torch import nn

    from ..harness import Comparison

MAX_CONTEXT_LENGTH = 2048  # where neither the user nor the saved configuration says how much the model reads


@dataclass(frozen=True)
class Subject:
    """What is evaluated. `backbone` is None where the model is its own backbone, with its adapter switched off."""

    model: nn.Module
    backbone: nn.Module | None
    tokenizer: Any
    context_length: int


def choose_tasks(tasks: str, is_paper: bool, languages: str) -> list[str]:
    """Names of tasks from the options `--tasks`, `--paper-tasks` and `--languages`."""
    if tasks and is_paper:
        raise ConfigError(f"--tasks {tasks} and --paper-tasks are given. Give one of the two.")
    if languages and not is_paper:
        raise ConfigError(f"--languages {languages} chooses among the paper's tasks. Add --paper-tasks.")
    if is_paper:
        return paper_tasks(_split(languages) or ["en", "fr"])
    return list(dict.fromkeys(_split(tasks)))


def evaluate(
    backbone: str,
    extension: Path | None,
    corpora: dict[str, str],
    tasks: Sequence[str],
    *,
    n_evaluation_bytes: int,
    context_length: int = 0,
    limit: int = 0,
    progress: bool = True,
) -> list[Comparison]:
    """Check everything that can be checked at once, then the tasks, then the models; then measure.

    Parameters
    ----------
    backbone
        Name or folder; '' takes the one the extension was saved with.
    extension
        Folder of an adapter or of a fine-tuned model; None evaluates the backbone alone.
    corpora
        Specs by the name their tasks are called after.

    Raises
    ------
    ConfigError, CorpusError, BackboneError
        In words: what was given, what is allowed, what to do.
    """
    corpora = {name: absolute_path(name, spec) for name, spec in corpora.items() if spec}
    if not corpora and not tasks:
        raise ConfigError(
            "There is nothing to evaluate on. Name a corpus with --original or --new-domain, or tasks with --tasks or "
            "--paper-tasks."
        )
    for spec in corpora.values():
        check_spec(spec)
    backbone = find_backbone(backbone, extension)
    check_harness()
    if tasks:
        check_hub()
        check_task_names(tasks)
    from ..harness import compare_on_tasks
    from ..harness_tasks import load_tasks
    from ..local_tasks import make_local_tasks

    local = [task for name, spec in corpora.items() for task in make_local_tasks(name, spec, n_evaluation_bytes)]
    loaded = load_tasks(tasks, local)
    subject = load_subject(backbone, extension, context_length)
    return compare_on_tasks(
        subject.model,
        subject.tokenizer,
        loaded,
        context_length=subject.context_length,
        backbone=subject.backbone,
        limit=limit,
        progress=progress,
    )


def find_backbone(backbone: str, extension: Path | None) -> str:
    """The backbone that was named, or else the one an extension was saved with: beside it, or by name.

    Raises
    ------
    ConfigError
        When there is none, or the extension is not a folder with a model.
    """
    if extension is None:
        if not backbone:
            raise ConfigError("No model is named. Give --backbone, --extension or both.")
        return backbone
    if not _is_adapter(extension) and not (extension / "config.json").is_file():
        raise ConfigError(
            f"--extension {extension}: not a folder with an adapter (adapter_config.json) or a model (config.json). Give "
            "a folder written by `nrlib extend --save` or by save_pretrained()."
        )
    if backbone:
        return backbone
    if (extension / "backbone").is_dir():
        return str(extension / "backbone")
    saved = _saved_config(extension).get("backbone", {}).get("backbone_name", "")
    if _is_adapter(extension):
        adapter = json.loads((extension / "adapter_config.json").read_text(encoding="utf-8"))
        saved = adapter.get("base_model_name_or_path") or saved
    if not saved:
        raise ConfigError(f"--extension {extension} does not say which backbone it extends. Name it with --backbone.")
    return str(saved)


def load_subject(backbone: str, extension: Path | None, context_length: int = 0) -> Subject:
    """Load backbone, extension and tokenizer, and see that they fit each other.

    Raises
    ------
    ConfigError
        When they do not.
    BackboneError
        When a model or tokenizer cannot be had.
    """
    from ..backbone import load_backbone
    from ..machine import pick_device
    from ..tokenization import load_tokenizer

    device = pick_device()
    reference = load_backbone(backbone).to(device).eval()
    has_tokenizer = extension is not None and (extension / "tokenizer_config.json").is_file()
    folder = str(extension) if has_tokenizer else backbone
    tokenizer = load_tokenizer(folder)
    n_entries = reference.get_input_embeddings().num_embeddings
    if len(tokenizer) > n_entries:
        raise ConfigError(
            f"The tokenizer of {folder} has {len(tokenizer)} entries, the backbone {backbone} only {n_entries}: they do "
            "not belong together. Name the backbone that was extended."
        )
    length = _context_length(context_length, reference, backbone, extension)
    if extension is None:
        return Subject(reference, None, tokenizer, length)
    if _is_adapter(extension):
        return Subject(_load_adapter(reference, backbone, extension).to(device).eval(), None, tokenizer, length)
    model = load_backbone(str(extension)).to(device).eval()
    if _shapes(model) != _shapes(reference):
        raise ConfigError(
            f"--extension {extension} is a whole model and has other weights than the backbone {backbone}: it was not made "
            "from it. Name the backbone that was extended."
        )
    return Subject(model, reference, tokenizer, length)


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {name: weight.shape for name, weight in model.named_parameters()}


def _load_adapter(reference: Any, backbone: str, extension: Path) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT only warns, and goes on with random weights.
            warnings.filterwarnings("error", message=".*Found missing adapter keys")
            return PeftModel.from_pretrained(reference, str(extension))
    except Exception as error:  # torch's size mismatch, PEFT's missing targets, safetensors' damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"--extension {extension} does not fit the backbone {backbone}, or is damaged. Name the backbone that was "
            f"extended, or leave --backbone out where the extension was saved with it. ({reason})"
        ) from error


def _context_length(asked: int, model: Any, backbone: str, extension: Path | None) -> int:
    """What the user says; else what a small backbone was trained on, since it has not seen the positions after it; else
    the model's positions, up to a limit."""
    n_positions = getattr(text_config(model), "max_position_embeddings", None) or MAX_CONTEXT_LENGTH
    if asked > n_positions:
        raise ConfigError(
            f"context_length = {asked} is more than the {n_positions} positions of the backbone {backbone}. Give at most "
            f"{n_positions}."
        )
    for folder in (extension, Path(backbone), Path(backbone).parent):
        saved = _saved_config(folder) if folder is not None else {}
        if not asked and saved and not saved["backbone"]["backbone_name"]:
            asked = saved["training"]["context_length"]
    return asked or min(n_positions, MAX_CONTEXT_LENGTH)


def _saved_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return saved


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def format_table(rows: Sequence[Comparison]) -> str:
    """A line for each task and metric; after ± the standard error, ↑ and ↓ what is better."""
    has_extension = any(row.extended is not None for row in rows)
    header = ["task", "metric", "items", "backbone", *(["extended", "difference"] if has_extension else [])]
    lines = [header]
    for row in rows:
        line = [row.task, f"{row.metric} {'↑' if row.is_higher_better else '↓'}", f"{row.n_items:,}"]
        line.append(_number(row.backbone, row.backbone_standard_error))
        if has_extension:
            line.append(_number(row.extended, row.extended_standard_error))
            line.append(_number(row.difference, row.difference_standard_error, "+.4f"))
        lines.append(line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = [
        [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _number(value: float | None, error: float | None, form: str = ".4f") -> str:
    if value is None:
        return "–"
    return f"{value:{form}} ± {error:.4f}" if error is not None else f"{value:{form}}"
