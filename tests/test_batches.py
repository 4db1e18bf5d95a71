"""Batches and bits per byte: an exact mix, evenly spread; every token scored once; each batch a function of seed and step."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nrlib.batches import MixedBatches, TokenStream, evaluation_batches
from nrlib.config import make_config
from nrlib.errors import CorpusError
from nrlib.evaluation import (
    MAX_LOGITS,
    _vocabulary_size,
    bits_per_byte,
    drift,
    evaluate,
    forgetting,
    learning,
    sequences_at_a_time,
)
from nrlib.losses import NEW, ORIGINAL

T = 5


def stream(n_tokens, first=0, name="text", n_bytes=1):
    return TokenStream(np.arange(first, first + n_tokens, dtype=np.int32), n_bytes, name)


def mixed(mix_ratio=0.1, n_steps=30, batch_size=8, seed=0, n_new=401, n_original=151):
    return MixedBatches(
        stream(n_new), stream(n_original, 1000), mix_ratio=mix_ratio, n_steps=n_steps, batch_size=batch_size,
        context_length=T, seed=seed,
    )  # fmt: skip


def sequences(batches):
    """All sequences of a run (n, T + 1), and their domains."""
    found = [batches.batch(step) for step in range(batches.n_steps)]
    for batch in found:
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    tokens = torch.cat([torch.cat([b.inputs, b.targets[:, -1:]], dim=1) for b in found])
    return tokens, torch.cat([b.domain for b in found])


# --- mix --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix_ratio", [0.0, 0.001, 0.01, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("n_steps", "batch_size"), [(30, 8), (7, 3), (1, 1)])
def test_the_mix_is_exact_and_even(mix_ratio, n_steps, batch_size):
    n = n_steps * batch_size
    tokens, domain = sequences(mixed(mix_ratio, n_steps, batch_size))
    assert len(tokens) == n
    is_original = (domain == ORIGINAL).numpy()
    assert is_original.sum() == round(mix_ratio * n)
    assert ((domain == NEW).numpy() == ~is_original).all()
    assert ((tokens >= 1000).numpy() == is_original[:, None]).all()  # the domain says where the tokens are from
    # evenly: no stretch of the run has one sequence more or less than its share
    counts = np.concatenate([[0], is_original.cumsum()])
    share = np.arange(n + 1) * round(mix_ratio * n) / n
    assert np.abs(counts - share).max() < 1


def test_without_a_proxy_a_mix_of_zero_works():
    batches = MixedBatches(stream(401), None, mix_ratio=0.0, n_steps=2, batch_size=4, context_length=T, seed=0)
    assert batches.batch(1).domain.tolist() == [NEW] * 4


def test_an_epoch_reads_every_sequence_once():
    tokens, _ = sequences(mixed(0.0, n_steps=30, batch_size=8))  # 240 sequences of 80
    starts = tokens[:, 0].tolist()
    epochs = [starts[i : i + 80] for i in range(0, 240, 80)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 400, T))
    assert epochs[0] != sorted(epochs[0]) and epochs[0] != epochs[1]
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(T + 1))


@pytest.mark.parametrize("mix_ratio", [0.1, 0.5])
def test_a_batch_is_a_function_of_seed_and_step(mix_ratio):
    in_order = mixed(mix_ratio)
    expected = {step: in_order.batch(step) for step in range(30)}
    shuffled = mixed(mix_ratio)
    torch.manual_seed(5)
    random.seed(5)
    for step in [29, 0, 13, 28, 1, 29]:
        found = shuffled.batch(step)
        assert torch.equal(found.inputs, expected[step].inputs) and torch.equal(found.domain, expected[step].domain)
    other = mixed(mix_ratio, seed=1)
    assert not torch.equal(other.batch(0).inputs, expected[0].inputs)


@pytest.mark.parametrize(("n_tokens", "n_sequences"), [(1, 0), (T, 0), (T + 1, 1), (2 * T, 1), (2 * T + 1, 2)])
def test_number_of_sequences(n_tokens, n_sequences):
    text = stream(n_tokens)
    assert text.n_sequences(T) == n_sequences
    if n_sequences:
        last = text.sequences(np.array([n_sequences - 1]), T)
        assert last.tolist() == [list(range((n_sequences - 1) * T, n_sequences * T + 1))]


@pytest.mark.parametrize(
    ("n_new", "n_original", "mix_ratio", "name"),
    [
        (8 * T, 151, 0.0, "new text"),
        (401, T, 0.1, "old text"),
        (401, None, 0.1, "the proxy"),
        (0, 151, 0.5, "new text"),
    ],
)
def test_text_too_small_for_one_batch(n_new, n_original, mix_ratio, name):
    original = None if n_original is None else stream(n_original, 1000, "old text")
    with pytest.raises(CorpusError, match="too small") as caught:
        MixedBatches(
            stream(n_new, name="new text"), original, mix_ratio=mix_ratio, n_steps=2, batch_size=8, context_length=T,
            seed=0,
        )  # fmt: skip
    message = str(caught.value)
    assert name in message and f"context_length = {T}" in message and "lower batch_size" in message


def test_one_batch_of_text_is_enough():
    assert mixed(n_new=8 * T + 1, n_original=T + 1).batch(29).inputs.shape == (8, T)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [2, T, T + 1, T + 2, 2 * T, 2 * T + 1, 2 * T + 2, 77])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_is_scored_once(n_tokens, batch_size):
    found = list(evaluation_batches(stream(n_tokens, 100), T, batch_size))
    assert torch.cat([targets.flatten() for _, targets in found]).tolist() == list(range(101, 100 + n_tokens))
    for inputs, targets in found:
        assert (inputs + 1 == targets).all()  # each is predicted from the token before it
        assert len(inputs) <= batch_size and inputs.shape[1] <= T
    lengths = [inputs.shape[1] for inputs, _ in found for _ in inputs]
    n_full, rest = divmod(n_tokens - 1, T)
    assert lengths == [T] * n_full + [rest] * (rest > 0)


# --- the token that a backbone's tokenizer puts before every text -----------------------------------------------------

BOS = 5_000  # no token of the texts


def digest(tensors):
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def test_batches_without_a_beginning_token_are_those_of_the_published_runs():
    batches = [mixed().batch(step) for step in range(30)]
    assert digest(t for batch in batches for t in (batch.inputs, batch.targets)) == "9c06c0f0630b9db2"
    assert digest(t for pair in evaluation_batches(stream(77, 100), T) for t in pair) == "c03c2ce5ba7d1b8a"


def test_every_training_window_begins_with_the_beginning_token():
    new, original = (replace(s, bos_token_id=BOS) for s in (stream(401), stream(151, 1000)))
    begun = MixedBatches(new, original, mix_ratio=0.1, n_steps=30, batch_size=8, context_length=T, seed=0)
    for step in range(30):
        found, plain = begun.batch(step), mixed().batch(step)
        assert (found.inputs[:, 0] == BOS).all() and torch.equal(found.inputs[:, 1:], plain.inputs[:, 1:])
        assert torch.equal(found.targets, plain.targets) and torch.equal(found.domain, plain.domain)
    assert BOS not in new.tokens  # the text itself is as it was


@pytest.mark.parametrize("n_tokens", [2, T + 1, 77])
def test_every_evaluation_window_begins_with_the_beginning_token(n_tokens):
    plain = list(evaluation_batches(stream(n_tokens, 100), T, 3))
    begun = list(evaluation_batches(replace(stream(n_tokens, 100), bos_token_id=BOS), T, 3))
    for (inputs, targets), (before, same) in zip(begun, plain, strict=True):
        assert (inputs[:, 0] == BOS).all() and torch.equal(inputs[:, 1:], before[:, 1:])
        assert torch.equal(targets, same)


# --- numbers ----------------------------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """Predicts each token from the one before it, by a table of logits."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=self.table[input_ids])


