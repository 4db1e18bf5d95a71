"""Frozen backbones of 4 and 8 bits (bitsandbytes, which runs on the processor too): adapters learn beside them as ever."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from peft import PeftModel
from test_peft_method import TOKENS, extended, gradients, logits, open_adapters
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nrlib.architecture import count_weights, find_blocks
from nrlib.backbone import get_backbone
from nrlib.config import MethodConfig, make_config
from nrlib.errors import ConfigError
from nrlib.methods import apply_method, count_extra_weights
from nrlib.profiles import METHODS

BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    8: {"load_in_8bit": True},
}
UNQUANTISED = {"falcon"}  # its linear layers are a class of its own, which transformers 5 leaves as they are

# bitsandbytes says on every product that it computes in half precision.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """`folders(family)`: where a tiny model of that family is saved in full precision."""
    root = tmp_path_factory.mktemp("backbones")

    def folder(family):
        if not (root / family).exists():
            tiny_model(family).save_pretrained(root / family)
        return root / family

    return folder


def quantised(folder, n_bits, **options):
    settings = BitsAndBytesConfig(**BITS[n_bits])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_bits", BITS)
def test_quantised_backbone(family, n_bits, folders, tiny_model, tmp_path):
    backbone = quantised(folders(family), n_bits, dtype=torch.float32)
    stored = {p.dtype for p in backbone.parameters()}
    assert family in UNQUANTISED or stored == {torch.float32, {4: torch.uint8, 8: torch.int8}[n_bits]}
    before = logits(backbone)
    weights = {name: p.clone() for name, p in backbone.named_parameters()}
    kept = dict(backbone.named_parameters())
    model = extended(backbone)
    assert torch.equal(logits(model), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    # the budget is a share of the weights, however few bytes they are packed into
    assert count_weights(model) == count_weights(tiny_model(family))
    assert model.peft_config["default"].width == extended(tiny_model(family)).peft_config["default"].width

    _, silent = gradients(open_adapters(model))
    assert not silent
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in kept.items())
    trained = logits(model.eval())
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    fresh = quantised(folders(family), n_bits, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, adapter_name="other").eval()
    assert torch.equal(logits(loaded), trained)
    assert torch.equal(logits(loaded.unload()), before)


@pytest.mark.parametrize("n_bits", BITS)
def test_a_saved_quantised_backbone_is_loaded_by_name(n_bits, folders, tmp_path):
    backbone = quantised(folders("llama"), n_bits, dtype=torch.float32)
    backbone.save_pretrained(tmp_path)
    loaded = get_backbone(make_config("smoke", backbone_name=str(tmp_path)), None)
    assert torch.equal(logits(loaded), logits(backbone))
    assert count_weights(loaded) == count_weights(backbone)


@pytest.mark.parametrize("n_bits", BITS)
def test_bfloat16_around_a_quantised_backbone(n_bits, folders):
    model = extended(quantised(folders("llama"), n_bits, dtype=torch.bfloat16), site="attention", position="serial")
    with model.disable_adapter():
        before = logits(model)
    assert torch.equal(logits(model), before) and before.dtype == torch.bfloat16
    _, silent = gradients(open_adapters(model))
    assert not silent
    generated = model.eval().generate(TOKENS[:1, :5], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_bits", BITS)
def test_methods_on_a_quantised_backbone(method, n_bits, folders):
    backbone = quantised(folders("llama"), n_bits, dtype=torch.float32)
    n_backbone, before = count_weights(backbone), logits(backbone)
    config = MethodConfig(method=method, gate="none" if method == "vanilla_adapter" else "relu")
    if method == "fine_tuning":
        with pytest.raises(ConfigError, match=r"fine_tuning.*quantised.*neutral_residues"):
            apply_method(backbone, config, seed=0)
        return
    model = apply_method(backbone, config, seed=0)
    assert torch.equal(logits(model), before)
    extra = count_extra_weights(model, n_backbone)
    assert extra == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0.1 * n_backbone < extra <= 0.2 * n_backbone


def test_the_blocks_are_found_as_ever(folders, tiny_model):
    assert find_blocks(quantised(folders("gpt2"), 8), "ffn") == find_blocks(tiny_model("gpt2"), "ffn")
