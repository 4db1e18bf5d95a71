"""What the tests of several processes run, in each of them and, for comparison, in a single one.

As a program, one of the processes that torchrun would start: python distributed_worker.py FOLDER
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from conftest import build_tiny_model

from nrlib import training
from nrlib.batches import MixedBatches, TokenStream
from nrlib.config import MethodConfig, TrainingConfig
from nrlib.distributed import is_first_process, n_processes, processes, shard, whole_weights
from nrlib.language_loss import find_head
from nrlib.meter import Meter
from nrlib.methods import apply_method
from nrlib.profiles import METHODS
from nrlib.training import Hooks, train

N_STEPS, SAVED_AT = 10, 5


@dataclass(frozen=True)
class Case:
    """One run: a method, and what is special about it."""

    method: str
    gate: str = "elu"
    local_loss: str = "l1"
    accumulation_steps: int = 1
    precision: str = "float32"
    is_loss_in_head: bool = False
    family: str = "llama"


# Eight sequences a batch, two of them original ones: the processes do not get the same number of them.
CASES = {
    **{method: Case(method) for method in METHODS},
    "micro_batches": Case("neutral_residues", accumulation_steps=2),
    "domain_classifier": Case("neutral_residues", gate="sigmoid", local_loss="domain_cross_entropy"),
    "loss_in_head": Case("fine_tuning", accumulation_steps=2, is_loss_in_head=True, family="mistral"),
    "bfloat16": Case("neutral_residues", precision="bfloat16"),
}
RESUMED = ("fine_tuning", "neutral_residues")


def run(case: Case, is_sharded: bool = False, checkpoint=None):
    """Train; returns the exact losses and norms of the steps, the weights, the checkpoint of one step and the model."""
    readings, saved = [], []

    class WatchedMeter(Meter):
        def add(self, *args, **kwargs):
            reading = super().add(*args, **kwargs)
            readings.append((reading.language_loss, reading.local_loss, reading.gradient_norm))
            return reading

    rng = np.random.default_rng(0)
    new, original = (TokenStream(rng.integers(0, 64, 900).astype(np.int32), 1) for _ in range(2))
    batches = MixedBatches(new, original, mix_ratio=0.2, n_steps=N_STEPS, batch_size=8, context_length=8, seed=3)
    uses_adapters = case.method in ("neutral_residues", "vanilla_adapter")
    has_local_loss = case.method == "neutral_residues"
    options = {"gate": case.gate if has_local_loss else "none"} if uses_adapters else {}
    config = MethodConfig(method=case.method, **options)
    model = apply_method(build_tiny_model(case.family, n_layers=2), config, seed=0)
    if is_sharded:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what is out of date
            shard(model)
    settings = TrainingConfig(
        batch_size=8, context_length=8, learning_rate=1e-2, weight_decay=0.1, precision=case.precision,
        accumulation_steps=case.accumulation_steps,
    )  # fmt: skip
    save = lambda state: saved.append(_copy(state)) if state["step"] == SAVED_AT else None  # noqa: E731
    training.Meter = WatchedMeter
    training._head_to_compute_in = lambda model, device: find_head(model) if case.is_loss_in_head else None
    train(
        model, batches, settings, progress=False,
        local_loss=case.local_loss if has_local_loss else "none", local_loss_weight=1.0,
        hooks=Hooks(save=save, load=lambda: _copy(checkpoint), seconds_between_saves=0.0),
    )  # fmt: skip
    weights = whole_weights(model) if is_sharded else {n: p.detach() for n, p in model.named_parameters()}
    return {"readings": readings, "weights": weights, "checkpoint": saved[0] if saved else None}, model


def _copy(state):
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copy(value) for value in state]
    return state.clone() if isinstance(state, torch.Tensor) else state


def main(folder: Path) -> None:
    """All cases, by both ways of sharing a run; what came out goes into the folder."""
    alone = torch.load(folder / "alone.pt", weights_only=True)
    for is_sharded in (False, True):
        results = {}
        for name, case in CASES.items():
            results[name], model = run(case, is_sharded)
            if is_sharded and name in ("lora", "neutral_residues", "fine_tuning"):
                _save(model, folder / name)
            if name in RESUMED:
                results[f"{name}, resumed"], _ = run(case, is_sharded, alone[name]["checkpoint"])
        if is_first_process():
            torch.save(results, folder / ("fsdp.pt" if is_sharded else "ddp.pt"))


def _save(model, folder: Path) -> None:
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    weights = whole_weights(model)
    if is_first_process():
        model.save_pretrained(folder, state_dict=weights)
        torch.save(logits, folder / "logits.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes():
        assert n_processes() == 2
        main(Path(sys.argv[1]))
