"""Several processes: the numbers of a single one, checkpoints for any number of them, adapters saved from shards."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from distributed_worker import CASES, RESUMED, SAVED_AT, run

from nrlib import distributed, runs
from nrlib.config import flat_values
from nrlib.distributed import WRAPPINGS, process_index, processes
from nrlib.errors import ConfigError, StorageError

TESTS = Path(__file__).parent


def start_processes(*arguments, **options):
    """Start two processes as torchrun would, wait for them, and return the results of both."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **options,
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        return [(process.communicate(timeout=240), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came out of every case: alone, by ddp and by fsdp; and the folder with what was saved."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nrlib.training.Meter", None)  # the worker puts its own there
        patch.setattr("nrlib.training._head_to_compute_in", None)
        alone = {name: run(case)[0] for name, case in CASES.items()}
        torch.save(alone, folder / "alone.pt")
        for (_, errors), code in start_processes(str(TESTS / "distributed_worker.py"), str(folder)):
            assert code == 0, errors[-3000:]
        found = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in WRAPPINGS}
        found["alone"] = alone
        for wrapping in WRAPPINGS:
            for name in RESUMED:
                resumed, _ = run(CASES[name], checkpoint=found[wrapping][name]["checkpoint"])
                alone[f"{name}, resumed from {wrapping}"] = resumed
    return found, folder


def assert_same_run(found, expected, rtol=1e-5):
    for at, (row, expected_row) in enumerate(zip(found["readings"], expected["readings"], strict=True)):
        assert row == pytest.approx(expected_row, rel=rtol, abs=1e-7), f"step {at}"
    assert found["weights"].keys() <= expected["weights"].keys()  # of a sharded model only the trained ones
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "bfloat16"])
def test_two_processes_give_the_numbers_of_one(name, wrapping, results):
    found, _ = results
    alone = found["alone"][name]
    assert len(alone["readings"]) == 10 and alone["readings"][0] != alone["readings"][1]
    assert any(local > 0 for _, local, _ in alone["readings"]) == (CASES[name].method == "neutral_residues")
    assert_same_run(found[wrapping][name], alone)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_two_processes_in_bfloat16(wrapping, results):
    found, _ = results
    for row, expected in zip(
        found[wrapping]["bfloat16"]["readings"], found["alone"]["bfloat16"]["readings"], strict=True
    ):
        assert row[:2] == pytest.approx(expected[:2], rel=0.02, abs=1e-4)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("name", RESUMED)
def test_another_number_of_processes_goes_on_from_a_checkpoint(name, wrapping, results):
    found, _ = results
    alone = found["alone"][name]
    rest = {**alone, "readings": alone["readings"][SAVED_AT:]}
    assert_same_run(found[wrapping][f"{name}, resumed"], rest)
    assert_same_run(found["alone"][f"{name}, resumed from {wrapping}"], rest)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_holds_trained_weights_only_and_whole(name, wrapping, results):
    found, _ = results
    expected, checkpoint = found["alone"][name]["checkpoint"], found[wrapping][name]["checkpoint"]
    assert checkpoint["step"] == SAVED_AT and len(checkpoint["curve"]) == SAVED_AT
    shapes = {key: value.shape for key, value in expected["weights"].items()}
    assert {key: value.shape for key, value in checkpoint["weights"].items()} == shapes
    assert ("model.embed_tokens.weight" in shapes) == (name == "fine_tuning")
    for index, moments in expected["optimizer"]["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(checkpoint["optimizer"]["state"][index][key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["fine_tuning", "lora", "neutral_residues"])
def test_what_is_saved_from_shards_loads_on_one_device(name, results, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, folder = results
    if name == "fine_tuning":
        model = AutoModelForCausalLM.from_pretrained(folder / name)
    else:
        model = PeftModel.from_pretrained(tiny_model(n_layers=2), folder / name)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(20).reshape(2, 10)).logits
        backbone = tiny_model(n_layers=2)(input_ids=torch.arange(20).reshape(2, 10)).logits
    torch.testing.assert_close(logits, torch.load(folder / name / "logits.pt"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, backbone, atol=1e-2)


# --- alone ------------------------------------------------------------------------------------------------------------


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with processes():
        assert (process_index(), distributed.n_processes(), distributed.is_first_process()) == (0, 1, True)
        assert not distributed.shards_models()


@pytest.mark.parametrize(("parallel", "remedy"), [("fsdp", "torchrun --nproc-per-node"), ("dpp", "ddp, fsdp")])
def test_what_processes_refuses(parallel, remedy, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=remedy), processes(parallel):
        pass


def test_a_batch_that_cannot_be_shared_is_refused_before_any_work(small_config, monkeypatch):
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    runs.check_run(small_config(batch_size=8, accumulation_steps=4))
    with pytest.raises(ConfigError, match=r"batch_size = 4 .*multiple of 8"):
        runs.check_run(small_config(batch_size=4, accumulation_steps=4))


def test_processes_with_caches_of_their_own_are_told(monkeypatch):
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)

    def other_has_step_5(steps, own):
        steps[0].copy_(own)
        steps[1].fill_(5)

    monkeypatch.setattr(distributed.dist, "all_gather", other_has_step_5)
    distributed.check_agreement(5)
    with pytest.raises(StorageError, match=r"\[0, 5\].*NRLIB_CACHE"):
        distributed.check_agreement(0)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("method", "wrapping"), [("fine_tuning", "fsdp"), ("neutral_residues", "ddp")])
def test_extend_under_torchrun(method, wrapping, small_config, tmp_path):
    """The same record from one process and from two; only the first process writes and prints."""
    found = {}
    for name, arguments in {"alone": [], wrapping: ["--parallel", "fsdp"] if wrapping == "fsdp" else []}.items():
        folder = tmp_path / name
        launcher = [sys.executable, "-m"]
        if name != "alone":
            launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        values = flat_values(small_config(method=method))
        given = {key: value for key, value in values.items() if key in SMALL}
        command = [*launcher, "nrlib.cli", "extend", "--profile", "smoke", "--method", method, *arguments]
        command += [part for key, value in given.items() for part in ("-p", f"{key}={value}")]
        environment = {
            **os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "NRLIB_CACHE": str(folder),
        }  # fmt: skip
        done = subprocess.run(
            [*command, "--save", str(folder / "saved")], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("bits per byte (lower") == 1
        (path,) = (folder / "records").glob("*.json")
        found[name] = json.loads(path.read_text()) | {"files": sorted(p.name for p in (folder / "saved").iterdir())}
        assert not list((folder / "checkpoints").glob("*"))
    together, alone = found[wrapping], found["alone"]
    assert together["config"] == alone["config"] and together["files"] == alone["files"]
    assert together["provenance"]["n_processes"] == 2
    for key in ("bits_per_byte", "backbone_bits_per_byte"):
        assert together["results"][key] == pytest.approx(alone["results"][key], abs=1e-4)
