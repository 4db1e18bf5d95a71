"""Gates that weigh the last tokens together: by hand, and with every way a sequence reaches a model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FAMILIES, D, L, build_tiny_image_reader
from test_peft_method import TOKENS, extended, logits, open_adapters

from nrlib import NeutralResiduesConfig
from nrlib.adapter import GatedAdapter
from nrlib.architecture import count_layers, model_width
from nrlib.config import make_config
from nrlib.errors import BackboneError, ConfigError
from nrlib.gate_memory import BlockGate, causal_mean, decoder_of

LENGTH = 12


def remembering(backbone, **changes):
    """Open adapters with a short memory, so that tokens leave it."""
    return open_adapters(extended(backbone, **{"gate_memory": 3, "gate": "sigmoid", **changes})).eval()


def greedy(model, prompt, **options):
    """Nothing but arithmetic decides: no sampling, no end."""
    mask = options.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )


def test_the_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 1.0, 1.0, 4.0]])
    expected = torch.tensor([[1.0, 1.5, 2.5, 4.5], [5.0, 3.0, 1.0, 2.5]])
    torch.testing.assert_close(causal_mean(values, 2), expected)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    expected[0] = torch.tensor([0.0, 2.0, 2.5, 4.5])
    torch.testing.assert_close(causal_mean(values, 2, mask), expected)
    torch.testing.assert_close(causal_mean(values, 1), values)
    torch.testing.assert_close(causal_mean(values, 100)[:, -1], values.mean(dim=1))


def test_texts_in_one_row_do_not_remember_each_other():
    values = torch.tensor([[1.0, 2.0, 3.0, 6.0, 5.0, 1.0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    torch.testing.assert_close(causal_mean(values, 2, None, positions), torch.tensor([[1.0, 1.5, 2.5, 6.0, 5.5, 3.0]]))
    torch.testing.assert_close(causal_mean(values, 9, None, torch.arange(6)[None]), causal_mean(values, 9))


def test_a_memory_of_one_token_is_the_papers_gate():
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 8)
    one, three = (GatedAdapter(8, 4, 2, gate_memory=memory) for memory in (1, 3))
    three.load_state_dict(one.state_dict())
    torch.testing.assert_close(one.gate_values(x), torch.nn.functional.elu(torch.nn.Linear.forward(one.block_gate, x)))
    smoothed = torch.stack([x[:, max(0, t - 2) : t + 1].mean(dim=1) for t in range(LENGTH)], dim=1)
    torch.testing.assert_close(three.gate_values(x), one.gate_values(smoothed))


def test_the_future_is_not_read():
    torch.manual_seed(0)
    gate, x = BlockGate(8, memory=5), torch.randn(1, LENGTH, 8)
    changed = x.clone()
    changed[:, 7:] = 0
    assert torch.equal(gate(x)[:, :7], gate(changed)[:, :7])
    assert not torch.equal(gate(x)[:, 7:], gate(changed)[:, 7:])


@pytest.mark.parametrize("memory", [0, -1, 2.5, True])
def test_a_memory_that_is_none(memory):
    with pytest.raises(ConfigError, match="gate_memory"):
        NeutralResiduesConfig(gate_memory=memory)


def test_a_memory_of_no_gate():
    with pytest.raises(ConfigError, match="gate_memory = 8 has no meaning for method = 'vanilla_adapter'"):
        make_config("smoke", method="vanilla_adapter", gate_memory=8)
    with pytest.raises(ConfigError, match=r"gate_memory = 8.*gate = 'none'"):
        make_config("smoke", gate="none", local_loss="none", gate_memory=8)
    with pytest.raises(ConfigError, match=r"gate_memory = 8.*gate = 'none'"):
        NeutralResiduesConfig(gate="none", local_loss="none", gate_memory=8)


def test_a_run_without_memory_keeps_its_name():
    assert "gate_memory" not in make_config("smoke").to_dict()["method"]
    assert make_config("smoke", gate_memory=1).run_id == make_config("smoke").run_id
    assert make_config("smoke", gate_memory=8).run_id != make_config("smoke").run_id


# --- every family, every way to read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_tokens_are_remembered(family, tiny_model):
    model = remembering(tiny_model(family))
    tokens = TOKENS[:2, :LENGTH]
    whole = logits(model, tokens)
    with model.disable_adapter():
        assert not torch.allclose(whole, logits(model, tokens), atol=1e-3)
    cache, parts = None, []
    with torch.no_grad():
        for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:9], tokens[:, 9:]):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)
    prompt = tokens[:, :5]
    assert torch.equal(greedy(model, prompt), greedy(model, prompt, use_cache=False))


@pytest.mark.parametrize("site", ["ffn", "attention", "persistent_memory"])
def test_beams_padding_and_longer_memories(site, tiny_model):
    model = remembering(tiny_model(), site=site)
    prompt = TOKENS[:2, :5]
    assert torch.equal(greedy(model, prompt, num_beams=3), greedy(model, prompt, num_beams=3, use_cache=False))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(9) >= 4).long().expand(2, -1)
    assert torch.equal(greedy(model, padded, attention_mask=mask)[:, 4:], greedy(model, prompt))


def test_two_adapters_remember_apart(tiny_model):
    model = remembering(tiny_model())
    model.add_adapter("second", NeutralResiduesConfig(gate_memory=5, gate="sigmoid", extra_ratio=0.3))
    open_adapters(model)
    prompt = TOKENS[:2, :5]
    alone = greedy(model, prompt)
    model.base_model.set_adapter(["default", "second"])
    assert torch.equal(greedy(model, prompt), greedy(model, prompt, use_cache=False))
    model.set_adapter("default")
    assert torch.equal(greedy(model, prompt), alone)


def test_two_adapters_that_transformers_loads_remember_apart(tiny_model, tmp_path):
    """`load_adapter` of the model itself makes a tuner for each."""
    model = remembering(tiny_model())
    model.add_adapter("second", NeutralResiduesConfig(gate_memory=5, gate="sigmoid", extra_ratio=0.3))
    open_adapters(model)
    model.save_pretrained(tmp_path)
    names = ["default", "second"]
    model.base_model.set_adapter(names)
    loaded = tiny_model()
    loaded.load_adapter(tmp_path, "default")
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter(names)
    assert torch.equal(logits(loaded), logits(model))
    prompt = TOKENS[:2, :5]
    assert torch.equal(greedy(loaded, prompt), greedy(model, prompt))


def test_a_cache_that_was_filled_without_the_adapter_is_refused(tiny_model):
    model, tokens = remembering(tiny_model()), TOKENS[:1, :LENGTH]
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=tokens[:, :5], use_cache=True).past_key_values
        with pytest.raises(BackboneError, match="holds 5 tokens, but of 0 the gates know"):
            model(input_ids=tokens[:, 5:6], past_key_values=cache, use_cache=True)


def test_copies_and_saved_adapters_remember_alike(tiny_model, tmp_path):
    model, tokens = remembering(tiny_model()), TOKENS[:2, :LENGTH]
    model.save_pretrained(tmp_path)
    loaded = extended(tiny_model()).eval()
    loaded.load_adapter(tmp_path, "loaded")
    loaded.set_adapter("loaded")
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(logits(other, tokens), logits(model, tokens))
        assert torch.equal(greedy(other, tokens[:, :5]), greedy(model, tokens[:, :5]))


def test_unloading_takes_the_hooks_off(tiny_model):
    backbone = tiny_model()
    before = logits(backbone)
    model = remembering(backbone)
    decoder = decoder_of(backbone, "model.layers.0.mlp")
    assert decoder is backbone.model and decoder._forward_pre_hooks
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), before)
    assert not decoder._forward_pre_hooks and not decoder._forward_hooks


def test_a_recomputed_pass_gates_alike(tiny_model):
    """Gradient checkpointing runs the layers again after the pass has ended."""
    found = []
    for is_checkpointed in (False, True):
        model = remembering(tiny_model()).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_requests_in_one_row_of_a_paged_cache_are_refused(tiny_model):
    """As continuous batching passes them."""
    row = {"input_ids": TOKENS[:1], "position_ids": torch.arange(12)[None] % 5, "cache": object(), "use_cache": False}
    model = remembering(tiny_model())
    with torch.no_grad():
        with pytest.raises(BackboneError, match=r"generate_batch.*gate_memory=1"):
            model(**row)
        with model.disable_adapter():
            model(**row)
        remembering(tiny_model(), gate_memory=1)(**row)


@pytest.mark.parametrize("other", ["backbone", "padded", "later"])
def test_a_recomputed_pass_is_not_taken_for_a_later_one(other, tiny_model):
    """Between a pass and its backward pass may lie others: of other texts, with other padding, with the adapters off."""
    mask = torch.ones_like(TOKENS)
    mask[:, :7] = 0
    found = []
    for is_checkpointed in (False, True):
        model = remembering(tiny_model()).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        if other == "backbone":
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=TOKENS[:1, :5])
        elif other == "padded":
            loss = loss - model(input_ids=TOKENS, attention_mask=mask).logits[:, 7:].logsumexp(-1).mean()
        loss.backward()
        if other == "later":
            model.zero_grad()
            losses = [model(input_ids=part, labels=part).loss for part in (TOKENS, TOKENS[:3, :8], TOKENS[:1])]
            for loss in losses:
                loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# --- models that read images too --------------------------------------------------------------------------------------


def test_a_model_that_reads_images_is_extended_in_its_text_decoder():
    backbone = build_tiny_image_reader()
    tokens = TOKENS[:2, :LENGTH] % 60
    before = logits(backbone, tokens)
    for site, block in (("ffn", "mlp"), ("attention", "self_attn")):
        model = extended(build_tiny_image_reader(), site=site)
        found = model.peft_config["default"].target_modules
        assert found == tuple(f"model.language_model.layers.{index}.{block}" for index in range(L))
        assert torch.equal(logits(model, tokens), before)
    assert model_width(backbone) == model_width(model) == D and count_layers(model) == L


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_and_cache_of_a_model_that_reads_images(cache):
    """Its decoder gets masks in which padding is lost."""
    model = remembering(build_tiny_image_reader(), gate_memory=64)
    prompt = TOKENS[:1, :5] % 59 + 1
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(9) >= 4).long()[None]
    with torch.no_grad():
        found = model(input_ids=padded, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(found, logits(model, prompt), atol=2e-5, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(found, logits(model, prompt), atol=1e-2)
    options = {"cache_implementation": cache, "disable_compile": True}
    whole = greedy(model, prompt, use_cache=False)
    assert torch.equal(greedy(model, prompt, **options), whole)
    assert torch.equal(greedy(model, padded, attention_mask=mask, **options)[:, 4:], whole)


def test_a_mask_in_which_padding_is_lost_is_refused(tiny_model):
    model = remembering(tiny_model())
    tokens = TOKENS[:1, :LENGTH]
    mask = torch.ones(LENGTH, LENGTH).tril().log()[None, None]
    with torch.no_grad():
        with pytest.raises(BackboneError, match=r"padding.*\(sequences, tokens\).*gate_memory=1"):
            model(input_ids=tokens, attention_mask=mask)
        with model.disable_adapter():
            model(input_ids=tokens, attention_mask=mask)
        found = model(input_ids=tokens, attention_mask=mask, position_ids=torch.arange(LENGTH)[None]).logits
    torch.testing.assert_close(found, logits(model, tokens))
