"""The rest of the matrix: what a user does with adapters after the first step, on every family and in every placement.

Together with test_peft_method.py, test_quantised.py and test_weights.py this is the contract with PEFT and transformers:
`make matrix` runs it on the oldest supported versions, `make test` on the newest.
"""

from __future__ import annotations

import shutil
import types

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
import transformers
from conftest import FAMILIES
from packaging.version import Version
from peft import PeftModel
from test_peft_method import BATCH, PLACEMENTS, TOKENS, extended, gradients, logits, open_adapters
from torch import nn
from transformers import PretrainedConfig

from nrlib import NeutralResiduesConfig, NeutralResiduesLayer
from nrlib.config import MethodConfig, TrainingConfig
from nrlib.errors import BackboneError, ConfigError
from nrlib.methods import apply_method
from nrlib.profiles import METHODS
from nrlib.training import make_optimizer, training_step

# Backbones that are no single graph by themselves: transformers 4 chooses the experts in a loop over the data.
BROKEN_GRAPHS = {"mixtral"} if Version(transformers.__version__) < Version("5") else set()

# --- saved, loaded, switched, removed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "position", "site"), PLACEMENTS)
def test_save_load_switch_disable_unload(family, position, site, tiny_model, tmp_path):
    written = open_adapters(extended(tiny_model(family), position=position, site=site, extra_ratio=0.5))
    first = logits(written)
    written.save_pretrained(tmp_path)
    backbone = tiny_model(family)
    before, names = logits(backbone), [name for name, _ in backbone.named_modules()]
    assert not torch.equal(first, before)

    model = PeftModel.from_pretrained(backbone, tmp_path, adapter_name="french").eval()
    assert torch.equal(logits(model), first)
    other_site = "attention" if site != "attention" else "ffn"
    model.add_adapter("danish", NeutralResiduesConfig(site=other_site, position=position, extra_ratio=0.5))
    model.set_adapter("danish")
    assert torch.equal(logits(model), before)  # W_o = 0
    second = logits(open_adapters(model, seed=1, name="danish"))
    assert not torch.equal(second, before) and not torch.equal(second, first)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.set_adapter("french")
    assert torch.equal(logits(model), first)
    model.delete_adapter("danish")
    assert torch.equal(logits(model), first)
    restored = model.unload()
    assert torch.equal(logits(restored), before)
    assert [name for name, _ in restored.named_modules()] == names


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_learns_and_generates_with_a_cache(method, family, tiny_model):
    gate, local_loss = ("relu", "l1") if method == "neutral_residues" else ("none", "none")
    model = apply_method(tiny_model(family), MethodConfig(method=method, gate=gate, local_loss=local_loss), seed=0)
    config = TrainingConfig(batch_size=4, learning_rate=1e-2, precision="float32")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = make_optimizer(model, config), []
    for _ in range(4):
        losses.append(training_step(model, BATCH, config, local_loss, 0.1, torch.float32)[0])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    model.eval()
    tokens = prompt = TOKENS[:2, :5]
    for _ in range(3):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    mask = torch.ones_like(prompt)
    assert torch.equal(model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False), tokens)


