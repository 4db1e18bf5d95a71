"""Neutral residues in PEFT: one matrix of families, positions and sites, and all that PEFT promises its users."""

from __future__ import annotations

import itertools
from functools import partial

import peft
import pytest
import torch
from conftest import FAMILIES
from peft import PeftModel, get_peft_model

from nrlib import NEW, ORIGINAL, GatedAdapter, NeutralResiduesConfig, NeutralResiduesLayer
from nrlib.adapter import GatedResidue
from nrlib.architecture import count_weights, find_blocks, select_layers
from nrlib.batches import Batch
from nrlib.config import GATES, INITIALISATIONS, LAYER_CHOICES, MethodConfig, TrainingConfig
from nrlib.config import PLACEMENTS as ALLOWED
from nrlib.errors import BackboneError, ConfigError
from nrlib.losses import LocalLoss
from nrlib.methods import apply_method, count_extra_weights
from nrlib.profiles import METHODS
from nrlib.training import make_optimizer, training_step

MIXED_QUERIES = ("gpt_neox", "falcon")  # one layer makes queries, keys and values, head by head
PLACEMENTS = [
    (family, position, site)
    for family, (position, site) in itertools.product(FAMILIES, ALLOWED)
    if not (site == "persistent_memory" and family in MIXED_QUERIES)
]
TOKENS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], torch.tensor([NEW, ORIGINAL, NEW, ORIGINAL]))


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens).logits


def extended(backbone, **options):
    return get_peft_model(backbone, NeutralResiduesConfig(**options)).eval()


