"""Two studies of the page *Bridging vocabularies*: a synthetic pair of languages, and the words of real ones. See
`vocabulary_alignment` for the method."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..corpora import load_corpus
from ..corpora.documents import Document
from ..corpora.synthetic import load_language
from ..errors import ConfigError
from .vocabulary_alignment import compare_maps, fit_map, precision_at_1, translate, unit_rows
from .vocabulary_words import (
    Lexicon,
    Vectors,
    co_occurrences,
    freedict,
    lexicon_pairs,
    static_embeddings,
    word_sequences,
)

RESULT_VERSION = 2

FREEDICT = {"fr": "eng-fra", "tr": "eng-tur", "ru": "eng-rus", "de": "eng-deu", "es": "eng-spa", "it": "eng-ita"}
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 10.0, 25.0)  # RCSLS's, chosen on a fifth of the training words
TUNED = ("rcsls", "rcsls_spectral")


# --- two synthetic languages ------------------------------------------------------------------------------------------


def synthetic_alignment(
    *, seed: int, n_words: int = 2000, n_pairs: int = 100, n_test: int = 500, dimension: int = 40
) -> dict[str, Any]:
    """Every map on two languages whose words mean the same but for a disturbance of each language's own."""
    source, target, order = synthetic_pair(seed, n_words, dimension)
    pairs = np.stack([order[:n_pairs]] * 2, axis=1)
    test = {int(word): [int(word)] for word in order[n_pairs : n_pairs + n_test]}
    return {"precision": compare_maps(source, target, pairs, test)}


def synthetic_pair(
    seed: int,
    n_words: int = 2000,
    dimension: int = 40,
    *,
    n_meanings: int = 20,
    disturbance: float = 0.3,
    sharpness: float = 4.0,
    n_counts: float = 1e7,
) -> tuple[Vectors, Vectors, NDArray[np.int64]]:
    """Vectors (n_words, dimension) of two languages, in which words of one index translate each other, and an order of
    the words to choose from.

    Words have latent unit vectors, shared but for a disturbance, and Zipf frequencies f; words i and j stand together a
    Poisson number of times with mean ∝ f_i f_j exp(sharpness · u_i · u_j). Each language is counted, factorised and
    rotated on its own.
    """
    rng = np.random.default_rng(seed)
    shared = unit_rows(rng.normal(size=(n_words, n_meanings)))
    frequency = 1.0 / np.arange(1, n_words + 1)
    languages = []
    for _ in range(2):
        own = unit_rows(shared + disturbance * unit_rows(rng.normal(size=shared.shape)))
        expected = np.outer(frequency, frequency) * np.exp(sharpness * own @ own.T)
        np.fill_diagonal(expected, 0.0)
        counts = rng.poisson(n_counts * expected / expected.sum()).astype(float)
        rotation = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]
        languages.append(static_embeddings(counts + counts.T, dimension) @ rotation)
    return languages[0], languages[1], rng.permutation(n_words)


# --- words of real languages ------------------------------------------------------------------------------------------


def word_alignment(
    *, seed: int, language: str, n_words: int = 8000, dimension: int = 100, test_ratio: float = 0.25
) -> dict[str, Any]:
    """Every map between English and a language of `debian-docs`, or "synthetic", with a random split of the lexicon's
    words by `seed`; the rate of each form of RCSLS is chosen on a fifth of the training words.

    Coverage is over the lexicon's single words: those with a vector on both sides. `validation` has by map the precision
    at each rate; at rate 0, for comparison, that of Procrustes, from which both start.
    """
    words, others, source, target, lexicon, name = _word_vectors(language, n_words, dimension)
    known = lexicon_pairs(lexicon, words, others)
    order = np.random.default_rng(seed).permutation(len(known))
    n_test = round(test_ratio * len(known))
    test, training = [known[i] for i in order[:n_test]], [known[i] for i in order[n_test:]]
    n_validation = len(training) // 5
    validation, fitted = training[:n_validation], training[n_validation:]
    start = _precision(source, target, fitted, validation, "procrustes")
    tried = {
        name: {
            rate: _precision(source, target, fitted, validation, name, learning_rate=rate) for rate in LEARNING_RATES
        }
        for name in TUNED
    }
    best = {name: max(rates, key=lambda rate: rates[rate]) for name, rates in tried.items()}
    precision = compare_maps(source, target, _all_pairs(training), dict(test), best)
    return {
        "lexicon": name,
        "n_entries": len(lexicon),
        "coverage": round(len(known) / len(lexicon), 4),
        "n_vectors": [len(words), len(others)],
        "n_pairs": len(_all_pairs(training)),
        "n_test": n_test,
        "learning_rates": best,
        "validation": {
            name: {f"{rate:g}": round(value, 4) for rate, value in {0.0: start, **rates}.items()}
            for name, rates in tried.items()
        },
        "precision": precision,
    }


