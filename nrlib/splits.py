"""Train, validation and test by document, with nothing near-identical on two sides.

Which split a document lies in depends on its id alone. Technical documentation repeats its paragraphs, so afterwards
near-identical paragraphs are dropped from the larger side. Two texts are compared by *shingles*, all their windows of
50 characters after case and white space are made equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .corpora.documents import Document
from .errors import ConfigError, CorpusError

SPLITS = ("train", "validation", "test")
SHINGLE_WIDTH = 50  # characters
MAX_SHARED_RATIO = 0.1  # a paragraph with a larger share of its shingles on the other side is dropped
CHUNK = 1_000_000  # characters hashed at once: bounds the memory to some tens of megabytes

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Split:
    """Documents of the three sides, and how much of the held-out text was in the training text."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    overlap_before: float  # share of held-out shingles that occur in train, before paragraphs were dropped
    overlap_after: float
    n_bytes_dropped: int  # from train and validation


def split_documents(
    documents: Iterable[Document], *, validation_ratio: float = 0.05, test_ratio: float = 0.05
) -> dict[str, list[Document]]:
    """Assign each document to a split by the SHA-256 of its id.

    The same id lies in the same split in every corpus, language and selection of groups. A split of a small corpus may
    be empty.

    Raises
    ------
    ConfigError
        When a ratio is negative or both together reach 1.
    """
    if min(validation_ratio, test_ratio) < 0 or validation_ratio + test_ratio >= 1:
        raise ConfigError(
            f"validation_ratio={validation_ratio} and test_ratio={test_ratio} are not allowed: each must be at least 0 "
            "and their sum below 1, so that something is left to train on."
        )
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        place = int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:8], "big") / 2**64
        is_test, is_held_out = place < test_ratio, place < test_ratio + validation_ratio
        splits["test" if is_test else "validation" if is_held_out else "train"].append(document)
    return splits


def split_corpus(documents: Sequence[Document]) -> Split:
    """Split documents, then drop what is near-identical on two sides: from validation first, then from train.

    Raises
    ------
    CorpusError
        When a side is left without text, as with a handful of documents.
    """
    raw = split_documents(documents)
    held_out = _texts(raw["validation"]) + _texts(raw["test"])
    overlap_before = shingle_overlap(_texts(raw["train"]), held_out)
    test = raw["test"]
    validation = remove_near_duplicates(raw["validation"], test)
    train = remove_near_duplicates(raw["train"], [*validation, *test])
    for name, side in zip(SPLITS, (train, validation, test), strict=True):
        if not side:
            raise CorpusError(
                f"The corpus has {len(documents)} documents and none with text of its own for the split '{name}'. "
                "About 5% of the documents go to validation and 5% to test: give at least 100 documents, for "
                "example by cutting one large file into a .jsonl file with one document a line."
            )
    overlap_after = shingle_overlap(_texts(train), _texts(validation) + _texts(test))
    n_bytes_dropped = _n_bytes(documents) - _n_bytes([*train, *validation, *test])
    return Split(tuple(train), tuple(validation), tuple(test), overlap_before, overlap_after, n_bytes_dropped)


def remove_near_duplicates(
    documents: Sequence[Document],
    held_out: Sequence[Document],
    *,
    max_shared_ratio: float = MAX_SHARED_RATIO,
    width: int = SHINGLE_WIDTH,
) -> list[Document]:
    """Documents without the paragraphs that are nearly the same as held-out ones.

    A paragraph goes when more than `max_shared_ratio` of its shingles occur in a held-out paragraph, or, if it is
    shorter than `width` characters, when it equals one. Documents left without a paragraph go too.
    """
    paragraphs = [paragraph for document in documents for paragraph in document.text.split("\n\n")]
    others = [_normalise(paragraph) for document in held_out for paragraph in document.text.split("\n\n")]
    others_short = {text for text in others if len(text) < width}
    shared, total = _count_shared(map(_normalise, paragraphs), _ShingleSet(others, width), len(paragraphs))
    is_dropped = shared > max_shared_ratio * total
    kept: list[Document] = []
    position = 0
    for document in documents:
        own = document.text.split("\n\n")
        dropped = is_dropped[position : position + len(own)]
        position += len(own)
        remaining = [
            text for text, drop in zip(own, dropped, strict=True) if not drop and _normalise(text) not in others_short
        ]
        if len(remaining) == len(own):
            kept.append(document)
        elif remaining:
            kept.append(replace(document, text="\n\n".join(remaining)))
    return kept


