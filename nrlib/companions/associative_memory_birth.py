"""The experiment of "Birth of a Transformer" (https://arxiv.org/abs/2306.00802): in which order do the memories of
`nrlib.companions.associative_memory` come into being?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .associative_memory import MemoryTransformer, behaviour, probe, table_entropy, train
from .associative_memory_bigrams import make_language, sample

if TYPE_CHECKING:
    import pandas as pd

RESULT_VERSION = 1
SMOKE = {"n_steps": 50, "n_tokens": 32, "d_model": 64, "context_length": 32}


def birth(
    *,
    seed: int,
    n_layers: int = 2,
    loss_on: str = "in_context",
    n_steps: int = 200,
    n_tokens: int = 64,
    d_model: int = 128,
    context_length: int = 64,
    n_triggers: int = 5,
    learning_rate: float = 0.2,
) -> dict[str, Any]:
    """A study: train from scratch, with W_F where all tokens count, and read memories and behaviour every five steps.

    Returns
    -------
    curve : by name a list with one value a reading, `step` among the names; entropy : the table's, in nats;
    tokens, attentions : the first tokens of one sequence, and at the end of training each layer's attention there.
    """
    language = make_language(n_tokens, seed, n_triggers=n_triggers)
    training, test = (torch.Generator().manual_seed(2 * seed + offset) for offset in (0, 1))
    held_out = sample(language, 128, context_length, test)
    model = MemoryTransformer(
        n_tokens, d_model, context_length, n_layers=n_layers, has_feed_forward=loss_on == "all", seed=seed
    )
    points = train(
        model, lambda: sample(language, 64, context_length, training), n_steps, learning_rate, loss_on=loss_on,
        measure_at=range(0, n_steps + 1, 5), measure=lambda: {**behaviour(model, held_out), **probe(model, language)},
    )  # fmt: skip
    n_shown = min(24, context_length)
    inputs = held_out.inputs[:, :n_shown]
    is_loop = F.pad(inputs[:, 1:] == inputs[:, :-1], (1, 0))  # of a trigger that is its own output: nothing to see
    shown = int((held_out.is_in_context[:, :n_shown] & ~is_loop).sum(1).argmax())  # much to find in the context
    with torch.no_grad():
        attentions = [a[shown, :n_shown, :n_shown] for a in model.run(held_out.inputs)[1]]
    return {
        "curve": {name: [round(point[name], 4) for point in points] for name in points[0]},
        "entropy": round(table_entropy(language, held_out), 4),
        "tokens": inputs[shown].tolist(),
        "triggers": list(language.triggers),
        "attentions": [[[round(a, 2) for a in row] for row in attention.tolist()] for attention in attentions],
    }


def birth_settings(profile: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Settings of `birth`: for each seed two layers and one on in-context tokens, and two on all tokens for longer. The
    profile smoke is small, all others are one size."""
    small: dict[str, Any] = SMOKE if profile == "smoke" else {}
    longer = {} if small else {"n_steps": 300}
    variants: list[dict[str, Any]] = [{}, {"n_layers": 1}, {"loss_on": "all", **longer}]
    return [{"seed": seed, **small, **variant} for variant in variants for seed in seeds]


def first_step(curve: Mapping[str, Sequence[float]], name: str, above: float) -> float:
    """The first step of a curve of `birth` at which a value exceeds a threshold; infinite if it never does."""
    steps = (step for step, value in zip(curve["step"], curve[name], strict=True) if value > above)
    return next(steps, float("inf"))


def by_variant(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Results of `birth` by what was trained: `two_layers` and `one_layer` on in-context tokens, two on `all_tokens`."""
    return {
        "two_layers": [row for row in rows if row["loss_on"] == "in_context" and row["n_layers"] == 2],
        "one_layer": [row for row in rows if row["loss_on"] == "in_context" and row["n_layers"] == 1],
        "all_tokens": [row for row in rows if row["loss_on"] == "all"],
    }


def findings(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What the runs of `birth` show, one row a seed: accuracy and attention at the end, the first step at which each memory
    stands two standard deviations above the rest (`from`) and the first at which two of them answer more than three
    quarters of their questions right (`right_from`), and how far the run on all tokens has come by step 50."""
    import pandas as pd

    found = []
    for two, one, every in zip(*by_variant(rows).values(), strict=True):
        curve, early = two["curve"], every["curve"]["step"].index(50)
        found.append(
            {
                "seed": two["seed"],
                "accuracy": curve["in_context_accuracy"][-1],
                "accuracy_one_layer": one["curve"]["in_context_accuracy"][-1],
                "previous_attention": curve["previous_attention"][-1],
                **{f"{name}_from": first_step(curve, f"{name}_strength", 2) for name in ("output", "key_2", "key_1")},
                **{f"{name}_right_from": first_step(curve, name, 0.75) for name in ("output", "key_2")},
                "excess_at_50": every["curve"]["bigram_loss"][early] - every["entropy"],
                "accuracy_at_50": every["curve"]["in_context_accuracy"][early],
            }
        )
    return pd.DataFrame(found)
