"""The benchmark: what it reports, and that its rivals do the same work. No test compares times."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap

import pytest
import torch

from nrlib import benchmark
from nrlib.benchmark import cases, memory
from nrlib.config import make_config
from nrlib.methods import apply_method

TINY = benchmark.Settings(profile="smoke", n_rounds=2, n_steps=1, prompt_length=4, n_generated=3, with_memory=False)


@pytest.fixture(scope="module")
def result():
    return benchmark.run_benchmark(progress=False, settings=TINY)


def test_every_case_is_measured(result):
    assert {kind: tuple(result[kind]) for kind in benchmark.CASES} == benchmark.CASES
    assert result["n_rounds"] == 2
    for kind, names in benchmark.CASES.items():
        for name in names:
            row = result[kind][name]
            values = [*row["tokens_per_second"].values(), *row["ratio"].values(), *row["processor_ratio"].values()]
            assert all(math.isfinite(value) and value > 0 for value in values)
            assert 0 <= row["kernel_time_ratio"] <= 1
        assert set(result[kind][benchmark.OURS]["ratio"].values()) == {1.0}


def test_result_is_json_and_names_the_circumstances(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["precision"] in ("float32", "bfloat16")
    assert result["machine"]["n_threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "peft"} <= set(result["versions"])


def test_table_has_a_line_for_every_case(result):
    table = benchmark.format_table(result)
    assert all(title in table for title in benchmark.TITLES.values())


def test_no_new_round_is_started_after_the_time_is_over():
    settings = dataclasses.replace(TINY, n_rounds=5, seconds=0.0)
    assert benchmark.run_benchmark(progress=False, settings=settings)["n_rounds"] == 1


def test_trainer_does_the_same_training_as_our_loop():
    config = make_config("smoke", precision="float32")
    batches = cases.random_batches(config, n_steps=4)
    weights = []
    for one_round in (cases.train_with_our_loop, cases.train_with_transformers):
        backbone = cases.build_backbone(config, config.backbone.vocabulary_size, eos_token_id=0)
        model = apply_method(backbone, config.method, seed=0)
        start, end, n_tokens = one_round(model, batches, config)
        assert end.seconds > start.seconds
        assert n_tokens == 3 * batches.batch_size * batches.context_length
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of the processor")
def test_peak_memory_counts_what_was_freed_again():
    n_bytes = 64_000_000

    def use_and_free() -> None:
        # fresh pages, unlike a tensor's, which may come from blocks the allocator kept
        with mmap.mmap(-1, n_bytes) as block:
            block.write(b"x" * n_bytes)

    n_allocated = 2 * n_bytes / 1e6  # the bytes object is the other half
    assert n_bytes / 1e6 - 8 <= memory.peak_memory_of(use_and_free) <= n_allocated + 8
