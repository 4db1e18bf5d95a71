"""Plans as tables: for the console, and for the book, whose page is made when the book is built."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from .plan import HARDWARE, Plan, make_plans, method_config, notes
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
    for c in stored["comparisons"]:
        pairs = (
            (c["planned_bytes"], c["measured_bytes"]),
            (c["planned_bytes_with_checkpointing"], c["measured_bytes_with_checkpointing"]),
            (c["planned_flops"], c["measured_flops"]),
            (c["predicted_tokens_per_second"], c["tokens_per_second"]),
        )
        ratios = [f"{planned / measured:.3f}" for planned, measured in pairs]
        is_calibration = c["d_model"] == stored["calibrated_on"]
        ratios[-1] = "calibrated" if is_calibration else f"{pairs[-1][0] / pairs[-1][1]:.2f}"
        rows.append([str(c["d_model"]), c["method"].replace("_", " "), *ratios])
    device = (
        f"{stored['device']}, {stored['n_threads']} thread{'s' if stored['n_threads'] > 1 else ''}, float32, PyTorch "
        f"{stored['versions']['torch']}, {stored['tokens_per_step']:,} tokens a step"
    )
    return f"{markdown_table(rows)}\n\nMeasured on: {device}.\n"
