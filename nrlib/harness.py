"""An extended model and its backbone on the tasks of EleutherAI's lm-evaluation-harness, both in memory.

https://github.com/EleutherAI/lm-evaluation-harness. The backbone is measured inside `disable_adapter()`, on the same
items as the extended model, so that the standard error of a difference is that of paired items, which is much smaller
than the two errors of its parts suggest.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from .errors import ConfigError
from .evaluation import sequences_at_a_time
from .harness_tasks import quiet
from .tokenization import beginning_token

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Score:
    """A metric of one model on one task: Σ numerators / Σ weights, over items.

    An item's weight is 1 for an accuracy and its number of bytes for bits per byte. Both are None for a metric of another
    kind, which has no standard error here.
    """

    value: float
    n_items: int
    numerators: Array | None
    weights: Array | None


@dataclass(frozen=True)
class Comparison:
    """One metric of one task, of the backbone and of the extended model (None where only the backbone was measured)."""

    task: str
    metric: str
    is_higher_better: bool
    n_items: int
    backbone: float
    backbone_standard_error: float | None
    extended: float | None = None
    extended_standard_error: float | None = None
    difference: float | None = None  # extended − backbone
    difference_standard_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_on_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    context_length: int,
    backbone: nn.Module | None = None,
    limit: int = 0,
    progress: bool = True,
) -> list[Comparison]:
    """Measure a model and its backbone on tasks from `load_tasks`.

    Parameters
    ----------
    model
        In memory. A PEFT model is its own backbone inside `disable_adapter()`; a plain one is the backbone, measured
        alone, unless `backbone` is given.
    context_length
        Tokens T the models see at most; longer texts are read in windows, longer prompts lose their beginning.
    backbone
        The model before it was extended, for methods that change it, such as fine-tuning.
    limit
        Only the first items of each task; 0 is all.
    """
    measure = functools.partial(
        run_tasks, tokenizer=tokenizer, tasks=tasks, context_length=context_length, limit=limit, progress=progress
    )
    higher_is_better = _directions(tasks)
    if backbone is not None:
        before, after = measure(backbone), measure(model)
    elif hasattr(model, "disable_adapter"):
        after = measure(model)
        with model.disable_adapter():  # type: ignore[operator]
            before = measure(model)
    else:
        before, after = measure(model), {}
    return [
        _compare(
            task, metric, higher_is_better.get((task, metric.partition(",")[0]), True), score, after.get((task, metric))
        )
        for (task, metric), score in before.items()
    ]


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    context_length: int,
    limit: int = 0,
    progress: bool = True,
) -> dict[tuple[str, str], Score]:
    """Scores of one model by task (a group that has an average of its own is one task) and metric."""
    from lm_eval.evaluator import evaluate

    # Bits per byte as `nrlib.evaluation` counts them: an end-of-text token before the text, no other special token, but
    # every window begins with the token that the tokenizer puts before every text, if it has one.
    packed = {name: task for name, task in tasks["tasks"].items() if _is_ours(task) and _is_rolling(task)}
    others = {**tasks, "tasks": {name: task for name, task in tasks["tasks"].items() if name not in packed}}
    end_of_text = {"add_bos_token": False, "prefix_token_id": tokenizer.eos_token_id}
    bos = beginning_token(tokenizer)
    scores: dict[tuple[str, str], Score] = {}
    was_training = model.training
    for part, options, first in (
        ({"tasks": packed, "groups": {}, "group_map": {}}, end_of_text, bos),
        (others, {}, None),
    ):
        if part["tasks"]:
            with quiet(bars=progress and sys.stderr.isatty()):
                wrapped = _wrap(model, tokenizer, context_length, options, first)
                scores |= _scores(evaluate(lm=wrapped, task_dict=part, limit=limit or None, bootstrap_iters=0), part)
    model.train(was_training)
    return scores


def _wrap(model: nn.Module, tokenizer: Any, context_length: int, options: dict[str, Any], first: int | None) -> Any:
    """The model as the harness's own class for models in memory. Windows of rolling tasks begin with `first`, if it is a
    token, in place of their own first token."""
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > context_length:
                raise ConfigError(
                    f"context_length = {context_length} is too small: an answer of the tasks has {longest} tokens. Give at "
                    f"least {longest}, or leave the task out."
                )
            # Rolling windows come batch by batch, with a fixed size: a bar for each would fill the screen.
            is_rolling = override_bs is not None
            if is_rolling and first is not None:
                requests = [(key, [first, *context[1:]], continuation) for key, context, continuation in requests]
            return super()._loglikelihood_tokens(requests, disable_tqdm=is_rolling, override_bs=override_bs)

    return Wrapped(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
        max_length=context_length,
        batch_size=sequences_at_a_time(len(tokenizer), context_length),
        **options,
    )


def _is_ours(task: Any) -> bool:
    return "corpus" in (task.get_config("metadata") or {})


def _is_rolling(task: Any) -> bool:
    return bool(task.OUTPUT_TYPE == "loglikelihood_rolling")


def _scores(results: Any, tasks: dict[str, Any]) -> dict[tuple[str, str], Score]:
    """The harness's results, with the items they are made of, by task or group and by metric."""
    groups = {name: group for name, group in tasks["groups"].items() if group.has_aggregation}
    # A task inside a group with an average is not shown beside it: MMLU has 57.
    shown = {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}
    inside = {leaf for name, leaves in shown.items() for leaf in leaves} | {
        subgroup.name for group in groups.values() for subgroup in group.get_all_groups()
    }
    shown = {name: leaves for name, leaves in shown.items() if name not in inside}
    shown |= {name: [name] for name in tasks["tasks"] if name not in inside}
    scores = {}
    for name, leaves in shown.items():
        for key, value in results["results"][name].items():
            metric, is_metric, rule = key.partition(",")
            if is_metric and not metric.endswith("_stderr"):
                samples = [s for leaf in leaves for s in results["samples"][leaf] if s["filter"] == rule]
                values = [s[metric] for s in samples if metric in s]
                scores[name, metric if rule == "none" else key] = _score(metric, float(value), values)
    return scores


