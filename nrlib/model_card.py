"""The model card of neutral residues: the README.md beside the saved adapters, which says what they are, how to load them
and what was measured. Its metadata are those the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .storage import atomic_path

MARK = "<!-- Written by nrlib, which writes it anew with every save. Delete this line to keep your own text. -->"
BLANK = "# Model Card for Model ID"  # what PEFT writes; the hub's empty template
OPTIONS = (
    "gate",
    "local_loss",
    "local_loss_weight",
    "gate_memory",
    "extra_ratio",
    "width",
    "site",
    "position",
    "layers",
    "initialisation",
)
BACKBONE_FOLDER = "backbone"  # where `nrlib extend --save` puts a backbone that was trained here


@dataclass(frozen=True)
class CardDetails:
    """What only the caller knows. Everything may be left out.

    repository : name on the hub the card is for; without it the card's code loads from the folder it lies in.
    language, datasets, tags : as on the hub, for example ['fr', 'en'].
    license : identifier as on the hub, for example 'apache-2.0'.
    bits_per_byte : rows (held-out text, corpus, backbone's bits per byte, bits per byte now).
    forgetting, learning : shares, as in `nrlib.evaluation`.
    corpora : by role, what was trained and measured on.
    """

    repository: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    tags: str | Sequence[str] | None = None
    datasets: str | Sequence[str] | None = None
    bits_per_byte: Sequence[tuple[str, str, float, float]] = ()
    forgetting: float | None = None
    learning: float | None = None
    corpora: Mapping[str, str] = field(default_factory=dict)


def write_model_card(config: Any, folder: str | Path, details: CardDetails | None = None) -> None:
    """Write README.md into `folder`, for adapters with the options `config` (a `NeutralResiduesConfig`).

    Metadata that stand there and are not given stay. A text of somebody's own stays too, and gets a section on loading if
    it does not import nrlib; PEFT's empty template and an older text of ours are replaced.
    """
    from huggingface_hub import ModelCard, ModelCardData

    details = details or CardDetails()
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else None
    text = card.text if card is not None else ""
    base = hub_name(config.base_model_name_or_path)
    loading = _loading(base, details.repository, (path.parent / BACKBONE_FOLDER).is_dir())
    if MARK in text or BLANK in text or not text.strip():
        text = _text(config, base, loading, details)
    elif "import nrlib" not in text:
        text = f"{text.rstrip()}\n\n## Loading\n\n{loading}"
    known = card.data.to_dict() if card is not None else {}
    data = ModelCardData(ignore_metadata_errors=True, **_metadata(known, base, details))
    with atomic_path(path) as temporary:
        temporary.write_text(f"---\n{data}\n---\n\n{text.strip()}\n", encoding="utf-8")


def _metadata(known: dict[str, Any], base: str | None, details: CardDetails) -> dict[str, Any]:
    from huggingface_hub import EvalResult

    given = {"language": details.language, "license": details.license, "datasets": details.datasets}
    values = {**known, **{key: value for key, value in given.items() if value}}
    values.pop("model-index", None)  # measured on what stood here before
    values |= {"library_name": "peft", "pipeline_tag": "text-generation", "base_model": base}
    values.setdefault("license", "unknown")
    tags = [*_listed(known.get("tags")), *_listed(details.tags), "neutral-residues", "nrlib"]
    if base is None:
        tags = [tag for tag in tags if not tag.startswith("base_model:")]  # a path of one machine
    values["tags"] = sorted(set(tags))
    if details.bits_per_byte:
        values["model_name"] = (details.repository or "neutral residues").rpartition("/")[2]
        values["eval_results"] = [
            EvalResult(
                task_type="text-generation", dataset_type=corpus, dataset_name=f"{text} ({corpus})",
                metric_type="bits_per_byte", metric_name="bits per byte", metric_value=round(after, 5),
            )
            for text, corpus, _, after in details.bits_per_byte
        ]  # fmt: skip
    return {key: value for key, value in values.items() if value is not None}


def _text(config: Any, base: str | None, loading: str, details: CardDetails) -> str:
    name = (details.repository or "").rpartition("/")[2] or "Neutral residues"
    backbone = f"[{base}](https://huggingface.co/{base})" if base else "a backbone trained or kept locally"
    paragraphs = [
        MARK,
        f"# {name}",
        f"Adapters that extend {backbone} to a new domain. They are neutral residues "
        "([arXiv 2410.02744](https://arxiv.org/abs/2410.02744)): gated adapters beside its blocks, trained so that their "
        "output is near zero on text of the original domain. The backbone's own weights are unchanged.",
        "## Loading",
        loading,
    ]
    if details.bits_per_byte or details.forgetting is not None:
        paragraphs += ["## Measured", *_measured(details)]
    if details.corpora:
        corpora = "\n".join(f"- {role}: `{spec}`" for role, spec in details.corpora.items())
        paragraphs += ["## Text", corpora]
    rows = [(option, getattr(config, option)) for option in OPTIONS]
    rows.append(("extended blocks", len(config.target_modules or ())))
    table = "\n".join(f"| {option} | {value} |" for option, value in rows)
    paragraphs += ["## Options", f"| option | value |\n|---|---|\n{table}"]
    return "\n\n".join(paragraphs)


def _measured(details: CardDetails) -> list[str]:
    paragraphs = []
    if details.bits_per_byte:
        rows = "\n".join(
            f"| {text} | `{corpus}` | {before:.3f} | {after:.3f} |"
            for text, corpus, before, after in details.bits_per_byte
        )
        paragraphs.append(
            "Bits per byte of held-out text; lower is better.\n\n| text | corpus | backbone | extended |\n|---|---|---|---|\n"
            + rows
        )
    if details.forgetting is not None:
        paragraphs.append(
            f"Forgetting, the relative change on the original domain outside the training mix: {details.forgetting:.2%}."
        )
    if details.learning is not None:
        paragraphs.append(f"Learning, the share of full fine-tuning's gain on the new domain: {details.learning:.1%}.")
    return paragraphs


def _loading(base: str | None, repository: str | None, has_backbone: bool) -> str:
    here = repository or "."
    where = "" if repository else "Run it in the folder of this file, or put its name in place of the dot.\n\n"
    more = ""
    if base is not None:
        backbone = f'"{base}"'
    elif has_backbone and repository is None:
        backbone = f'"{BACKBONE_FOLDER}"'
    else:
        backbone, more = f'PeftConfig.from_pretrained("{here}").base_model_name_or_path', "PeftConfig, "
        where += "The backbone has no name on the hub: its folder stands in `adapter_config.json`.\n\n"
    code = (
        "import nrlib  # makes the method known to PEFT\n"
        f"from peft import {more}PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"backbone = AutoModelForCausalLM.from_pretrained({backbone})\n"
        f'model = PeftModel.from_pretrained(backbone, "{here}")'
    )
    return f"With the package `nrlib` installed:\n\n{where}```python\n{code}\n```"


def hub_name(base: str | None) -> str | None:
    """The backbone's name on the hub; None for a path, which means nothing on another machine."""
    if not base or Path(base).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        return None
    return base


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
