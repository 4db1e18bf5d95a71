"""Several processes: the numbers of a single one, checkpoints for any number of them, adapters saved from shards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES, RESUMED, SAVED_AT, run

WRAPPINGS = ("ddp", "fsdp")
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
