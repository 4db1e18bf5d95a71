"""Bigram languages with triggers: the data of "Birth of a Transformer: A Memory Viewpoint", Bietti, Cabannes, Bouchacourt,
Jégou and Bottou, https://arxiv.org/abs/2306.00802.

Most tokens follow the language's bigram table, which weights can store. After a *trigger* comes one and the same *output*
within a sequence, drawn anew for each sequence: only looking back at the context can predict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError


@dataclass(frozen=True)
class BigramLanguage:
    """A bigram table over `N` tokens with triggers.

    Parameters
    ----------
    unigram : (N,), distribution of the first token.
    bigram : (N, N), row v the distribution of the token after v.
    triggers : the K tokens whose successor is the sequence's own output.
    outputs : (N,), distribution of the outputs; by default uniform over the tokens that `unigram` allows.

    Raises
    ------
    ConfigError
        For fewer than two tokens, a value that is no probability, rows that do not add up to 1, or triggers that are no
        tokens or named twice.
    """

    unigram: Tensor
    bigram: Tensor
    triggers: tuple[int, ...]
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        n = len(self.unigram)
        if n < 2:
            raise ConfigError(
                f"A bigram language needs two tokens or more, and this one has {n}: with one token there is nothing to "
                "predict. Give a text with different characters, or a larger n_tokens."
            )
        if not len(self.outputs):
            is_used = (self.unigram > 0).to(self.unigram.dtype)
            object.__setattr__(self, "outputs", is_used / is_used.sum())
        for name, table, shape in (
            ("unigram", self.unigram, (n,)),
            ("bigram", self.bigram, (n, n)),
            ("outputs", self.outputs, (n,)),
        ):
            _check_distribution(name, table, shape)
        bad = [k for k in self.triggers if not 0 <= k < n]
        if bad or not self.triggers or len(set(self.triggers)) < len(self.triggers):
            raise ConfigError(
                f"triggers = {self.triggers} must be one or more different tokens from 0 to {n - 1}. Leave out what is "
                "named twice or lies outside."
            )

    @property
    def n_tokens(self) -> int:
        """N, size of the vocabulary."""
        return len(self.unigram)

    @property
    def tokens(self) -> Tensor:
        """The tokens the language uses; two languages may share one vocabulary without using all of it."""
        return torch.nonzero(self.unigram > 0).flatten()


def _check_distribution(name: str, table: Tensor, shape: tuple[int, ...]) -> None:
    problem = ""
    if tuple(table.shape) != shape:
        problem = f"has shape {tuple(table.shape)}"
    elif not torch.isfinite(table).all() or (table < 0).any():
        n_bad = int((~torch.isfinite(table) | (table < 0)).sum())
        problem = f"holds {n_bad} values that are no probabilities (negative, infinite or NaN)"
    elif (table.sum(-1) - 1).abs().max() > 1e-4:
        problem = f"has a distribution that adds up to {float(table.sum(-1).flatten()[(table.sum(-1) - 1).abs().argmax()]):.4g}"
    if problem:
        raise ConfigError(
            f"{name} {problem}. It must have shape {shape}, with values of 0 or more that add up to 1 along the last axis: "
            "divide counts by their sum, and give a row without counts the unigram distribution."
        )


def make_language(
    n_tokens: int,
    seed: int,
    *,
    n_triggers: int = 5,
    used: Sequence[int] | None = None,
    triggers: Sequence[int] | None = None,
    concentration: float = 10.0,
) -> BigramLanguage:
    """A random language: a Zipf unigram, and bigram rows drawn from a Dirichlet distribution around it.

    Parameters
    ----------
    n_tokens : N, size of the vocabulary.
    seed : of the tables.
    n_triggers : K; the most frequent tokens become triggers unless `triggers` names them.
    used : tokens of the vocabulary that the language uses; default all.
    triggers : default the most frequent tokens.
    concentration : of the Dirichlet distribution; the lower, the fewer successors a token has.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(sorted(set(range(n_tokens) if used is None else used)), dtype=torch.long)
    if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < n_tokens:
        raise ConfigError(f"used holds tokens outside 0 to {n_tokens - 1}: the vocabulary has n_tokens = {n_tokens}.")
    order = chosen[torch.randperm(len(chosen), generator=generator)]  # most frequent first
    if triggers is not None:  # they lead, in the order given
        order = torch.tensor([*triggers, *(v for v in order.tolist() if v not in triggers)], dtype=torch.long)
    frequencies = 1 / torch.arange(1, len(order) + 1, dtype=torch.float64)
    unigram = torch.zeros(n_tokens, dtype=torch.float64)
    unigram[order] = frequencies / frequencies.sum()
    bigram = unigram.repeat(n_tokens, 1)  # a token the language does not use has no row of its own
    if len(chosen) > 1:
        shape = (concentration * unigram[chosen]).expand(len(chosen), -1).clamp(min=1e-3)
        draws = torch._standard_gamma(shape, generator=generator).clamp(min=1e-12)
        bigram[chosen[:, None], chosen] = draws / draws.sum(-1, keepdim=True)
    return BigramLanguage(unigram, bigram, tuple(order[:n_triggers].tolist() if triggers is None else triggers))