def _score(metric: str, value: float, items: Sequence[Any]) -> Score:
    if metric == "bits_per_byte":  # items are (log-likelihood, bytes)
        pairs = np.array(items, dtype=np.float64)
        numerators, weights = -pairs[:, 0] / math.log(2), pairs[:, 1]
    elif all(isinstance(item, (int, float, np.number)) for item in items):
        numerators, weights = np.array(items, dtype=np.float64), np.ones(len(items))
    else:
        return Score(value, len(items), None, None)
    # Not every metric of single numbers is their mean.
    is_ratio = len(items) > 0 and np.isclose(numerators.sum() / weights.sum(), value, rtol=1e-5)
    return Score(value, len(items), numerators, weights) if is_ratio else Score(value, len(items), None, None)


def standard_error(numerators: Array, weights: Array) -> float | None:
    """Standard error of the ratio Σ numerators / Σ weights over independent items (None for fewer than two).

    The usual linearisation for a ratio; with weights of 1, the standard error of a mean.
    """
    n = len(numerators)
    if n < 2:
        return None
    residuals = numerators - weights * (numerators.sum() / weights.sum())
    return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / weights.sum())


def _compare(task: str, metric: str, is_higher_better: bool, before: Score, after: Score | None) -> Comparison:
    def error(numerators: Array | None, weights: Array | None) -> float | None:
        return None if numerators is None or weights is None else standard_error(numerators, weights)

    row = Comparison(
        task, metric, is_higher_better, before.n_items, before.value, error(before.numerators, before.weights)
    )
    if after is None:
        return row
    is_paired = before.numerators is not None and after.numerators is not None
    differences = after.numerators - before.numerators if is_paired else None  # type: ignore[operator]
    return replace(
        row,
        extended=after.value,
        extended_standard_error=error(after.numerators, after.weights),
        difference=after.value - before.value,
        difference_standard_error=error(differences, before.weights),
    )


def _directions(tasks: dict[str, Any]) -> dict[tuple[str, str], bool]:
    """Whether more is better, by task or group and metric."""
    leaves = {name: [task] for name, task in tasks["tasks"].items()}
    leaves |= {name: group.get_all_tasks() for name, group in tasks["groups"].items()}
    return {
        (name, metric): bool(is_better)
        for name, members in leaves.items()
        for task in members
        for metric, is_better in task.higher_is_better().items()
    }
