"""What the study of new tokens works on: a profile's text in the extended tokenizer, static vectors of its tokens in both
languages, and pairs of tokens."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batches import TokenStream
from ..experiments import arm
from ..texts import PreparedText, prepare_text
from ..tokenization import beginning_token
from .vocabulary_studies import FREEDICT, respell, synthetic_lexicon
from .vocabulary_tokens import NewTokens, TokenVectors, add_tokens, split_texts, token_pairs, token_vectors
from .vocabulary_words import Lexicon, freedict

DIMENSIONS = {"smoke": 24}  # of the tokens' static vectors, fewer than pairs
DIMENSION = 64


@dataclass(frozen=True)
class Material:
    """What all ways to begin the rows share: the text with the new language in the extended tokenizer, static vectors of
    tokens in both languages, pairs of tokens, and how the extension encodes held-out text of the original domain."""

    text: PreparedText
    tokens: NewTokens
    source: TokenVectors
    target: TokenVectors
    pairs: tuple[tuple[int, int], ...]
    n_changed: int  # tokens that differ from the backbone's own encoding, of n_held_out
    n_held_out: int


def profile_lexicon(profile: str) -> Lexicon:
    """Words of the original language with their translations."""
    return synthetic_lexicon() if profile == "smoke" else freedict(FREEDICT["fr"], progress=False)[0]


@functools.lru_cache(maxsize=1)
def prepare_material(profile: str, n_new_tokens: int) -> Material:
    """Tokens, vectors and pairs for a profile; nothing of it has seen held-out text of the new language."""
    text, dimension = profile_text(profile), DIMENSIONS.get(profile, DIMENSION)
    old = text.tokenizer
    lexicon = profile_lexicon(profile)
    new_texts = list(split_texts(text.new.tokens, old))
    original_texts = list(split_texts(text.pretraining.tokens, old))
    tokens = add_tokens(old, new_texts, original_texts, n_new_tokens)
    held_out = dict(text.held_out)
    for name in ("new", "new_validation"):
        held_out[name] = _encode(split_texts(held_out[name].tokens, old), tokens.tokenizer, name)
    stream = _encode(new_texts, tokens.tokenizer, text.new.name)
    own = [n for n in held_out if not n.startswith("new")]
    again = [_encode(split_texts(held_out[n].tokens, old), tokens.tokenizer, n).tokens for n in own]
    separator = old.eos_token_id
    return Material(
        replace(text, tokenizer=tokens.tokenizer, new=stream, held_out=held_out),
        tokens,
        token_vectors(stream.tokens, separator, len(tokens.tokenizer), dimension),
        token_vectors(text.pretraining.tokens, separator, len(old), dimension),
        tuple(token_pairs(lexicon, old, tokens.tokenizer)),
        sum(_n_differing(held_out[n].tokens, tokens_again) for n, tokens_again in zip(own, again, strict=True)),
        sum(len(held_out[n].tokens) for n in own),
    )


@functools.lru_cache(maxsize=1)
def profile_text(profile: str) -> PreparedText:
    """The text of a profile. On synthetic text the new language is the original one, word by word in the lexicon of
    another: there is something to align."""
    config = arm(profile, "neutral_residues")
    text = prepare_text(config.data, config.backbone, False)
    if profile != "smoke":
        return text
    lexicon = synthetic_lexicon()

    def translated(stream: TokenStream, name: str) -> TokenStream:
        texts = split_texts(stream.tokens, text.tokenizer)
        return _encode([respell(t, lexicon) for t in texts], text.tokenizer, name)

    held_out = dict(text.held_out)
    held_out["new"] = translated(held_out["unseen_original"], "new")
    held_out["new_validation"] = translated(held_out["unseen_original_validation"], "new_validation")
    return replace(text, new=translated(text.pretraining, "new"), held_out=held_out)


def _encode(texts: Iterable[str], tokenizer: Any, name: str) -> TokenStream:
    separator, n_bytes = tokenizer.eos_token_id, 0
    parts = [np.array([separator], dtype=np.int32)]
    for text in texts:
        n_bytes += len(text.encode())
        parts.append(np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], separator], dtype=np.int32))
    return TokenStream(np.concatenate(parts), n_bytes, name, beginning_token(tokenizer))


def _n_differing(before: NDArray[np.int32], after: NDArray[np.int32]) -> int:
    """Tokens of `before` that `after` has not kept."""
    if np.array_equal(before, after):
        return 0
    matcher = difflib.SequenceMatcher(None, before.tolist(), after.tolist(), autojunk=False)
    return len(before) - sum(block.size for block in matcher.get_matching_blocks())
