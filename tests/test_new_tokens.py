"""New tokens beside neutral residues: their gate, their local loss, and the study of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrlib.errors import ConfigError
from nrlib.losses import NEW, ORIGINAL
from nrlib.studies.new_tokens import (
    CLOSED,
    METHODS,
    NewTokenGate,
    new_tokens,
    penalty_on_new_tokens,
    taken_by_new_tokens,
)

N_OLD, N_TOKENS, D = 7, 10, 6


@pytest.fixture
def gate():
    torch.manual_seed(0)
    return NewTokenGate(nn.Linear(D, N_TOKENS, bias=False), D, N_OLD, memory=4)


def test_a_new_gate_lowers_the_new_tokens_alone_and_all_alike(gate):
    hidden = torch.randn(2, 5, D)
    change = gate(hidden) - gate.head(hidden)
    assert (change[..., :N_OLD] == 0).all()
    torch.testing.assert_close(change[..., N_OLD:], torch.full((2, 5, 3), CLOSED).sigmoid().log())


def test_a_gate_reads_its_memory_and_no_later_token(gate):
    nn.init.normal_(gate.block_gate.weight)
    hidden = torch.randn(1, 9, D)
    changed = hidden.clone()
    changed[:, 3] += 1.0
    differs = (gate(hidden) - gate.head(hidden) != gate(changed) - gate.head(changed))[0, :, -1]
    assert differs.tolist() == [3 <= t < 7 for t in range(9)]


def test_what_new_tokens_take_is_the_rise_of_the_loss_on_text_without_them():
    logits, targets = torch.randn(4, N_TOKENS), torch.tensor([0, 3, 6, 2])
    with_all = nn.functional.cross_entropy(logits, targets, reduction="none")
    without = nn.functional.cross_entropy(logits[:, :N_OLD], targets, reduction="none")
    torch.testing.assert_close(taken_by_new_tokens(logits, N_OLD), with_all - without)


def test_the_penalty_counts_original_sequences_and_adds_up_over_micro_batches():
    penalty = penalty_on_new_tokens(N_OLD, 3.0)
    logits, inputs = torch.randn(4, 5, N_TOKENS), torch.zeros(4, 5, dtype=torch.long)
    domain = torch.tensor([ORIGINAL, NEW, NEW, ORIGINAL])
    whole = penalty(inputs, domain, logits, 10, 1.0)
    torch.testing.assert_close(whole, 3 * taken_by_new_tokens(logits[[0, 3]], N_OLD).mean())
    halves = sum(penalty(inputs[h], domain[h], logits[h], 10, 0.5) for h in (slice(2), slice(2, 4)))
    torch.testing.assert_close(halves, whole)
    assert penalty(inputs[1:3], domain[1:3], logits[1:3], 0, 1.0) == 0


@pytest.mark.parametrize(("method", "weight"), [("vanilla_adapter", 0.0), ("lora", 5.0), ("fine_tuning", 5.0)])
def test_what_the_study_cannot_do_is_said_first(method, weight):
    with pytest.raises(ConfigError, match="only with neutral_residues"):
        new_tokens("smoke", method, 256, weight, 0.2, 102_400, 0.1, 0)


@pytest.mark.slow
def test_the_loss_on_new_tokens_keeps_the_old_language():
    """Shortened runs: without the loss the new tokens take a tenth and more of the old language; with it hardly any."""
    free, held = (new_tokens("smoke", "neutral_residues", 256, weight, 0.2, 61_440, 0.1, 0) for weight in (0.0, 20.0))
    assert held["forgetting"] < 0.02 < 0.08 < free["forgetting"]
    assert held["forgetting_own_tokens"] == pytest.approx(free["forgetting_own_tokens"], abs=0.01)
    for study in (free, held):
        assert study["n_changed"] == 0 and study["bytes_per_token"] > 1.5 * study["backbone_bytes_per_token"]
        assert study["bits_per_byte"]["new"] < 0.5 * study["backbone_bits_per_byte"]["new"]


@pytest.mark.slow
def test_extra_weights_are_counted_alike():
    shares = {m: new_tokens("smoke", m, 256, 0.0, 0.2, 4_096, 0.1, 0)["extra_weights"] for m in METHODS}
    assert 0 < shares["neutral_residues"] - shares["fine_tuning"] < 0.21  # rows alone
    assert shares["lora"] == pytest.approx(shares["neutral_residues"], abs=0.03)
