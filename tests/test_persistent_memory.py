"""Persistent memory: the formulas by hand, what is refused, neutrality, and the thresholds of the chapter."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model

from nrlib import NeutralResiduesConfig, NeutralResiduesLayer, tables
from nrlib.companions import persistent_memory as companion
from nrlib.companions import persistent_memory_extension as extension
from nrlib.companions.persistent_memory_extension import JointSoftmax, neutrality
from nrlib.config import make_config
from nrlib.errors import BackboneError, ConfigError
from nrlib.persistent_memory import PersistentMemory
from nrlib.records import published_records
from nrlib.runs import check_run
from nrlib.study import published_studies

TOKENS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
SEEDS = (0, 1, 2)


def numbers(tensor):
    return tensor.detach().double().numpy()


def softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def randomised(module, std=0.5):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module


# --- the system -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all_attention", "unscaled", "split"])
def test_attention_is_the_formula(kind):
    """Loops over heads and positions, in double precision."""
    n_heads, d_head, n_vectors, n_tokens = 2, 3, 4, 5
    layer = randomised(companion.AllAttention(n_heads * d_head, n_heads, n_vectors, span=6, kind=kind))
    x = torch.randn(1, n_tokens, n_heads * d_head, generator=torch.Generator().manual_seed(1))
    hidden = numbers(x)[0]
    q, k, v = (
        (hidden @ numbers(part.weight).T).reshape(n_tokens, n_heads, d_head)
        for part in (layer.query, layer.key, layer.value)
    )
    scales = (1, 1) if kind == "unscaled" else (d_head**0.5, n_vectors**0.5)
    keys, values = scales[0] * numbers(layer.persistent_keys), scales[1] * numbers(layer.persistent_values)
    mixed = np.zeros((n_tokens, n_heads, d_head))
    for h in range(n_heads):
        for t in range(n_tokens):
            context = [q[t, h] @ (k[s, h] + numbers(layer.positions)[:, t - s]) for s in range(t + 1)]
            scores = np.array([*context, *(keys[h] @ q[t, h])]) / d_head**0.5
            if kind == "split":
                a = np.concatenate([softmax(scores[: t + 1]), softmax(scores[t + 1 :])])
            else:
                a = softmax(scores)
            mixed[t, h] = a[: t + 1] @ v[: t + 1, h] + a[t + 1 :] @ values[h]
    expected = mixed.reshape(n_tokens, -1) @ numbers(layer.output.weight).T
    np.testing.assert_allclose(numbers(layer(x))[0], expected, rtol=1e-4, atol=1e-6)


def test_vectors_in_use_have_variance_1_and_a_step_moves_them_as_far_as_the_paper_says():
    torch.manual_seed(0)
    layer = companion.AllAttention(64, 4, 256, span=8)
    for part, stored, scale in zip(
        layer.persistent(), (layer.persistent_keys, layer.persistent_values), (16**0.5, 256**0.5), strict=True
    ):
        assert part.var().item() == pytest.approx(1, rel=0.05)
        assert stored.var().item() == pytest.approx(1 / scale**2, rel=0.05)
    before = [part.detach().clone() for part in layer.persistent()]
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    layer(torch.randn(2, 8, 64)).square().sum().backward()
    optimizer.step()  # Adam's first step moves each stored number by the rate
    for part, old, scale in zip(layer.persistent(), before, (16**0.5, 256**0.5), strict=True):
        assert (part - old).abs().median().item() == pytest.approx(scale * 1e-3, rel=0.05)


def test_vectors_cost_what_a_feed_forward_block_of_that_width_costs():
    def count(kind):
        return sum(p.numel() for p in companion.make_model(24, kind).parameters())

    vectors, ffn = (count(kind) - count("attention_only") for kind in ("all_attention", "feed_forward"))
    assert vectors == 2 * (2 * 256 * 64)
    assert 0 < ffn - vectors <= 2 * (256 + 64 + 2 * 64)  # its biases and its LayerNorm


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_all_attention_learns_what_attention_alone_does_not(monkeypatch, seed):
    """The study in short, on a smaller table; the published results below are the thresholds at full length."""
    monkeypatch.setattr(companion, "MarkovSource", partial(companion.MarkovSource, n_symbols=12))
    for name, value in {"BATCH_SIZE": 32, "CONTEXT_LENGTH": 12, "LEARNING_RATE": 4e-3, "N_MEASURED": 512}.items():
        monkeypatch.setattr(companion, name, value)
    kinds = ("attention_only", "feed_forward", "all_attention")
    rows = [
        {"kind": k, "seed": seed, **companion.language_model(seed=seed, kind=k, n_steps=300, width=64)} for k in kinds
    ]
    alone, with_ffn, vectors = companion.with_gap_closed(rows)
    assert alone["perplexity"] > 1.03 * with_ffn["perplexity"]
    assert (alone["gap_closed"], with_ffn["gap_closed"]) == (0, 1)
    assert vectors["gap_closed"] > 0.7
    assert min(vectors["persistent_mass"]) > 0.5 and alone["persistent_mass"] == [0, 0]
    assert [step for step, _ in vectors["curve"]][-1] == 300 and vectors["curve"][0][1] > vectors["perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_vectors_without_scaling_stay_behind(monkeypatch, seed):
    """At full width, without which the scaling changes little, and a third of the steps."""
    monkeypatch.setattr(companion, "N_MEASURED", 256)
    found = {k: companion.language_model(seed=seed, kind=k, n_steps=300) for k in ("all_attention", "unscaled")}
    assert found["all_attention"]["perplexity"] < found["unscaled"]["perplexity"] - 0.3


def test_attention_sees_no_later_token_and_the_mass_is_a_share():
    model = randomised(companion.make_model(24, "all_attention"))
    tokens = TOKENS % 24
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 24
    assert torch.equal(model(tokens)[:, :-1], model(changed)[:, :-1])
    masses = companion.persistent_mass(model, tokens)
    assert len(masses) == 2 and all(0 < mass < 1 for mass in masses)
    assert companion.persistent_mass(companion.make_model(24, "attention_only"), tokens) == [0, 0]
    assert companion.persistent_mass(companion.make_model(24, "split"), tokens) == pytest.approx([0.5, 0.5])


def test_the_source_is_its_table():
    source = companion.MarkovSource(0, n_symbols=4)
    tokens = source.sample(2_000, 30, seed=1)
    counts = torch.zeros(4, 4, 4, dtype=torch.float64)
    counts.index_put_(tuple(tokens.unfold(1, 3, 1).reshape(-1, 3).T), torch.ones(2_000 * 28, dtype=torch.float64), accumulate=True)  # fmt: skip
    often = counts.sum(-1) > 2_000
    assert often.any()
    torch.testing.assert_close((counts / counts.sum(-1, keepdim=True))[often], source.table[often], atol=0.03, rtol=0)
    rows = source.table[tokens[:, :-2], tokens[:, 1:-1]]
    entropy = -(rows * rows.clamp(min=1e-300).log()).sum(-1).mean().item()
    assert source.loss(tokens) == pytest.approx(entropy, rel=0.02)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: companion.AllAttention(10, 3, 4, 8), "d_model = 10 cannot be split into n_heads = 3"),
        (lambda: companion.make_model(24, "both"), "kind = 'both' is unknown.*feed_forward, attention_only"),
        (lambda: companion.MarkovSource(0, n_symbols=1), "n_symbols = 1.*two symbols or more"),
        (lambda: companion.make_model(24, "split", span=4)(TOKENS % 24), "12 tokens are more than the span of 4"),
    ],
)
def test_bad_input_of_the_system(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# --- the extension ----------------------------------------------------------------------------------------------------


def test_the_residue_is_the_formula(tiny_model):
    """Two heads share a key head; the block's own queries and output projection."""
    block = tiny_model(num_key_value_heads=1).model.layers[0].self_attn
    memory = randomised(PersistentMemory(16, 2, 8, width=5, n_layers=3, gate="relu"))
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    expected = np.zeros((6, 16))
    for t, hidden in enumerate(numbers(x)[0]):
        q = (numbers(block.q_proj.weight) @ hidden).reshape(2, 8)
        keys, values = 8**0.5 * numbers(memory.keys), 5**0.5 * numbers(memory.values)
        mixed = [softmax(keys[h] @ q[h] / 8**0.5) @ values[h] for h in range(2)]
        score = numbers(memory.block_gate.weight)[0] @ hidden + numbers(memory.block_gate.bias)[0]
        expected[t] = max(score, 0) * (numbers(block.o_proj.weight) @ np.concatenate(mixed))
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(numbers(memory(x, block))[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "name"), [("phi3", "qkv_proj"), ("gpt2", "c_attn"), ("qwen3", "q_norm"), ("olmo2", "q_norm"), ("opt", "q_proj")])  # fmt: skip
def test_the_queries_are_those_the_block_makes(family, name, tiny_model, monkeypatch):
    """The same as the block gives to its own attention at position 0, where a rotation does nothing."""
    from nrlib.architecture import attention_queries, find_blocks

    model = tiny_model(family)
    block = model.get_submodule(find_blocks(model, "persistent_memory")[0])
    assert getattr(block, name, None) is not None
    seen = {}
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, *args, **options):
        seen.setdefault("query", query)
        return original(query, *args, **options)

    def keep(_, args, kwargs):
        seen.setdefault("x", args[0] if args else kwargs["hidden_states"])

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(input_ids=TOKENS[:, :1])
    handle.remove()
    with torch.no_grad():
        queries = attention_queries(block, seen["x"])  # (B, 1, heads, d_h)
    scale = block.head_dim**-0.5 if family == "opt" else 1.0  # OPT scales its queries, the others their scores
    torch.testing.assert_close(queries.transpose(1, 2) * scale, seen["query"])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_bias_of_the_output_projection_is_not_added_twice(family, tiny_model):
    from nrlib.architecture import find_blocks

    backbone = tiny_model(family)
    with torch.no_grad():
        for name in find_blocks(backbone, "attention"):
            block = backbone.get_submodule(name)
            (block.out_proj if family == "opt" else block.c_proj).bias.normal_()
        before = backbone(input_ids=TOKENS).logits
        model = get_peft_model(backbone, NeutralResiduesConfig(site="persistent_memory", gate="none")).eval()
        assert torch.equal(model(input_ids=TOKENS).logits, before)


