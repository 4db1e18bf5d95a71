"""Records as tables: one row a run, with forgetting and learning, and the learning rate each method is best at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from .config import RunConfig, flat_values, make_config, parameters
from .evaluation import forgetting, learning
from .profiles import ALL_METHODS, STRENGTHS
from .records import Record

FLAT_CONFIG = ("data", "backbone", "method", "training")


def flat_records(records: Sequence[Record], references: Iterable[Record] = ()) -> list[dict[str, Any]]:
    """One flat dictionary a record.

    `learning` compares with fine-tuning at its best learning rate on all of the new text with the usual proxy, for the same
    backbone, held-out text and number of tokens,
    looked for among `records` and `references`; None where there is none.
    """
    best = _fine_tuning_references([*records, *references])
    rows = []
    for record in records:
        results, provenance = record.results, record.provenance
        row: dict[str, Any] = {
            "run_id": record.run_id,
            "notebook": record.notebook,
            "profile": record.config["profile"],
        }
        config = record.run_config
        for part in FLAT_CONFIG:
            row |= asdict(getattr(config, part))
        row["seed"] = config.seed
        fine_tuning = best.get(_setting(config))
        after, before = results["bits_per_byte"], results["backbone_bits_per_byte"]
        validation = "unseen_original_validation"
        row |= {
            "forgetting": results["forgetting"]["unseen_original"],
            "forgetting_validation": round(forgetting(after[validation], before[validation]), 5),
            "forgetting_proxy": results["forgetting"].get("proxy"),
            "learning": None if fine_tuning is None else round(learning(after["new"], before["new"], fine_tuning), 5),
            "drift": results["drift"]["unseen_original"],
            "bits_per_byte": results["bits_per_byte"],
            "backbone_bits_per_byte": results["backbone_bits_per_byte"],
            "extra_weights": results["n_extra_weights"] / results["n_backbone_weights"],
            "tokens_per_second": results["tokens_per_second"],
        }
        keys = ("seconds", "device", "precision", "peak_memory_mb", "git_commit", "is_dirty", "created")
        rows.append(row | {key: provenance[key] for key in keys})
    return rows


def differing_settings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the parameters that are not the same in all of these flat records."""
    return [name for name in parameters() if len({row[name] for row in rows if name in row}) > 1]


def results_table(records: Sequence[Record], references: Iterable[Record] = ()) -> pd.DataFrame:
    """`flat_records` as a table, with one column for each held-out text: bits_per_byte_unseen_original, …"""
    rows = []
    for row in flat_records(records, references):
        values = row.pop("bits_per_byte")
        row.pop("backbone_bits_per_byte")
        rows.append(row | {f"bits_per_byte_{name}": value for name, value in values.items()})
    table = pd.DataFrame(rows)
    order = [name for name in ALL_METHODS if name in set(table["method"])]
    table["method"] = pd.Categorical(table["method"], order, ordered=True)
    return table


def best_learning_rates(table: pd.DataFrame) -> dict[str, float]:
    """For each method the rate with the lowest mean bits per byte on the new domain's *validation* text, among the rates
    with the most seeds: rates are tried with one seed, the best is then repeated with others."""
    rates = table.groupby(["method", "learning_rate"], observed=True)
    rates = rates.agg(seeds=("seed", "nunique"), validation=("bits_per_byte_new_validation", "mean")).reset_index()
    rates = rates[rates["seeds"] == rates.groupby("method", observed=True)["seeds"].transform("max")]
    best = rates.loc[rates.groupby("method", observed=True)["validation"].idxmin()]
    return {str(method): float(rate) for method, rate in zip(best["method"], best["learning_rate"], strict=True)}


