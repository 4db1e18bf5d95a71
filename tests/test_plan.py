"""The plan: what it says is what real training steps take, and it needs neither weights nor a network."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from nrlib import hardware, language_loss, plan_tables, training
from nrlib.benchmark.plan_check import compare, make_model, peak_allocated, train_steps
from nrlib.cli import app
from nrlib.config import make_config
from nrlib.corpora import check_spec
from nrlib.errors import BackboneError, ConfigError
from nrlib.hardware import HARDWARE, Hardware, parse_hardware
from nrlib.machine import attention_in_float32, keep_attention_precision
from nrlib.plan import make_plan, make_plans, notes, planned_model
from nrlib.plan_tables import markdown_table, plan_rows
from nrlib.profiles import METHODS
from nrlib.step_cost import CostTracker, step_cost

CPU = Hardware("cpu", tflops=1.0, tflops_float32=0.5, memory_gb=1.0, utilisation=0.5)
TOLERANCE = 0.15


def small(**changes):
    options = {
        "vocabulary_size": 512, "n_layers": 2, "context_length": 128, "batch_size": 4, "n_tokens": 4 * 128 * 3,
        "d_model": 128, "ffn_width": 352, "n_heads": 4, "precision": "float32",
    }  # fmt: skip
    return make_config("laptop", **{**options, **changes})


def call(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments], prog_name="nrlib")


# --- plan against measurement -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("d_model", "n_layers"), [(128, 4), (256, 2), (512, 1)])
def test_memory_and_arithmetic_are_what_training_takes(d_model, n_layers, method):
    found = compare(small(method=method, d_model=d_model, ffn_width=11 * d_model // 4, n_layers=n_layers))
    assert found.planned_bytes == pytest.approx(found.measured_bytes, rel=TOLERANCE)
    checkpointed = found.measured_bytes_with_checkpointing
    assert found.planned_bytes_with_checkpointing == pytest.approx(checkpointed, rel=TOLERANCE)
    assert found.planned_flops == pytest.approx(found.measured_flops, rel=TOLERANCE)
    if n_layers == 4:  # where activations are most of the memory
        assert found.planned_bytes_with_checkpointing < 0.75 * found.planned_bytes


@pytest.mark.parametrize("method", ["fine_tuning", "neutral_residues"])
def test_mixed_precision_and_accumulation_are_planned_too(method):
    config = small(method=method, precision="bfloat16", accumulation_steps=2, batch_size=8, context_length=64)
    found = compare(config)
    assert found.planned_bytes == pytest.approx(found.measured_bytes, rel=TOLERANCE)
    plan = make_plan(config, CPU)
    assert plan.cost.memory["weight_copies"] > 0
    # those of the micro-batches before are there when the activations are
    assert plan.cost.memory["gradients"] == pytest.approx(4 * plan.n_trainable_weights)
    whole = make_plan(replace(config, training=replace(config.training, accumulation_steps=1)), CPU)
    assert plan.cost.peak_bytes < 0.8 * whole.cost.peak_bytes


@pytest.mark.parametrize("method", ["fine_tuning", "neutral_residues"])
def test_an_accelerator_computes_the_loss_in_parts(monkeypatch, method):
    """Measured on the processor, with the loss computed as on an accelerator."""
    monkeypatch.setattr(language_loss, "N_LOGITS_AT_ONCE", 1 << 16)
    config = small(method=method, vocabulary_size=4096)
    planned = make_plan(config, replace(CPU, name="h100")).cost
    whole = make_plan(config, CPU).cost
    assert planned.memory["logits"] < 0.2 * whole.memory["logits"]
    assert planned.forward_flops == whole.forward_flops
    monkeypatch.setattr(training, "_head_to_compute_in", lambda model, device: language_loss.find_head(model))
    measured = peak_allocated(lambda: train_steps(make_model(config), config, 2))
    assert planned.peak_bytes == pytest.approx(measured, rel=TOLERANCE)
    assert whole.peak_bytes > 1.3 * measured


def test_arithmetic_of_a_forward_pass_by_hand():
    config = small(method="fine_tuning")
    d, f, v, n_layers, t = 128, 352, 512, 2, 128
    linear = n_layers * (4 * d * d + 3 * d * f) + v * d  # weights that meet every token
    attention = n_layers * 2 * t * d  # multiplications a token with T keys and T values
    plan = make_plan(config, CPU)
    assert plan.cost.forward_flops == 2 * (linear + attention)
    # the backward pass: twice the products; attention is computed a second time
    assert plan.cost.training_flops == pytest.approx(2 * (3 * linear + 3.5 * attention), rel=0.02)
    assert plan.cost_with_checkpointing.forward_flops == plan.cost.forward_flops
    assert plan.cost_with_checkpointing.training_flops > 1.15 * plan.cost.training_flops


@pytest.fixture(scope="module")
def smoke_plans():
    return list(make_plans("smoke", {"n_layers": 1}, HARDWARE["h100"]))


def test_a_frozen_backbone_computes_and_keeps_less(smoke_plans):
    plans = {plan.method: plan for plan in smoke_plans}
    full, ours = plans["fine_tuning"], plans["neutral_residues"]
    assert ours.cost.forward_flops > full.cost.forward_flops
    assert ours.cost.training_flops < full.cost.training_flops
    assert ours.cost.memory["optimiser"] < 0.3 * full.cost.memory["optimiser"]
    assert full.cost.memory["optimiser"] == pytest.approx(2 * full.cost.memory["weights"], rel=0.02)
    assert full.n_trainable_weights == full.n_weights
    assert ours.n_trainable_weights == ours.n_extra_weights <= 0.2 * ours.n_backbone_weights
    assert (full.width, full.rank) == (None, None) and ours.width > 1 and plans["lora"].rank > 1


def test_the_parts_are_the_peak_and_the_hours_follow_from_the_arithmetic():
    config = small(n_tokens=10**9)
    plan = make_plan(config, CPU)
    assert plan.cost.peak_bytes == sum(plan.cost.memory.values())
    weights = sum(p.numel() for p in make_model(config).parameters())
    assert plan.n_weights == weights and plan.cost.memory["weights"] == pytest.approx(4 * weights, rel=0.01)
    assert plan.hours == pytest.approx(1e9 * plan.cost.training_flops / (0.5e12 * 0.5) / 3600)
    slow = make_plan(config, replace(CPU, bandwidth_gb=2.0))
    assert slow.hours == pytest.approx(plan.hours + 1e9 * plan.cost.moved_bytes / 2e9 / 3600)
    gpu = replace(CPU, name="h100")
    on_gpu = make_plan(config, gpu)  # float32 was asked for
    assert on_gpu.hours == pytest.approx(1e9 * on_gpu.cost.training_flops / (0.5e12 * 0.5) / 3600)
    automatic = replace(config, training=replace(config.training, precision="auto"))
    assert make_plan(automatic, gpu).hours == pytest.approx(on_gpu.hours / 2)


def test_an_accelerator_keeps_attention_in_bfloat16():
    plans = [make_plan(small(precision="bfloat16"), replace(CPU, name=name)) for name in ("cpu", "h100")]
    assert plans[1].cost.memory["activations"] < 0.97 * plans[0].cost.memory["activations"]
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    fused = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with keep_attention_precision(), attention_in_float32(torch.device("cpu"), torch.bfloat16):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is fused
    with attention_in_float32(torch.device("cpu"), torch.bfloat16):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not fused


def test_no_weight_is_allocated():
    config = small(d_model=1024, ffn_width=2816, n_heads=8)
    plan = None

    def make():
        nonlocal plan
        plan = make_plan(config, CPU)

    assert peak_allocated(make) < 0.01 * plan.cost.memory["weights"]


def test_experts_cannot_be_planned(tiny_model):
    with torch.device("meta"):
        model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    config = small(local_loss="none")
    with pytest.raises(BackboneError, match="Plan with a dense model"):
        step_cost(model, config.method, config.training, torch.float32)


def test_speed_of_other_shapes_follows_from_one():
    flops, moved = 2e11, 3e10
    costs = [(128, 9e6, 1.8e6), (256, 27e6, 3.2e6), (256, 23e6, 4.3e6), (512, 93e6, 6.5e6)]
    comparisons = [
        {"d_model": d, "planned_flops": f, "planned_moved_bytes": b, "tokens_per_second": 1 / (f / flops + b / moved)}
        for d, f, b in costs
    ]
    assert plan_tables.calibrate(comparisons[1:3]) == pytest.approx((flops, moved))
    predicted = plan_tables.predict_speeds(comparisons, 256)
    assert predicted == pytest.approx([c["tokens_per_second"] for c in comparisons])


def test_the_published_comparison_is_within_the_promised_share():
    stored = json.loads(plan_tables.COMPARISON_FILE.read_text(encoding="utf-8"))
    comparisons = stored["comparisons"]
    assert {(c["d_model"], c["method"]) for c in comparisons} == {(d, m) for d in (128, 256, 512) for m in METHODS}
    for c, speed in zip(comparisons, plan_tables.predict_speeds(comparisons, stored["calibrated_on"]), strict=True):
        for name in ("bytes", "bytes_with_checkpointing", "flops"):
            assert c[f"planned_{name}"] == pytest.approx(c[f"measured_{name}"], rel=TOLERANCE)
        assert speed == pytest.approx(c["tokens_per_second"], rel=TOLERANCE)


def test_moved_bytes_of_one_operation_by_hand():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), CostTracker(n_vocabulary=7) as tracker:
        a = torch.empty(10, 20)
        b = a.t() + 1.0  # reads 800 bytes, writes 800
        a @ b  # a product: operations, not bytes
        b.mul_(2.0)
    assert (tracker.n_moved_bytes, tracker.n_flops) == (3200, 2 * 10 * 20 * 10)


# --- the paper's profile ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    import transformers

    def refuse(*_arguments, **_options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.parametrize(
    ("name", "lowest", "highest"), [("google/gemma-2b", 2_506_172_416, 2_506_172_416), ("english-1.3b", 1.25e9, 1.35e9)]
)
def test_the_papers_backbones_have_their_size(no_hub, name, lowest, highest):
    model, n_backbone = planned_model(make_config("paper", backbone_name=name))
    assert lowest <= n_backbone <= highest
    assert 0.19 * n_backbone < sum(p.numel() for p in model.parameters()) - n_backbone <= 0.2 * n_backbone
    assert all(p.is_meta for p in model.parameters())


def test_the_papers_profile_is_planned_without_a_network(no_hub):
    result = call("--profile", "paper", "--method", "neutral_residues", "--format", "json")
    assert result.exit_code == 0, (result.output, result.exception)
    printed = json.loads(result.stdout)
    (plan,) = printed["plans"]
    assert plan["n_backbone_weights"] == 2_506_172_416 and 0.199 < plan["n_extra_weights"] / 2_506_172_416 <= 0.2
    assert plan["cost"]["peak_bytes"] < 80e9  # it fits the device that is named
    assert plan["cost_with_checkpointing"]["peak_bytes"] < plan["cost"]["peak_bytes"]
    new, proxy = (note for note in printed["notes"] if "stops at 200MB" in note)
    assert "450 times" in new and "#90000MB" in new and "50 times" in proxy


def test_forgetting_is_measured_outside_what_the_paper_trains_on():
    data = make_config("paper").data
    specs = [data.original, data.proxy, data.new_domain, data.unseen_original]
    assert len({spec.split("@")[0] for spec in specs}) == 4
    for spec in specs:
        check_spec(spec)


# --- hardware, command, tables ----------------------------------------------------------------------------------------


def test_hardware_by_name_by_numbers_or_changed():
    assert parse_hardware("a100") == HARDWARE["a100"]
    given = parse_hardware("tflops=312, memory=80GB, utilisation=.5")
    assert (given.tflops, given.tflops_float32, given.memory_gb, given.utilisation) == (312, 312, 80, 0.5)
    assert given.source == "as given" and given.is_accelerator
    assert parse_hardware("h100,bandwidth=3000GB").bandwidth_gb == 3000
    changed = parse_hardware("h100,utilisation=0.5")
    assert changed == replace(HARDWARE["h100"], utilisation=0.5)


@pytest.mark.parametrize(
    "text",
    ["tpu", "", "h100,speed=3", "tflops=312", "memory=80GB", "tflops=0,memory=8", "h100,utilisation=40", "tflops=1,tflops=2,memory=3", "h100,memory=-1"],
)  # fmt: skip
def test_other_hardware_is_refused_in_words(text):
    with pytest.raises(ConfigError) as caught:
        parse_hardware(text)
    assert "\n" not in str(caught.value) and any(word in str(caught.value) for word in ("Give one of", "at most 1"))


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "_matrix_tflops", lambda dtype: 2.0 if dtype == torch.bfloat16 else 1.0)
    here = parse_hardware("cpu")
    assert (here.tflops, here.tflops_float32, here.is_accelerator) == (2.0, 1.0, False) and here.memory_gb > 0.5


def test_what_does_not_fit_gets_a_remedy_that_helps():
    config = small(batch_size=32)
    plan = make_plan(config, CPU)
    tight = replace(CPU, memory_gb=0.35 * plan.cost.peak_bytes / 1e9)
    (note,) = (note for note in notes(config, tight, [plan]) if "does not fit" in note)
    steps = int(note.partition("accumulation_steps = ")[2].split()[0].rstrip("."))
    helped = make_plan(replace(config, training=replace(config.training, accumulation_steps=steps)), CPU)
    assert helped.cost.peak_bytes <= tight.memory_gb * 1e9 < plan.cost.peak_bytes
    assert not [note for note in notes(config, CPU, [plan]) if "does not fit" in note]
    hopeless = notes(config, replace(CPU, memory_gb=1e-6), [plan])
    assert any("several (sharded)" in note for note in hopeless)


def test_the_command_takes_a_folder_or_its_configuration_file(tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path)
    options = ("--profile", "smoke", "--method", "fine_tuning", "--format", "json")
    folder, file = (call("--backbone", str(path), *options) for path in (tmp_path, tmp_path / "config.json"))
    assert folder.exit_code == file.exit_code == 0, (folder.output, file.output)
    assert json.loads(folder.stdout)["plans"] == json.loads(file.stdout)["plans"]


def test_the_table_shows_every_method_and_leaves_out_what_one_does_not_use():
    result = call(
        "--profile", "smoke", "-p", "gate=relu", "-p", "extra_ratio=0.3", "-p", "n_layers=1", "--hardware", "a100"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    heading = next(line for line in result.stdout.splitlines() if "fine tuning" in line)
    assert all(method.replace("_", " ") in heading for method in METHODS)
    extra = next(line for line in result.stdout.splitlines() if line.startswith("extra weights")).split()[2:]
    assert extra[0] == "0.00%" and all(25 < float(share.rstrip("%")) <= 30 for share in extra[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "tpu"], "hardware = 'tpu'"),
        (["--method", "prompting"], "method = 'prompting'"),
        (["-p", "gates=relu"], "Did you mean gate?"),
        (["--profile", "huge"], "profile = 'huge' is unknown"),
        (["-p", "extra_ratio=1e-7"], "extra_ratio"),
        (["--backbone", "no/such/config.json"], "no/such/config.json"),
        (["--backbone", "english-1.3b", "-p", "context_length=8192"], "4096 positions"),
    ],
)
def test_the_command_refuses_what_cannot_be(arguments, message):
    result = call("--profile", "smoke", "--method", "neutral_residues", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_the_books_tables_are_made_from_plans(monkeypatch, smoke_plans):
    made = smoke_plans
    monkeypatch.setattr(plan_tables, "make_plans", lambda *_arguments: made)
    pages = plan_tables.paper_pages()
    assert set(pages) == {"plan-gemma-2b.md", "plan-english-1.3b.md"}
    n_columns = {line.count("|") for line in markdown_table(plan_rows(made)).splitlines()}
    assert n_columns == {len(METHODS) + 2}
    assert f"{made[0].n_weights:,}" in pages["plan-gemma-2b.md"]
    comparison = plan_tables.comparison_page()
    assert comparison.count("neutral residues") == 3