def open_adapters(model, seed=0, name=None):
    """Give every adapter (of one name) weights with which its residue is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "neutral_residues_adapters." in key and (name is None or f"adapters.{name}." in key):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def gradients(model, step_config=None, local_loss="l1"):
    """Run one of our training steps; returns the names of the adapter parameters by whether a gradient reaches them."""
    config = step_config or TrainingConfig(batch_size=4, precision="float32")
    model.train()
    training_step(model, BATCH, config, local_loss, 0.1, torch.float32)
    adapters = {name: p for name, p in model.named_parameters() if "neutral_residues_adapters." in name}
    assert adapters and all(p.grad is not None and p.grad.isfinite().all() for p in adapters.values())
    return {n for n, p in adapters.items() if p.grad.any()}, {n for n, p in adapters.items() if not p.grad.any()}


# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "position", "site"), PLACEMENTS)
def test_placement(family, position, site, tiny_model):
    """Equal at step 0; only adapters learn, all of them; the backbone's bits stay."""
    backbone = tiny_model(family)
    before = logits(backbone)
    weights = {name: p.clone() for name, p in backbone.named_parameters()}
    backbone_parameters = dict(backbone.named_parameters())
    model = extended(backbone, position=position, site=site)
    assert torch.equal(logits(model), before)
    adapters = {name: p for name, p in model.named_parameters() if "neutral_residues_adapters." in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters.keys()
    assert len(adapters) == 3 * (4 if site == "persistent_memory" else 5)  # layers times W_i, W_g, W_o or K, V; w, b

    start = {name: p.clone() for name, p in adapters.items()}
    training = TrainingConfig(batch_size=4, learning_rate=1e-2, weight_decay=0.1, precision="float32")
    optimizer = make_optimizer(model, training)
    reached, silent = gradients(model, training)
    last = (".output_projection.", ".values")  # as they are zero, they hide the others at step 1
    assert reached == {name for name in adapters if any(part in name for part in last)}
    optimizer.step()
    optimizer.zero_grad()
    reached, silent = gradients(model, training)
    assert not silent
    optimizer.step()
    assert all(torch.equal(p, weights[name]) for name, p in backbone_parameters.items())
    assert all(p.grad is None for p in backbone_parameters.values())
    assert all(not torch.equal(p, start[name]) for name, p in adapters.items())
    model.eval()
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def keep(seen, name, module, args, kwargs, output):
    """A forward hook that stores a block's input and output: copies, since Falcon adds to the output in place."""
    x = args[0] if args else kwargs["hidden_states"]
    seen[name] = x.clone(), (output[0] if isinstance(output, tuple) else output).clone()


@pytest.mark.parametrize(("family", "position", "site"), PLACEMENTS)
def test_where_the_residue_is_added(family, position, site, tiny_model):
    """parallel: block(x) + residue(x); serial: block(x) + residue(block(x))."""
    model = open_adapters(extended(tiny_model(family), position=position, site=site, extra_ratio=0.5))
    layer = next(module for module in model.modules() if isinstance(module, NeutralResiduesLayer))
    adapter = layer.neutral_residues_adapters["default"]
    seen = {}
    handles = [
        module.register_forward_hook(partial(keep, seen, name), with_kwargs=True)
        for name, module in (("layer", layer), ("block", layer.base_layer))
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    block_input, block_output = seen["block"]
    block = (layer.base_layer,) if site == "persistent_memory" else ()
    residue = adapter(block_input if position == "parallel" else block_output, *block)
    assert residue.abs().max() > 1e-3
    torch.testing.assert_close(seen["layer"][1], block_output + residue)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_starts_at_the_backbone_and_keeps_the_budget(method, family, tiny_model):
    backbone = tiny_model(family)
    before, n_backbone = logits(backbone), count_weights(backbone)
    config = MethodConfig(method=method, gate="none" if method == "vanilla_adapter" else "relu")
    model = apply_method(backbone, config, seed=0)
    assert torch.equal(logits(model), before)
    extra = count_extra_weights(model, n_backbone)
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n_trainable == (n_backbone if method == "fine_tuning" else extra)
    if method != "fine_tuning":
        assert 0 < extra <= 0.2 * n_backbone


def test_new_weights_depend_on_the_seed_alone(tiny_model):
    def weights(seed):
        model = apply_method(tiny_model(), MethodConfig(), seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    torch.manual_seed(1)
    first = weights(seed=0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(weights(seed=0), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(weights(seed=1), first)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_options_reach_the_adapters(gate, initialisation, tiny_model):
    backbone = tiny_model(n_layers=4)
    before = logits(backbone)
    model = extended(backbone, gate=gate, initialisation=initialisation, width=512, layers=[0, 2])
    adapters = [module for module in model.modules() if isinstance(module, GatedAdapter)]
    variance = {"low_variance": 1 / (16 * 4), "he": 2 / 16}[initialisation]  # L counts all layers, not the adapted ones
    assert [adapter.gate for adapter in adapters] == [gate, gate]
    for adapter in adapters:
        assert adapter.input_projection.weight.shape == (512, 16)
        assert adapter.input_projection.weight.var().item() == pytest.approx(variance, rel=0.1)
    assert torch.equal(logits(model), before)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local_loss", ["none", "l1"])
def test_gradients_after_a_pass_without_gradients(local_loss, tiny_model):
    model = extended(tiny_model())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        model(input_ids=TOKENS)
        with LocalLoss(model, "l1", BATCH.domain) as local:
            model(input_ids=TOKENS)
    assert local.mean() > 0 and not local.mean().requires_grad
    model.generate(TOKENS[:1], max_new_tokens=2, do_sample=False)
    reached, silent = gradients(model, local_loss=local_loss)
    assert not silent and len(reached) == 15


def test_the_gate_learns_from_step_1_as_a_classifier(tiny_model):
    model = extended(tiny_model(), gate="sigmoid", local_loss="domain_cross_entropy")
    reached, _ = gradients(model, local_loss="domain_cross_entropy")
    parts = {name.rsplit(".", 2)[-2] for name in reached}
    assert parts == {"output_projection", "block_gate"}


# --- layers and budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "n_layers", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("first_half", 4, [0, 1]),
        ("first_half", 5, [0, 1, 2]),
        ("last_half", 4, [2, 3]),
        ("last_half", 5, [2, 3, 4]),
        ("every_other", 4, [1, 3]),
        ("every_other", 5, [1, 3]),
        ("every_other", 1, [0]),
        ("3, 0", 4, [0, 3]),
        ("2", 4, [2]),
    ],
)
def test_layers(layers, n_layers, expected, tiny_model):
    assert select_layers(layers, n_layers) == expected
    model = extended(tiny_model(n_layers=n_layers), layers=layers, extra_ratio=0.5)
    wrapped = [
        isinstance(model.get_submodule(f"base_model.model.model.layers.{index}.mlp"), NeutralResiduesLayer)
        for index in range(n_layers)
    ]
    assert [index for index, is_wrapped in enumerate(wrapped) if is_wrapped] == expected


@pytest.mark.parametrize(("layers", "words"), [("0,3", "0 to 2"), ("1,1", "twice"), ([5], "0 to 2")])
def test_impossible_layers(layers, words, tiny_model):
    backbone = tiny_model()
    with pytest.raises(ConfigError, match=words):
        extended(backbone, layers=layers)
    assert not any(isinstance(module, NeutralResiduesLayer) for module in backbone.modules())


@pytest.mark.parametrize(("family", "site"), sorted({(family, site) for family, _, site in PLACEMENTS}))
def test_extra_weights_come_within_one_unit_of_width_of_the_budget(family, site, tiny_model):
    choices = itertools.product((*LAYER_CHOICES, "0,2"), ("none", "relu"))
    for (layers, gate), ratio in zip(choices, itertools.cycle((0.05, 0.2, 1.0))):
        with torch.device("meta"):
            backbone = tiny_model(family)
        n_backbone = sum(p.numel() for p in backbone.parameters())
        model = extended(backbone, site=site, layers=layers, gate=gate, extra_ratio=ratio)
        n_adapters = sum(isinstance(module, GatedResidue) for module in model.modules())
        n_extra = sum(p.numel() for p in model.parameters()) - n_backbone
        one_unit = (2 if site == "persistent_memory" else 3) * 16 * n_adapters
        assert ratio * n_backbone - one_unit < n_extra <= ratio * n_backbone, (layers, gate, ratio)
        assert n_extra == count_extra_weights(model, n_backbone)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 1.0])
def test_lora_rank_follows_from_the_budget(ratio, tiny_model):
    backbone = tiny_model()
    n_backbone, (d, h) = count_weights(backbone), (16, 32)
    per_rank = 3 * (4 * 2 * d + 3 * (d + h))  # three layers of four attention and three feed-forward matrices
    extra = count_extra_weights(apply_method(backbone, MethodConfig(method="lora", extra_ratio=ratio), 0), n_backbone)
    assert ratio * n_backbone - per_rank < extra <= ratio * n_backbone


def test_a_budget_below_one_unit_of_width_names_the_smallest_that_works(tiny_model):
    for method, options in (("neutral_residues", {}), ("lora", {})):
        with pytest.raises(ConfigError, match=r"extra_ratio = 0\.001 is too small") as caught:
            apply_method(tiny_model(), MethodConfig(method=method, extra_ratio=0.001, **options), 0)
        smallest = float(str(caught.value).split("Give at least ")[1].split(",")[0].rstrip("."))
        apply_method(tiny_model(), MethodConfig(method=method, extra_ratio=smallest * 1.05, **options), 0)


def test_a_second_adapter_does_not_count_as_backbone(tiny_model):
    model = extended(tiny_model())
    model.add_adapter("second", NeutralResiduesConfig())
    assert model.peft_config["second"].width == model.peft_config["default"].width
    assert count_weights(model) == count_weights(tiny_model())


# --- what is wrapped --------------------------------------------------------------------------------------------------


def test_named_targets_are_wrapped_and_a_wrong_one_is_an_error(tiny_model):
    model = extended(tiny_model(), target_modules=["model.layers.1.mlp"])
    assert sum(isinstance(module, NeutralResiduesLayer) for module in model.modules()) == 1
    backbone = tiny_model()
    with pytest.raises(ConfigError, match=r"model\.layers\.7\.mlp"):
        extended(backbone, target_modules=["model.layers.1.mlp", "model.layers.7.mlp"])
    assert not any(isinstance(module, NeutralResiduesLayer) for module in backbone.modules())


def test_a_family_whose_blocks_are_not_found_says_what_the_layers_hold(tiny_model):
    model = tiny_model()
    for layer in model.model.layers:
        layer.thinking = layer.mlp
        del layer.mlp
    with pytest.raises(BackboneError, match="thinking") as caught:
        find_blocks(model, "ffn")
    assert "target_modules" in str(caught.value) and "LlamaForCausalLM" in str(caught.value)
    assert find_blocks(model, "attention") == [f"model.layers.{index}.self_attn" for index in range(3)]


def test_blocks_of_an_unknown_name_are_wrapped_when_named(tiny_model):
    backbone = tiny_model()
    before = logits(backbone)
    for layer in backbone.model.layers:
        layer.add_module("thinking", layer.mlp)
        del layer.mlp
        layer.__class__ = type("Layer", (type(layer),), {"mlp": property(lambda self: self.thinking)})
    with pytest.raises(BackboneError, match="thinking"):
        extended(backbone)
    with pytest.raises(ConfigError, match=r"layers\.0\.thinking"):  # the candidates
        extended(backbone, target_modules=["model.layers.0.mlp"])
    names = [f"model.layers.{index}.thinking" for index in range(3)]
    model = extended(backbone, target_modules=names)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(open_adapters(model)), before)


