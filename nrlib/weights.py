"""Saved weights: only safetensors, which cannot run code, and only such as fit the model, name by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from .errors import WeightsError

N_NAMED = 4  # more names than these are counted: an error is one paragraph


def refuse_pickles(folder: str | Path) -> None:
    """Raise WeightsError for an adapter's folder whose weights are a pickle file, as torch.save writes it."""
    has_safetensors = (Path(folder) / "adapter_model.safetensors").exists()
    if not has_safetensors and (Path(folder) / "adapter_model.bin").exists():
        raise WeightsError(
            f"{str(folder)!r} holds its weights as adapter_model.bin, a pickle, which can run any code when it is read; "
            "only safetensors are loaded. Ask whoever made it to save it again: model.save_pretrained(folder) writes "
            "adapter_model.safetensors."
        )


def check_fit(
    what: str,
    model: str,
    *,
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    remedy: str,
) -> None:
    """Raise WeightsError if there is anything in `missing` (the model's own), `unexpected` (the file's own) or
    `mismatched` (name: shape in the file, shape in the model); the message lists the first of each."""
    shapes = [f"{name} {tuple(a)} in the file, {tuple(b)} in the model" for name, (a, b) in (mismatched or {}).items()]
    kinds = {"missing in the file": missing, "unknown to the model": unexpected, "of another shape": shapes}
    parts = [f"{words}: {_first(sorted(items))}" for words, items in kinds.items() if items]
    if parts:
        raise WeightsError(f"The weights of {what} do not fit {model}. {'; '.join(parts)}. {remedy}")


def _first(items: list[str]) -> str:
    more = f" and {len(items) - N_NAMED} more" if len(items) > N_NAMED else ""
    return ", ".join(items[:N_NAMED]) + more