@pytest.mark.parametrize("family", ["gpt_neox", "falcon"])
def test_a_family_whose_queries_stand_mixed_with_its_keys_is_refused_before_anything_changes(family, tiny_model):
    backbone = tiny_model(family)
    with pytest.raises(BackboneError, match=r"looked for q_proj.*query_key_value.*site = 'attention' or 'ffn'"):
        get_peft_model(backbone, NeutralResiduesConfig(site="persistent_memory"))
    assert not any(isinstance(module, NeutralResiduesLayer) for module in backbone.modules())


def test_what_is_no_attention_block_and_a_serial_position_are_refused(tiny_model):
    with pytest.raises(BackboneError, match=r"LlamaMLP.*it holds gate_proj, up_proj"):
        get_peft_model(
            tiny_model(), NeutralResiduesConfig(site="persistent_memory", target_modules=["model.layers.0.mlp"])
        )
    for make in (NeutralResiduesConfig, make_config):
        with pytest.raises(ConfigError, match=r"position = 'serial' has no meaning for site = 'persistent_memory'"):
            make(site="persistent_memory", position="serial")
        with pytest.raises(ConfigError, match=r"activation = 'gelu' has no meaning for site = 'persistent_memory'"):
            make(site="persistent_memory", activation="gelu")


def test_it_compiles_to_one_graph(tiny_model):
    model = get_peft_model(tiny_model(n_layers=1), NeutralResiduesConfig(site="persistent_memory")).eval()
    for name, parameter in model.named_parameters():
        if ".values" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=TOKENS).logits, expected, atol=1e-2)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=TOKENS, use_cache=False).logits, expected)
    torch._dynamo.reset()