def test_a_configuration_may_be_used_for_models_of_two_sizes(tiny_model):
    config = NeutralResiduesConfig()
    widths = [get_peft_model(tiny_model(n_layers=n), config).peft_config["default"].width for n in (3, 6, 3)]
    expected = [get_peft_model(tiny_model(n_layers=n), NeutralResiduesConfig()).peft_config["default"].width for n in (3, 6, 3)]  # fmt: skip
    assert widths == expected and widths[0] != widths[1]
    fixed = NeutralResiduesConfig(width=5)
    for n_layers in (3, 6):
        assert get_peft_model(tiny_model(n_layers=n_layers), fixed).peft_config["default"].width == 5


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("gate", "tanh", "none, sigmoid, relu, elu"),
        ("position", "inside", "parallel, serial"),
        ("site", "mlp", "ffn, attention, persistent_memory"),
        ("layers", "some", "all, first_half"),
        ("initialisation", "xavier", "low_variance, he"),
        ("extra_ratio", -0.1, "between 0 and 10"),
        ("extra_ratio", float("nan"), "between 0 and 10"),
        ("local_loss", "l2", "none, l1, domain_cross_entropy"),
        *(("width", value, "whole numbers from 1") for value in (0, -1, 2.5, True)),
    ],
)
def test_options_are_checked_when_the_configuration_is_made(option, value, words):
    with pytest.raises(ConfigError, match=words) as caught:
        NeutralResiduesConfig(**{option: value})
    assert option in str(caught.value) and repr(value) in str(caught.value)


