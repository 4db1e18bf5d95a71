"""Saved weights: only safetensors, which cannot run code, and only such as fit the model, name by name."""

from __future__ import annotations

from collections.abc import Collection
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
    mismatched: Collection[str] = (),
    remedy: str,
) -> None:
    """Raise WeightsError if there is anything in `missing` (the model's own), `unexpected` (the file's own) or
    `mismatched` (made by `shapes_differ`); the message lists the first of each."""
    kinds = {"missing in the file": missing, "unknown to the model": unexpected, "of another shape": mismatched}
    parts = [f"{words}: {_first(sorted(items))}" for words, items in kinds.items() if items]
    if parts:
        raise WeightsError(f"The weights of {what} do not fit {model}. {'; '.join(parts)}. {remedy}")


def shapes_differ(name: str, in_file: Collection[int] | None, in_model: Collection[int]) -> str:
    """A weight whose shape is not the model's; None where a library does not tell the file's."""
    given = f"{tuple(in_file)} in the file, " if in_file is not None else ""
    return f"{name} {given}{tuple(in_model)} in the model"


def _first(items: list[str]) -> str:
    more = f" and {len(items) - N_NAMED} more" if len(items) > N_NAMED else ""
    return ", ".join(items[:N_NAMED]) + more
