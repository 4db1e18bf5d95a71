"""The layer: the formula of its docstring, its initial variance, and a residue of exactly zero before training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nrlib.adapter import GatedAdapter
from nrlib.config import GATES

BY_HAND = {
    "none": lambda score: np.ones_like(score),
    "sigmoid": lambda score: 1 / (1 + np.exp(-score)),
    "relu": lambda score: np.maximum(0, score),
    "elu": lambda score: np.where(score > 0, score, np.exp(score) - 1),
}


def numbers(parameter):
    return parameter.detach().double().numpy()


def randomised(adapter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return adapter


@pytest.mark.parametrize("gate", GATES)
def test_forward_is_the_formula(gate):
    adapter = randomised(GatedAdapter(5, 7, n_layers=2, gate=gate))
    x = torch.randn(2, 11, 5, generator=torch.Generator().manual_seed(1))
    expected = np.zeros((2, 11, 5))
    for b in range(2):
        for t in range(11):
            hidden = x[b, t].double().numpy()
            glu = numbers(adapter.gate_projection.weight) @ hidden
            glu = glu / (1 + np.exp(-glu)) * (numbers(adapter.input_projection.weight) @ hidden)
            score = 0.0
            if gate != "none":
                score = numbers(adapter.block_gate.weight)[0] @ hidden + numbers(adapter.block_gate.bias)[0]
            expected[b, t] = BY_HAND[gate](score) * (numbers(adapter.output_projection.weight) @ glu)
    np.testing.assert_allclose(numbers(adapter(x)), expected, rtol=1e-4, atol=1e-6)


def test_a_closed_gate_lets_nothing_through():
    adapter = randomised(GatedAdapter(5, 7, n_layers=2, gate="relu"))
    with torch.no_grad():
        adapter.block_gate.weight.zero_()
        adapter.block_gate.bias.fill_(-0.1)
    assert torch.equal(adapter(torch.randn(2, 3, 5)), torch.zeros(2, 3, 5))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("initialisation", "variance"), [("low_variance", 1 / (1024 * 3)), ("he", 2 / 1024)], ids=["low_variance", "he"]
)
def test_initial_variance(gate, initialisation, variance):
    torch.manual_seed(0)
    adapter = GatedAdapter(1024, 64, n_layers=3, gate=gate, initialisation=initialisation)
    for linear in (adapter.input_projection, adapter.gate_projection):
        assert linear.weight.mean().abs() < 0.02 * variance**0.5
        assert linear.weight.var().item() == pytest.approx(variance, rel=0.03)
    assert not torch.equal(adapter.input_projection.weight, adapter.gate_projection.weight)
    assert not adapter.output_projection.weight.any()
    if gate == "none":
        assert adapter.block_gate is None
    else:
        assert adapter.block_gate.weight.var().item() == pytest.approx(variance, rel=0.15)
        assert not adapter.block_gate.bias.any()


@pytest.mark.parametrize("gate", GATES)
def test_the_first_residue_is_zero_and_only_w_o_can_learn_from_it(gate):
    adapter = GatedAdapter(8, 4, n_layers=2, gate=gate)
    residue = adapter(torch.randn(3, 5, 8))
    assert torch.equal(residue, torch.zeros(3, 5, 8))
    residue.sum().backward()
    learns = {name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {"output_projection.weight"}


@pytest.mark.parametrize("gate", GATES)
def test_number_of_weights(gate):
    n_weights = sum(p.numel() for p in GatedAdapter(8, 5, n_layers=2, gate=gate).parameters())
    assert n_weights == 3 * 8 * 5 + (0 if gate == "none" else 8 + 1)


def test_forward_keeps_nothing():
    adapter = randomised(GatedAdapter(8, 4, n_layers=2))
    before = {module: set(vars(module)) for module in adapter.modules()}
    buffers = len(list(adapter.buffers()))
    adapter(torch.randn(2, 3, 8))
    assert {module: set(vars(module)) for module in adapter.modules()} == before
    assert len(list(adapter.buffers())) == buffers == 0