@functools.lru_cache(maxsize=2)
def _word_vectors(
    language: str, n_words: int, dimension: int
) -> tuple[list[str], list[str], Vectors, Vectors, Lexicon, str]:
    english, documents, lexicon, name = load_pair(language)
    sides = []
    for corpus in (english, documents):
        vocabulary, sequences = word_sequences(corpus, n_words)
        sides.append((vocabulary, static_embeddings(co_occurrences(sequences, len(vocabulary)), dimension)))
    (words, source), (others, target) = sides
    return words, others, source, target, lexicon, name


def load_pair(language: str) -> tuple[Sequence[Document], Sequence[Document], Lexicon, str]:
    """Documents in English, those in the language, the lexicon from the one to the other and where it comes from.

    "synthetic" stands for an artificial language and its translation word by word: nothing is downloaded.

    Raises
    ------
    ConfigError
        For a language without a lexicon here.
    CorpusError
        When text or lexicon cannot be had.
    """
    if language == "synthetic":
        documents = load_corpus("synthetic:aurelian").documents
        lexicon = synthetic_lexicon()
        translated = [replace(d, text=respell(d.text, lexicon)) for d in documents]
        return documents, translated, lexicon, "synthetic"
    if language not in FREEDICT:
        raise ConfigError(f"language = {language!r} has no lexicon here. Allowed: synthetic, {', '.join(FREEDICT)}.")
    lexicon, name = freedict(FREEDICT[language], progress=False)
    english, other = (load_corpus(f"debian-docs:{code}", progress=False).documents for code in ("en", language))
    return english, other, lexicon, name


def synthetic_lexicon() -> Lexicon:
    """The words of one artificial language with those of the same rank in another."""
    words, others = load_language("aurelian").words, load_language("borealic").words
    return {word: {other} for word, other in zip(words, others, strict=True)}


def respell(text: str, lexicon: Lexicon) -> str:
    """A text with every word that the lexicon knows replaced by its translation, the first in the alphabet."""
    first = {word: min(translations) for word, translations in lexicon.items()}
    return re.sub(r"\w+", lambda match: first.get(match[0], match[0]), text)


def _all_pairs(entries: Sequence[tuple[int, Sequence[int]]]) -> NDArray[np.int64]:
    return np.array([(word, translation) for word, translations in entries for translation in translations])


def _precision(source: Vectors, target: Vectors, fitted: Any, tested: Any, name: str, **options: float) -> float:
    mapping = fit_map(name, source, target, _all_pairs(fitted), **options)
    found = translate(mapping, source, target, np.array([word for word, _ in tested]))[1][:, 0]
    return precision_at_1(found, [right for _, right in tested])


def precision_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row for each result, map and rule: pair of languages, map, rule, seed, precision at 1."""
    return pd.DataFrame(
        [
            {"pair": r.get("language", "calibrated"), "map": name, "rule": rule, "seed": r["seed"], "precision": value}
            for r in results
            for name, by_rule in r["precision"].items()
            for rule, value in by_rule.items()
        ]
    )


def word_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row for each language of `word_alignment`: lexicon, coverage, sizes, and the rates chosen for both forms of RCSLS."""
    rows: dict[str, dict[str, Any]] = {}
    for r in results:
        sizes = {"vectors": " / ".join(f"{n:,}" for n in r["n_vectors"]), "test_words": r["n_test"]}
        row = rows.setdefault(
            r["language"],
            {
                "lexicon": r["lexicon"],
                "entries": r["n_entries"],
                "coverage": r["coverage"],
                **sizes,
                **{f"{name}_rates": "" for name in TUNED},
            },
        )
        for name, rate in r["learning_rates"].items():
            row[f"{name}_rates"] = ", ".join(filter(None, [row[f"{name}_rates"], f"{rate:g}"]))
    return pd.DataFrame.from_dict(rows, orient="index")
