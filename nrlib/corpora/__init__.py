"""From a spec string to documents: one registry of five kinds of corpora.

    synthetic:<name>[/<genre>[+<genre>]][?<option>=<number>]          seeded artificial languages, made on the spot
    debian-docs:<language>[/<group>+<group>]                          documentation translated by volunteers
    debian-code:<language>                                            source code, from packages too
    file:<glob>                                                       your own .txt, .jsonl and .parquet files
    hub:<dataset or folder>[:<config>][@<revision>][#<number>[MB]]    streamed from the Hugging Face hub, then cached

Every kind gives a check that needs no text, and a loader; whatever goes wrong is a CorpusError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import CorpusError
from ..storage import canonical_json
from .documents import Document
from .hub_datasets import load_hub, parse_hub
from .synthetic import load_synthetic, parse_synthetic
from .text_files import load_files, match_files


@dataclass(frozen=True)
class Corpus:
    """Documents and all that is needed to say where they came from."""

    spec: str
    documents: tuple[Document, ...]
    versions: dict[str, str]  # package or dataset -> version or hash, and how many rows were left out
    fingerprint: str  # SHA-256 over ids and texts
    entropy_floor: float | None = None  # bits per byte, synthetic languages only

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(len(document.text.encode()) for document in self.documents)


Loaded = tuple[list[Document], dict[str, str], "float | None"]


class Kind(NamedTuple):
    """One kind of corpus: both functions take what follows the colon."""

    example: str
    check: Callable[[str], object]
    load: Callable[[str, bool], Loaded]


def parse_spec(spec: str) -> tuple[str, str]:
    """Split a spec into its kind and the rest.

    Raises
    ------
    CorpusError
        When the kind is unknown or nothing follows it.
    """
    kind, _, rest = spec.strip().partition(":")
    if kind not in KINDS or not rest:
        examples = "; ".join(known.example for known in KINDS.values())
        problem = "has nothing after its colon" if kind in KINDS else f"does not start with one of {', '.join(KINDS)}"
        raise CorpusError(f"The corpus '{spec}' {problem}. Examples: {examples}.")
    return kind, rest


def check_spec(spec: str) -> None:
    """Look whether a spec can be right, without reading or downloading its text.

    Raises
    ------
    CorpusError
        When `load_corpus` would fail for a reason that can be seen at once.
    """
    kind, rest = parse_spec(spec)
    KINDS[kind].check(rest)


def load_corpus(spec: str, *, progress: bool = True) -> Corpus:
    """Load the documents a spec stands for.

    Parameters
    ----------
    spec
        See the top of this module.
    progress
        Say on standard error what is being downloaded.

    Raises
    ------
    CorpusError
        When the spec is wrong, or the text cannot be had or read; the message says what to do.
    """
    kind, rest = parse_spec(spec)
    documents, versions, entropy_floor = KINDS[kind].load(rest, progress)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(canonical_json([document.id, document.text]).encode())
    return Corpus(spec.strip(), tuple(documents), versions, digest.hexdigest(), entropy_floor)


def _load_synthetic(rest: str, progress: bool) -> Loaded:
    return load_synthetic(rest)


def _load_files(rest: str, progress: bool) -> Loaded:
    return *load_files(rest), None


def _load_hub(rest: str, progress: bool) -> Loaded:
    return *load_hub(rest, progress=progress), None


def _check_debian_docs(rest: str) -> None:
    from .debian_docs import _parse  # knows languages, groups and their other names; needs neither apt nor network

    _parse(rest)


def _load_debian_docs(rest: str, progress: bool) -> Loaded:
    from .debian_docs import load_debian_docs

    return *load_debian_docs(rest, progress=progress), None


def _check_debian_code(rest: str) -> None:
    from .debian_code import parse_debian_code

    parse_debian_code(rest)


def _load_debian_code(rest: str, progress: bool) -> Loaded:
    from .debian_code import load_debian_code

    return *load_debian_code(rest, progress=progress), None


KINDS = {
    "synthetic": Kind("synthetic:aurelian", parse_synthetic, _load_synthetic),
    "debian-docs": Kind("debian-docs:fr", _check_debian_docs, _load_debian_docs),
    "debian-code": Kind("debian-code:python", _check_debian_code, _load_debian_code),
    "file": Kind("file:texts/*.txt", match_files, _load_files),
    "hub": Kind("hub:HuggingFaceFW/fineweb-2:fra_Latn#20000", parse_hub, _load_hub),
}
