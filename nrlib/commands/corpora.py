"""`nrlib corpora`: what kinds there are, and what one corpus holds."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from .. import corpora
from ..corpora import Corpus, check_spec, load_corpus
from ..corpora.documents import Document


def describe_kinds() -> str:
    """The kinds of corpora and what can stand in their specs."""
    from ..corpora.debian_docs import groups_of, languages
    from ..corpora.synthetic import GENRES

    return "\n".join(
        [
            inspect.cleandoc(corpora.__doc__ or ""),
            "",
            f"synthetic: any name is a language of its own; genres {', '.join(GENRES)}",
            f"debian-docs: languages {' '.join(languages())}",
            f"             groups of English {' '.join(groups_of('en'))}; other languages have some or all of them",
            "",
            "Examples:",
            *(f"    nrlib corpora '{kind.example}' --show 3" for kind in corpora.KINDS.values()),
        ]
    )


def describe_corpus(spec: str, n_paragraphs: int = 0, seed: int = 0) -> Iterator[str]:
    """Size, sources, fingerprint, versions, licences, splits and random paragraphs, part by part."""
    check_spec(spec)
    corpus = load_corpus(spec)
    yield from _facts(corpus)
    yield from _random_paragraphs(corpus.documents, n_paragraphs, seed)
    yield from _splits(corpus.documents)


def _facts(corpus: Corpus) -> Iterator[str]:
    yield f"corpus       {corpus.spec}"
    yield f"documents    {len(corpus.documents):,}"
    yield f"bytes        {corpus.n_bytes:,}"
    sizes: Counter[str] = Counter()
    for document in corpus.documents:
        sizes[document.source] += len(document.text.encode())
    yield from _listed("sources", [f"{name}: {size:,} bytes" for name, size in sizes.most_common(20)], len(sizes))
    yield f"fingerprint  {corpus.fingerprint}"
    if corpus.entropy_floor is not None:
        yield f"entropy      {corpus.entropy_floor:.4f} bits per byte: no model can do better"
    yield from _listed("versions", [f"{name} {version}" for name, version in corpus.versions.items()])
    licences = Counter(document.licence for document in corpus.documents)
    yield from _listed("licences", [f"{name} ({n:,} documents)" for name, n in licences.most_common(20)], len(licences))


def _listed(heading: str, items: Sequence[str], n_all: int | None = None) -> Iterator[str]:
    for index, item in enumerate(items):
        yield f"{heading if index == 0 else '':12s} {item}"
    if n_all is not None and n_all > len(items):
        yield f"{'':12s} … and {n_all - len(items):,} more"


def _random_paragraphs(documents: Sequence[Document], n_paragraphs: int, seed: int) -> Iterator[str]:
    if not n_paragraphs:
        return
    paragraphs = [(d.id, text) for d in documents for text in d.text.split("\n\n")]
    for name, text in random.Random(seed).sample(paragraphs, min(n_paragraphs, len(paragraphs))):
        yield f"--- {name}\n{text}"


def _splits(documents: Sequence[Document]) -> Iterator[str]:
    from ..splits import split_corpus

    split = split_corpus(documents)
    sides = {"train": split.train, "validation": split.validation, "test": split.test}
    parts = [f"{n}: {len(d):,} documents, {sum(len(x.text.encode()) for x in d):,} bytes" for n, d in sides.items()]
    yield from _listed("splits", parts)
    yield f"dropped      {split.n_bytes_dropped:,} bytes of near-duplicates"
    yield (
        f"overlap      {split.overlap_after:.3%} of held-out 50-character shingles occur in train "
        f"({split.overlap_before:.3%} before near-duplicates were dropped)"
    )
