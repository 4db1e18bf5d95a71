"""Synthetic languages: the same everywhere, parsed in one way, and with a floor that is exact."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from nrlib.corpora.synthetic import GENRES, load_language, load_synthetic, parse_synthetic
from nrlib.errors import CorpusError

BOTH = tuple(GENRES)


@pytest.fixture(scope="module")
def language():
    return load_language("aurelian")


@pytest.fixture(scope="module")
def sample(language):
    return {genre: language.sample(genre, 1500, 12) for genre in GENRES}


def bits_and_bytes(language, texts, genres):
    bits = np.array([-language.document_log_probability(text, genres) for text in texts])
    return bits, np.array([len(text.encode()) for text in texts])


def test_a_name_gives_the_same_documents_on_every_platform_and_version():
    documents, _, floor = load_synthetic("aurelian?n_documents=5")
    digest = hashlib.sha256("\n".join(document.id + document.text for document in documents).encode()).hexdigest()
    # another digest means other texts for the same spec: raise GENERATOR_VERSION, and published records are void
    assert digest[:16] == "d2ea1fc2ecc49bc7"
    assert floor == pytest.approx(0.8282427206082379, rel=1e-9)


def test_default_size_and_genres():
    documents, versions, _ = load_synthetic("aurelian")
    assert Counter(document.source for document in documents) == {"plain": 600, "manual": 600}
    assert 500 < np.mean([len(document.text) for document in documents]) < 700
    assert len({document.id for document in documents}) == len({document.text for document in documents}) == 1200
    assert versions.keys() == {"synthetic", "numpy"}


def test_genre_and_size_select_documents_without_changing_them():
    everything = {document.id: document for document in load_synthetic("aurelian?n_documents=130")[0]}
    fewer = load_synthetic("aurelian/manual?n_documents=110")[0]
    assert len(fewer) == 110 and all(everything[document.id] == document for document in fewer)


def test_lexicons_of_two_languages_hardly_overlap():
    lexicons = [set(load_language(name).words) for name in ("aurelian", "borealic", "cassian", "french", "danish")]
    assert all(len(lexicon) == 592 for lexicon in lexicons)
    for i, first in enumerate(lexicons):
        assert all(len(first & second) < 0.02 * len(first) for second in lexicons[i + 1 :])


def test_texts_parse_in_one_way(language, sample):
    for text in sample["manual"][:100]:
        sentences = language.parse(text)
        assert len(sentences) == 12 and min(map(len, sentences)) >= 1
        assert language.render(sentences) == text
    word = language.words[0]
    for wrong in ("hello.", word, f"{word} {word}", f"{word}  {word}.", f"{word}.\n{word}.", f".{word}."):
        with pytest.raises(CorpusError):
            language.parse(wrong)


def test_frequencies_follow_zipf_roughly(language, sample):
    symbols = (symbol for text in sample["plain"] for sentence in language.parse(text) for symbol in sentence)
    counts = np.array([n for symbol, n in Counter(symbols).most_common() if symbol < language.n_common])[:300]
    slope = np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)[0]
    assert -1.4 < slope < -0.7


@pytest.mark.parametrize("genres", [("plain",), ("manual",), BOTH])
def test_next_symbol_probabilities_sum_to_one_and_multiply_to_the_documents(language, sample, genres):
    text = sample[genres[-1]][7]
    symbols = [symbol for sentence in language.parse(text) for symbol in (*sentence, language.n_symbols)]
    total = 0.0
    for n_read, symbol in enumerate(symbols):
        probabilities = language.next_symbol_probabilities(symbols[:n_read], genres)
        assert probabilities.min() >= 0 and probabilities.sum() == pytest.approx(1, abs=1e-12)
        total += np.log2(probabilities[symbol])
    assert total == pytest.approx(language.document_log_probability(text, genres), rel=1e-12)


@pytest.mark.parametrize(
    ("genres", "n_sentences", "n_documents"),
    [(("plain",), 12, 1500), (("manual",), 12, 1500), (BOTH, 12, 1500), (("plain",), 1, 4000), (BOTH, 2, 1500)],
)
def test_floor_is_the_mean_code_length_of_a_large_sample(language, genres, n_sentences, n_documents):
    texts = [text for genre in genres for text in language.sample(genre, n_documents, n_sentences)]
    bits, n_bytes = bits_and_bytes(language, texts, genres)
    floor, measured = language.entropy_floor(genres, n_sentences), bits.sum() / n_bytes.sum()
    standard_error = np.std(bits - measured * n_bytes) / np.sqrt(len(texts)) / n_bytes.mean()
    assert standard_error < 0.004 * floor  # the sample is large enough to notice a wrong floor
    assert abs(measured - floor) < 3 * standard_error


def test_no_model_that_ignores_the_topic_reaches_the_floor(language, sample):
    """Word models fitted on the very texts they are scored on, so even their best case stays above the floor."""
    documents = [language.parse(text) for text in sample["plain"]]
    n_bytes = sum(map(len, sample["plain"]))
    floor = language.entropy_floor(("plain",), 12)
    pairs: Counter[tuple[int, int]] = Counter()
    for sentences in documents:
        for sentence in sentences:
            pairs.update(zip([-1, *sentence], [*sentence, -1], strict=True))
    before: defaultdict[int, int] = defaultdict(int)
    after: defaultdict[int, int] = defaultdict(int)
    for (first, second), count in pairs.items():
        before[first] += count
        after[second] += count
    total = sum(pairs.values())
    bigram = -sum(n * np.log2(n / before[first]) for (first, _), n in pairs.items()) / n_bytes
    unigram = -sum(n * np.log2(n / total) for n in after.values()) / n_bytes
    assert unigram > bigram > 1.05 * floor


def test_context_tells_the_topic(language, sample):
    text = sample["plain"][0]
    symbols = [symbol for sentence in language.parse(text) for symbol in (*sentence, language.n_symbols)]
    uncertain = language.next_symbol_probabilities([], BOTH)[language.n_common : -1]
    certain = language.next_symbol_probabilities(symbols, BOTH)[language.n_common : -1]
    assert np.count_nonzero(uncertain) == 2 * 16 * 6 and np.count_nonzero(certain) == 6


def test_texts_that_cannot_be_drawn_have_probability_zero(language):
    opening_of_plain = int(np.argmax(language.successors["plain"][-1]))
    text = language.render([[opening_of_plain]])
    assert language.document_log_probability(text, ("plain",)) > -np.inf
    assert language.document_log_probability(text, ("manual",)) == -np.inf
    first, second = language.topic_words("plain")[:2, 0]
    assert language.document_log_probability(language.render([[first, second]])) == -np.inf


def test_floor_depends_on_length_and_genre(language):
    floors = {language.entropy_floor(genres, n) for genres in (("plain",), ("manual",), BOTH) for n in (1, 12, 100)}
    assert len(floors) == 9
    # a longer document pays for its topic once
    assert language.entropy_floor(("plain",), 100) < language.entropy_floor(("plain",), 12)


@pytest.mark.parametrize(
    "rest",
    [
        *("", "/plain", "a b", "a/", "a/novel", "a/plain+plain", "a?n_documents", "a?n_documents=0", "a?seed=1"),
        *("a?n_documents=-1", "a?n_documents=1e3", "a?n_words=10", "a?n_words=5000", "a?n_topics=\u0662"),
    ],
)
def test_wrong_specs(rest):
    with pytest.raises(CorpusError, match="synthetic:"):
        parse_synthetic(rest)


def test_options_are_read():
    spec = parse_synthetic("vesper-2/manual+plain?n_documents=40&n_sentences=3&n_words=60&n_topics=2")
    assert spec.genres == BOTH  # one order whatever is written, so that equal corpora have equal fingerprints
    assert (spec.n_documents, spec.n_sentences, spec.n_words, spec.n_topics) == (40, 3, 60, 2)
    documents, _, floor = load_synthetic("vesper-2/manual+plain?n_documents=40&n_sentences=3&n_words=60&n_topics=2")
    assert len(documents) == 80 and 0.3 < floor < 1.5
    assert all(document.text.count(".") == 3 for document in documents)
