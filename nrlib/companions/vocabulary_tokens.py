"""New tokens for a new language: a tokenizer that goes on merging where the backbone's stops, and first values for the
new rows of its embedding matrix.

The backbone's merges keep their order and come first; new ones are learnt, by the tokenizers library, on the pieces they
leave of the new language's words. A new merge that would touch any word of the original domain's text is dropped, so that
this text is encoded as before. A new token's row comes from the old rows by one of INITIALISATIONS; `vocabulary_alignment`
maps the tokens' static vectors between the languages for two of them.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackboneError, ConfigError, CorpusError
from .vocabulary_alignment import rcsls, translate, unit_rows
from .vocabulary_words import GAP, Lexicon, Vectors, co_occurrences, static_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INITIALISATIONS = ("random", "mean", "pieces", "mapped", "mixture")
N_ROUNDS = 20  # of dropping merges; dropping one can set another free
N_CANDIDATES = 8  # merges learnt for each one that is kept: most touch some word of the original text
TEMPERATURE = 0.1  # of the mixture's weights over CSLS scores, which lie between −2 and 2

_FIRST_SYMBOL = 0xF0000  # a private plane of Unicode: one character for each old token, so that a library learns merges


@dataclass(frozen=True)
class NewTokens:
    """A tokenizer with tokens added, and what each new token is made of: ids of the backbone's own tokens."""

    tokenizer: PreTrainedTokenizerBase
    n_old: int
    pieces: tuple[tuple[int, ...], ...]


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, new_texts: Iterable[str], original_texts: Iterable[str], n_tokens: int
) -> NewTokens:
    """Add `n_tokens` merges learnt on `new_texts`; none of them changes how `original_texts` are encoded.

    Raises
    ------
    BackboneError
        For a tokenizer that is not a byte-pair encoding with a pre-tokenizer.
    CorpusError
        When the new text does not yield as many tokens.
    """
    old = _model_of(tokenizer)
    originals = list(_count_words(tokenizer, original_texts))
    candidates = _learn_merges(tokenizer, _count_words(tokenizer, new_texts), N_CANDIDATES * n_tokens)
    banned: set[str] = set()
    for _ in range(N_ROUNDS):
        chosen = _first_merges(candidates, banned, old.keys(), n_tokens)
        extended = _with_merges(tokenizer, chosen)
        model = extended.backend_tokenizer.model
        touched = {token.value for word in originals for token in model.tokenize(word) if token.id >= len(tokenizer)}
        if not touched:
            break
        banned |= touched
    else:
        raise CorpusError(
            f"After {N_ROUNDS} rounds new merges still touch the original domain's text: the two texts are too alike for "
            f"{n_tokens} tokens of one language alone. Ask for fewer."
        )
    if len(chosen) < n_tokens:
        raise CorpusError(
            f"The new text yields only {len(chosen)} tokens that leave the original domain's text as it is, of {n_tokens} "
            "asked for. Give more text or ask for fewer."
        )
    pieces: dict[str, tuple[int, ...]] = {token: (index,) for token, index in old.items()}
    for left, right in chosen:
        pieces[left + right] = pieces[left] + pieces[right]
    return NewTokens(extended, len(tokenizer), tuple(pieces[left + right] for left, right in chosen))


def _model_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(backend.model).__name__ if backend is not None else type(tokenizer).__name__
    if kind != "BPE" or backend.pre_tokenizer is None:
        raise BackboneError(
            f"New merges can only be added to a byte-pair encoding with a pre-tokenizer; this tokenizer is {kind}. Choose "
            "a backbone with a tokenizer of that kind, such as those of GPT-2, Llama 3 or Qwen."
        )
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _count_words(tokenizer: Any, texts: Iterable[str]) -> collections.Counter[str]:
    """Pre-tokens, in the tokenizer's own spelling, with how often they occur."""
    backend = tokenizer.backend_tokenizer
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return counts


def _learn_merges(tokenizer: Any, words: Mapping[str, int], n_merges: int) -> list[tuple[str, str]]:
    """Merges of the old tokens that `words` are made of, most frequent first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = tokenizer.backend_tokenizer.model
    spelled = {word: "".join(chr(_FIRST_SYMBOL + token.id) for token in model.tokenize(word)) for word in words}
    alphabet = sorted(set("".join(spelled.values())))
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + n_merges, min_frequency=10, initial_alphabet=alphabet, show_progress=False
    )
    corpus = (" ".join(itertools.repeat(spelled[word], n)) for word, n in words.items())
    learner.train_from_iterator(corpus, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    names = tokenizer.convert_ids_to_tokens

    def spell(symbols: str) -> str:
        return "".join(names([ord(symbol) - _FIRST_SYMBOL for symbol in symbols]))

    return [(spell(left), spell(right)) for left, right in (m.split(" ") if isinstance(m, str) else m for m in merges)]


def _first_merges(
    candidates: Sequence[tuple[str, str]], banned: set[str], old: Iterable[str], n_tokens: int
) -> list[tuple[str, str]]:
    """The first merges that make a token of their own out of tokens that are there."""
    there = set(old)
    chosen: list[tuple[str, str]] = []
    for left, right in candidates:
        token = left + right
        if len(chosen) < n_tokens and token not in banned and token not in there and {left, right} <= there:
            chosen.append((left, right))
            there.add(token)
    return chosen


def _with_merges(tokenizer: Any, merges: Sequence[tuple[str, str]]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    is_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    for offset, (left, right) in enumerate(merges):
        model["vocab"][left + right] = len(tokenizer) + offset
        model["merges"].append(f"{left} {right}" if is_text else [left, right])
    extended = Tokenizer.from_str(json.dumps(description))
    result = PreTrainedTokenizerFast(tokenizer_object=extended, eos_token=tokenizer.eos_token)
    result.model_max_length = tokenizer.model_max_length
    return result


# --- the rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenVectors:
    """Static vectors (n, D) of the tokens that occur often enough, and those tokens' ids (n,)."""

    vectors: Vectors
    ids: NDArray[np.int64]

    def place(self) -> dict[int, int]:
        """Row by token id."""
        return {int(token): row for row, token in enumerate(self.ids)}


