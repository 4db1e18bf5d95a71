"""From documents to packed, mixed token batches. A batch is a pure function of (seed, step), so that a resumed run sees
the same data as one that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import CorpusError
from .losses import NEW, ORIGINAL


@dataclass(frozen=True)
class TokenStream:
    """Packed text: every document preceded by one end-of-text token, and one at the very end.

    tokens : (N,), n_bytes : UTF-8 bytes of the documents, without the separators; bos_token_id : what every window begins
    with in place of its first token, which is never a target, for backbones that began every sequence so.
    """

    tokens: NDArray[np.int32]
    n_bytes: int
    name: str = ""
    bos_token_id: int | None = None

    def n_sequences(self, context_length: int) -> int:
        """Full windows of T + 1 tokens that overlap by one, so that each token is predicted once."""
        return max(0, (len(self.tokens) - 1) // context_length)

    def sequences(self, indices: NDArray[np.int64], context_length: int) -> Tensor:
        """Windows (B, T + 1)."""
        offsets = indices[:, None] * context_length + np.arange(context_length + 1)[None, :]
        return self._begun(self.tokens[offsets])

    def sequence(self, start: int, end: int | None = None) -> Tensor:
        """One window (1, end - start) of any tokens that follow one another."""
        return self._begun(self.tokens[None, start:end])

    def _begun(self, windows: NDArray[np.int32]) -> Tensor:
        copied = torch.from_numpy(windows.astype(np.int64))
        if self.bos_token_id is not None:
            copied[:, :1] = self.bos_token_id
        return copied


@dataclass(frozen=True)
class Batch:
    """inputs (B, T), targets (B, T), domain (B,)."""

    inputs: Tensor
    targets: Tensor
    domain: Tensor

    def pin_memory(self) -> Batch:
        """A copy in memory that a GPU reads by itself, while the processor goes on."""
        return Batch(*(t.contiguous().pin_memory() for t in (self.inputs, self.targets, self.domain)))


class MixedBatches:
    """Batches in which exactly round(mix_ratio · all sequences) come from the original domain's proxy.

    The original-domain sequences are spread evenly over the run: with a ratio of 0.1 every tenth sequence is one. Each
    stream is read in a seeded random order, a new one in every epoch.

    Raises
    ------
    CorpusError
        When a stream that is needed holds less than one sequence, or the new domain less than one batch.
    """

    def __init__(
        self,
        new: TokenStream,
        original: TokenStream | None,
        *,
        mix_ratio: float,
        n_steps: int,
        batch_size: int,
        context_length: int,
        seed: int,
        new_is: int = NEW,
    ) -> None:
        self.n_steps, self.batch_size, self.context_length, self.seed = n_steps, batch_size, context_length, seed
        n_sequences = n_steps * batch_size
        self.n_original = round(mix_ratio * n_sequences)
        self.streams = {ORIGINAL: original, new_is: new}
        # Counting up to sequence i, floor(i · n_original / n) of the sequences are original: exact and even.
        counts = (np.arange(n_sequences + 1, dtype=np.int64) * self.n_original) // n_sequences
        self._is_original = np.diff(counts).astype(bool)
        self._rank = {True: counts[:-1], False: np.arange(n_sequences) - counts[:-1]}
        self._new_is = new_is
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # the current epoch's order of each domain
        self._check(new, batch_size if mix_ratio < 1 else 0)
        if self.n_original:
            self._check(original, 1)

    def _check(self, stream: TokenStream | None, n_needed: int) -> None:
        n_there = stream.n_sequences(self.context_length) if stream is not None else 0
        if n_there < n_needed:
            name = stream.name if stream is not None else "the proxy"
            n_tokens = len(stream.tokens) if stream is not None else 0
            raise CorpusError(
                f"The training text of {name} is too small: {n_tokens:,} tokens make {n_there} sequences of "
                f"context_length = {self.context_length}, and at least {n_needed} are needed (one batch). Give more "
                "text, or lower batch_size or context_length."
            )

    def batch(self, step: int) -> Batch:
        """The batch of optimiser step `step`, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        windows, domains = [], []
        for position in positions:
            is_original = bool(self._is_original[position])
            domain = ORIGINAL if is_original else self._new_is
            stream = self.streams[domain]
            assert stream is not None
            index = self._index(domain, int(self._rank[is_original][position]), stream)
            windows.append(stream.sequences(np.array([index]), self.context_length))
            domains.append(domain)
        tokens = torch.cat(windows)  # (B, T + 1)
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.tensor(domains))

    def _index(self, domain: int, rank: int, stream: TokenStream) -> int:
        epoch, place = divmod(rank, stream.n_sequences(self.context_length))
        return int(self._order(domain, epoch, stream)[place])

    def _order(self, domain: int, epoch: int, stream: TokenStream) -> NDArray[np.int64]:
        known_epoch, order = self._orders.get(domain, (-1, np.empty(0, dtype=np.int64)))
        if known_epoch != epoch:
            generator = np.random.default_rng([self.seed, domain, epoch])
            order = generator.permutation(stream.n_sequences(self.context_length))
            self._orders[domain] = (epoch, order)
        return order


def load_ahead(load: Callable[[int], Batch], steps: Iterable[int]) -> Iterator[Batch]:
    """load(step) for every step, each called in another thread while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="load_ahead") as pool:
        waiting = None
        for step in steps:
            loading = pool.submit(load, step)
            if waiting is not None:
                yield waiting.result()
            waiting = loading
        if waiting is not None:
            yield waiting.result()


def evaluation_batches(
    stream: TokenStream, context_length: int, batch_size: int = 16
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every token of the stream as a target exactly once: inputs and targets (B, T), the last of them (1, shorter)."""
    n_full = stream.n_sequences(context_length)
    for start in range(0, n_full, batch_size):
        window = stream.sequences(np.arange(start, min(start + batch_size, n_full)), context_length)
        yield window[:, :-1], window[:, 1:]
    rest = stream.sequence(n_full * context_length)
    if rest.shape[1] > 1:
        yield rest[:, :-1], rest[:, 1:]
