"""Plans as tables: for the console, and for the book, whose page is made when the book is built."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .hardware import HARDWARE
from .plan import Plan, make_plans, method_config, notes
from .step_cost import PARTS
from .storage import project_directory

PART_NAMES = {"optimiser": "optimiser state", "weight_copies": "bfloat16 copies of weights"}
PAPER_BACKBONES = ("google/gemma-2b", "english-1.3b")
_PAPER_HARDWARE = "h100"
COMPARISON_FILE = project_directory() / "data" / "plan_check.json"  # written by `python -m nrlib.benchmark.plan_check`


def plan_rows(plans: Sequence[Plan]) -> list[list[str]]:
    """A heading and one row a quantity, with a column for each method."""
    rows = [["", *(plan.method.replace("_", " ") for plan in plans)]]

    def add(name: str, cells: Iterable[Any]) -> None:
        rows.append([name, *map(str, cells)])

    add("adapter width, or rank", (plan.width or plan.rank or "-" for plan in plans))
    add("weights in all", (f"{plan.n_weights:,}" for plan in plans))
    add("trainable weights", (f"{plan.n_trainable_weights:,}" for plan in plans))
    add("extra weights", (f"{plan.n_extra_weights / plan.n_backbone_weights:.2%}" for plan in plans))
    add("GFLOPs a token, forward", (f"{plan.cost.forward_flops / 1e9:.3g}" for plan in plans))
    for title, costs, hours in (
        ("", [plan.cost for plan in plans], [plan.hours for plan in plans]),
        (", checkpointing", [p.cost_with_checkpointing for p in plans], [p.hours_with_checkpointing for p in plans]),
    ):
        add(f"GFLOPs a token, training{title}", (f"{cost.training_flops / 1e9:.3g}" for cost in costs))
        add(f"hours{title}", (f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in hours))
        add(f"peak memory{title}, GB", (_gb(cost.peak_bytes) for cost in costs))
        for part in PARTS:
            add(f"· {PART_NAMES.get(part, part)}", (_gb(cost.memory[part]) for cost in costs))
    return rows


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f}" if n_bytes >= 1e9 else f"{n_bytes / 1e9:.3f}"


def paper_pages() -> dict[str, str]:
    """The figures of the profile `paper` in Markdown, by the name of the file the book includes: a table for each of its
    backbones, and what is to be said about them."""
    hardware, pages = HARDWARE[_PAPER_HARDWARE], {}
    for backbone in PAPER_BACKBONES:
        changes = {"backbone_name": backbone}
        plans = list(make_plans("paper", changes, hardware))
        remarks = notes(method_config("paper", changes, "neutral_residues"), hardware, plans)
        name = backbone.rpartition("/")[2]
        table = markdown_table(plan_rows(plans))
        pages[f"plan-{name}.md"] = "\n".join([table, "", *(f"* {remark}" for remark in remarks), ""])
    return pages


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table in Markdown; the first is the heading."""
    heading, *body = [[cell.replace("|", r"\|").strip() for cell in row] for row in rows]
    lines = [heading, ["---", *("---:" for _ in heading[1:])], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def comparison_page() -> str:
    """Plan against measurement, from COMPARISON_FILE, in Markdown."""
    stored = json.loads(COMPARISON_FILE.read_text(encoding="utf-8"))
    rows = [["width D", "method", "peak memory", "with checkpointing", "operations", "speed"]]
    predicted = predict_speeds(stored["comparisons"], stored["calibrated_on"])
    for c, tokens_per_second in zip(stored["comparisons"], predicted, strict=True):
        pairs = (
            (c["planned_bytes"], c["measured_bytes"]),
            (c["planned_bytes_with_checkpointing"], c["measured_bytes_with_checkpointing"]),
            (c["planned_flops"], c["measured_flops"]),
            (tokens_per_second, c["tokens_per_second"]),
        )
        mark = " (calibration)" if c["d_model"] == stored["calibrated_on"] else ""
        ratios = [f"{planned / measured:.3f}" for planned, measured in pairs[:3]]
        ratios.append(f"{pairs[3][0] / pairs[3][1]:.2f}{mark}")
        rows.append([str(c["d_model"]), c["method"].replace("_", " "), *ratios])
    flops, moved = calibrate([c for c in stored["comparisons"] if c["d_model"] == stored["calibrated_on"]])
    device = (
        f"{stored['device']}, {stored['n_threads']} thread{'s' if stored['n_threads'] > 1 else ''}, float32, PyTorch "
        f"{stored['versions']['torch']}, {stored['tokens_per_step']:,} tokens a step"
    )
    found = f"The calibration: {flops / 1e12:.3f} TFLOPS in products, {moved / 1e9:.0f} GB/s in everything else."
    return f"{markdown_table(rows)}\n\nMeasured on: {device}.\n{found}\n"


def calibrate(comparisons: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Operations and moved bytes a second that explain the measured speeds best.

    Several methods at one shape are enough: LoRA moves more for each operation than fine-tuning does. What comes out is
    what `--hardware 'tflops=…,bandwidth=…GB,utilisation=1'` takes.
    """
    costs = np.array([[c["planned_flops"], c["planned_moved_bytes"]] for c in comparisons])
    shares = costs * np.array([c["tokens_per_second"] for c in comparisons])[:, None]  # of a second, once divided
    flops, moved = 1 / np.linalg.lstsq(shares, np.ones(len(shares)), rcond=None)[0]
    return float(flops), float(moved)


def predict_speeds(comparisons: Sequence[Mapping[str, Any]], calibrated_on: int) -> list[float]:
    """Tokens a second of all shapes, by what the shape of width `calibrated_on` needs for its operations and bytes."""
    flops, moved = calibrate([c for c in comparisons if c["d_model"] == calibrated_on])
    return [1 / (c["planned_flops"] / flops + c["planned_moved_bytes"] / moved) for c in comparisons]