def shingle_overlap(train_texts: Iterable[str], held_out_texts: Iterable[str], width: int = SHINGLE_WIDTH) -> float:
    """Share of the held-out shingles (windows of `width` characters, at every position) that occur in train.

    Texts shorter than a shingle do not count; without any held-out shingle the overlap is 0.
    """
    held_out = _ShingleSet(map(_normalise, held_out_texts), width)
    is_found = np.zeros(len(held_out.hashes), dtype=bool)
    for _, hashes in _shingles(map(_normalise, train_texts), width):
        is_found[held_out.positions(hashes)[1]] = True
    return float(held_out.counts[is_found].sum() / max(1, held_out.counts.sum()))


def _texts(documents: Iterable[Document]) -> list[str]:
    return [document.text for document in documents]


def _n_bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _count_shared(texts: Iterable[str], others: _ShingleSet, n_texts: int) -> tuple[Array, Array]:
    """How many shingles of each text are in `others`, and how many it has: two arrays (n_texts,)."""
    shared, total = np.zeros(n_texts, dtype=np.int64), np.zeros(n_texts, dtype=np.int64)
    for owners, hashes in _shingles(texts, others.width):
        total += np.bincount(owners, minlength=n_texts)
        shared += np.bincount(owners[others.positions(hashes)[0]], minlength=n_texts)
    return shared, total


class _ShingleSet:
    """A sorted set of shingle hashes that is fast to search for millions of others, most of them absent."""

    FILTER_BITS = 24

    def __init__(self, normalised_texts: Iterable[str], width: int) -> None:
        self.width = width
        parts = [hashes for _, hashes in _shingles(normalised_texts, width)]
        self.hashes, self.counts = np.unique(np.concatenate(parts or [np.empty(0, np.uint64)]), return_counts=True)
        self._maybe = np.zeros(1 << self.FILTER_BITS, dtype=bool)
        self._maybe[self._slots(self.hashes)] = True

    def _slots(self, hashes: Array) -> Array:
        return np.asarray(hashes >> np.uint64(64 - self.FILTER_BITS))

    def positions(self, hashes: Array) -> tuple[Array, Array]:
        """Indices into `hashes` of those that are in the set, and their places in the set."""
        candidates = np.flatnonzero(self._maybe[self._slots(hashes)])  # one look-up rules out nearly all
        places = np.searchsorted(self.hashes, hashes[candidates])
        places[places == len(self.hashes)] = 0
        is_found = self.hashes[places] == hashes[candidates] if len(self.hashes) else np.zeros(0, dtype=bool)
        return candidates[is_found], places[is_found]


def _shingles(normalised_texts: Iterable[str], width: int) -> Iterator[tuple[Array, Array]]:
    """Yield, chunk by chunk, the index of the text each shingle is from and its 64-bit hash."""
    chunk: list[str] = []
    first = n_characters = 0
    for text in normalised_texts:
        chunk.append(text)
        n_characters += len(text)
        if n_characters >= CHUNK:
            yield _hash_windows(chunk, first, width)
            first, n_characters = first + len(chunk), 0
            chunk = []
    if chunk:
        yield _hash_windows(chunk, first, width)


def _hash_windows(texts: list[str], first: int, width: int) -> tuple[Array, Array]:
    """Rolling polynomial hashes modulo 2^64 of all windows that lie within one text."""
    lengths = np.array([len(text) for text in texts])
    ends = np.cumsum(lengths)
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    starts = np.arange(max(0, len(characters) - width + 1))
    owners = np.searchsorted(ends, starts, side="right")
    is_inside = starts + width <= ends[owners]
    # sum of c[i + j] * base^j over a window = (prefix[i + width] - prefix[i]) / base^i; an odd base has an inverse
    base = 0x9E3779B97F4A7C15
    powers = _powers(base, len(characters))
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(characters) * powers, dtype=np.uint64)])
    inverse_powers = _powers(pow(base, -1, 2**64), len(starts))
    hashes = _mix((prefix[width:] - prefix[: len(starts)]) * inverse_powers)
    return owners[is_inside] + first, hashes[is_inside]


def _powers(base: int, n_powers: int) -> Array:
    factors = np.full(n_powers, base, dtype=np.uint64)
    factors[:1] = 1
    return np.asarray(np.cumprod(factors, dtype=np.uint64))


def _mix(values: Array) -> Array:
    """Spread 64-bit values evenly (the finaliser of splitmix64): sums of character codes are anything but even."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
