"""Logging: what the loop gives away, what arrives in TensorBoard and in the rival trackers, and that a run stays itself."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from nrlib import tracking
from nrlib.cli import app
from nrlib.errors import ConfigError
from nrlib.runs import run_or_load

N_STEPS = 20


def events(folder):
    """Scalars by name as {step: value}."""
    found = EventAccumulator(str(folder)).Reload()
    return {name: {e.step: e.value for e in found.Scalars(name)} for name in found.Tags()["scalars"]}


def test_every_step_arrives_in_tensorboard_and_the_record_is_the_same(small_config, tmp_path):
    config = small_config(seed=71)
    with tracking.tracking("tensorboard", config.run_id, {"seed": 71}, tmp_path) as log:
        record = run_or_load(config, progress=False, log=log)
    logged = events(tmp_path / config.run_id)
    assert {"language_loss", "local_loss", "gradient_norm", "learning_rate"} <= logged.keys()
    assert list(logged["language_loss"]) == list(range(1, N_STEPS + 1))
    for point in record.curve:
        assert logged["language_loss"][point["step"]] == pytest.approx(point["language_loss"], abs=1e-4)
        if "bits_per_byte_new_validation" in point:
            value = logged["bits_per_byte_new_validation"][point["step"]]
            assert value == pytest.approx(point["bits_per_byte_new_validation"], abs=1e-5)
    assert len(logged["bits_per_byte_new_validation"]) >= 5
    again = run_or_load(config, progress=False, log=lambda *a: pytest.fail("a stored run is not logged"))
    assert again.run_id == record.run_id and "log" not in str(again.config)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_other_trackers_get_project_run_and_values(name, monkeypatch):
    calls = []
    fake = types.ModuleType(name)
    fake.__spec__ = importlib.machinery.ModuleSpec(name, None)
    run = types.SimpleNamespace(
        log=lambda values, step=None, **k: calls.append(("log", step, values)), finish=lambda: calls.append("finish")
    )
    fake.init = lambda **options: (calls.append(("init", options)), run)[1]
    fake.config = types.SimpleNamespace(update=lambda values, **k: calls.append(("config", values)))
    monkeypatch.setitem(sys.modules, name, fake)
    with tracking.tracking(name, "run-1", {"gate": "elu"}) as log:
        log(3, {"local_loss": 0.5})
    assert calls == [
        ("init", {"project": "nrlib", "name": "run-1"}), ("config", {"gate": "elu"}),
        ("log", 3, {"local_loss": 0.5}), "finish",
    ]  # fmt: skip


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        tracking.check_tracker("trackio")
    with pytest.raises(ConfigError, match="tensorboard, trackio, wandb"):
        tracking.check_tracker("tensorbored")


def test_tracker_is_closed_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), tracking.tracking("tensorboard", "run", {}, tmp_path) as log:
        log(1, {"language_loss": 2.0})
        raise ZeroDivisionError
    assert events(tmp_path / "run")["language_loss"] == {1: 2.0}


def test_extend_logs_what_it_trains_and_says_when_there_is_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("NRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nrlib.tracking.project_directory", lambda: tmp_path)
    sizes = {"d_model": 16, "n_heads": 2, "ffn_width": 24, "pretraining_tokens": 2048, "n_tokens": 2048}
    options = [text for name, value in sizes.items() for text in ("-p", f"{name}={value}")]
    command = ["extend", "--profile", "smoke", *options, "--log-to"]
    refused = CliRunner().invoke(app, [*command, "tensorbored"])
    assert refused.exit_code == 2 and not (tmp_path / "cache").exists()
    first = CliRunner().invoke(app, [*command, "tensorboard"])
    assert first.exit_code == 0, first.output
    (folder,) = (tmp_path / "build" / "logs").iterdir()
    assert f"--logdir {folder.parent}" in first.stdout and len(events(folder)["local_loss"]) == 2
    second = CliRunner().invoke(app, [*command, "tensorboard"])
    assert "not logged" in second.stdout
