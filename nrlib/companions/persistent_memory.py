"""All-attention: persistent key and value vectors in the place of the feed-forward block, and how they extend a model.

Sukhbaatar, Grave, Lample, Jégou and Joulin, *Augmenting self-attention with persistent memory*,
https://arxiv.org/abs/1907.01470.

    context keys, values (T) ─┐
                              ├─► one softmax over T + N scores ─► values mixed ─► W_out ─► + x, LayerNorm
    learned keys, values (N) ─┘         of a head

What libraries do instead: x-transformers has learned keys and values (`attn_num_mem_kv`), but without the scaling of the
paper and beside a feed-forward block; PEFT's prefix tuning learns keys and values for a frozen model, in one softmax with
the context. The layer here is the paper's. As a placement of the extension (`site='persistent_memory'`) persistent vectors
are `nrlib.persistent_memory`; why those have a softmax of their own is measured in
`nrlib.companions.persistent_memory_extension`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..machine import seeded

RESULT_VERSION = 1
# What is compared: `unscaled` uses the stored vectors as they are, `split` adds the outputs of two softmaxes.
KINDS = ("feed_forward", "attention_only", "all_attention", "unscaled", "split")
N_STEPS = {"smoke": 10}  # by profile
N_STEPS_MEASURED = 900  # on every other profile
BATCH_SIZE, CONTEXT_LENGTH, LEARNING_RATE = 64, 32, 2e-3
N_MEASURED = 1_024  # held-out sequences


class MarkovSource:
    """Text in which each symbol depends on the two before it: a table of V² rows drawn from a Dirichlet distribution.

    Parameters
    ----------
    seed : of the table.
    n_symbols : V, two or more.
    concentration : of the Dirichlet distribution; small values make a text that is easy to predict.
    """

    def __init__(self, seed: int, n_symbols: int = 24, concentration: float = 0.1) -> None:
        if n_symbols < 2:
            raise ConfigError(
                f"n_symbols = {n_symbols}: a text of one symbol has nothing to predict. Give two symbols or more."
            )
        self.n_symbols = n_symbols
        table = np.random.default_rng(seed).dirichlet([concentration] * n_symbols, (n_symbols, n_symbols))
        self.table = torch.from_numpy(table)  # (V, V, V): symbol before the last, last symbol, next symbol
        self.cumulative = self.table.cumsum(-1)

    def sample(self, n_sequences: int, n_tokens: int, seed: int) -> Tensor:
        """Sequences (n_sequences, n_tokens) of symbols; the first two of each are drawn evenly."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.n_symbols, (n_sequences, n_tokens), generator=generator)
        for t in range(2, n_tokens):
            rows = self.cumulative[tokens[:, t - 2], tokens[:, t - 1]]  # (n_sequences, V)
            drawn = torch.rand(n_sequences, 1, generator=generator, dtype=rows.dtype)
            tokens[:, t] = torch.searchsorted(rows, drawn).squeeze(1).clamp(max=self.n_symbols - 1)
        return tokens

    def loss(self, tokens: Tensor) -> float:
        """Nats per symbol, from the third on, of whoever knows the table: no model can do better."""
        p = self.table[tokens[:, :-2], tokens[:, 1:-1]].gather(-1, tokens[:, 2:, None])
        return -p.log().mean().item()


