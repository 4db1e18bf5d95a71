"""What a run reads, ready to use: corpora loaded, split by document, tokenised, packed, fingerprinted and cached."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .batches import TokenStream
from .config import BackboneConfig, DataConfig
from .corpora import Corpus, load_corpus
from .corpora.documents import Document
from .errors import CorpusError
from .splits import Split, split_corpus, split_documents
from .storage import atomic_path, cache_directory, fingerprint
from .tokenization import beginning_token, encode_documents, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREPARATION_VERSION = 1

# The held-out texts every run is measured on. Settings (the learning rate) are chosen on the validation texts only.
TEST_SETS = ("unseen_original", "proxy", "new")
VALIDATION_SETS = ("unseen_original_validation", "new_validation")
SMALL_TEST_BYTES = 50_000  # much less is accepted with a warning, unless `n_evaluation_bytes` asks for less


@dataclass(frozen=True)
class PreparedText:
    """Token streams by role.

    pretraining, proxy, new : training text; held_out : the test and validation texts by name; corpora : what each spec
    resolved to, for the record.
    """

    tokenizer: PreTrainedTokenizerBase
    pretraining: TokenStream
    proxy: TokenStream | None
    new: TokenStream
    held_out: dict[str, TokenStream]
    corpora: dict[str, dict[str, Any]]


@functools.lru_cache(maxsize=2)
def prepare_text(data: DataConfig, backbone: BackboneConfig, progress: bool = True) -> PreparedText:
    """Load and prepare all text of a run.

    All original-domain specs are pooled before they are split, so that a page that is held out under one spec is held
    out under every other.

    Raises
    ------
    CorpusError
        When a corpus cannot be had or is too small.
    """
    corpora = {role: load_corpus(spec, progress=progress) for role, spec in _specs(data).items()}
    original = split_corpus(
        _pool([corpora[role] for role in ("original", "proxy", "unseen_original") if role in corpora])
    )
    new = split_corpus(corpora["new_domain"].documents)
    chosen = {role: {d.id for d in corpus.documents} for role, corpus in corpora.items()}

    if shared := chosen.get("proxy", set()) & chosen["unseen_original"]:
        raise CorpusError(
            f"proxy = {data.proxy!r} and unseen_original = {data.unseen_original!r} share {len(shared)} documents, for "
            f"example {min(shared)!r}. Forgetting is measured on text outside the proxy: choose two that share nothing."
        )
    training = {role: _pick(original.train, chosen[role]) for role in ("original", "proxy") if role in corpora}
    if backbone.backbone_name:
        tokenizer = load_tokenizer(backbone.backbone_name)
    else:
        tokenizer = train_tokenizer(training["original"], backbone.vocabulary_size, progress)
    n_bytes = data.n_evaluation_bytes
    held_out = {
        "unseen_original": _first(_pick(original.test, chosen["unseen_original"]), n_bytes),
        "new": _first(new.test, n_bytes),
        "unseen_original_validation": _first(_pick(original.validation, chosen["unseen_original"]), n_bytes // 4),
        "new_validation": _first(new.validation, n_bytes // 4),
    }
    if "proxy" in corpora:
        held_out["proxy"] = _first(_pick(original.test, chosen["proxy"]), n_bytes)
    _warn_of_small_tests({name: documents for name, documents in held_out.items() if name in TEST_SETS}, n_bytes)

    def stream(documents: Sequence[Document], name: str) -> TokenStream:
        return tokenise(documents, tokenizer, name, progress)

    return PreparedText(
        tokenizer=tokenizer,
        pretraining=stream(training["original"], data.original),
        proxy=stream(training["proxy"], data.proxy) if "proxy" in training else None,
        new=stream(_share(new.train, data.new_text_ratio), data.new_domain),
        held_out={name: stream(documents, name) for name, documents in held_out.items()},
        corpora={
            role: _describe(corpus, new if role == "new_domain" else original) for role, corpus in corpora.items()
        },
    )


def tokenise(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, name: str, progress: bool = True
) -> TokenStream:
    """Encode and pack documents; cached by text and tokenizer. The token that a tokenizer puts before every text is no part
    of the packed tokens: each window begins with it, wherever the window does (see `TokenStream`).

    Raises
    ------
    CorpusError
        When there is no document.
    """
    if not documents:
        raise CorpusError(
            f"No text is left for {name} after the split into training, validation and test documents: the corpus is "
            "too small. Give more documents."
        )
    key = fingerprint([PREPARATION_VERSION, _identity(tokenizer), [(d.id, d.text) for d in documents]], 32)
    path = cache_directory() / "tokens" / f"{key}.npy"
    if not path.exists():
        separator = tokenizer.eos_token_id
        parts = [np.array([separator], dtype=np.int32)]
        encoded = encode_documents(documents, tokenizer)
        for ids in tqdm(encoded, total=len(documents), desc=f"tokenise {name}", disable=not progress, leave=False):
            parts.append(np.array([*ids, separator], dtype=np.int32))
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.save(handle, np.concatenate(parts))
    n_bytes = sum(len(d.text.encode()) for d in documents)
    return TokenStream(np.load(path), n_bytes, name, beginning_token(tokenizer))


def held_out_documents(documents: Sequence[Document], n_bytes: int) -> list[Document]:
    """Test documents of a corpus, about `n_bytes` of them: what `prepare_text` measures on for the same documents."""
    return _first(split_documents(documents)["test"], n_bytes)


def _specs(data: DataConfig) -> dict[str, str]:
    return {
        role: spec
        for role in ("original", "proxy", "unseen_original", "new_domain")
        if (spec := getattr(data, role))
    }  # fmt: skip


def _pool(corpora: Sequence[Corpus]) -> list[Document]:
    """The documents of all corpora, those of several once. An id that stands for two texts would let one corpus train on
    what another is measured on."""
    pooled: dict[str, tuple[Document, Corpus]] = {}
    for corpus in corpora:
        for document in corpus.documents:
            known, other = pooled.get(document.id, (document, corpus))
            if not _is_one_page(known, document):
                raise CorpusError(
                    f"The id '{document.id}' stands for one text in {other.spec} and for another in {corpus.spec}, so "
                    "nothing would keep what is trained on apart from what is measured on. Give the files other names, "
                    "or the rows other ids."
                )
            pooled[document.id] = document, corpus
    return [document for document, _ in pooled.values()]


def _is_one_page(one: Document, other: Document) -> bool:
    """Whether the texts are equal but for paragraphs that one corpus leaves out because it has them elsewhere."""
    if one.text == other.text:
        return True
    return one.source == other.source and not set(one.text.split("\n\n")).isdisjoint(other.text.split("\n\n"))


def _pick(documents: Sequence[Document], ids: set[str]) -> list[Document]:
    return [document for document in documents if document.id in ids]


def _first(documents: Sequence[Document], n_bytes: int) -> list[Document]:
    """Whole documents in an order given by the hash of their id, up to about `n_bytes`; each is cut at n_bytes / 20
    (at a paragraph) so that no single long page decides a result."""
    chosen, total = [], 0
    for document in sorted(documents, key=lambda d: fingerprint(d.id)):
        if total >= n_bytes:
            break
        paragraphs: list[str] = []
        length = 0
        for paragraph in document.text.split("\n\n"):
            if paragraphs and length + len(paragraph.encode()) > n_bytes // 20:
                break
            paragraphs.append(paragraph)
            length += len(paragraph.encode()) + 2
        chosen.append(Document(document.id, document.source, "\n\n".join(paragraphs), document.licence))
        total += length
    return chosen


def _warn_of_small_tests(tests: dict[str, list[Document]], n_bytes: int) -> None:
    for name, documents in tests.items():
        found = sum(len(document.text.encode()) for document in documents)
        if found < 0.9 * min(n_bytes, SMALL_TEST_BYTES):  # whole paragraphs are chosen, so a few bytes may lack
            warnings.warn(
                f"The test text of {name} has {found:,} bytes in {len(documents)} documents: differences of a few per cent "
                f"may be chance. {SMALL_TEST_BYTES:,} bytes and more tell more; 5% of a corpus's documents go to its test text.",
                stacklevel=3,
            )


def _share(documents: Sequence[Document], ratio: float) -> Sequence[Document]:
    """The part of the documents whose ids' hashes come first: a smaller share lies within a larger one."""
    if ratio == 1:
        return documents
    return sorted(documents, key=lambda d: fingerprint(d.id))[: round(ratio * len(documents))]


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return fingerprint(backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()))


def _describe(corpus: Corpus, split: Split) -> dict[str, Any]:
    description = {
        "spec": corpus.spec,
        "fingerprint": corpus.fingerprint[:16],
        "n_bytes": corpus.n_bytes,
        "versions": corpus.versions,
        "shingle_overlap": round(split.overlap_after, 5),
    }
    if corpus.entropy_floor is not None:
        description["entropy_floor"] = round(corpus.entropy_floor, 5)
    return description
