"""Rival methods: each starts at the backbone, keeps to its budget and does what its paper says."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from test_peft_method import extended, open_adapters
from torch.nn import functional as F

from nrlib import NEW, ORIGINAL, tables
from nrlib.architecture import count_layers, count_weights
from nrlib.batches import Batch
from nrlib.config import MethodConfig, TrainingConfig, make_config
from nrlib.distributed import _recompute_activations
from nrlib.errors import BackboneError, ConfigError
from nrlib.methods import apply_method, count_extra_weights
from nrlib.penalties import kl_penalty, per_step
from nrlib.profiles import RIVALS
from nrlib.rivals import block_expansion, elastic_weight_consolidation, weight_interpolation
from nrlib.runs import _logits_before, run
from nrlib.training import make_optimizer, training_step

TOKENS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], torch.tensor([NEW, ORIGINAL, NEW, ORIGINAL]))
ADDING = ("block_expansion", "gated_lora", "orthogonal_finetuning")
FAMILIES = ("llama", "gpt2", "gemma3", "gpt_neox", "qwen3")


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens).logits


def step(model, penalty=None, accumulation_steps=1, learning_rate=1e-2):
    config = TrainingConfig(accumulation_steps=accumulation_steps, learning_rate=learning_rate)
    optimizer = make_optimizer(model, config)
    optimizer.zero_grad()
    model.train()
    losses = training_step(model, BATCH, config, "none", 0.0, torch.float32, penalty=penalty)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    model.eval()
    return losses, gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ADDING)
def test_starts_at_the_backbone_keeps_the_budget_and_learns(method, family, tiny_model):
    backbone = tiny_model(family)
    if family == "gpt2" and method != "block_expansion":  # its matrices are Conv1D
        with pytest.raises(BackboneError, match=r"GPT2LMHeadModel has no torch\.nn\.Linear layers"):
            apply_method(backbone, MethodConfig(method=method, extra_ratio=0.6), seed=0)
        return
    n_backbone, before = count_weights(backbone), logits(backbone)
    model = apply_method(backbone, MethodConfig(method=method, extra_ratio=0.6), seed=0)
    tolerance = 1e-4 if method == "orthogonal_finetuning" else 0  # it puts the matrix together from its singular values
    torch.testing.assert_close(logits(model), before, rtol=tolerance, atol=tolerance)
    assert 0 < count_extra_weights(model, n_backbone) <= 0.6 * n_backbone
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in trainable}
    (first, _), _ = step(model)
    for _ in range(3):
        (last, _), _ = step(model)
    assert last < first
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_model_generates_with_its_cache(family, tiny_model):
    model = apply_method(tiny_model(family), MethodConfig(method="block_expansion", extra_ratio=0.6), seed=0)
    assert count_layers(model) == model.config.num_hidden_layers > 3
    step(model)
    with torch.no_grad():
        cached = model(input_ids=TOKENS[:, :-1], use_cache=True).past_key_values
        last = model(input_ids=TOKENS[:, -1:], past_key_values=cached).logits[:, -1]
    torch.testing.assert_close(last, logits(model)[:, -1], rtol=1e-4, atol=1e-4)


def test_copies_are_spaced_evenly(tiny_model):
    model = block_expansion.build(tiny_model(n_layers=6), MethodConfig(method="block_expansion", extra_ratio=0.5))
    is_copy = [any(p.requires_grad for p in layer.parameters()) for layer in model.model.layers]
    assert [index for index, copied in enumerate(is_copy) if copied] == [2, 5, 8]


@pytest.mark.parametrize("method", ADDING)
def test_budget_too_small(method, tiny_model):
    with pytest.raises(ConfigError, match=r"extra_ratio = 0\.0001 is too small.*Give at least"):
        apply_method(tiny_model(), MethodConfig(method=method, extra_ratio=0.0001), seed=0)


def test_orthogonal_finetuning_keeps_the_large_singular_directions(tiny_model):
    backbone = tiny_model()
    name = "model.layers.0.mlp.up_proj"
    before = backbone.get_submodule(name).weight.detach().clone()
    model = apply_method(backbone, MethodConfig(method="orthogonal_finetuning", extra_ratio=0.2), seed=0)
    for _ in range(3):
        step(model)
    after = model.merge_and_unload().get_submodule(name).weight.detach()
    (u, s, v), change = torch.linalg.svd(before, full_matrices=False), after - before
    assert change.norm() > 1e-3
    assert (u[:, 0] @ change @ v[0]).abs() < 1e-3 * s[0]


def test_kl_penalty_by_hand_and_under_accumulation(tiny_model):
    backbone, model = tiny_model(seed=1), tiny_model(seed=0)
    penalty = kl_penalty(lambda tokens: logits(backbone, tokens).flatten(0, 1), weight=3.0)
    old = BATCH.inputs[BATCH.domain == ORIGINAL]
    p, q = (F.log_softmax(logits(m, old).flatten(0, 1), dim=-1) for m in (backbone, model))
    expected = 3.0 * (p.exp() * (p - q)).sum(dim=-1).mean()
    value = penalty(BATCH.inputs, BATCH.domain, logits(model, BATCH.inputs), old.numel(), 1.0)
    torch.testing.assert_close(value, expected)
    _, whole = step(tiny_model(seed=0), penalty)
    _, parts = step(tiny_model(seed=0), penalty, accumulation_steps=4)
    _, without = step(tiny_model(seed=0))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(without[name], gradient) for name, gradient in whole.items())


def test_kl_penalty_with_recomputed_activations(tiny_model):
    """As where a model is sharded: the pass of the backbone stands between a pass and its recomputation."""
    config, found = TrainingConfig(batch_size=4, precision="float32"), []
    for is_checkpointed in (False, True):
        model = open_adapters(extended(tiny_model())).train()
        if is_checkpointed:
            _recompute_activations(model)
        penalty = kl_penalty(_logits_before(model, lambda: pytest.fail("it holds its backbone")), weight=2.0)
        losses = training_step(model, BATCH, config, "l1", 5.0, torch.float32, penalty=penalty)
        found.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert found[0][0] == found[1][0] and found[0][1]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_kl_penalty_without_original_tokens_is_zero(tiny_model):
    penalty = kl_penalty(lambda tokens: pytest.fail("the backbone was asked for nothing"), weight=1.0)
    assert penalty(TOKENS, torch.full((4,), NEW), logits(tiny_model()), 0, 1.0) == 0


def test_ewc_penalty_by_hand(tiny_model):
    backbone, model = tiny_model(), tiny_model()
    sequences = [(BATCH.inputs[i : i + 1], BATCH.targets[i : i + 1]) for i in range(4)]
    config = MethodConfig(method="elastic_weight_consolidation", ewc_weight=8.0)
    penalty = elastic_weight_consolidation.make_penalty(model, backbone, config, sequences)
    assert penalty() == 0
    name = "model.layers.1.mlp.up_proj.weight"
    fisher = torch.zeros(())
    for inputs, targets in sequences:
        loss = F.cross_entropy(backbone(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        (gradient,) = torch.autograd.grad(loss, [backbone.get_parameter(name)])
        fisher = fisher + gradient[2, 3] ** 2 / 4
    with torch.no_grad():
        model.get_parameter(name)[2, 3] += 0.5
    torch.testing.assert_close(penalty(), 8.0 / 2 * fisher * 0.25, rtol=1e-4, atol=1e-9)
    _, whole = step(model, per_step(penalty), learning_rate=0.0)
    _, parts = step(model, per_step(penalty), accumulation_steps=2, learning_rate=0.0)
    torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_interpolated_weights(ratio, tiny_model):
    backbone, model = tiny_model(seed=0), tiny_model(seed=1)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    weight_interpolation.finish(model, backbone, MethodConfig(method="weight_interpolation", interpolation_ratio=ratio))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, (1 - ratio) * backbone.get_parameter(name) + ratio * trained[name])


@pytest.mark.parametrize("method", RIVALS)
def test_a_run_measures_every_rival(method, small_config):
    options = {"extra_ratio": 0.4} if method in ADDING else {}
    record = run(small_config(method=method, **options), progress=False)
    assert record.results["bits_per_byte"]["new"] < record.results["backbone_bits_per_byte"]["new"]
    assert record.results["bits_per_byte"]["proxy"] != record.results["backbone_bits_per_byte"]["proxy"]


def test_penalties_hold_the_model_to_its_backbone(small_config):
    free = run(small_config(method="fine_tuning"), progress=False).results["drift"]["proxy"]
    distilled = run(small_config(method="distillation", kl_weight=30.0), progress=False).results["drift"]["proxy"]
    consolidated = run(small_config(method="elastic_weight_consolidation", ewc_weight=1e5), progress=False)
    assert distilled < free / 2 and consolidated.results["drift"]["proxy"] < free / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "distillation", "mix_ratio": 0.0}, "kl_weight = 1 acts on original-domain tokens"),
        ({"method": "elastic_weight_consolidation", "proxy": "", "mix_ratio": 0.0}, "proxy is empty"),
        ({"method": "lora", "kl_weight": 1.0}, "has no meaning for method = 'lora'"),
        ({"method": "weight_interpolation", "interpolation_ratio": 1.5}, "between 0 and 1"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config("smoke", **changes)


def test_front_and_the_area_it_dominates():
    points = pd.DataFrame(
        {"learning": [0.5, 1.0, 0.4, 0.8, 1.2], "forgetting": [0.1, 0.4, 0.2, 0.1, 0.5]}, index=list("abcde")
    )
    assert list(tables.front(points).index) == ["d", "b", "e"]
    # up to 0.8 learned for 0.1 of 0.4 forgotten, then nothing below the worst
    assert tables.hypervolume(points, worst_forgetting=0.4) == pytest.approx(0.8 * 0.75)
    assert tables.hypervolume(points.loc[["c"]].assign(forgetting=-0.1), worst_forgetting=0.4) == pytest.approx(0.4)
    assert tables.hypervolume(points.loc[["e"]], worst_forgetting=0.4) == 0


def test_runs_made_before_the_rivals_keep_their_names():
    config = make_config("laptop", method="neutral_residues", learning_rate=1e-2)
    assert not {"kl_weight", "ewc_weight", "interpolation_ratio"} & config.to_dict()["method"].keys()
    assert make_config("laptop", learning_rate=1e-2, kl_weight=1.0).run_id != config.run_id


def test_the_seeds_of_one_setting_count_once_by_their_mean():
    columns = ["method", "learning_rate", "strength", "forgetting", "learning", "extra_weights"]
    rows = [
        ("fine_tuning", 0.01, float("nan"), 0.4, 1.0, 0.0),
        ("neutral_residues", 0.01, 5.0, 0.0, 0.9, 0.2),
        ("neutral_residues", 0.01, 5.0, 0.02, 0.7, 0.2),
    ]
    reading = [{"ratios": {"fine_tuning": 1.0, "neutral_residues": 1.2}}]
    training = [
        {name: {"fine_tuning": 1.0, "neutral_residues": value} for name in ("ratios", "memory", "kept")}
        for value in (0.7, 0.9, 2.0)
    ]
    costs = tables.costs(pd.DataFrame(rows, columns=columns), reading, training).set_index("method")
    assert costs["settings"].tolist() == [1, 1]
    assert costs.loc["neutral_residues", "at_80%"] == pytest.approx(0.01)
    assert (costs.loc["neutral_residues", ["training_time", "training_memory", "kept_memory"]] == 0.9).all()
