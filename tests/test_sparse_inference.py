"""Inference that skips closed gates: the same output, fewer operations, and nothing skipped where all must be seen."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FAMILIES
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from nrlib import GatedAdapter, NeutralResiduesConfig, sparse_inference
from nrlib.evaluation import bits_per_byte
from nrlib.losses import GateStatistics, LocalLoss, active_adapters
from nrlib.runs import run_and_keep
from nrlib.sparse_inference import add_residue
from nrlib.texts import prepare_text

TOKENS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def always_worthwhile(monkeypatch):
    """Rows are gathered however few operations that saves: the models here are tiny."""
    monkeypatch.setitem(sparse_inference.WORTHWHILE_FLOPS, "cpu", 0.0)
    monkeypatch.setattr(sparse_inference, "LARGEST_OPEN_RATIO", 1.0)


@pytest.fixture
def computed(monkeypatch):
    """How many tokens each call of the adapter's gated linear unit computed."""
    numbers = []
    glu = GatedAdapter.glu

    def counting(adapter, x):
        numbers.append(x.shape[:-1].numel())
        return glu(adapter, x)

    monkeypatch.setattr(GatedAdapter, "glu", counting)
    return numbers


def make_adapter(d_model=16, width=12, gate="relu", dtype=torch.float32):
    adapter = GatedAdapter(d_model, width, n_layers=2, gate=gate).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def open_gates(adapter, x, n_open):
    """Move the bias so that exactly `n_open` tokens of x have an open gate."""
    adapter.block_gate.bias.zero_()
    scores = adapter.block_gate(x).flatten().sort().values
    edges = torch.cat([scores[:1] - 1, (scores[1:] + scores[:-1]) / 2, scores[-1:] + 1])
    adapter.block_gate.bias.copy_(-edges[len(scores) - n_open])
    assert (adapter.gate_values(x) > 0).sum() == n_open


def tensors(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))


# --- the same output --------------------------------------------------------------------------------------------------

TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n_open", [0, 1, 7, 33])
@torch.no_grad()
def test_the_sum_is_that_of_the_dense_path(dtype, n_open, always_worthwhile, computed):
    adapter = make_adapter(dtype=dtype)
    output, x = tensors(3, 11, 16, dtype=dtype)
    open_gates(adapter, x, n_open)
    expected = output + adapter(x)
    computed.clear()
    before = output.clone()
    extended = add_residue(output, adapter, x)
    assert computed == ([n_open] if n_open else [])
    assert extended.shape == output.shape and extended.dtype == dtype
    torch.testing.assert_close(extended, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    is_closed = adapter.gate_values(x).squeeze(-1) == 0
    assert torch.equal(extended[is_closed], output[is_closed])
    assert torch.equal(output, before)


@torch.no_grad()
def test_other_shapes_and_layouts(always_worthwhile, computed):
    adapter = make_adapter()
    for output, x in (tensors(33, 16), (t.transpose(0, 1) for t in tensors(3, 11, 16)), tensors(1, 1, 16)):
        open_gates(adapter, x, max(1, x.shape[:-1].numel() // 3))
        expected = output + adapter(x)
        computed.clear()
        torch.testing.assert_close(add_residue(output, adapter, x), expected, rtol=1e-5, atol=1e-6)
        assert computed == [max(1, x.shape[:-1].numel() // 3)]
    empty = torch.zeros(0, 16)
    assert add_residue(empty, adapter, empty).shape == (0, 16)


@torch.no_grad()
def test_float32_adapter_beside_a_bfloat16_block_and_autocast(always_worthwhile, computed):
    adapter = make_adapter()
    output, x = tensors(3, 11, 16, dtype=torch.bfloat16)
    open_gates(adapter, x.float(), 9)
    expected = output + adapter(x.float()).bfloat16()
    computed.clear()
    extended = add_residue(output, adapter, x)
    assert computed == [9] and extended.dtype == torch.bfloat16
    torch.testing.assert_close(extended, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = output.float() + adapter(x.float())
        torch.testing.assert_close(add_residue(output.float(), adapter, x.float()), expected, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_gate_that_is_not_a_number_is_not_hidden(always_worthwhile):
    adapter = make_adapter()
    output, x = tensors(2, 5, 16)
    x[1, 2] = torch.nan
    is_nan = add_residue(output, adapter, x).isnan().any(-1)
    assert is_nan[1, 2] and is_nan.sum() == 1


def extended_model(backbone, **options):
    """With large weights, and with about half of the gates open."""
    model = get_peft_model(backbone, NeutralResiduesConfig(**{"gate": "relu", "extra_ratio": 0.5} | options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in active_adapters(model):
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("position", "site"), [("parallel", "ffn"), ("serial", "ffn"), ("parallel", "attention")])
def test_every_family_and_placement(family, position, site, tiny_model, always_worthwhile, computed):
    model = extended_model(tiny_model(family), position=position, site=site)
    expected = model(input_ids=TOKENS).logits.detach()  # with gradients nothing is skipped
    assert set(computed) == {TOKENS.numel()}
    computed.clear()
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    assert 0 < sum(computed) < 3 * TOKENS.numel()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_on_one_block(tiny_model, always_worthwhile):
    model = extended_model(tiny_model(), position="serial")  # the second must not read what the first has added
    model.add_adapter("second", NeutralResiduesConfig(gate="relu", position="serial"))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.model.layers[0].mlp
    first, second = layer.neutral_residues_adapters.values()
    second.load_state_dict(make_adapter(16, second.input_projection.out_features).state_dict())
    second.eval()
    x, _ = tensors(2, 9, 16)
    block = layer.base_layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), block + first(block) + second(block), rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_the_dense_path(tiny_model, always_worthwhile, computed, monkeypatch):
    model = extended_model(tiny_model())
    options = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(TOKENS, **options)
    n_computed = sum(computed)
    computed.clear()
    monkeypatch.setattr(sparse_inference, "may_skip", lambda *_: False)
    assert torch.equal(model.generate(TOKENS, **options), generated)
    assert n_computed < sum(computed)


def test_bits_per_byte_of_a_trained_extension(small_config, always_worthwhile, computed):
    config = small_config(gate="relu", n_tokens=60 * 4 * 32)
    _, model = run_and_keep(config, progress=False)
    stream = prepare_text(config.data, config.backbone, False).held_out["unseen_original"]
    computed.clear()
    sparse, n_computed = bits_per_byte(model, stream, 32), sum(computed)
    computed.clear()
    dense = bits_per_byte(model, stream, 32, statistics=GateStatistics(model))  # its hooks see every token
    assert 0 < n_computed < sum(computed)
    assert sparse == pytest.approx(dense, rel=1e-6)


# --- chosen where it pays ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tokens", "n_open", "expected"),
    [
        (1, 0, []),
        (1, 1, [1]),
        (64, 0, []),
        (64, 1, [64]),  # 63 tokens of 6·64·128 operations are too little to save
        (512, 26, [26]),
        (2048, 1700, [1700]),
        (2048, 1900, [2048]),  # most gates are open
    ],
)
@torch.no_grad()
def test_rows_are_gathered_where_that_saves_enough(n_tokens, n_open, expected, computed):
    adapter = make_adapter(64, 128)
    output, x = tensors(1, n_tokens, 64)
    open_gates(adapter, x, n_open)
    add_residue(output, adapter, x)
    assert computed == expected


def test_operations_of_original_text_are_those_of_the_backbone_and_the_gates(tiny_model):
    backbone = tiny_model()
    model = extended_model(copy.deepcopy(backbone))
    with torch.no_grad():
        for adapter in active_adapters(model):
            adapter.block_gate.bias.fill_(-1e3)
    totals = []
    for each in (backbone, model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            logits = each(input_ids=TOKENS).logits
        totals.append((counter.get_total_flops(), logits))
    n_layers, d_model = 3, 16
    assert totals[1][0] - totals[0][0] == 2 * n_layers * d_model * TOKENS.numel()
    assert torch.equal(totals[0][1], totals[1][1])


# --- nothing is skipped where all must be seen ------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["none", "sigmoid", "elu"])
@torch.no_grad()
def test_other_gates_are_never_exactly_zero(gate, always_worthwhile, computed):
    adapter = make_adapter(gate=gate)
    output, x = tensors(2, 5, 16)
    assert torch.equal(add_residue(output, adapter, x), output + adapter(x))
    assert set(computed) == {10}
    assert not sparse_inference.may_skip(adapter, x)


@pytest.mark.parametrize("where", ["adapter", "block_gate"])
@torch.no_grad()
def test_hooks_see_every_token(where, always_worthwhile):
    adapter = make_adapter()
    output, x = tensors(2, 5, 16)
    open_gates(adapter, x, 3)
    seen = []
    module = adapter if where == "adapter" else adapter.block_gate
    with module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel())):
        add_residue(output, adapter, x)
    with module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel())):
        add_residue(output, adapter, x)
    assert seen == [10, 10]


def test_local_loss_and_statistics_of_every_token_in_evaluation(tiny_model, always_worthwhile):
    model = extended_model(tiny_model())
    domain, values = torch.tensor([0, 1, 0, 1]), []
    for has_gradients in (True, False):  # with gradients nothing is skipped
        statistics, losses = GateStatistics(model), []
        with torch.set_grad_enabled(has_gradients):
            for kind in ("l1", "domain_cross_entropy"):
                with LocalLoss(model, kind, domain) as loss:
                    model(input_ids=TOKENS)
                losses.append(loss.mean().item())
            with statistics.collect("text"):
                model(input_ids=TOKENS)
        values.append((losses, statistics.table()))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-6) and min(values[0][0]) > 0
    assert values[0][1] == values[1][1] and all(0 < row["open_ratio"] < 1 for row in values[0][1])


class OtherAdapter(GatedAdapter):
    """Does more than the formula."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_training_gradients_and_other_forward_passes(always_worthwhile, computed):
    output, x = tensors(2, 5, 16)
    adapter = make_adapter()
    open_gates(adapter, x, 3)
    with torch.enable_grad():
        assert add_residue(output, adapter.requires_grad_(True), x).requires_grad
    with torch.no_grad():
        add_residue(output, adapter.train(), x)
        assert computed == [10, 10]
        other = OtherAdapter(16, 12, n_layers=2, gate="relu").eval()
        other.load_state_dict(adapter.state_dict())
        torch.testing.assert_close(add_residue(output, other, x), output + 2 * adapter(x))


@torch.no_grad()
def test_a_compiled_graph_does_not_depend_on_the_data(always_worthwhile):
    adapter = make_adapter()
    output, x = tensors(2, 5, 16)
    open_gates(adapter, x, 0)
    compiled = torch.compile(add_residue, backend="eager", fullgraph=True)
    other_output, other_x = 3 * output, 3 * x  # some gates are open
    assert torch.equal(compiled(output, adapter, x), output)
    torch.testing.assert_close(compiled(other_output, adapter, other_x), other_output + adapter(other_x))
    module = torch.nn.Module()
    module.adapter, module.forward = adapter, lambda output, x: add_residue(output, adapter, x)
    traced = torch.jit.trace(module, (output, x))
    assert adapter(other_x).any()
    torch.testing.assert_close(traced(other_output, other_x), other_output + adapter(other_x))


@torch.no_grad()
def test_tensors_without_data_take_the_dense_path(always_worthwhile):
    adapter = make_adapter().to("meta")
    assert add_residue(torch.empty(2, 5, 16, device="meta"), adapter, torch.empty(2, 5, 16, device="meta")).is_meta
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert add_residue(torch.empty(2, 5, 16), GatedAdapter(16, 12, 2, gate="relu").eval(), torch.empty(2, 5, 16)).shape == (2, 5, 16)  # fmt: skip
