"""Reading losses now and then: the same numbers, and an error that still names the step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nrlib import training
from nrlib.batches import MixedBatches, TokenStream, load_ahead
from nrlib.config import MethodConfig, TrainingConfig
from nrlib.meter import Meter
from nrlib.methods import apply_method
from nrlib.training import Hooks, train

CONFIG = TrainingConfig(batch_size=4, context_length=8, learning_rate=1e-2, precision="float32")
FINE = torch.tensor(1.0, dtype=torch.float64)


def add(meter, step, loss=1.0, norm=1.0, **options):
    losses = (torch.tensor(loss, dtype=torch.float64), 2 * FINE)
    return meter.add(step, losses, torch.tensor(norm), options.pop("is_save_due", False), **options)


def test_it_reads_every_few_steps_and_when_asked():
    meter = Meter(read_every=3, n_steps=10, learning_rate=0.1)
    answers = [add(meter, step, loss=step / 4, read_now=step in (4, 9)) for step in range(10)]
    assert [step for step, reading in enumerate(answers) if reading] == [2, 4, 7, 9]
    assert answers[4].as_point() == {"language_loss": 1.0, "local_loss": 2.0, "gradient_norm": 1.0}
    assert answers[9].language_loss == 2.25 and not answers[9].is_save_due


def test_a_save_is_due_only_when_the_step_that_is_read_says_so():
    meter = Meter(read_every=1, n_steps=10, learning_rate=0.1)
    assert add(meter, 0, is_save_due=True).is_save_due and not add(meter, 1).is_save_due


@pytest.mark.parametrize(("name", "bad"), [("loss", math.nan), ("loss", math.inf), ("norm", math.nan)])
def test_it_names_the_step_that_went_wrong(name, bad):
    meter = Meter(read_every=8, n_steps=100, learning_rate=0.1)
    for step in range(7):
        assert add(meter, step, **({name: bad} if step >= 4 else {})) is None
    with pytest.raises(
        FloatingPointError, match=f"{'loss' if name == 'loss' else 'gradient'} became {bad} at step 4 of 100"
    ):
        add(meter, 7)


def batches(n_steps=12):
    rng = np.random.default_rng(0)
    new, original = (TokenStream(rng.integers(0, 64, 300).astype(np.int32), 1) for _ in range(2))
    return MixedBatches(new, original, mix_ratio=0.25, n_steps=n_steps, batch_size=4, context_length=8, seed=3)


def run(tiny_model, hooks=None, n_steps=60):
    model = apply_method(tiny_model(n_layers=1), MethodConfig(), seed=0)
    state = train(
        model, batches(n_steps), CONFIG, local_loss="l1", local_loss_weight=1.0, hooks=hooks, progress=False
    )  # fmt: skip
    return state, model


def test_a_run_that_reads_rarely_has_the_same_numbers(tiny_model, monkeypatch):
    expected, expected_model = run(tiny_model)
    saved = []
    original = training.Meter
    monkeypatch.setattr(training, "Meter", lambda read_every, *rest: original(7, *rest))
    hooks = Hooks(save=lambda state: saved.append(state["step"]), seconds_between_saves=0.0)
    state, model = run(tiny_model, hooks)
    assert state.curve == expected.curve and len(state.curve) == 20
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected_model.parameters(), strict=True))
    assert saved == [point["step"] for point in state.curve[:-1]]  # only where the losses are known to be numbers


def test_nothing_is_saved_after_a_step_that_went_wrong(tiny_model, monkeypatch):
    original, saved = training.Meter, []
    monkeypatch.setattr(training, "Meter", lambda read_every, *rest: original(1000, *rest))
    original_step = training.training_step

    def spoilt(*args, **kwargs):
        spoilt.n_calls += 1
        losses = original_step(*args, **kwargs)
        return (losses[0] * math.nan, losses[1]) if spoilt.n_calls == 5 else losses

    spoilt.n_calls = 0
    monkeypatch.setattr(training, "training_step", spoilt)
    hooks = Hooks(save=lambda state: saved.append(state["step"]), seconds_between_saves=0.0)
    with pytest.raises(FloatingPointError, match="at step 4 of 60"):
        run(tiny_model, hooks)
    assert saved == [3]


# --- batches made in another thread -----------------------------------------------------------------------------------


def test_batches_made_ahead_come_in_order_and_one_ahead():
    made, used = [], []
    for value in load_ahead(lambda step: made.append(step) or step * 10, range(3, 8)):
        used.append(value)
    assert made == [3, 4, 5, 6, 7] and used == [30, 40, 50, 60, 70]
    assert list(load_ahead(lambda step: step, range(0))) == []


def test_an_error_while_a_batch_is_made_arrives():
    def load(step):
        if step == 2:
            raise ValueError("step 2")
        return step

    values = load_ahead(load, range(5))
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(ValueError, match="step 2"):
        next(values)


def test_a_gpu_gets_the_same_batches(monkeypatch):
    monkeypatch.setattr("nrlib.batches.Batch.pin_memory", lambda batch: batch)
    text = batches(6)
    expected = [text.batch(step) for step in range(2, 6)]
    numbered = list(training._numbered_batches(batches(6), 2, torch.device("cuda")))
    assert [step for step, _ in numbered] == [2, 3, 4, 5]
    assert all(torch.equal(found.inputs, batch.inputs) for (_, found), batch in zip(numbered, expected, strict=True))
