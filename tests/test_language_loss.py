"""The language-model loss a few tokens at a time: the value and the gradients of the whole."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from torch import nn

from nrlib import language_loss
from nrlib.config import MethodConfig
from nrlib.language_loss import cross_entropy_and_logits, find_head
from nrlib.methods import apply_method

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, TARGETS = (torch.randint(0, 64, (2, 9), generator=GENERATOR) for _ in range(2))
CAPPED = {"gemma2"}


def loss_and_gradients(model, dtype, head):
    model.zero_grad()
    loss, _ = cross_entropy_and_logits(model, INPUTS, TARGETS, dtype, head)
    (0.3 * loss).backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("n_tokens", [5, 18, 1000])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - CAPPED))
def test_in_parts_equals_at_once(family, n_tokens, tiny_model, monkeypatch):
    monkeypatch.setattr(language_loss, "N_LOGITS_AT_ONCE", 64 * n_tokens)
    model = tiny_model(family, n_layers=2)
    expected, gradients = loss_and_gradients(model, torch.float32, None)
    found, parts = loss_and_gradients(model, torch.float32, find_head(model))
    assert found == pytest.approx(expected, rel=1e-6)
    assert parts.keys() == gradients.keys() and any("embed" in name or "wte" in name for name in parts)
    for name, gradient in gradients.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "neutral_residues"])
def test_with_a_frozen_head_in_bfloat16(method, tiny_model, monkeypatch):
    monkeypatch.setattr(language_loss, "N_LOGITS_AT_ONCE", 64 * 5)
    model = apply_method(tiny_model(n_layers=2), MethodConfig(method=method), seed=0)
    head = find_head(model)
    expected, gradients = loss_and_gradients(model, torch.bfloat16, None)
    found, parts = loss_and_gradients(model, torch.bfloat16, head)
    assert head.weight.grad is None and parts.keys() == gradients.keys()
    assert found == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0.05, atol=0.02 * float(gradient.abs().max() + 1e-6))


def test_the_logits_are_never_all_there(tiny_model, monkeypatch):
    monkeypatch.setattr(language_loss, "N_LOGITS_AT_ONCE", 64 * 5)
    model, sizes = tiny_model(), []
    original = nn.functional.cross_entropy

    def watched(logits, *args, **kwargs):
        sizes.append(len(logits))
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "cross_entropy", watched)
    loss_and_gradients(model, torch.float32, find_head(model))
    assert sorted(sizes) == [3, 3, 5, 5, 5, 5, 5, 5]  # once forwards, once backwards


def test_the_model_is_as_before(tiny_model):
    model = tiny_model()
    before = model(input_ids=INPUTS).logits
    head = find_head(model.train())
    assert model.training
    with pytest.raises(RuntimeError), language_loss.loss_in_place_of_logits(head, TARGETS, torch.float32):
        raise RuntimeError
    assert torch.equal(model.eval()(input_ids=INPUTS).logits, before)


def test_a_model_that_changes_its_logits_or_hides_its_head_takes_the_ordinary_path(tiny_model):
    assert find_head(tiny_model("gemma2")) is None  # caps its logits
    assert find_head(tiny_model("gemma2", final_logit_softcapping=None)) is not None
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)  # as an adapter on it would
    assert find_head(model) is None
    assert find_head(nn.Linear(2, 2)) is None