def count_language(tokens: Sequence[int] | Tensor, n_triggers: int = 5) -> BigramLanguage:
    """The language of a token sequence of one's own (characters, words): its counted unigrams and bigrams, its most
    frequent tokens as triggers. Tokens are numbered from 0; the vocabulary ends with the largest number.

    Raises
    ------
    ConfigError
        For a negative token, or a text of fewer than two different ones.
    """
    sequence = torch.as_tensor(tokens, dtype=torch.long).flatten()
    if (sequence < 0).any():
        raise ConfigError(
            f"The text holds the token {int(sequence.min())}; allowed are whole numbers from 0. Number its tokens anew, or "
            "leave out what stands for none."
        )
    n = int(sequence.max()) + 1 if len(sequence) else 0
    unigram = torch.bincount(sequence, minlength=n).double() / max(1, len(sequence))
    counts = torch.bincount(sequence[:-1] * n + sequence[1:], minlength=n * n).reshape(n, n).double()
    totals = counts.sum(-1, keepdim=True)
    bigram = torch.where(totals > 0, counts / totals.clamp(min=1), unigram)
    return BigramLanguage(unigram, bigram, tuple(unigram.argsort(descending=True)[: min(n_triggers, n)].tolist()))


def with_other_rows(language: BigramLanguage, other: BigramLanguage, ratio: float, seed: int) -> BigramLanguage:
    """The language with `ratio` of its used rows taken from `other`: text that resembles it without being it."""
    generator = torch.Generator().manual_seed(seed)
    used = language.tokens
    changed = used[torch.randperm(len(used), generator=generator)[: round(ratio * len(used))]]
    bigram = language.bigram.clone()
    bigram[changed] = other.bigram[changed]
    return BigramLanguage(language.unigram, bigram, language.triggers, language.outputs)


@dataclass(frozen=True)
class Sequences:
    """B sequences of T tokens, each with its successor.

    inputs, targets : (B, T), token ids; `targets[t]` follows `inputs[t]`.
    occurrence : (B, T), how many times the trigger `inputs[t]` has occurred so far; 0 where it is no trigger.
    """

    inputs: Tensor
    targets: Tensor
    occurrence: Tensor

    @property
    def is_in_context(self) -> Tensor:
        """Whether the context holds the successor, from a trigger's second occurrence on; (B, T)."""
        return self.occurrence >= 2


def sample(
    language: BigramLanguage,
    n_sequences: int,
    context_length: int,
    generator: torch.Generator,
    *,
    has_fixed_triggers: bool = True,
) -> Sequences:
    """Draw sequences.

    Parameters
    ----------
    has_fixed_triggers : False draws as many triggers for each sequence anew, from the unigram distribution.
    """
    rows, n_triggers = torch.arange(n_sequences), len(language.triggers)
    if has_fixed_triggers:
        triggers = torch.tensor(language.triggers).expand(n_sequences, -1)
    else:
        triggers = torch.multinomial(language.unigram.expand(n_sequences, -1), n_triggers, generator=generator)
    outputs = torch.multinomial(language.outputs, n_sequences * n_triggers, replacement=True, generator=generator)
    # What follows each token in each sequence; -1: the table.
    output_of = torch.full((n_sequences, language.n_tokens), -1)
    output_of.scatter_(1, triggers, outputs.view(n_sequences, n_triggers))
    cumulative = language.bigram.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    uniform = torch.rand(context_length, n_sequences, generator=generator, dtype=cumulative.dtype)
    tokens = torch.empty(n_sequences, context_length + 1, dtype=torch.long)
    tokens[:, 0] = torch.multinomial(language.unigram, n_sequences, replacement=True, generator=generator)
    for t in range(context_length):
        current = tokens[:, t]
        drawn = torch.searchsorted(cumulative[current], uniform[t][:, None], right=True).squeeze(1)
        output = output_of[rows, current]
        tokens[:, t + 1] = torch.where(output >= 0, output, drawn.clamp(max=language.n_tokens - 1))
    inputs = tokens[:, :-1]
    n_seen = F.one_hot(inputs, language.n_tokens).cumsum(1).gather(2, inputs[..., None]).squeeze(2)
    is_trigger = output_of.gather(1, inputs) >= 0
    return Sequences(inputs, tokens[:, 1:], n_seen * is_trigger)