def test_a_classifier_needs_a_gate():
    with pytest.raises(ConfigError, match="gate = 'none'"):
        NeutralResiduesConfig(gate="none", local_loss="domain_cross_entropy")


# --- saving, loading, switching ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A folder written by save_pretrained, and the logits of the model that wrote it."""
    model = open_adapters(extended(tiny_model(), site="attention", position="serial", gate="elu", layers="0,2"))
    expected = logits(model)
    assert (expected - logits(tiny_model())).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", expected


# Some names are also parts of the keys that are saved.
@pytest.mark.parametrize(
    "name", ["default", "french", "weight", "input_projection", "layers", "neutral_residues_adapters"]
)
def test_loading_under_another_name(name, saved, tiny_model):
    folder, expected = saved
    model = PeftModel.from_pretrained(tiny_model(), folder, adapter_name=name).eval()
    assert torch.equal(logits(model), expected)
    assert model.active_adapter == name and not any(p.requires_grad for p in model.parameters())


def test_saved_files_hold_the_adapter_alone_and_its_options(saved, tiny_model):
    from safetensors import safe_open

    folder, _ = saved
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert len(keys) == 2 * 5 and all("neutral_residues_adapters" in key for key in keys)
    config = peft.PeftConfig.from_pretrained(folder)
    assert isinstance(config, NeutralResiduesConfig)
    assert (config.site, config.position, config.gate, config.layers) == ("attention", "serial", "elu", "0,2")
    assert config.width == extended(tiny_model(), layers="0,2").peft_config["default"].width


def test_the_saved_card_says_what_to_import(saved):
    folder, _ = saved
    assert "import nrlib" in (folder / "README.md").read_text(encoding="utf-8")


def test_transformers_loads_the_folder_itself(saved, tiny_model):
    folder, expected = saved
    model = tiny_model()
    before = logits(model)
    model.load_adapter(str(folder))
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), before)


def test_two_adapters_and_switching(saved, tiny_model, tmp_path):
    folder, first = saved
    other = open_adapters(extended(tiny_model(), gate="none", extra_ratio=0.4), seed=1)
    second = logits(other)
    other.save_pretrained(tmp_path / "second")
    backbone = tiny_model()
    before = logits(backbone)
    model = PeftModel.from_pretrained(backbone, folder, adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("neutral_residues_adapters.second." in name for name in trainable)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in name for name, _ in model.named_parameters())