V = 7
TEXT = TokenStream(np.random.default_rng(0).integers(0, V, 48).astype(np.int32), 113, "text")


def bigram(seed):
    return Bigram(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))


def test_bits_per_byte_of_a_uniform_model():
    assert bits_per_byte(Bigram(torch.zeros(V, V)), TEXT, T) == pytest.approx(math.log2(V) * 47 / 113, rel=1e-6)


@pytest.mark.parametrize("context_length", [3, T, 47, 100])
def test_bits_per_byte_by_hand(context_length):
    model, bits = bigram(0), 0.0
    for before, after in zip(TEXT.tokens[:-1], TEXT.tokens[1:], strict=True):
        bits -= torch.log_softmax(model.table[before].detach().double(), -1)[after].item() / math.log(2)
    assert bits_per_byte(model, TEXT, context_length) == pytest.approx(bits / 113, rel=1e-5)


def test_drift_by_hand():
    backbone, model = bigram(0), bigram(1)
    p, q = (torch.log_softmax(m.table.detach().double(), -1) for m in (backbone, model))
    kl = (p.exp() * (p - q)).sum(-1)  # from the backbone's distribution to the model's
    expected = np.mean([kl[token].item() for token in TEXT.tokens[:-1]])

    def before(inputs):
        return backbone.table.detach()[inputs].flatten(0, 1)

    assert drift(model, before, TEXT, T) == pytest.approx(expected, rel=1e-5)
    assert drift(backbone, before, TEXT, T) == pytest.approx(0, abs=1e-7)