def test_a_run_is_checked_and_keeps_its_name(small_config):
    """The new choice adds no field: what was run before is called what it was called."""
    check_run(small_config(site="persistent_memory"))
    with pytest.raises(ConfigError, match=r"extra_ratio = 0\.001 is too small"):
        check_run(small_config(site="persistent_memory", extra_ratio=0.001))
    assert make_config("laptop", site="attention", learning_rate=0.01).run_id == "laptop-nr-s0-7c398cca"


def test_the_initialisation_is_that_of_the_gate_alone():
    torch.manual_seed(0)
    for initialisation, variance in (("low_variance", 1 / (1024 * 3)), ("he", 2 / 1024)):
        memory = PersistentMemory(1024, 4, 256, 32, n_layers=3, initialisation=initialisation)
        assert memory.block_gate.weight.var().item() == pytest.approx(variance, rel=0.15)
        assert memory.keys.var().item() == pytest.approx(1 / 256, rel=0.05)
        assert not memory.values.any() and not memory.block_gate.bias.any()


def test_a_joint_softmax_takes_from_the_context_what_the_vectors_attract(tiny_model):
    """Each head of the first layer puts out its share of context times what it did."""
    model = tiny_model(num_key_value_heads=1)
    model.set_attn_implementation("eager")
    mixed = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        assert torch.equal(JointSoftmax(model, 0)(TOKENS).logits, before)
        torch.testing.assert_close(JointSoftmax(model, 7, -1e4)(TOKENS).logits, before)
        joint = JointSoftmax(model, 7, -1.5, seed=3)(TOKENS, output_attentions=True)
    weights = joint.attentions[0]  # (B, heads, T, N + T)
    assert weights.shape == (4, 2, 12, 7 + 12) and not weights[..., 7:].triu(1).any()
    share = weights[..., 7:].sum(-1)
    assert (share < 1).all() and share[..., 0].mean() < share[..., -1].mean()  # a long context loses less
    expected = mixed[0].unflatten(-1, (2, 8)) * share.transpose(1, 2)[..., None]
    torch.testing.assert_close(mixed[-1], expected.flatten(-2))
    assert not torch.allclose(joint.logits, before, atol=1e-2)