# --- other ways to compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "position", "site"), PLACEMENTS)
def test_gradient_checkpointing_changes_no_gradient(family, position, site, tiny_model):
    config = TrainingConfig(batch_size=4, precision="float32")
    found = []
    for is_checkpointed in (False, True):
        model = open_adapters(extended(tiny_model(family), position=position, site=site)).train()
        calls = []
        layer = next(module for module in model.modules() if isinstance(module, NeutralResiduesLayer))
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.random.fork_rng():  # GPT-2 and OPT drop out
            torch.manual_seed(0)
            losses = training_step(model, BATCH, config, "l1", 0.1, torch.float32)
        assert len(calls) == 1 + is_checkpointed  # computed again on the way back
        found.append((losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (losses, plain), (losses_again, checkpointed) = found
    assert losses_again == losses
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize(("family", "position", "site"), PLACEMENTS)
def test_bfloat16_backbone(family, position, site, tiny_model):
    backbone = tiny_model(family).to(torch.bfloat16)
    before = logits(backbone)
    model = extended(backbone, position=position, site=site)
    assert torch.equal(logits(model), before) and before.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    _, silent = gradients(open_adapters(model))
    assert not silent
    assert not torch.equal(logits(model.eval()), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family, tiny_model):
    """One graph from end to end, and one for all steps; equal logits, and gradients as without."""
    model = extended(tiny_model(family, n_layers=1), site="ffn")
    model.add_adapter("second", NeutralResiduesConfig(site="attention", position="serial", gate="relu", gate_memory=3))
    model.base_model.set_adapter(["default", "second"])
    open_adapters(model)
    parameters = {
        name: p.requires_grad_() for name, p in model.named_parameters() if "neutral_residues_adapters" in name
    }

    def gradients_of(run, tokens):
        model.zero_grad()
        output = run(input_ids=tokens, use_cache=False).logits
        output.float().logsumexp(-1).sum().backward()
        return output.detach(), {name: p.grad.clone() for name, p in parameters.items()}

    torch._dynamo.reset()
    if family in BROKEN_GRAPHS:
        reasons = torch._dynamo.explain(model)(input_ids=TOKENS).break_reasons
        assert reasons and all("nrlib" not in reason.user_stack[-1].filename for reason in reasons)
        return
    counted = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    for step in range(3):
        tokens = TOKENS.roll(step, dims=1)
        expected, plain = gradients_of(model, tokens)
        output, found = gradients_of(compiled, tokens)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(found, plain)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(0.9)
    assert counted.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the inductor needs a C++ compiler")
def test_compiled_to_machine_code(tiny_model, tmp_path, monkeypatch):
    """A training step with the local loss, forward and backward, through torch's default compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = open_adapters(extended(tiny_model(n_layers=1)))
    config = TrainingConfig(batch_size=4, precision="float32")
    expected = training_step(model, BATCH, config, "l1", 0.1, torch.float32)
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(model)
        found = training_step(compiled, BATCH, config, "l1", 0.1, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch._dynamo.reset()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(gradients, plain)


# --- a family nobody has heard of -------------------------------------------------------------------------------------


class Stage(nn.Module):
    """A layer of no library's making: its blocks have names of their own, and one is asked what it is."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.GRU(16, 16, batch_first=True)
        self.thinking = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.thinking.scale = 0.5

    def forward(self, x):
        x = x + self.mixing(x)[0]
        return x + self.thinking.scale * self.thinking(x)


class HomeMade(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.stages = nn.ModuleList(Stage() for _ in range(3))
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids, **_):
        x = self.embedding(input_ids)
        for stage in self.stages:
            x = stage(x)
        return types.SimpleNamespace(logits=self.head(x))


def home_made():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HomeMade().eval()
    model.config = PretrainedConfig(hidden_size=16)
    return model


@pytest.mark.parametrize("block", ["thinking", "mixing"])
def test_a_family_of_ones_own_works_when_its_modules_are_named(block, tmp_path):
    backbone = home_made()
    before = logits(backbone)
    names = [f"stages.{index}.{block}" for index in range(3)]
    model = extended(backbone, target_modules=names)
    assert torch.equal(logits(model), before)
    gradients(model)
    first = logits(open_adapters(model).eval())
    assert not torch.equal(first, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(home_made(), tmp_path, adapter_name="again").eval()
    assert torch.equal(logits(loaded), first)
    assert torch.equal(logits(loaded.unload()), before)


def test_a_family_of_ones_own_is_told_the_candidates():
    with pytest.raises(BackboneError, match=r"HomeMade.*mixing, thinking.*target_modules=\['stages\.0\.NAME'"):
        extended(home_made())
    with pytest.raises(ConfigError, match=r"'stages\.0\.mlp'.*stages\.0\.mixing, stages\.0\.thinking"):
        extended(home_made(), target_modules=["stages.0.mlp"])
    backbone = home_made()
    del backbone.config
    with pytest.raises(BackboneError, match=r"PretrainedConfig\(hidden_size=D\)"):
        extended(backbone, target_modules=["stages.0.thinking"])
