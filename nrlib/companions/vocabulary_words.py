"""Static word embeddings and bilingual lexicons, the material of `vocabulary_alignment`.

Embeddings: positive pointwise mutual information of co-occurrence counts, factorised (Levy and Goldberg, "Neural word
embedding as implicit matrix factorization", NeurIPS 2014). scipy holds the counts and scikit-learn factorises them.
Lexicons: two columns of a file, or a FreeDict dictionary of Debian's archive, which is downloaded, never committed.
"""

from __future__ import annotations

import collections
import gzip
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..corpora.debian_packages import exclusive, fetch_packages, package_version, read_members
from ..corpora.documents import Document
from ..errors import ConfigError, CorpusError
from ..storage import cache_directory

Vectors = NDArray[np.float64]
Lexicon = dict[str, set[str]]

GAP = -1  # in place of a rare word: nothing is counted, but the words around it stay as far apart as they were

_WORD = re.compile(r"[^\W\d_]+")
_HEADWORD = re.compile(r"^(?P<word>\S[^/\n]*?)(?: +/[^/\n]*/)?(?: +<[^>\n]*>)*$")
_SENSE_NUMBER = re.compile(r"^\d+\. *")
_REMARK = re.compile(r"\([^)]*\)|\[[^\]]*\]|\{[^}]*\}|<[^>]*>|\"[^\"]*\"")


# --- words and their vectors ------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters."""
    return _WORD.findall(text.lower())


def word_sequences(
    documents: Sequence[Document], n_words: int, min_count: int = 10
) -> tuple[list[str], list[NDArray[np.int32]]]:
    """The `n_words` most frequent words, most frequent first, and each document as their indices, rarer words a `GAP`.

    Raises
    ------
    CorpusError
        When fewer than two words occur `min_count` times.
    """
    texts = [words_of(document.text) for document in documents]
    counts = collections.Counter(word for text in texts for word in text)
    frequent = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
    if len(frequent) < 2:
        raise CorpusError(
            f"Only {len(frequent)} word occurs {min_count} times in {sum(map(len, texts)):,} running words; a vocabulary "
            "needs two or more to have neighbours. Give more text or a smaller min_count."
        )
    index = {word: position for position, word in enumerate(frequent[:n_words])}
    return list(index), [np.array([index.get(word, GAP) for word in text], dtype=np.int32) for text in texts]


def co_occurrences(sequences: Iterable[NDArray[np.int32]], n_words: int, window: int = 5) -> Any:
    """Symmetric co-occurrence counts, a sparse matrix (n_words, n_words). Words at a distance of d count
    (window + 1 − d) / window; entries of `GAP` count nothing, and no pair spans two sequences."""
    from scipy import sparse

    separator = np.full(window, GAP, dtype=np.int32)
    parts = [part for sequence in sequences for part in (sequence, separator)]
    stream = np.concatenate(parts) if parts else separator
    counts = sparse.csr_matrix((n_words, n_words), dtype=np.float64)
    for distance in range(1, window + 1):
        left, right = stream[:-distance], stream[distance:]
        is_pair = (left != GAP) & (right != GAP)
        pair = (left[is_pair], right[is_pair])
        weight = np.full(len(pair[0]), (window + 1 - distance) / window)
        counts += sparse.coo_matrix((weight, pair), shape=counts.shape).tocsr()
    return counts + counts.T


def static_embeddings(counts: Any, dimension: int, *, smoothing: float = 0.75, power: float = 0.25) -> Vectors:
    """Vectors (n_words, dimension) from symmetric counts (n_words, n_words): the left singular vectors of the positive
    pointwise mutual information, times their singular values to the `power`.

    Parameters
    ----------
    smoothing : exponent of the context frequencies; below 1 rare contexts weigh less.

    Raises
    ------
    ConfigError
        For counts that are none, fewer than two words, or not more words than dimensions.
    """
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    counts = sparse.coo_matrix(counts)
    n_words = counts.shape[0]
    is_bad = ~(np.isfinite(counts.data) & (counts.data >= 0))
    if is_bad.any():
        raise ConfigError(
            f"{is_bad.sum()} of {len(counts.data)} counts are negative, NaN or infinite, the first in row "
            f"{counts.row[is_bad.argmax()]}; a count is a number of 0 or more. Count again, or leave these words out."
        )
    if n_words < 2:
        raise ConfigError(f"The counts are those of {n_words} word; vectors need two words or more. Give more text.")
    if not 0 < dimension < n_words:
        raise ConfigError(
            f"dimension = {dimension} for {n_words} words: a factorisation gives fewer dimensions than words. Choose "
            f"dimension between 1 and {n_words - 1}, or a larger vocabulary."
        )
    frequency = np.asarray(counts.sum(axis=1)).ravel()
    context = frequency**smoothing / (frequency**smoothing).sum()
    information = np.log(counts.data / (frequency[counts.row] * context[counts.col]))
    is_positive = information > 0
    places = (counts.row[is_positive], counts.col[is_positive])
    positive = sparse.csr_matrix((information[is_positive], places), shape=counts.shape)
    # Several times faster than Arnoldi iterations (scipy's svds); the fixed seed makes the vectors the same every time.
    left, values, _ = randomized_svd(positive, dimension, n_iter=6, random_state=0)
    return np.asarray(left * values**power)


