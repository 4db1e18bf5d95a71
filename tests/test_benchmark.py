"""The benchmark: what it reports, and that its rivals do the same work. No test compares times."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import mmap
import statistics
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nrlib import GatedAdapter, benchmark
from nrlib.benchmark import cases, gpu, memory
from nrlib.benchmark.inference import OPEN_RATIOS, inference_case
from nrlib.config import make_config
from nrlib.methods import apply_method

WIDE = {"d_model": 48, "n_heads": 2, "batch_size": 2}
TINY = benchmark.Settings(
    profile="smoke", n_rounds=2, n_steps=1, prompt_length=4, n_generated=3, with_memory=False, wide=WIDE
)


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
        assert set(result[kind][names[0]]["ratio"].values()) == {1.0}


def test_result_is_json_and_names_the_circumstances(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["precision"].values()) <= {"float32", "bfloat16"}
    assert result["open_ratios"] == OPEN_RATIOS
    assert result["machine"]["n_threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "peft"} <= set(result["versions"])


def test_table_has_a_line_for_every_case(result):
    table = benchmark.format_table(result)
    assert all(title in table for title in benchmark.TITLES.values())


def test_no_new_round_is_started_after_the_time_is_over():
    settings = dataclasses.replace(TINY, n_rounds=5, seconds=0.0)
    assert benchmark.run_benchmark(progress=False, settings=settings)["n_rounds"] == 1


@pytest.mark.parametrize(("text", "case"), [("unseen_original", "original_domain"), ("new", "new_domain")])
def test_open_ratios_are_those_of_the_published_records(text, case):
    folder = Path(__file__).parents[1] / "data" / "results"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    chosen = [r for r in records if "method" in r.get("config", {}) and r["config"]["method"] == OURS_WITH_RELU]
    rows = [row for record in chosen for row in record["results"]["gate_statistics"] if row["text"] == text]
    assert len({r["config"]["seed"] for r in chosen}) == len(chosen) == 3
    assert OPEN_RATIOS[case] == pytest.approx(statistics.mean(row["open_ratio"] for row in rows), abs=5e-4)


OURS_WITH_RELU = make_config("laptop", gate="relu").to_dict()["method"]


@pytest.mark.parametrize("kind", ["scoring", "prefill", "decoding", "decoding_one"])
@pytest.mark.parametrize("name", OPEN_RATIOS)
def test_gates_open_on_the_stated_share_of_tokens(kind, name):
    settings = dataclasses.replace(TINY, n_generated=40)
    model, config = cases.make_model(kind, name, settings)
    one_round = inference_case(kind, name, model, config, settings)
    is_open = []
    adapters = [module for module in model.modules() if isinstance(module, GatedAdapter)]
    for adapter in adapters:
        assert adapter.gate == "relu" and not adapter.training
        adapter.block_gate.register_forward_hook(lambda module, inputs, score: is_open.append((score > 0).flatten()))
    one_round()
    n_tokens = torch.cat(is_open).numel() / len(adapters)
    assert torch.cat(is_open).float().mean().item() == pytest.approx(OPEN_RATIOS[name], abs=1 / n_tokens + 2e-3)


def test_wide_cases_are_wider():
    for kind, width in (("prefill", 32), ("prefill_wide", 48), ("decoding_one_wide", 48)):
        model, config = cases.make_model(kind, "original_domain", TINY)
        assert config.backbone.d_model == width == model.config.hidden_size


def test_a_prefill_fills_the_cache_and_asks_for_one_token():
    model, config = cases.make_model("prefill", "bare_backbone", TINY)
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    inference_case("prefill", "bare_backbone", model, config, TINY)()
    length = config.training.context_length
    assert outputs[0].logits.shape[1] == 1 and outputs[0].past_key_values.get_seq_length() == length


# --- the section for a GPU, on a shape for a processor ----------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_result():
    shapes = {"tiny": {"context_length": 16, "batch_size": 4}}
    return gpu.run_gpu_benchmark(shapes, progress=False, settings=TINY)


def test_every_case_of_the_gpu_section_is_measured(gpu_result):
    assert json.loads(json.dumps(gpu_result, allow_nan=False)) == gpu_result
    kinds = gpu_result["shapes"]["tiny"]
    assert {kind: tuple(rows) for kind, rows in kinds.items()} == gpu.GPU_CASES
    for row in kinds["training"].values():
        speed = row["tokens_per_second"]["median"]
        assert (
            row["mfu"] == pytest.approx(speed * row["flops_per_token"] / gpu_result["peak_flops"], abs=1e-4) and speed
        )
    table = gpu.format_gpu_table(gpu_result)
    assert all(benchmark.TITLES[name] in table for names in gpu.GPU_CASES.values() for name in names)


def test_what_does_not_fit_into_the_memory_is_none(monkeypatch):
    def full(kind, name, settings):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "make_model", full)
    result = gpu.run_gpu_benchmark({"tiny": {}}, progress=False, settings=TINY)
    assert result["shapes"]["tiny"] == dict.fromkeys(gpu.GPU_CASES)
    assert "does not fit" in gpu.format_gpu_table(result)


@pytest.mark.parametrize("method", gpu.GPU_CASES["training"])
def test_operations_of_a_training_step_are_those_that_torch_counts(method):
    model, config = gpu.make_model("training", method, TINY)
    context_length = config.training.context_length
    counted = gpu.training_flops_per_token(model, context_length)
    backbone = model.base_model.model if method != "fine_tuning" else model
    backbone.set_attn_implementation("eager")  # torch does not count the fused attention of a processor
    tokens = torch.zeros(2, context_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    assert counted * tokens.numel() == counter.get_total_flops()


@pytest.mark.parametrize(("name", "peak"), [("cuda: NVIDIA H200", 989e12), ("cuda: NVIDIA A100-SXM4-80GB", 312e12)])
def test_the_peak_of_a_known_device_is_the_vendors(name, peak, monkeypatch):
    monkeypatch.setattr(gpu, "describe_device", lambda device: name)
    assert gpu.run_gpu_benchmark({}, settings=TINY)["peak_flops"] == peak


def test_shapes_have_the_weights_that_their_names_say():
    for name, n_weights in (("125M", 125e6), ("1.3B", 1.3e9)):
        config = make_config("gpu", **gpu.SHAPES[name])
        with torch.device("meta"):
            backbone = cases.build_backbone(config, config.backbone.vocabulary_size, eos_token_id=0)
        assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(n_weights, rel=0.02)


def test_rate_of_a_matrix_product(monkeypatch):
    ticks = itertools.count(step=0.5)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(ticks))
    assert gpu.matrix_product_flops(torch.device("cpu"), torch.float32, size=8) == 4 * 2 * 8**3 / 0.5


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
