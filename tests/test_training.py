"""The training loop: the schedule, what it refuses, and an interrupted run that ends with the same numbers."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from nrlib import GatedAdapter, training
from nrlib.backbone import checkpoint_hooks, delete_checkpoint
from nrlib.batches import MixedBatches, TokenStream
from nrlib.config import MethodConfig, TrainingConfig
from nrlib.methods import apply_method
from nrlib.profiles import METHODS
from nrlib.storage import cache_directory
from nrlib.training import Hooks, learning_rate_at, make_optimizer, train

N_STEPS = 12
CONFIG = TrainingConfig(batch_size=4, context_length=8, learning_rate=1e-2, weight_decay=0.1, precision="float32")


def batches(n_steps=N_STEPS, cls=MixedBatches):
    rng = np.random.default_rng(0)
    new, original = (TokenStream(rng.integers(0, 64, 300).astype(np.int32), 1) for _ in range(2))
    return cls(new, original, mix_ratio=0.25, n_steps=n_steps, batch_size=4, context_length=8, seed=3)


def model_of(tiny_model, method="neutral_residues"):
    return apply_method(tiny_model(n_layers=2), MethodConfig(method=method), seed=0)


def run(model, hooks=None, text=None, config=CONFIG):
    local_loss = "l1" if any(isinstance(module, GatedAdapter) for module in model.modules()) else "none"
    text = text or batches()
    return train(model, text, config, local_loss=local_loss, local_loss_weight=1.0, hooks=hooks, progress=False)


def size_of(model):
    """A measurement that moves with every weight."""
    return lambda: {"size": round(sum(p.abs().sum().item() for p in model.parameters() if p.requires_grad), 6)}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Watched(MixedBatches):
    """Remembers which steps were asked for, and is interrupted before one of them."""

    stop_before = None

    def batch(self, step):
        if step == self.stop_before:
            raise KeyboardInterrupt
        self.__dict__.setdefault("steps", []).append(step)
        return super().batch(step)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("saved_after", "stopped_before"), [(1, 1), (7, 10)], ids=["at once", "later"])
def test_an_interrupted_run_ends_with_the_same_numbers(method, saved_after, stopped_before, tiny_model):
    name = f"{method}-{saved_after}"
    expected_model = model_of(tiny_model, method)
    expected = run(expected_model, Hooks(measure=size_of(expected_model), n_measurements=3))
    assert [point["step"] for point in expected.curve if "size" in point] == [4, 8, 12]

    interrupted = model_of(tiny_model, method)
    hooks = checkpoint_hooks(name, measure=size_of(interrupted), n_measurements=3, seconds_between_saves=0.0)
    text = batches(cls=Watched)
    text.stop_before = stopped_before

    def save_once(state):
        if state["step"] == saved_after:
            hooks.save(state)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, replace(hooks, save=save_once), text)
    random.seed(9)
    torch.manual_seed(9)  # a new process has another global random state

    resumed = model_of(tiny_model, method)
    text = batches(cls=Watched)
    state = run(resumed, replace(hooks, measure=size_of(resumed), save=None), text)
    assert text.steps == list(range(saved_after, N_STEPS))
    assert state.curve == expected.curve and state.step == N_STEPS
    found = weights(resumed)
    assert all(torch.equal(found[key], value) for key, value in weights(expected_model).items())
    delete_checkpoint(name)
    assert hooks.load() is None


def test_saving_changes_nothing_and_the_last_step_needs_no_checkpoint(tiny_model):
    plain, saving, saved = model_of(tiny_model), model_of(tiny_model), []
    run(plain)
    run(saving, Hooks(save=lambda state: saved.append(state["step"]), seconds_between_saves=0.0))
    assert saved == list(range(1, N_STEPS))
    assert all(torch.equal(value, weights(plain)[key]) for key, value in weights(saving).items())


def test_a_checkpoint_that_was_never_renamed_is_not_seen(tiny_model):
    folder = cache_directory() / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".unfinished.pt.abc123.tmp").write_bytes(b"half")
    assert checkpoint_hooks("unfinished").load() is None


def test_a_checkpoint_made_from_other_text_is_not_loaded(tiny_model):
    state = {"step": 3}
    checkpoint_hooks("text", "fingerprint of the old text").save(state)
    assert checkpoint_hooks("text", "fingerprint of the old text").load() == state
    with pytest.warns(UserWarning, match="other code or text"):
        assert checkpoint_hooks("text", "fingerprint of the new text").load() is None


@pytest.mark.parametrize("size", [0, 100, 0.5])
def test_a_damaged_checkpoint_is_put_aside_and_the_run_starts_over(size, tiny_model):
    """A disk may lose what was synchronised: then the run begins again, with the numbers it would have had."""
    expected = model_of(tiny_model)
    run(expected)
    hooks = checkpoint_hooks("damaged", seconds_between_saves=0.0)
    run(model_of(tiny_model), hooks)
    path = cache_directory() / "checkpoints" / "damaged.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    model, text = model_of(tiny_model), batches(cls=Watched)
    with pytest.warns(UserWarning, match="damaged.pt"):
        run(model, replace(hooks, save=None), text)
    assert text.steps == list(range(N_STEPS))
    assert all(torch.equal(value, weights(expected)[key]) for key, value in weights(model).items())


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_learning_rate_by_hand(tiny_model, monkeypatch):
    config = replace(CONFIG, warmup_ratio=0.25, final_learning_rate_ratio=0.1)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(9)]
    expected = [1e-2 * factor for factor in [1 / 3, 2 / 3, 1, *cosine]]
    assert [learning_rate_at(step, 12, config) for step in range(12)] == pytest.approx(expected)
    assert cosine[0] == 1 and cosine[-1] < 0.2
    used = []

    def watched_optimizer(*args):
        optimizer = make_optimizer(*args)
        optimizer.register_step_pre_hook(lambda o, *_: used.append([group["lr"] for group in o.param_groups]))
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", watched_optimizer)
    run(model_of(tiny_model), config=config)
    assert [rates[0] for rates in used] == pytest.approx(expected)
    assert all(rate == rates[0] for rates in used for rate in rates)


@pytest.mark.parametrize("n_steps", [1, 2, 1000])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 1.0])
def test_learning_rate_stays_within_its_range(n_steps, warmup_ratio):
    config = replace(CONFIG, warmup_ratio=warmup_ratio)
    rates = [learning_rate_at(step, n_steps, config) for step in range(n_steps)]
    assert all(0 < rate <= 1e-2 for rate in rates) and max(rates) == pytest.approx(1e-2)


def test_weight_decay_is_for_matrices(tiny_model):
    groups = make_optimizer(model_of(tiny_model), CONFIG).param_groups
    decays = {group["weight_decay"]: {p.dim() for p in group["params"]} for group in groups}
    assert decays == {0.1: {2}, 0.0: {1}}


@pytest.mark.parametrize("max_gradient_norm", [1e-3, 1e3])
def test_gradients_are_clipped(max_gradient_norm, tiny_model, monkeypatch):
    norms = []

    def watched_optimizer(model, config):
        optimizer = make_optimizer(model, config)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        )
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", watched_optimizer)
    state = run(model_of(tiny_model), config=replace(CONFIG, max_gradient_norm=max_gradient_norm))
    before = [point["gradient_norm"] for point in state.curve]
    assert len(norms) == len(before) == N_STEPS
    assert norms == pytest.approx([min(norm, max_gradient_norm) for norm in before], rel=1e-2, abs=1e-4)


def test_the_curve(tiny_model):
    state = run(model_of(tiny_model))
    assert [point["step"] for point in state.curve] == list(range(1, N_STEPS + 1))
    assert [point["n_tokens"] for point in state.curve] == [32 * step for step in range(1, N_STEPS + 1)]
    assert state.curve[0]["local_loss"] == 0 < state.curve[-1]["local_loss"]
    assert state.curve[0]["language_loss"] > state.curve[-1]["language_loss"]
    assert state.seconds > 0


@pytest.mark.parametrize("n_steps", [39, 79])
def test_a_long_curve_is_thinned(n_steps, tiny_model):
    state = run(model_of(tiny_model), text=batches(n_steps))
    assert 15 <= len(state.curve) <= 30 and state.curve[-1]["step"] == n_steps


def test_bfloat16(tiny_model):
    exact, coarse = model_of(tiny_model), model_of(tiny_model)
    expected, state = run(exact), run(coarse, config=replace(CONFIG, precision="bfloat16"))
    assert all(p.dtype == torch.float32 for p in coarse.parameters())
    assert state.curve[-1]["language_loss"] == pytest.approx(expected.curve[-1]["language_loss"], rel=0.02)
    assert state.curve != expected.curve


def test_a_loss_that_is_no_number_stops_the_run(tiny_model):
    model, saved = model_of(tiny_model), []
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"learning_rate = 0\.01"):
        run(model, Hooks(save=saved.append, seconds_between_saves=0.0))
    assert not saved
    assert all(
        torch.equal(
            value,
            before[key],
        )
        or value.isnan().all()
        for key, value in weights(model).items()
    )


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_are_lost(tiny_model):
    model = model_of(tiny_model)
    next(p for n, p in model.named_parameters() if "output_projection" in n).register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError):
        run(model, text=batches(n_steps=1))
    assert all(p.isfinite().all() for p in model.parameters())