def at_best_rate(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each method at its best learning rate."""
    best = table["method"].astype(str).map(best_learning_rates(table))
    return table[table["learning_rate"] == best]


def summary(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean over seeds, lowest and highest, of forgetting and learning, and the number of seeds. Where the table has them,
    the means of drift and of forgetting on validation text, by which no setting was chosen."""
    grouped = table.groupby(list(by), observed=True, dropna=False)
    return grouped.agg(
        seeds=("seed", "nunique"),
        forgetting=("forgetting", "mean"),
        forgetting_min=("forgetting", "min"),
        forgetting_max=("forgetting", "max"),
        learning=("learning", "mean"),
        learning_min=("learning", "min"),
        learning_max=("learning", "max"),
        **{name: (name, "mean") for name in ("forgetting_validation", "drift") if name in table},
    ).reset_index()


def readable(summary: pd.DataFrame) -> Styler:
    """A summary for a page: forgetting and learning in per cent with their range over the seeds, right behind what the row
    is about; no index."""

    def percent(metric: str, digits: int) -> pd.Series[str]:
        means, low, high = (100 * summary[f"{metric}{end}"] for end in ("", "_min", "_max"))
        texts = means.map(f"{{:.{digits}f}}%".format)
        ranges = (
            " (" + low.map(f"{{:.{digits}f}}".format) + "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}"
        )  # breaks before the bracket
        ranges += high.map(f"{{:.{digits}f}}".format) + ")"
        return texts.where(summary["seeds"] == 1, texts + ranges)

    dropped = [column for column in summary if column.endswith(("_min", "_max"))]
    shown = summary.drop(columns=dropped).assign(forgetting=percent("forgetting", 2), learning=percent("learning", 1))
    if "forgetting_validation" in shown:
        shown["forgetting_validation"] = shown["forgetting_validation"].map("{:.2%}".format)
    shown.columns = [column.replace("_", " ") for column in shown]
    settings = shown.loc[:, :"seeds"].select_dtypes("float")
    by = [column for column in shown.loc[:, :"seeds"].columns[:-1] if column != "learning rate"]
    first = [name for name in (*by, "forgetting", "learning", "forgetting validation") if name in shown]
    shown = shown[first + [column for column in shown if column not in first]]
    return shown.style.format(dict.fromkeys(settings, "{:g}"), precision=4, na_rep="–").hide(axis="index")


def machine(rows: pd.DataFrame) -> pd.DataFrame:
    """On which devices the runs were made: how many on each, and their median time."""
    return rows.groupby("device")["seconds"].agg(runs="size", median_seconds="median").reset_index()


def with_strength(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column `strength`: the setting of each method's dial, NaN where a method has none."""
    table = table.copy()
    table["strength"] = float("nan")
    for method, (name, _) in STRENGTHS.items():
        table["strength"] = table["strength"].mask(table["method"] == method, table[name])
    return table


def front(points: pd.DataFrame) -> pd.DataFrame:
    """The rows no other row beats on both learning (more) and forgetting (less), by learning."""
    ordered = points.sort_values(["learning", "forgetting"], ascending=[False, True])
    best_so_far = ordered["forgetting"].cummin().shift(fill_value=float("inf"))
    return ordered[ordered["forgetting"] < best_so_far].iloc[::-1]


def hypervolume(points: pd.DataFrame, worst_forgetting: float) -> float:
    """Area of the learning–forgetting plane that the points dominate, in a rectangle that reaches from learning 0 and
    forgetting `worst_forgetting` (area 0) to learning 1 and forgetting 0 (area 1).

    What lies outside the rectangle counts as on its edge.
    """
    edge = front(points.assign(learning=points["learning"].clip(0, 1), forgetting=points["forgetting"].clip(0)))
    edge = edge[edge["forgetting"] < worst_forgetting]
    widths = edge["learning"].diff().fillna(edge["learning"])
    return float((widths * (1 - edge["forgetting"] / worst_forgetting)).sum())


LEARNED = (0.8, 0.95)  # shares of fine-tuning's gain at which methods are compared

# What a method needs besides the backbone and the new text.
NEEDS = {
    "fine_tuning": "proxy text",
    "lora": "proxy text",
    "vanilla_adapter": "proxy text",
    "neutral_residues": "proxy text",
    "block_expansion": "proxy text",
    "weight_interpolation": "proxy text, backbone once",
    "orthogonal_finetuning": "proxy text, singular values of the weights",
    "gated_lora": "proxy text",
    "elastic_weight_consolidation": "proxy text, backbone in memory, importance of every weight",
    "distillation": "proxy text, backbone in memory",
}


def costs(table: pd.DataFrame, inference: Sequence[dict[str, Any]], training: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a method: area of the plane it dominates, least forgetting of the settings that learn `LEARNED` at least,
    number of settings, extra weights, time and peak memory of training over those of fine-tuning, memory that training
    keeps between its steps over the backbone's, reading time over the backbone's, and what it needs. A setting is a learning rate and a strength; it counts by the mean over its seeds.

    Parameters
    ----------
    table : of `with_strength`.
    inference : results of `nrlib.studies.inference_cost`; the median of them is shown.
    training : results of `nrlib.studies.training_cost`, likewise.
    """
    reading = pd.DataFrame([study["ratios"] for study in inference]).median()
    time, memory, kept = (
        pd.DataFrame([study[name] for study in training]).median() for name in ("ratios", "memory", "kept")
    )
    by_setting = table.groupby(["method", "learning_rate", "strength"], observed=True, dropna=False)
    settings = by_setting[["forgetting", "learning", "extra_weights"]].mean().reset_index()
    worst = settings.loc[settings["method"] == "fine_tuning", "forgetting"].max()
    rows = [
        {
            "method": method,
            "area": hypervolume(runs, worst),
            **{f"at_{share:.0%}": _least_forgetting(runs, share) for share in LEARNED},
            "settings": len(runs),
            "extra_weights": runs["extra_weights"].median(),
            "training_time": time[method],
            "training_memory": memory[method],
            "kept_memory": kept[method],
            "inference_time": reading[method],
            "needs": NEEDS[str(method)],
        }
        for method, runs in settings.groupby("method", observed=True)
    ]
    return pd.DataFrame(rows)


def _least_forgetting(runs: pd.DataFrame, learned: float) -> float:
    return float(runs.loc[runs["learning"] >= learned, "forgetting"].min())


def readable_costs(costs: pd.DataFrame) -> Styler:
    """`costs` for a page."""
    shown = costs.rename(columns=lambda column: column.replace("_", " "))
    ratios = ("area", "training time", "training memory", "kept memory", "inference time")
    formats = {"extra weights": "{:.1%}", **dict.fromkeys(ratios, "{:.2f}")}
    formats |= {f"at {share:.0%}": "{:.1%}" for share in LEARNED}
    return shown.style.format(formats, na_rep="–").hide(axis="index")


def curves_table(records: Sequence[Record], *, from_backbone: bool = False) -> pd.DataFrame:
    """Learning curves: one row a run and measured point, validation bits per byte; `from_backbone` begins each with the
    backbone's."""
    rows = []
    for r in records:
        run = {"run_id": r.run_id, "method": r.config["method"]["method"], "seed": r.config["seed"]}
        if from_backbone:
            before = r.results["backbone_bits_per_byte"]
            rows.append(run | {"n_tokens": 0} | {f"bits_per_byte_{n}": before[n] for n in before if "validation" in n})
        rows += [run | point for point in r.curve if "bits_per_byte_new_validation" in point]
    return pd.DataFrame(rows)


def gate_table(records: Sequence[Record]) -> pd.DataFrame:
    """Gate statistics: one row a run, adapter and held-out text."""
    rows = [
        {"run_id": r.run_id, **{k: r.config["method"][k] for k in ("gate", "local_loss", "local_loss_weight")}, **row}
        for r in records
        for row in r.results["gate_statistics"]
    ]
    return pd.DataFrame(rows)


def gate_and_loss(table: pd.DataFrame) -> pd.Series[str]:
    """'relu, l1' and so on: the pair a run of the gate experiment is about."""
    return table["gate"] + ", " + table["local_loss"].str.replace("_", " ")


def with_shared_zero(table: pd.DataFrame) -> pd.DataFrame:
    """Weight 0 switches the local loss off, so that one run stands for every local loss of its gate: repeat it for each."""
    without = table[table["local_loss"] == "none"]
    used = table[table["local_loss"] != "none"]
    pairs = used[["gate", "gate and local loss"]].drop_duplicates()
    shared = without.drop(columns="gate and local loss").merge(pairs, on="gate")
    return pd.concat([used, shared], ignore_index=True)


_USUAL = ("new_text_ratio", "proxy", "mix_ratio")  # what fine-tuning has as usual, whatever a run compared with it has


def _setting(config: RunConfig) -> tuple[Any, ...]:
    """What runs must share to be compared with the same fine-tuning: all but what `_USUAL` names, method and seed."""
    data = replace(config.data, proxy="", new_text_ratio=1.0)
    return config.profile, data, config.backbone, config.training.context_length, config.training.n_tokens


def _fine_tuning_references(records: Sequence[Record]) -> dict[tuple[Any, ...], float]:
    """Mean test bits per byte on the new domain of fine-tuning at its best rate, by setting; of what `_USUAL` names the
    profile's value, or that of most fine-tuning runs where none has it."""
    by_setting: dict[tuple[Any, ...], list[Record]] = {}
    for record in {r.run_id: r for r in records}.values():
        if record.config["method"]["method"] == "fine_tuning":
            by_setting.setdefault(_setting(record.run_config), []).append(record)
    return {setting: _best_fine_tuning(group) for setting, group in by_setting.items()}


def _best_fine_tuning(records: Sequence[Record]) -> float:
    table = pd.DataFrame(
        {
            "method": "fine_tuning",
            "seed": r.config["seed"],
            **{name: flat_values(r.run_config)[name] for name in _USUAL},
            "learning_rate": r.config["training"]["learning_rate"],
            "bits_per_byte_new_validation": r.results["bits_per_byte"]["new_validation"],
            "test": r.results["bits_per_byte"]["new"],
        }
        for r in records
    )
    usual = flat_values(make_config(records[0].config["profile"]))
    for name in _USUAL:
        is_there = usual[name] in set(table[name])
        table = table[table[name] == (usual[name] if is_there else table[name].mode().max())]
    return float(at_best_rate(table)["test"].mean())