def test_two_adapters_on_the_same_blocks_add_up(tiny_model):
    model = extended(tiny_model())
    model.add_adapter("second", NeutralResiduesConfig(gate="none"))
    open_adapters(model)
    layer = next(module for module in model.modules() if isinstance(module, NeutralResiduesLayer))
    x = torch.randn(1, 2, 16)
    model.base_model.set_adapter(["default", "second"])
    expected = layer.base_layer(x) + sum(adapter(x) for adapter in layer.neutral_residues_adapters.values())
    torch.testing.assert_close(layer(x), expected)
    assert len(LocalLoss(model, "l1", BATCH.domain).adapters) == 2 * 3
    model.set_adapter("second")
    torch.testing.assert_close(layer(x), layer.base_layer(x) + layer.neutral_residues_adapters["second"](x))
    assert len(LocalLoss(model, "l1", BATCH.domain).adapters) == 3


def test_unload_gives_the_backbone_back(tiny_model):
    backbone = tiny_model()
    before, names = logits(backbone), [name for name, _ in backbone.named_modules()]
    restored = open_adapters(extended(backbone)).unload()
    assert torch.equal(logits(restored), before)
    assert [name for name, _ in restored.named_modules()] == names


def test_a_residue_cannot_be_merged(tiny_model):
    model = open_adapters(extended(tiny_model()))
    expected = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("family", "position", "site"), PLACEMENTS)
def test_generation_with_a_cache_is_greedy_decoding_without(family, position, site, tiny_model):
    model = open_adapters(extended(tiny_model(family), position=position, site=site))
    tokens = prompt = TOKENS[:2, :5]
    for _ in range(5):
        following = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    mask = torch.ones_like(prompt)
    generated = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(generated, tokens)


# --- half precision ---------------------------------------------------------------------------------------------------


def test_bfloat16_backbone(tiny_model, tmp_path):
    backbone = tiny_model().to(torch.bfloat16)
    before = logits(backbone)
    model = extended(backbone)
    assert torch.equal(logits(model), before) and logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    open_adapters(model)
    _, silent = gradients(model)
    assert not silent
    model.eval()
    expected = logits(model)
    assert expected.dtype == torch.bfloat16 and not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model().to(torch.bfloat16), tmp_path, adapter_name="other").eval()
    assert torch.equal(logits(loaded), expected)


def test_autocast(tiny_model):
    backbone = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(backbone)
        model = extended(backbone)
        assert torch.equal(logits(model), before)
    open_adapters(model).train()
    losses = training_step(model, BATCH, TrainingConfig(batch_size=4), "l1", 1.0, torch.bfloat16)
    exact = training_step(model, BATCH, TrainingConfig(batch_size=4), "l1", 1.0, torch.float32)
    assert torch.stack(losses).tolist() == pytest.approx(torch.stack(exact).tolist(), rel=0.05)
    assert all(p.grad.any() and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layers", ["all", "last_half"])
def test_a_deep_model_is_extended_saved_and_loaded_under_another_name(tiny_model, tmp_path, layers):
    """From 20 targets on, PEFT abbreviates their names to the ends that tell them apart; ours are full names."""
    model = open_adapters(extended(tiny_model(n_layers=40), layers=layers))
    assert len(model.peft_config["default"].target_modules) == (40 if layers == "all" else 20)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(n_layers=40), str(tmp_path), adapter_name="other")
    torch.testing.assert_close(logits(loaded.eval()), logits(model))


class Packed(torch.nn.Module):
    """A linear layer as GPTQ and AWQ leave it: numbers and scales in buffers, no parameters."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed * self.scale)


def test_blocks_that_hold_buffers_only(tiny_model):
    backbone = tiny_model()
    for layer in backbone.model.layers:
        for name, linear in list(layer.mlp.named_children()):
            if isinstance(linear, torch.nn.Linear):
                setattr(layer.mlp, name, Packed(linear))
    before = logits(backbone)
    model = extended(backbone, width=4)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(open_adapters(model)), before)


def test_adapters_of_offloaded_blocks_are_in_memory(tiny_model):
    backbone = tiny_model()
    backbone.model.layers[1].mlp.to("meta")
    model = extended(backbone, width=4)
    adapters = {name: p for name, p in model.named_parameters() if "neutral_residues_adapters." in name}
    assert len(adapters) == 15 and {p.device.type for p in adapters.values()} == {"cpu"}
