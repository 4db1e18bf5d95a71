"""Weights that must not be loaded: pickles, and what does not fit the model, listed name by name with shapes."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_peft_method import extended, logits, open_adapters

from nrlib import NeutralResiduesLayer
from nrlib.backbone import load_backbone
from nrlib.errors import NrlibError, WeightsError
from nrlib.weights import N_NAMED, check_fit


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """A saved adapter, its weights, and the logits of the model that wrote it."""
    model = open_adapters(extended(tiny_model()))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", load_file(tmp_path / "adapter" / "adapter_model.safetensors"), logits(model)


def load(folder, backbone):
    return PeftModel.from_pretrained(backbone, folder, adapter_name="french").eval()


def changed(weights, change):
    weights = dict(weights)
    name = "base_model.model.model.layers.1.mlp.neutral_residues_adapters.input_projection.weight"
    if change in ("missing", "both"):
        weights.pop(name)
    if change in ("unexpected", "both"):
        weights["somebody.elses.weight"] = torch.zeros(2)
    if change == "shape":
        weights[name] = torch.zeros(7, 16)
    return weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", [r"missing in the file: .*layers\.1\.mlp\S*input_projection\.weight"]),
        ("unexpected", [r"unknown to the model: somebody\.elses\.weight"]),
        ("both", [r"missing in the file: \S+input_projection", r"unknown to the model: somebody"]),
        ("shape", [r"layers\.1\.mlp\S*input_projection\.weight \(7, 16\) in the file, \(13, 16\) in the model"]),
    ],
)
def test_an_adapter_that_does_not_fit(change, words, adapter, tiny_model):
    folder, weights, _ = adapter
    save_file(changed(weights, change), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        load(folder, tiny_model())
    for pattern in ["'french'", "width = 13 in 3 blocks", "adapter_config.json", *words]:
        caught.match(pattern)
    assert isinstance(caught.value, NrlibError) and "\n" not in str(caught.value)


def test_an_adapter_of_another_width_than_its_options_say(adapter, tiny_model):
    folder, _, _ = adapter
    options = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**options, "width": 5}), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"\(13, 16\) in the file, \(5, 16\) in the model.* and 5 more"):
        load(folder, tiny_model())


def test_what_else_peft_saves_beside_the_adapter_may_be_there(adapter, tiny_model):
    folder, weights, expected = adapter
    embedding = tiny_model().model.embed_tokens.weight.detach().clone()
    weights = {**weights, "base_model.model.model.embed_tokens.weight": embedding}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(folder, tiny_model())), expected)


def test_a_pickled_adapter_is_refused_before_it_is_opened(adapter, tiny_model, monkeypatch):
    folder, weights, expected = adapter
    torch.save(weights, folder / "adapter_model.bin")
    assert torch.equal(logits(load(folder, tiny_model())), expected)  # beside safetensors it is not read
    (folder / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was opened"))
    backbone = tiny_model()
    with pytest.raises(WeightsError, match=r"adapter_model\.bin, a pickle.*save_pretrained"):
        load(folder, backbone)
    assert not any(isinstance(module, NeutralResiduesLayer) for module in backbone.modules())


# --- backbones --------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone(tiny_model, tmp_path):
    """A saved backbone and its weights."""
    tiny_model().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone", load_file(tmp_path / "backbone" / "model.safetensors")


def test_a_backbone_with_a_weight_missing(backbone):
    folder, weights = backbone
    weights["model.layers.1.mlp.gate.weight"] = weights.pop("model.layers.1.mlp.gate_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        load_backbone(str(folder))
    for pattern in ("LlamaForCausalLM", r"missing in the file: \S*mlp\.gate_proj\.weight", r"unknown to the model: \S*mlp\.gate\.weight"):  # fmt: skip
        caught.match(pattern)


def test_a_backbone_with_a_weight_of_another_shape(backbone):
    folder, weights = backbone
    weights["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(31, 16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        WeightsError, match=r"mlp\.gate_proj\.weight (\(31, 16\) in the file, )?\(32, 16\) in the model"
    ):
        load_backbone(str(folder))


def test_a_backbone_with_weights_of_another_task_is_loaded(backbone, tiny_model):
    folder, weights = backbone
    weights["score.weight"] = torch.zeros(2, 16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_backbone(str(folder))), logits(tiny_model()))


def test_a_pickled_backbone(backbone, monkeypatch):
    folder, weights = backbone
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was opened"))
    with pytest.raises(WeightsError, match=r"no weights in safetensors.*pytorch_model\.bin.*convert it once"):
        load_backbone(str(folder))


def test_long_lists_are_cut():
    names = [f"w{index}" for index in range(N_NAMED + 3)]
    with pytest.raises(
        WeightsError, match=rf"missing in the file: {', '.join(names[:N_NAMED])} and 3 more\. Do this\."
    ):
        check_fit("a", "b", missing=names, remedy="Do this.")
    check_fit("a", "b", remedy="")