def token_vectors(
    tokens: NDArray[np.int32], separator: int, n_vocabulary: int, dimension: int, min_count: int = 10
) -> TokenVectors:
    """Static vectors from a stream of tokens (N,) with `separator` between documents."""
    counts = np.bincount(tokens, minlength=n_vocabulary)
    counts[separator] = 0
    ids = np.flatnonzero(counts >= min_count)
    position = np.full(n_vocabulary, GAP, dtype=np.int32)
    position[ids] = np.arange(len(ids))
    together = co_occurrences([position[tokens]], len(ids))
    return TokenVectors(static_embeddings(together, dimension), ids)


def token_pairs(lexicon: Lexicon, old: Any, extended: Any) -> list[tuple[int, int]]:
    """(id of a token of the extended tokenizer, id of one of the backbone's) for each pair of words of the lexicon that
    are one token each, written after a space. The lexicon leads from the original language to the new one."""
    return [
        (ours[0], theirs[0])
        for word, translations in sorted(lexicon.items())
        if len(theirs := old(f" {word}", add_special_tokens=False)["input_ids"]) == 1
        for translation in sorted(translations)
        if len(ours := extended(f" {translation}", add_special_tokens=False)["input_ids"]) == 1
    ]


def initial_rows(
    name: str,
    rows: Vectors,
    tokens: NewTokens,
    *,
    seed: int = 0,
    source: TokenVectors | None = None,
    target: TokenVectors | None = None,
    pairs: Sequence[tuple[int, int]] = (),
) -> Vectors:
    """First values (n_new, D) of the new tokens' rows from the backbone's `rows` (V, D).

    random
        Normal numbers with each column's mean and standard deviation.
    mean
        The mean row, for every token.
    pieces
        The mean of the rows of the old tokens it is made of.
    mapped
        The token's static vector, mapped to the backbone's rows by RCSLS and given their mean length.
    mixture
        A mean of the rows of ten old tokens, the candidates for its translation, weighted by their CSLS score: static
        vectors of both languages are aligned, and the rows themselves are not looked at.

    Parameters
    ----------
    source, target : static vectors of the extended tokenizer's tokens in the new language and of the backbone's in the
        original one; for `mapped` and `mixture`. A token without a vector gets the mean of its pieces.
    pairs : see `token_pairs`.
    """
    if name not in INITIALISATIONS:
        raise ConfigError(f"initialisation = {name!r} is unknown. Allowed: {', '.join(INITIALISATIONS)}.")
    n_new = len(tokens.pieces)
    if name == "random":
        return np.random.default_rng(seed).normal(rows.mean(0), rows.std(0), (n_new, rows.shape[1]))
    if name == "mean":
        return np.tile(rows.mean(0), (n_new, 1))
    result = np.stack([rows[list(pieces)].mean(0) for pieces in tokens.pieces])
    if name == "pieces":
        return result
    if source is None or target is None:
        raise ConfigError(f"initialisation = {name!r} needs the static vectors of both languages: source and target.")
    own, theirs = source.place(), target.place()
    known = np.array([(own[a], theirs[b]) for a, b in pairs if a in own and b in theirs], dtype=np.int64).reshape(-1, 2)
    new = np.array([(token - tokens.n_old, own[token]) for token in range(tokens.n_old, tokens.n_old + n_new) if token in own])  # fmt: skip
    old_rows = rows[target.ids]
    if name == "mapped":
        mapping = rcsls(source.vectors, old_rows, known)
        length = np.linalg.norm(rows, axis=1).mean()
        result[new[:, 0]] = length * unit_rows(unit_rows(source.vectors)[new[:, 1]] @ mapping.T)
    else:
        mapping = rcsls(source.vectors, target.vectors, known)
        scores, found = translate(mapping, source.vectors, target.vectors, new[:, 1], n_best=10)
        weight = np.exp((scores - scores.max(axis=1, keepdims=True)) / TEMPERATURE)
        result[new[:, 0]] = (weight[:, :, None] * old_rows[found]).sum(1) / weight.sum(1)[:, None]
    return result


def split_texts(tokens: NDArray[np.int32], tokenizer: Any) -> Iterator[str]:
    """The documents of a packed stream, as text."""
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    for start, end in itertools.pairwise(ends.tolist()):
        yield tokenizer.decode(tokens[start + 1 : end].tolist(), clean_up_tokenization_spaces=False)
