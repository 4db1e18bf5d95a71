"""The tables of the decision guide, made from the published records: what a choice costs and what it brings."""

from __future__ import annotations

import pandas as pd

from .profiles import METHOD_LABELS, METHODS, STRENGTHS
from .records import published_records
from .tables import front, results_table, summary, with_strength

NAMES = ("guide-weights", "guide-mixes", "guide-budgets", "guide-methods")
_FIXED = (
    "layers", "site", "position", "n_tokens", "proxy", "new_domain", "new_text_ratio", "activation", "batch_size"
)  # fmt: skip


def guide_tables(profile: str = "laptop") -> dict[str, str]:
    """Tables in Markdown by name, one for each of `NAMES`."""
    records = [r for r in published_records() if r.config["profile"] == profile]
    if not records:
        return dict.fromkeys(NAMES, f"*There is no published run of the profile {profile}.*\n")
    table = results_table(records)
    usual = _usual(table)
    is_ours = (usual["gate"] == "elu") & usual["local_loss"].isin(["l1", "none"]) & (usual["kl_weight"] == 0)
    plain_gates = usual[(usual["method"] == "neutral_residues") & is_ours]
    without_memory = usual[usual["gate_memory"] == 1]
    ours = without_memory[without_memory["method"] == "neutral_residues"]
    l1 = ours[(ours["gate"] == "elu") & ours["local_loss"].isin(["l1", "none"])]
    plain = l1[l1["local_loss_weight"] == 5]
    tables = (
        _dose(_of(l1, mix_ratio=0.1, extra_ratio=0.2), "local_loss_weight", "weight of the local loss"),
        _dose(_of(plain, extra_ratio=0.2), "mix_ratio", "mix ratio", "{:.0%}"),
        _dose(_of(plain, mix_ratio=0.1), "extra_ratio", "extra weights", "{:.0%}"),
        _reach(
            _of(pd.concat([usual[usual["method"] != "neutral_residues"], plain_gates]), mix_ratio=0.1, extra_ratio=0.2)
        ),
    )
    return dict(zip(NAMES, tables, strict=True))


def _usual(table: pd.DataFrame) -> pd.DataFrame:
    """Runs that differ from the profile's usual one in method, dials, mix and budget alone."""
    kept = table
    for column in _FIXED:
        kept = kept[kept[column] == table[column].mode().iloc[0]]
    return kept


def _of(table: pd.DataFrame, **values: float) -> pd.DataFrame:
    """The rows with these values; fine-tuning has no extra weights at any budget."""
    for column, value in values.items():
        table = table[(table[column] == value) | ((column == "extra_ratio") & (table[column] == 0))]
    return table


def _dose(table: pd.DataFrame, dose: str, title: str, form: str = "{:g}") -> str:
    """Forgetting and learning at every value of a dial, at the learning rate most runs have and without a KL term."""
    table = table[(table["kl_weight"] == 0) & (table["learning_rate"] == table["learning_rate"].mode().iloc[0])]
    lines = [f"| {title} | forgetting | learning | seeds |", "|---|---|---|---|"]
    for row in summary(table, [dose]).itertuples():
        value = form.format(getattr(row, dose))
        lines.append(f"| {value} | {row.forgetting:.1%} | {row.learning:.0%} | {row.seeds} |")
    return "\n".join([*lines, ""])


def _reach(table: pd.DataFrame) -> str:
    """For each method the least forgetting of a setting that learns at least 80, 90 and 95% of fine-tuning's gain."""
    shares = (0.8, 0.9, 0.95)
    settings = ["method", "learning_rate", "strength"]
    runs = with_strength(table[table["method"].isin([*METHODS, *STRENGTHS, "block_expansion", "gated_lora"])])
    memory = runs["gate_memory"].map(lambda n: f", a memory of {n}" if n > 1 else "")
    runs = runs.assign(method=runs["method"].astype(str).map(METHOD_LABELS) + memory)
    means = runs.groupby(settings, observed=True, dropna=False)[["learning", "forgetting"]].mean().reset_index()
    lines = [
        "| method | " + " | ".join(f"learns {share:.0%}" for share in shares) + " |",
        "|---|" + "---|" * len(shares),
    ]
    rows = []
    for method, group in means.groupby("method", observed=True):
        edge = front(group)
        least = [edge[edge["learning"] >= share]["forgetting"].min() for share in shares]
        rows.append((least, str(method)))
    for least, name in sorted(rows, key=lambda row: [10 if pd.isna(v) else v for v in row[0]]):
        lines.append(f"| {name} | " + " | ".join("–" if pd.isna(v) else f"{v:.1%}" for v in least) + " |")
    return "\n".join([*lines, ""])
