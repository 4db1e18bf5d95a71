"""What each method costs to train: time of a step and memory, over those of full fine-tuning.

Neither depends on what is learned, so weights and tokens are random. What goes before the first step, as the Fisher
information of elastic weight consolidation, counts in the memory and not in the time.
"""

from __future__ import annotations

import statistics
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..backbone import build_backbone
from ..benchmark.cases import random_batches, train_with_our_loop
from ..benchmark.timing import Case, Settings, take_turns
from ..config import RunConfig
from ..experiments import arm
from ..losses import ORIGINAL
from ..methods import apply_method
from ..profiles import ALL_METHODS
from ..runs import make_penalty


def training_cost(profile: str, extra_ratio: float, n_rounds: int = 6, seed: int = 0) -> dict[str, Any]:
    """Study: every method trains on the same batches in turn, and then once more while its memory is followed.

    Returns
    -------
    ratios : by method, time of its steps over fine-tuning's in the same round, the median over the rounds.
    memory : by method, most bytes of all living tensors from before the method is applied to the last step, over
        fine-tuning's.
    kept : by method, bytes of the tensors that live on between steps, over the backbone's: weights, the optimiser's state and
        what is remembered of the backbone.
    """
    settings = Settings(profile=profile, n_rounds=n_rounds, n_steps=4)
    configs = {method: arm(profile, method, extra_ratio=extra_ratio, seed=seed) for method in ALL_METHODS}
    timings = take_turns(
        {("training", method): _case(config, settings.n_steps) for method, config in configs.items()},
        settings, progress=False,
    )  # fmt: skip
    usual = timings["training", "fine_tuning"]
    measured = {method: _memory(config) for method, config in configs.items()}
    return {
        "ratios": {
            method: round(statistics.median(m.seconds / u.seconds for m, u in zip(rounds, usual, strict=True)), 3)
            for (_, method), rounds in timings.items()
        },
        "memory": {method: round(peak / measured["fine_tuning"][0], 3) for method, (peak, _) in measured.items()},
        "kept": {method: round(kept, 3) for method, (_, kept) in measured.items()},
    }


class LivingTensors(TorchDispatchMode):
    """Follows the bytes of all tensors that are made inside it until they are freed: `alive`, and at most `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()  # storages: views share one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def _drop(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.alive -= n_bytes


def _backbone(config: RunConfig) -> Any:
    return build_backbone(config, config.backbone.vocabulary_size, eos_token_id=0)


def _case(config: RunConfig, n_steps: int) -> Case:
    model: nn.Module = apply_method(_backbone(config), config.method, config.seed)
    batches = random_batches(config, n_steps + 1)
    penalty = make_penalty(config, model, batches.streams[ORIGINAL], lambda: _backbone(config))
    return lambda: train_with_our_loop(model, batches, config, penalty)


def _memory(config: RunConfig) -> tuple[int, float]:
    """Peak bytes, and bytes kept between steps over the backbone's."""
    kept: list[int] = []
    with LivingTensors() as tensors:
        backbone = _backbone(config)
        of_backbone = sum(p.nbytes for p in backbone.parameters())
        model = apply_method(backbone, config.method, config.seed)
        del backbone
        batches = random_batches(config, 3)
        penalty = make_penalty(config, model, batches.streams[ORIGINAL], lambda: _backbone(config))
        train_with_our_loop(model, batches, config, penalty, lambda: kept.append(tensors.alive))
    return tensors.peak, kept[-1] / of_backbone