# --- lexicons ---------------------------------------------------------------------------------------------------------


def read_lexicon(path: Path | str) -> Lexicon:
    """A lexicon from a text file: on each line a source word and a target word, separated by white space.

    Raises
    ------
    CorpusError
        When the file cannot be read, holds no pair, or a line does not hold two words; the line is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"The lexicon {path} cannot be read ({error}). Give a text file in UTF-8.") from error
    lexicon: Lexicon = collections.defaultdict(set)
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if words and len(words) != 2:
            raise CorpusError(
                f"The lexicon {path}, line {number}, holds {len(words)} words: {line.strip()[:80]!r}. Each line is one "
                "source word and one target word; write several translations on lines of their own."
            )
        if words:
            lexicon[words[0].lower()].add(words[1].lower())
    if not lexicon:
        raise CorpusError(f"The lexicon {path} is empty. Give one source word and one target word a line.")
    return dict(lexicon)


def freedict(languages: str, progress: bool = True) -> tuple[Lexicon, str]:
    """The lexicon of a FreeDict dictionary, for example "eng-fra" (GPL-2+), and its package with the version.

    Only single words are kept, on either side.

    Raises
    ------
    CorpusError
        When the package dict-freedict-<languages> cannot be had or holds no dictionary.
    """
    folder = cache_directory().resolve() / "corpora" / "freedict"
    name = f"dict-freedict-{languages}"
    with exclusive(folder):
        archive = fetch_packages([name], folder, f"the lexicon {languages}", progress)[name]
        members = read_members(archive, re.compile(r"usr/share/dictd/freedict-[a-z-]+\.dict\.dz"))
        text = "".join(gzip.decompress(content).decode("utf-8") for _, content in members)
    lexicon = parse_dictionary(text)
    if not lexicon:
        raise CorpusError(f"The package {archive.name} holds no dictionary in the format of dictd. Take another pair.")
    return lexicon, f"{name} {package_version(archive)}"


def parse_dictionary(text: str) -> Lexicon:
    """Pairs of single words from the text of a FreeDict dictionary: a headword with its pronunciation between slashes,
    then lines of translations, separated by commas and numbered by sense; remarks in brackets are left out."""
    lexicon: Lexicon = collections.defaultdict(set)
    for headword, senses in _entries(text):
        sources = words_of(headword)
        if len(sources) != 1 or sources[0] != headword.lower():
            continue
        for translation in re.split(r"[,;:.]", " , ".join(_REMARK.sub("", sense) for sense in senses)):
            targets = words_of(translation)
            if len(targets) == 1 and targets[0] == translation.strip().lower():
                lexicon[sources[0]].add(targets[0])
    return dict(lexicon)


def _entries(text: str) -> Iterator[tuple[str, list[str]]]:
    """Headwords with the lines below them; the dictionary's own description comes first and has no slashes."""
    headword = ""
    senses: list[str] = []
    for line in text.splitlines():
        match = _HEADWORD.match(line)
        if match and line.rstrip().endswith("/"):
            if headword:
                yield headword, senses
            headword, senses = match["word"], []
        elif headword:
            senses.append(_SENSE_NUMBER.sub("", line.strip()))
    if headword:
        yield headword, senses


def lexicon_pairs(
    lexicon: Mapping[str, set[str]], source: Sequence[str], target: Sequence[str]
) -> list[tuple[int, list[int]]]:
    """The entries both vocabularies know: index of a source word with the indices of its translations, in the order of
    the source vocabulary."""
    known = {word: index for index, word in enumerate(target)}
    found = []
    for index, word in enumerate(source):
        translations = sorted(known[t] for t in lexicon.get(word, ()) if t in known)
        if translations:
            found.append((index, translations))
    return found