class Recorded(Bigram):
    """Says how large its vocabulary is, which need not be true, and remembers how many sequences came at a time."""

    def __init__(self, table, vocabulary_size):
        super().__init__(table)
        self.config, self.n_sequences = SimpleNamespace(vocab_size=vocabulary_size), []

    def forward(self, input_ids, use_cache=None):
        self.n_sequences.append(len(input_ids))
        return super().forward(input_ids)


LONG = TokenStream(np.random.default_rng(1).integers(0, V, 150 * T + 3).astype(np.int32), 2_000, "long")


@pytest.mark.parametrize(("vocabulary_size", "n_at_a_time"), [(256, 16), (MAX_LOGITS // (3 * T), 3), (MAX_LOGITS, 1)])
def test_evaluation_computes_no_more_logits_at_a_time_than_fit(vocabulary_size, n_at_a_time):
    plain, other = bigram(0), bigram(1)
    model = Recorded(plain.table.detach(), vocabulary_size)
    assert bits_per_byte(model, LONG, T) == pytest.approx(bits_per_byte(plain, LONG, T), rel=1e-6)
    assert max(model.n_sequences) == n_at_a_time and sum(model.n_sequences) == 151
    model.n_sequences.clear()

    def before(inputs):
        assert len(inputs) <= n_at_a_time
        return other.table.detach()[inputs].flatten(0, 1)

    expected = drift(plain, lambda inputs: other.table.detach()[inputs].flatten(0, 1), LONG, T)
    assert drift(model, before, LONG, T) == pytest.approx(expected, rel=1e-5)
    assert max(model.n_sequences) == n_at_a_time and sum(model.n_sequences) == 128
    wrapped = nn.Sequential(model)  # a study's own module around a model says nothing of a vocabulary itself
    assert sequences_at_a_time(_vocabulary_size(wrapped), T) == n_at_a_time


def test_models_of_the_published_runs_are_evaluated_16_sequences_at_a_time_and_gemma_one():
    for profile in ("smoke", "laptop", "gpu"):
        config = make_config(profile)
        assert sequences_at_a_time(config.backbone.vocabulary_size, config.training.context_length) == 16
    assert sequences_at_a_time(256_000, 4096) == 1 and sequences_at_a_time(256_000, 256) == 4


def test_forgetting_and_learning_by_hand():
    assert forgetting(0.811, 0.663) == pytest.approx(0.2232, abs=1e-4)  # the paper's fine-tuning
    assert learning(0.793, 1.175, 0.758) == pytest.approx(0.9161, abs=1e-4)  # and its neutral residues
    assert learning(1.175, 1.175, 0.758) == 0 and learning(0.758, 1.175, 0.758) == 1


def test_evaluation_restores_the_mode_and_skips_texts_that_are_not_there():
    model = bigram(0).train()
    values, rows = evaluate(model, {"new": TEXT}, ("new", "proxy"), T)
    assert values == {"new": bits_per_byte(model, TEXT, T)} and rows == [] and model.training