class AllAttention(nn.Module):
    """Causal self-attention over the context and over N persistent vectors of each head.

        a      = softmax([q·k_s + q·p_(t-s) ; q·K] / √d_h)          over the T positions s ≤ t and the N vectors
        output = W_out (a_context v + a_persistent V),   K = √d_h · stored keys, V = √N · stored values

    The stored vectors have variance 1/d_h and 1/N, those in use variance 1: a step of the optimiser moves what is in use
    √d_h and √N times as far.

    Parameters
    ----------
    d_model : D; n_heads : heads, a divisor of D; d_h = D / heads.
    n_persistent : N, vectors of each head; 0 for plain attention.
    span : longest distance with a position vector of its own, shared by the heads; longer contexts are refused.
    kind : 'all_attention', 'unscaled' (stored vectors used as they are) or 'split' (a softmax for each of the two).
    """

    def __init__(self, d_model: int, n_heads: int, n_persistent: int, span: int, kind: str = "all_attention") -> None:
        super().__init__()
        if d_model % n_heads:
            raise ConfigError(f"d_model = {d_model} cannot be split into n_heads = {n_heads} heads of equal width.")
        self.n_heads, self.n_persistent, self.kind = n_heads, n_persistent, kind
        self.d_head = d_model // n_heads
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.positions = nn.Parameter(torch.randn(self.d_head, span) * self.d_head**-0.5)  # p: (d_h, span)
        if n_persistent:
            shape = (n_heads, n_persistent, self.d_head)
            self.persistent_keys = nn.Parameter(torch.randn(shape) * self.d_head**-0.5)
            self.persistent_values = nn.Parameter(torch.randn(shape) * n_persistent**-0.5)

    def persistent(self) -> tuple[Tensor, Tensor]:
        """Keys and values in use, each (heads, N, d_h)."""
        if self.kind == "unscaled":
            return self.persistent_keys, self.persistent_values
        return self.d_head**0.5 * self.persistent_keys, self.n_persistent**0.5 * self.persistent_values

    def weights(self, x: Tensor) -> Tensor:
        """Attention weights (B, heads, T, T + N) of the hidden states x (B, T, D): the context first."""
        n_tokens, span = x.shape[1], self.positions.shape[1]
        if n_tokens > span:
            raise ConfigError(f"{n_tokens} tokens are more than the span of {span}. Give shorter sequences.")
        q, k = self._heads(self.query(x)), self._heads(self.key(x))
        places = torch.arange(n_tokens, device=x.device)
        distance = places[:, None] - places  # t - s
        by_distance = q @ self.positions  # (B, heads, T, span)
        position = by_distance.gather(-1, distance.clamp(min=0).expand(*q.shape[:2], -1, -1))
        context = (q @ k.mT + position).masked_fill(distance < 0, -math.inf) / self.d_head**0.5
        if not self.n_persistent:
            return context.softmax(-1)
        persistent = q @ self.persistent()[0].mT / self.d_head**0.5
        if self.kind == "split":
            return torch.cat([context.softmax(-1), persistent.softmax(-1)], dim=-1)
        return torch.cat([context, persistent], dim=-1).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Output (B, T, D) of the hidden states x (B, T, D)."""
        a, n_tokens = self.weights(x), x.shape[1]
        mixed = a[..., :n_tokens] @ self._heads(self.value(x))  # (B, heads, T, d_h)
        if self.n_persistent:
            mixed = mixed + a[..., n_tokens:] @ self.persistent()[1]
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)  # (B, heads, T, d_h)


class Layer(nn.Module):
    """Attention, and with kind 'feed_forward' a feed-forward block of width N, each with its LayerNorm after the sum."""

    def __init__(self, d_model: int, n_heads: int, width: int, span: int, kind: str) -> None:
        super().__init__()
        has_vectors = kind not in ("feed_forward", "attention_only")
        self.attention = AllAttention(d_model, n_heads, width if has_vectors else 0, span, kind)
        self.norm = nn.LayerNorm(d_model)
        if kind == "feed_forward":
            self.ffn = nn.Sequential(nn.Linear(d_model, width), nn.ReLU(), nn.Linear(width, d_model))
            self.ffn_norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x))
        return self.ffn_norm(x + self.ffn(x)) if hasattr(self, "ffn") else x


def make_model(
    n_symbols: int,
    kind: str,
    *,
    n_layers: int = 2,
    d_model: int = 64,
    n_heads: int = 4,
    width: int = 256,
    span: int = 32,
) -> nn.Sequential:
    """A language model of one kind, tokens (B, T) to logits (B, T, V). The width of the feed-forward block is the number
    of persistent vectors, so that both cost 2·N·D weights.

    Raises
    ------
    ConfigError
        For an unknown kind, or heads that do not divide the width.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind = {kind!r} is unknown. Choose one of: {', '.join(KINDS)}.")
    layers = [Layer(d_model, n_heads, width, span, kind) for _ in range(n_layers)]
    return nn.Sequential(nn.Embedding(n_symbols, d_model), *layers, nn.Linear(d_model, n_symbols))


@torch.no_grad()
def persistent_mass(model: nn.Sequential, tokens: Tensor) -> list[float]:
    """Share of the attention that goes to persistent vectors, mean over heads and positions, layer by layer.

    For separate softmaxes, which have no share, it is 0.5: one of two.
    """
    embedding, *layers, _ = model.children()
    x, masses = embedding(tokens), []
    for layer in layers:
        assert isinstance(layer, Layer)
        a = layer.attention.weights(x)
        masses.append((a[..., tokens.shape[1] :].sum(-1) / a.sum(-1)).mean().item())
        x = layer(x)
    return masses


def language_model(*, seed: int, kind: str, n_steps: int, width: int = 256) -> dict[str, Any]:
    """A study: train one kind of model on a Markov source and measure its perplexity on unseen text.

    The source's table, the weights and the text depend on `seed`, so that all kinds of one seed read the same text.
    """
    source = MarkovSource(seed)
    train = source.sample(n_steps * BATCH_SIZE, CONTEXT_LENGTH + 1, seed=10_000 + seed)
    held_out = source.sample(N_MEASURED, CONTEXT_LENGTH + 1, seed=20_000 + seed)
    with seeded(seed):
        model = make_model(source.n_symbols, kind, width=width, span=CONTEXT_LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    curve = []
    for step, batch in enumerate(train.split(BATCH_SIZE), start=1):
        optimizer.zero_grad(set_to_none=True)
        _loss(model, batch).backward()
        optimizer.step()
        if step % max(10, n_steps // 12) == 0 or step == n_steps:
            curve.append([step, round(_perplexity(model, held_out), 4)])
    return {
        "perplexity": curve[-1][1],
        "best_perplexity": round(math.exp(source.loss(held_out)), 4),
        "persistent_mass": [round(mass, 4) for mass in persistent_mass(model, held_out[:128, :-1])],
        "n_weights": sum(p.numel() for p in model.parameters()),
        "curve": curve,
    }


def language_models(profile: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The settings of `language_model` for every kind and seed; how long it trains depends on the profile."""
    n_steps = N_STEPS.get(profile, N_STEPS_MEASURED)
    return [{"seed": seed, "kind": kind, "n_steps": n_steps} for kind in KINDS for seed in seeds]


def with_gap_closed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of `language_model`, each with the share of the gap, between attention alone and attention with feed-forward
    blocks of the same seed, that its kind closes."""
    perplexity = {(row["kind"], row["seed"]): row["perplexity"] for row in rows}
    extended = []
    for row in rows:
        without, with_ffn = (perplexity[kind, row["seed"]] for kind in ("attention_only", "feed_forward"))
        extended.append({**row, "gap_closed": (without - row["perplexity"]) / (without - with_ffn)})
    return extended


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats per symbol from the third on: the first two have nothing before them that could tell."""
    logits = model(tokens[:, :-1])[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())


@torch.no_grad()
def _perplexity(model: nn.Module, tokens: Tensor) -> float:
    return math.exp(_loss(model, tokens).item())
