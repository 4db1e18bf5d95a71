"""Runs, records, sweeps and tables: trained once, resumed after kill -9, stored whole, compared as defined."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nrlib
from nrlib import machine, records, runs, tasks
from nrlib import sweep as sweeping
from nrlib.backbone import get_backbone
from nrlib.batches import MixedBatches
from nrlib.config import MethodConfig, make_config
from nrlib.errors import ConfigError, RecordError
from nrlib.methods import apply_method
from nrlib.records import load_record, published_records, read_record, save_record
from nrlib.runs import run, run_or_load
from nrlib.storage import cache_directory, results_directory
from nrlib.sweep import SweepError, sweep
from nrlib.tables import (
    at_best_rate,
    best_learning_rates,
    curves_table,
    flat_records,
    gate_table,
    results_table,
    summary,
)
from nrlib.texts import prepare_text


def refuse(*_, **__):
    raise AssertionError("this should not have been called")


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    """Texts and backbones are shared by the session, published records and counts are each test's own."""
    monkeypatch.setenv("NRLIB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("NRLIB_COUNTS", str(tmp_path / "runs.jsonl"))


@pytest.fixture(scope="module")
def record(small_config):
    """A finished run, not stored."""
    return run(small_config(), progress=False)


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_is_trained_once(small_config, monkeypatch):
    config = small_config(seed=11)
    first = run_or_load(config, notebook="quickstart", progress=False)
    monkeypatch.setattr(runs, "run", refuse)
    second = run_or_load(config, notebook="another")
    assert second == first and second.notebook == "quickstart" and second.run_config == config
    assert not list((cache_directory() / "checkpoints").glob(f"{config.run_id}*"))


def test_what_a_record_says(record, small_config):
    results, config = record.results, small_config()
    assert results["bits_per_byte"].keys() == results["backbone_bits_per_byte"].keys() == {
        "unseen_original", "proxy", "new", "unseen_original_validation", "new_validation"
    }  # fmt: skip
    for name in ("unseen_original", "proxy"):
        before, after = results["backbone_bits_per_byte"][name], results["bits_per_byte"][name]
        assert results["forgetting"][name] == pytest.approx((after - before) / before, abs=1e-4)
        assert results["drift"][name] >= 0
    assert results["bits_per_byte"]["new"] < results["backbone_bits_per_byte"]["new"]
    assert 0.15 < results["n_extra_weights"] / results["n_backbone_weights"] <= 0.2
    assert {row["layer"] for row in results["gate_statistics"]} == {0, 1}
    provenance = record.provenance
    assert provenance.keys() >= {
        "seed", "device", "precision", "seconds", "peak_memory_mb", "versions", "corpora", "git_commit", "is_dirty"
    }  # fmt: skip
    assert provenance["corpora"].keys() == {"original", "proxy", "unseen_original", "new_domain"}
    assert all(len(corpus["fingerprint"]) == 16 for corpus in provenance["corpora"].values())
    assert record.config == config.to_dict() and record.curve[-1]["step"] == 20


def test_every_method_runs(small_config):
    for method in ("fine_tuning", "lora", "vanilla_adapter"):
        results = run(small_config(method=method), progress=False).results
        assert results["bits_per_byte"]["new"] < results["backbone_bits_per_byte"]["new"], method
        assert (results["n_extra_weights"] == 0) == (method == "fine_tuning")
        assert min(results["drift"].values()) > 1e-4  # against the backbone as it was before the training
        assert bool(results["gate_statistics"]) == (method == "vanilla_adapter")


def test_without_a_proxy(small_config):
    results = run(small_config(proxy="", mix_ratio=0.0), progress=False).results
    assert "proxy" not in results["bits_per_byte"] and results["forgetting"].keys() == {"unseen_original"}


def test_the_backbone_is_measured_for_each_precision(small_config, monkeypatch):
    """The precision is part of what a backbone is, since it is trained in it."""
    measured = []

    def other_backbone(config, text, progress=True):
        measured.append(config.training.precision)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(runs, "get_backbone", other_backbone)
    monkeypatch.setattr(runs, "bits_per_byte", lambda *_: float(len(measured)))
    text = runs.prepare_text(small_config().data, small_config().backbone, False)
    monkeypatch.setattr(runs, "_BACKBONE_METRICS", {})
    first, again, other = (
        runs.backbone_metrics(small_config(precision=p), text) for p in ("float32", "float32", "bfloat16")
    )
    assert first == again != other and measured == ["float32", "bfloat16"]


KILLED = """
import functools, io, json, os, signal, sys
import torch
from nrlib import runs
from nrlib.config import config_from_dict

save, n_saves = torch.save, []

def save_and_die(state, file):
    n_saves.append(1)
    if len(n_saves) < 3:
        return save(state, file)
    buffer = io.BytesIO()
    save(state, buffer)
    handle = file if hasattr(file, "write") else open(file, "wb")
    handle.write(buffer.getvalue()[: buffer.tell() // 2])
    handle.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_and_die
runs.checkpoint_hooks = functools.partial(runs.checkpoint_hooks, seconds_between_saves=0.0)
runs.run_or_load(config_from_dict(json.loads(sys.argv[1])), progress=False)
"""


def test_kill_9_while_a_checkpoint_is_written_then_resume(record, small_config, monkeypatch):
    config = small_config()  # the run of `record`, which was not stored
    root = str(Path(nrlib.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", KILLED, json.dumps(config.to_dict())]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    left = sorted(path.name for path in (cache_directory() / "checkpoints").glob(f"*{config.run_id}*"))
    assert len(left) == 2 and left[0].endswith(".tmp") and left[1] == f"{config.run_id}.pt"
    assert load_record(config) is None

    steps, batch = [], MixedBatches.batch
    monkeypatch.setattr(MixedBatches, "batch", lambda self, step: steps.append(step) or batch(self, step))
    resumed = run_or_load(config, progress=False)
    assert steps == list(range(2, 20))
    assert resumed.curve == record.curve
    timing = {"tokens_per_second": 0}
    assert {**resumed.results, **timing} == {**record.results, **timing}
    assert not (cache_directory() / "checkpoints" / f"{config.run_id}.pt").exists()
    assert load_record(config) == resumed


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_long_run_of_four_layers_fits_into_10_kb(small_config):
    """As long and as wide as a published run: the laptop's layers, and every point of the curve a measured one."""
    long_run = run(
        small_config(n_layers=4, d_model=8, n_tokens=79 * 8 * 2, context_length=8, batch_size=2), progress=False
    )
    widest = max(long_run.curve, key=len)
    point = {key: 819200 if key == "n_tokens" else 10.12345 for key in widest}
    packages = {f"a-package-of-debian-{i}": "1:20230508+deb12u1" for i in range(10)}
    corpora = {name: c | {"versions": packages} for name, c in long_run.provenance["corpora"].items()}
    long_run = replace(
        long_run,
        notebook="adapter_placement",
        config=make_config("laptop").to_dict(),
        curve=[point if len(p) == len(widest) else p | {"n_tokens": 819200} for p in long_run.curve],
        provenance=long_run.provenance | {"corpora": corpora, "git_commit": "0" * 40},
    )
    path = save_record(long_run)
    assert path.stat().st_size <= 10_000
    assert read_record(path) == long_run


def test_a_published_record_comes_first(record, small_config, monkeypatch):
    monkeypatch.setattr(records, "git_state", lambda: ("0" * 40, False))
    clean = replace(record, notebook="published", provenance=record.provenance | {"is_dirty": False})
    save_record(replace(record, notebook="cached"))
    assert load_record(small_config()).notebook == "cached"
    monkeypatch.setenv("NRLIB_PUBLISH", "1")
    assert save_record(clean).parent == results_directory()
    assert load_record(small_config()).notebook == "published"
    assert [r.run_id for r in published_records()] == [record.run_id]
    (cache_directory() / "records" / f"{record.run_id}.json").unlink()


def test_nothing_is_published_from_a_tree_with_changes(record, monkeypatch):
    monkeypatch.setenv("NRLIB_PUBLISH", "1")
    monkeypatch.setenv("NRLIB_CACHE", str(cache_directory() / "elsewhere"))
    with pytest.raises(RecordError, match="the working tree changed while it ran"):
        save_record(replace(record, provenance=record.provenance | {"is_dirty": True}))
    assert not list(results_directory().glob("*"))
    assert len(list((cache_directory() / "records").glob("*.json"))) == 1  # hours of training are not thrown away


def test_a_tree_with_changes_is_refused_before_the_training(small_config, monkeypatch):
    monkeypatch.setenv("NRLIB_PUBLISH", "1")
    monkeypatch.setattr(records, "git_state", lambda: ("0" * 40, True))
    monkeypatch.setattr(runs, "prepare_text", refuse)
    monkeypatch.setattr(sweeping, "prepare_text", refuse)
    with pytest.raises(RecordError, match="uncommitted changes"):
        run_or_load(small_config(seed=21), progress=False)
    with pytest.raises(RecordError, match="uncommitted changes"):
        sweep([small_config(seed=21)], n_workers=1, progress=False)


DAMAGES = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no json": lambda text: "half a line",
    "a list": lambda text: "[]",
    "no versions": lambda text: json.dumps({"run_id": "a"}),
    "a part missing": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "curve"}),
    "another result version": lambda text: json.dumps(json.loads(text) | {"result_version": 0}),
    "another schema version": lambda text: json.dumps(json.loads(text) | {"schema_version": 99}),
    "another configuration": lambda text: json.dumps(json.loads(text) | {"config": make_config("smoke").to_dict()}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_is_not_this_run_is_an_error_not_a_result(damage, record, small_config, monkeypatch):
    config = small_config(seed=12)
    path = save_record(replace(record, run_id=config.run_id, config=config.to_dict()))
    path.write_text(DAMAGES[damage](path.read_text()))
    monkeypatch.setattr(runs, "run", refuse)
    try:
        with pytest.raises(RecordError) as caught:
            run_or_load(config)
        message = str(caught.value)
        assert str(path) in message and "elete" in message and "\n" not in message
        if "version" in damage and damage.startswith("another"):
            assert "0" in message or "99" in message
            assert record.provenance["git_commit"] in message
    finally:
        path.unlink()


def test_a_record_that_was_never_renamed_is_not_seen(small_config):
    config = small_config(seed=13)
    for folder in (cache_directory() / "records", results_directory()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{config.run_id}.json.abc123.tmp").write_text("{")
    assert load_record(config) is None and not list(published_records())


# --- sweeps -----------------------------------------------------------------------------------------------------------


class Inline(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Dying(Inline):
    """Like a process pool whose worker is killed by the arm with seed 1: all that is not finished goes down with it."""

    is_broken = False

    def submit(self, function, /, *args, **kwargs):
        if self.is_broken:
            raise BrokenProcessPool("a worker was killed before")
        if args[0].seed == 1:
            self.is_broken = True
            future = Future()
            future.set_exception(BrokenProcessPool("a worker was killed"))
            return future
        return super().submit(function, *args, **kwargs)


@pytest.fixture
def fake_runs(record, monkeypatch):
    """Sweeps whose arms cost nothing; the list of those that ran. Seed 7 fails."""
    ran, stored = [], {}

    def fake(config, *, notebook="", progress=True):
        ran.append(config.seed)
        if config.seed == 7:
            raise FloatingPointError("the loss became nan")
        stored[config.run_id] = replace(record, run_id=config.run_id, notebook=notebook, config=config.to_dict())
        return stored[config.run_id]

    for module in (sweeping, tasks):
        monkeypatch.setattr(module, "run_or_load", fake)
    for module in (sweeping, runs):
        monkeypatch.setattr(module, "stored_record", lambda config: stored.get(config.run_id))
    monkeypatch.setattr(tasks, "check_worker", lambda *_: None)
    monkeypatch.setattr(sweeping, "_prepare", lambda *_: None)
    return ran


def counts(path=None):
    return records.read_counts()


def test_a_sweep_trains_what_is_missing_in_threads(small_config):
    """With any executor; the same arm twice is one run."""
    configs = [small_config(seed=seed, n_tokens=256) for seed in (31, 32, 31)]
    with ThreadPoolExecutor(1) as executor:
        found = sweep(configs, notebook="methods", executor=executor, progress=False)
    assert [r.run_config for r in found] == configs and found[0] == found[2] != found[1]
    assert counts() == {"loaded": 0, "trained": 2, "failed": 0}
    again = sweep(configs, notebook="rivals", progress=False)  # nothing is missing, so that no pool is started
    assert again == found and {r.notebook for r in again} == {"methods"}
    assert counts() == {"loaded": 0, "trained": 2, "failed": 0}  # two different runs, whoever asked for them
    assert records.pages_of_runs() == {config.run_id: ["methods", "rivals"] for config in configs}


@pytest.mark.parametrize("executor", [None, Inline()], ids=["here", "executor"])
def test_one_failing_arm_does_not_lose_the_others(executor, fake_runs, small_config):
    configs = [small_config(seed=seed) for seed in (5, 7, 6)]
    with pytest.raises(SweepError, match="1 of 3 runs failed") as caught:
        sweep(configs, n_workers=1, executor=executor, progress=False)
    message = str(caught.value)
    assert configs[1].run_id in message and "FloatingPointError: the loss became nan" in message
    assert configs[0].run_id not in message
    assert fake_runs == [5, 7, 6] and counts() == {"loaded": 0, "trained": 2, "failed": 1}
    assert [r.config["seed"] for r in sweep([configs[0], configs[2]], progress=False)] == [5, 6]
    assert fake_runs == [5, 7, 6]


def test_after_a_worker_was_killed_the_rest_gets_a_new_pool(fake_runs, small_config, monkeypatch):
    configs = [small_config(seed=seed) for seed in (0, 1, 2, 3)]
    pools = [Dying(), Inline()]
    monkeypatch.setattr(sweeping, "_pool", lambda n_workers: pools.pop(0))
    assert [r.config["seed"] for r in sweep(configs, n_workers=2, progress=False)] == [0, 1, 2, 3]
    assert fake_runs == [0, 1, 2, 3] and not pools


def test_an_arm_that_always_kills_its_worker_takes_no_other_along(fake_runs, small_config, monkeypatch):
    configs = [small_config(seed=seed) for seed in (1, 2, 3)]
    monkeypatch.setattr(sweeping, "_pool", lambda n_workers: Dying())
    with pytest.raises(SweepError, match="1 of 3 runs failed") as caught:
        sweep(configs, n_workers=2, progress=False)
    assert configs[0].run_id in str(caught.value) and sorted(fake_runs) == [2, 3]


def test_a_mistake_in_one_arm_stops_the_sweep_before_any_work(small_config, monkeypatch):
    for name in ("_prepare", "run_or_load", "prepare_text", "get_backbone"):
        monkeypatch.setattr(sweeping, name, refuse)
    with pytest.raises(nrlib.errors.ConfigError, match="layer 5"):
        sweep([small_config(seed=41), small_config(seed=41, layers="5")], progress=False)


def test_the_workers_environment_is_given_back(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("KMP_BLOCKTIME", raising=False)
    before = dict(os.environ)
    with sweeping._worker_environment():
        assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert dict(os.environ) == before


def test_runs_in_threads_of_one_process_draw_their_own_weights(tiny_model):
    """Executors may run arms in threads, which share torch's random state."""
    backbones = [tiny_model() for _ in range(16)]

    def weights(seed):
        model = apply_method(backbones[seed], MethodConfig(extra_ratio=1.0), seed)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as executor:
            found = list(executor.map(weights, range(16)))
    finally:
        sys.setswitchinterval(interval)
    backbones = [tiny_model() for _ in range(16)]
    assert all(torch.equal(found[seed], weights(seed)) for seed in range(16))


def test_attention_in_float32_ends_when_the_last_of_several_threads_leaves_it():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    first, second = (machine.attention_in_float32(torch.device("cpu"), torch.bfloat16) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    second.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


# --- tables -----------------------------------------------------------------------------------------------------------


def finished(record, method, rate, seed, *, new, validation, unseen=2.0, **changes):
    """A record with numbers of our own; the backbone has 2.0 on the original domain and 4.0 on the new one."""
    config = make_config("smoke", method=method, learning_rate=rate, seed=seed, **changes)
    values = {
        "unseen_original": unseen,
        "proxy": 2.0,
        "new": new,
        "unseen_original_validation": 2.0,
        "new_validation": validation,
    }
    before = {name: 4.0 if name.startswith("new") else 2.0 for name in values}
    results = record.results | {
        "bits_per_byte": values, "backbone_bits_per_byte": before, "forgetting": {"unseen_original": (unseen - 2) / 2, "proxy": 0.0}
    }  # fmt: skip
    return replace(record, run_id=config.run_id, config=config.to_dict(), results=results)


@pytest.fixture
def finished_runs(record):
    return [
        # fine-tuning: the rate that is best on the test text is not the one that is best on the validation text
        finished(record, "fine_tuning", 1e-3, 0, new=1.0, validation=3.0),
        finished(record, "fine_tuning", 2e-3, 0, new=2.0, validation=2.5, unseen=2.5),
        finished(record, "fine_tuning", 2e-3, 1, new=2.2, validation=2.5, unseen=2.4),
        finished(record, "neutral_residues", 1e-2, 0, new=2.1, validation=2.0, unseen=2.02),
        finished(record, "neutral_residues", 1e-2, 1, new=2.3, validation=2.2, unseen=2.06),
        finished(record, "neutral_residues", 3e-2, 0, new=1.5, validation=2.3, unseen=2.2),
        finished(record, "neutral_residues", 3e-2, 1, new=1.5, validation=2.4, unseen=2.2),
    ]


def test_learning_by_hand(finished_runs):
    rows = {(r["method"], r["learning_rate"], r["seed"]): r for r in flat_records(finished_runs)}
    fine_tuning = (2.0 + 2.2) / 2  # mean over seeds at 2e-3, the best rate on validation text
    assert rows["neutral_residues", 1e-2, 0]["learning"] == pytest.approx((4.0 - 2.1) / (4.0 - fine_tuning), abs=1e-5)
    assert rows["fine_tuning", 1e-3, 0]["learning"] == pytest.approx(3.0 / 1.9, abs=1e-5)
    assert rows["neutral_residues", 1e-2, 1]["forgetting"] == pytest.approx(0.03)
    assert rows["fine_tuning", 2e-3, 0]["forgetting"] == pytest.approx(0.25)


def test_the_best_rate_is_chosen_on_the_validation_text(finished_runs):
    table = results_table(finished_runs)
    assert best_learning_rates(table) == {"fine_tuning": 2e-3, "neutral_residues": 1e-2}
    best = at_best_rate(table)
    assert sorted(best["bits_per_byte_new"]) == [2.0, 2.1, 2.2, 2.3]
    row = summary(best, ["method"]).set_index("method").loc["neutral_residues"]
    assert row["seeds"] == 2 and row["forgetting"] == pytest.approx(0.02)
    assert (row["forgetting_min"], row["forgetting_max"]) == pytest.approx((0.01, 0.03))
    assert row["learning"] == pytest.approx((4.0 - 2.2) / 1.9, abs=1e-4)


def test_fine_tuning_of_another_setting_is_no_reference(finished_runs, record):
    other = finished(record, "neutral_residues", 1e-2, 0, new=2.1, validation=2.0, n_tokens=40_960)
    alone = flat_records([other])[0]
    assert alone["learning"] is None and alone["forgetting"] == 0.0
    assert flat_records([other], finished_runs)[0]["learning"] is None
    reference = finished(record, "fine_tuning", 2e-3, 0, new=3.0, validation=2.5, n_tokens=40_960)
    assert flat_records([other], [*finished_runs, reference])[0]["learning"] == pytest.approx(1.9, abs=1e-5)


def test_fine_tuning_at_another_mix_is_no_reference_where_the_usual_one_is_there(finished_runs, record):
    unmixed = finished(record, "fine_tuning", 2e-3, 0, new=1.0, validation=0.5, mix_ratio=0.0)
    expected = [row["learning"] for row in flat_records(finished_runs)]
    assert [row["learning"] for row in flat_records([*finished_runs, unmixed])][:-1] == expected


def test_flat_records_hold_what_the_command_line_prints(finished_runs):
    row = flat_records(finished_runs)[-1]
    assert row.keys() >= {
        "run_id", "notebook", "profile", "method", "original", "new_domain", "seed", "learning_rate", "extra_ratio",
        "mix_ratio", "gate", "local_loss", "local_loss_weight", "position", "site", "layers", "forgetting", "learning",
        "bits_per_byte", "seconds", "device", "git_commit", "is_dirty",
    }  # fmt: skip
    json.dumps(row)


def test_curves_and_gates_as_tables(record):
    curve = curves_table([record, replace(record, run_id="other")])
    measured = [p for p in record.curve if "bits_per_byte_new_validation" in p]
    assert len(curve) == 2 * len(measured) >= 8 and set(curve["run_id"]) == {record.run_id, "other"}
    gates = gate_table([record])
    assert len(gates) == len(record.results["gate_statistics"]) and set(gates["gate"]) == {"elu"}


def test_learning_is_relative_to_fine_tuning_at_the_profiles_mix(record, small_config):
    """Fine-tuning at three mix ratios with one seed each: a tie."""

    def fine_tuned(mix_ratio, value):
        config = small_config(method="fine_tuning", mix_ratio=mix_ratio)
        texts = record.results["bits_per_byte"] | {"new": value, "new_validation": value}
        results = record.results | {"bits_per_byte": texts}
        return replace(record, run_id=config.run_id, config=config.to_dict(), results=results)

    references = [fine_tuned(mix_ratio, value) for mix_ratio, value in ((0.0, 1.0), (0.1, 2.0), (0.5, 3.0))]
    new, before = record.results["bits_per_byte"]["new"], record.results["backbone_bits_per_byte"]["new"]
    assert results_table([record], references)["learning"][0] == pytest.approx(
        (before - new) / (before - 2.0), abs=1e-4
    )


def test_a_record_of_files_that_changed_does_not_count(small_config, tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [json.dumps({"text": f"{number} mele tavi sona. " * 20}) for number in range(300)]
    path.write_text("\n".join(rows))
    config = small_config(new_domain=f"file:{path}", n_tokens=2 * 4 * 32)
    stored = run_or_load(config, progress=False)
    assert runs.stored_record(config) == stored
    path.write_text("\n".join(rows[1:]))
    assert runs.stored_record(config) is None


def test_a_record_of_a_backbone_whose_weights_changed_does_not_count(small_config, tmp_path):
    first = small_config()
    text = prepare_text(first.data, first.backbone, progress=False)
    backbone = get_backbone(first, text, progress=False)
    backbone.save_pretrained(tmp_path)
    text.tokenizer.save_pretrained(tmp_path)
    config = make_config(
        "smoke", backbone_name=str(tmp_path), n_tokens=2 * 4 * 32, batch_size=4, context_length=32, precision="float32"
    )
    stored = run_or_load(config, progress=False)
    assert runs.stored_record(config) == stored
    with torch.no_grad():
        next(backbone.parameters()).add_(0.1)
    backbone.save_pretrained(tmp_path)
    assert runs.stored_record(config) is None
    again = run_or_load(config, progress=False)  # in the same process: what is kept in memory is of the old weights
    assert again.results["backbone_bits_per_byte"] != stored.results["backbone_bits_per_byte"]


@pytest.mark.parametrize("method", runs.WHOLE_COPIES)
def test_a_method_that_keeps_copies_of_all_weights_is_refused_where_they_are_spread(small_config, monkeypatch, method):
    monkeypatch.setattr(runs, "shards_models", lambda: True)
    with pytest.raises(ConfigError, match="--parallel ddp"):
        runs.check_run(small_config(method=method))
