"""The local loss and the gate statistics, by hand; under checkpointing and in micro-batches; and nothing stays behind."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nrlib import IGNORED, NEW, ORIGINAL, GatedAdapter, LocalLoss, NeutralResiduesConfig
from nrlib.adapter import GATE_FUNCTIONS
from nrlib.batches import Batch
from nrlib.config import GATES, TrainingConfig
from nrlib.errors import ConfigError
from nrlib.losses import GateStatistics
from nrlib.training import training_step

B, T, D = 4, 6, 8
PER_SEQUENCE = torch.tensor([NEW, ORIGINAL, NEW, ORIGINAL])
PER_TOKEN = torch.tensor([[ORIGINAL] * 6, [NEW] * 6, [ORIGINAL, NEW, IGNORED, ORIGINAL, NEW, IGNORED], [IGNORED] * 6])
DOMAINS = pytest.mark.parametrize("domain", [PER_SEQUENCE, PER_TOKEN], ids=["per sequence", "per token"])


class Stack(nn.Module):
    """Three adapters on top of each other: a model with nothing around them."""

    def __init__(self, gate="relu", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(GatedAdapter(D, width, n_layers=3, gate=gate) for width in (4, 6, 5))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

    def visited(self, x):
        """Each layer with what goes into it and its residue."""
        for layer in self.layers:
            residue = layer(x)
            yield layer, x, residue
            x = x + residue


@pytest.fixture
def x():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))


def domain_of(domain, b, t):
    return int(domain[b] if domain.dim() == 1 else domain[b, t])


# --- by hand ----------------------------------------------------------------------------------------------------------


@DOMAINS
@pytest.mark.parametrize("gate", ["none", "relu", "elu"])
def test_l1_is_the_mean_over_layers_and_original_tokens(domain, gate, x):
    model, terms = Stack(gate), []
    for _, _, residue in model.visited(x):
        for b in range(B):
            for t in range(T):
                if domain_of(domain, b, t) == ORIGINAL:
                    terms.append(sum(abs(value) for value in residue[b, t].tolist()) / D)
    with LocalLoss(model, "l1", domain) as local_loss:
        model(x)
    assert local_loss.mean().item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    total, count = local_loss.sum_and_count()
    assert count.item() == len(terms) and total.item() == pytest.approx(sum(terms), rel=1e-5)


@DOMAINS
def test_domain_cross_entropy_is_the_mean_over_layers_and_all_tokens_but_padding(domain, x):
    model, terms = Stack("sigmoid"), []
    for layer, layer_input, _ in model.visited(x):
        for b in range(B):
            for t in range(T):
                is_new = 1 / (1 + math.exp(-layer.block_gate(layer_input[b, t]).item()))
                if domain_of(domain, b, t) != IGNORED:
                    terms.append(-math.log(is_new if domain_of(domain, b, t) == NEW else 1 - is_new))
    with LocalLoss(model, "domain_cross_entropy", domain) as local_loss:
        model(x)
    assert (
        len(terms) == 3 * (domain.expand(B, T) if domain.dim() == 2 else domain[:, None].expand(B, T)).ne(IGNORED).sum()
    )
    assert local_loss.mean().item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "gate", "domain"),
    [
        ("l1", "relu", torch.tensor([NEW] * B)),
        ("l1", "none", torch.full((B, T), IGNORED)),
        ("domain_cross_entropy", "sigmoid", torch.full((B, T), IGNORED)),
        ("none", "relu", torch.tensor([ORIGINAL] * B)),
    ],
)
def test_without_a_token_that_counts_the_loss_is_zero_and_harms_no_gradient(kind, gate, domain, x):
    model = Stack(gate)
    with LocalLoss(model, kind, domain) as local_loss:
        loss = model(x).sum() + 10 * local_loss.mean()
        loss.backward()
    assert local_loss.mean().item() == 0
    expected = Stack(gate)
    expected(x).sum().backward()
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_the_gradient_of_new_tokens_is_exactly_zero(x):
    model = Stack()
    x.requires_grad_()
    with LocalLoss(model, "l1", PER_SEQUENCE) as local_loss:
        model(x)
        local_loss.mean().backward()
    assert not x.grad[PER_SEQUENCE == NEW].any() and x.grad[PER_SEQUENCE == ORIGINAL].any()


def test_residues_in_half_precision_are_summed_in_float32(x):
    model = Stack().to(torch.bfloat16)
    with LocalLoss(model, "l1", PER_SEQUENCE) as local_loss:
        model(x.to(torch.bfloat16))
    with LocalLoss(model.float(), "l1", PER_SEQUENCE) as exact:
        model(x)
    assert local_loss.mean().dtype == torch.float32
    assert local_loss.mean().item() == pytest.approx(exact.mean().item(), rel=0.05)


# --- in a language model ----------------------------------------------------------------------------------------------

TOKENS = torch.randint(0, 64, (4, 13), generator=torch.Generator().manual_seed(0))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], torch.tensor([ORIGINAL, ORIGINAL, NEW, NEW]))
KINDS = pytest.mark.parametrize(("kind", "gate"), [("l1", "relu"), ("domain_cross_entropy", "sigmoid")])


def extended(tiny_model, **options):
    model = get_peft_model(tiny_model(), NeutralResiduesConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.train()


def step(model, kind, **settings):
    config = TrainingConfig(batch_size=4, **settings)
    model.zero_grad()
    losses = training_step(model, BATCH, config, kind, 5.0, torch.float32)
    return tuple(loss.item() for loss in losses), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


@KINDS
def test_activation_checkpointing_changes_nothing(kind, gate, tiny_model):
    model = extended(tiny_model, gate=gate, local_loss=kind)
    plain_losses, plain_gradients = step(model, kind)
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    n_calls = []
    adapter = LocalLoss(model, kind, BATCH.domain).adapters[0]
    handle = adapter.register_forward_pre_hook(lambda *_: n_calls.append(1))
    losses, found = step(model, kind)
    handle.remove()
    assert len(n_calls) == 2  # the layer did run again
    assert losses == plain_losses and losses[1] > 0
    assert all(torch.equal(found[name], gradient) and gradient.any() for name, gradient in plain_gradients.items())
    with LocalLoss(model, kind, BATCH.domain) as local_loss:
        model(input_ids=BATCH.inputs)
        total, count = (value.clone() for value in local_loss.sum_and_count())
        total.backward()
        assert torch.equal(local_loss.sum_and_count()[0], total) and torch.equal(local_loss.sum_and_count()[1], count)
    n_counted = (BATCH.domain == ORIGINAL).sum() * 12 if kind == "l1" else BATCH.inputs.numel()
    assert count.item() == 3 * n_counted  # each layer once, though each ran twice


def test_reentrant_checkpointing_is_refused(tiny_model):
    model = extended(tiny_model)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        step(model, "l1")


@KINDS
@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_micro_batches_add_up_to_the_batch(kind, gate, accumulation_steps, tiny_model):
    model = extended(tiny_model, gate=gate, local_loss=kind)
    whole_losses, whole = step(model, kind)
    losses, parts = step(model, kind, accumulation_steps=accumulation_steps)
    assert losses == pytest.approx(whole_losses, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_training_step_adds_the_weighted_local_loss(tiny_model):
    model = extended(tiny_model)
    (language_loss, local_loss), _ = step(model, "l1")
    with LocalLoss(model, "l1", BATCH.domain) as collected:
        out = model(input_ids=BATCH.inputs, labels=TOKENS[:, :-1])
        expected = nn.functional.cross_entropy(out.logits.flatten(0, 1), BATCH.targets.flatten())
        mean = collected.mean()
        model.zero_grad()
        (expected + 5.0 * mean).backward()
    assert language_loss == pytest.approx(expected.item(), rel=1e-6)
    assert local_loss == pytest.approx(mean.item(), rel=1e-5)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    _, found = step(model, "l1")
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_without_an_original_sequence(tiny_model):
    model = extended(tiny_model)
    only_new = replace(BATCH, domain=torch.full((4,), NEW))
    language_loss, local_loss = training_step(model, only_new, TrainingConfig(batch_size=4), "l1", 5.0, torch.float32)
    assert local_loss == 0 and math.isfinite(language_loss)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_nothing_is_left_on_a_module(tiny_model):
    model = extended(tiny_model)

    def trace():
        keys = {module: set(vars(module)) for module in model.modules()}
        hooks = {
            module: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        }
        tensors = {m: sum(isinstance(value, torch.Tensor) for value in vars(m).values()) for m in model.modules()}
        return keys, hooks, tensors

    model(input_ids=TOKENS)  # PEFT and transformers set up what they keep
    before = trace()
    step(model, "l1")
    with pytest.raises(ZeroDivisionError), LocalLoss(model, "l1", BATCH.domain):
        raise ZeroDivisionError  # an error inside the context must not leave its hooks
    statistics = GateStatistics(model)
    with torch.no_grad(), statistics.collect("text"):
        model(input_ids=TOKENS)
    assert trace() == before
    model(input_ids=TOKENS)
    model(input_ids=TOKENS)
    assert trace() == before


def test_disabled_adapters_have_no_local_loss(tiny_model):
    model = extended(tiny_model)
    with model.disable_adapter(), LocalLoss(model, "l1", BATCH.domain) as local_loss:
        model(input_ids=BATCH.inputs)
        assert local_loss.mean().item() == 0


@pytest.mark.parametrize(
    ("kind", "domain", "words"),
    [
        ("l2", torch.tensor([NEW, ORIGINAL, NEW, ORIGINAL]), "none, l1, domain_cross_entropy"),
        ("l1", [0, 1], "tensor of whole numbers"),
        ("l1", torch.zeros(4), "tensor of whole numbers"),
    ],
    ids=["kind", "list", "floats"],
)
def test_a_local_loss_that_cannot_be_is_refused(kind, domain, words, tiny_model):
    with pytest.raises(ConfigError, match=words):
        LocalLoss(extended(tiny_model), kind, domain)


def test_a_local_loss_of_nothing_is_an_error(tiny_model):
    with pytest.raises(ConfigError, match="get_peft_model"):
        LocalLoss(tiny_model(), "l1", torch.tensor([NEW, ORIGINAL, NEW, ORIGINAL]))
    with (
        LocalLoss(extended(tiny_model), "l1", torch.tensor([NEW, ORIGINAL, NEW, ORIGINAL])) as local_loss,
        pytest.raises(RuntimeError, match="inside"),
    ):
        local_loss.mean()


# --- gate statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_gate_statistics_by_hand(gate, x):
    model = Stack(gate)
    statistics = GateStatistics(model)
    with torch.no_grad():
        for name, parts in (("first", [x[:3], x[3:]]), ("second", [2 * x])):
            with statistics.collect(name):
                for part in parts:
                    model(part)
        model(100 * x)  # outside: does not count
    rows = {(row["text"], row["layer"]): row for row in statistics.table()}
    assert len(rows) == 2 * 3
    for name, text in (("first", x), ("second", 2 * x)):
        for index, (layer, layer_input, residue) in enumerate(model.visited(text)):
            row = rows[name, index]
            assert row["mean_residue"] == pytest.approx(residue.abs().mean().item(), rel=1e-5, abs=1e-5)
            if gate == "none":
                assert "mean_gate" not in row and "open_ratio" not in row
            else:
                value = GATE_FUNCTIONS[gate](layer.block_gate(layer_input))
                assert row["mean_gate"] == pytest.approx(value.mean().item(), abs=1e-5)
                assert row["open_ratio"] == pytest.approx((value.abs() > 0.01).float().mean().item(), abs=1e-5)


def test_gate_statistics_name_the_decoder_layer(tiny_model):
    model = extended(tiny_model, layers="last_half")
    statistics = GateStatistics(model)
    with torch.no_grad(), statistics.collect("text"):
        model(input_ids=TOKENS)
    assert [row["layer"] for row in statistics.table()] == [1, 2]