def test_a_joint_softmax_has_the_precision_of_its_backbone(tiny_model):
    exact = JointSoftmax(tiny_model(), 7, -1.5, seed=3)
    rounded = JointSoftmax(tiny_model().to(torch.bfloat16), 7, -1.5, seed=3)
    with torch.no_grad():
        expected, logits = (model(TOKENS).logits for model in (exact, rounded))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("n", "bias"), [(-1, 0.0), (3, 1.0), (3, math.nan), (3, -math.inf)])
def test_bad_vectors_of_a_joint_softmax(n, bias, tiny_model):
    with pytest.raises(ConfigError, match="0 vectors or more, and a bias of at most 0"):
        JointSoftmax(tiny_model(), n, bias)
    with pytest.raises(ConfigError, match="each 1 or more"):
        neutrality(seed=0, profile="smoke", n_vectors=[0], logit_biases=[])


def test_neutrality_of_the_small_profile():
    rows = neutrality(seed=0, profile="smoke", n_vectors=[2, 40], logit_biases=[-10.0])["rows"]
    values = {(row["kind"], row["n_vectors"]): row["bits_per_byte"] for row in rows}
    backbone = values.pop(("backbone", 0))
    assert values[("separate", 2)] == values[("separate", 40)] == backbone
    assert values[("joint", 2)] != backbone != values[("joint", 40)]
    assert abs(values[("biased", 40)] - backbone) < abs(values[("joint", 40)] - backbone)


# --- the thresholds, on the published results of three seeds ----------------------------------------------------------


@pytest.fixture(scope="module")
def results(published_results):
    """Tables of the published language models, the untrained extensions and the trained ones."""
    models = pd.DataFrame(companion.with_gap_closed(published_studies(companion.language_model)))
    trials = published_studies(neutrality)
    untrained = pd.DataFrame([{"seed": trial["seed"], **row} for trial in trials for row in trial["rows"]])
    records = {record.run_id: record for record in published_records()}
    arms = [records[config.run_id] for config in extension.arms("laptop", SEEDS)]
    return models, untrained, tables.results_table(arms, records.values())


def test_all_attention_closes_the_gap_and_vectors_without_scaling_do_not(results):
    models, _, _ = results
    by_kind = models.set_index(["kind", "seed"]).sort_index()
    for kind in companion.KINDS:
        assert set(by_kind.loc[kind].index) == set(SEEDS)
    assert (by_kind.loc["all_attention"]["gap_closed"] > 0.7).all()
    assert (by_kind.loc["unscaled"]["gap_closed"] < 0.2).all()
    assert all(mass > 0.5 for masses in by_kind.loc["all_attention"]["persistent_mass"] for mass in masses)
    split_less_joint = by_kind.loc["split"]["gap_closed"] - by_kind.loc["all_attention"]["gap_closed"]
    assert (split_less_joint > 0.1).sum() == 2 and split_less_joint.min() > -0.01  # not the paper's finding
    assert (models["perplexity"] > models["best_perplexity"]).all()
    assert not models["n_weights"].groupby(models["kind"]).std().any()


def test_zero_values_in_a_joint_softmax_are_the_trap_and_a_softmax_of_their_own_is_not(results):
    _, untrained, _ = results
    assert set(untrained["seed"]) == set(SEEDS)
    backbone = untrained.loc[untrained["kind"] == "backbone", "bits_per_byte"]
    assert backbone.nunique() == 1
    assert (untrained.loc[untrained["kind"] == "separate", "bits_per_byte"] == backbone.iloc[0]).all()
    for _, rows in untrained.groupby("seed"):
        joint = rows[rows["kind"] == "joint"].sort_values("n_vectors")["bits_per_byte"] / backbone.iloc[0]
        assert joint.is_monotonic_increasing and joint.iloc[-1] > 1.1 and abs(joint.iloc[0] - 1) < 0.001
        biased = rows[rows["kind"] == "biased"].set_index("logit_bias")["bits_per_byte"] / backbone.iloc[0]
        assert 0 < abs(biased.loc[-10.0] - 1) < 0.001 and biased.loc[-2.0] > 1.02


def test_persistent_vectors_learn_less_and_forget_more_than_adapters_beside_the_ffn(results):
    _, _, table = results
    compared = table[table["local_loss_weight"] > 0].set_index(["site", "seed"])
    assert len(compared) == 3 * len(SEEDS)
    ffn, attention, memory = (compared.loc[site] for site in ("ffn", "attention", "persistent_memory"))
    assert memory["learning"].max() < min(ffn["learning"].min(), attention["learning"].min())
    assert (memory["forgetting"] > ffn["forgetting"]).all()
    assert compared["extra_weights"].max() - compared["extra_weights"].min() < 0.005
