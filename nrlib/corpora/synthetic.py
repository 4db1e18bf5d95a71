"""Seeded artificial languages whose entropy is known exactly, so that a curve has a floor to be compared with.

A document is drawn as follows. Its genre and its topic are drawn uniformly and never shown. Each sentence starts
afresh; after every word the sentence ends with probability `end_ratio`, goes on with one of the topic's own words with
probability `topic_ratio`, and otherwise with a successor of the last word (a sparse word-bigram table):

    genre -> topic -> [ start -> word -> word -> end ] x n_sentences       "sel mora tavi. mora kel ..."

Topic words belong to one topic only and come back all through a document, so reading the context pays. A sentence is
written as words between single spaces and a full stop, a paragraph has four sentences: a text is parsed in one way.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import CorpusError
from .documents import Document

GENERATOR_VERSION = "1"  # raise it when the same spec gives other texts
BLOCK = 100  # documents drawn together; a corpus is a prefix of any larger one of the same language
SENTENCES_PER_PARAGRAPH = 4
WORDS_PER_TOPIC = 6
SUCCESSORS_PER_WORD = 10
OPENINGS_PER_GENRE = 12

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Genre:
    """What makes one group of documents unlike another of the same language. All ratios are probabilities."""

    end_ratio: float  # a sentence ends after a word; 1 / mean words a sentence
    topic_ratio: float  # the next word is one of the topic's
    shared_ratio: float  # weight of the bigram table that all genres of a language share
    own_ratio: float  # weight of the genre's own bigram table; the rest is the Zipf unigram distribution


GENRES = {
    "plain": Genre(end_ratio=0.125, topic_ratio=0.25, shared_ratio=0.6, own_ratio=0.3),
    "manual": Genre(end_ratio=0.125, topic_ratio=0.2, shared_ratio=0.3, own_ratio=0.6),
}


@dataclass(frozen=True)
class SyntheticSpec:
    """What `synthetic:<name>[/<genre>[+<genre>]][?<option>=<number>[&...]]` says; the options are the numbers here."""

    name: str  # seeds the whole language
    genres: tuple[str, ...] = tuple(GENRES)
    n_documents: int = 600  # for each genre
    n_sentences: int = 12  # a document
    n_words: int = 400  # common words; another number is another language
    n_topics: int = 16  # for each genre; another number is another language


LIMITS = {"n_documents": (1, 1_000_000), "n_sentences": (1, 1000), "n_words": (50, 4000), "n_topics": (1, 100)}


def parse_synthetic(rest: str) -> SyntheticSpec:
    """Read the part of a spec after `synthetic:`.

    Raises
    ------
    CorpusError
        On an empty or odd name, an unknown genre or option, or a number out of its range.
    """
    grammar = "write synthetic:<name>, synthetic:<name>/plain or synthetic:<name>?n_documents=400&n_sentences=12"
    path, _, query = rest.partition("?")
    name, slash, genre_list = path.partition("/")
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise CorpusError(
            f"synthetic:{rest} names no language: the name may hold letters, digits, '-' and '_'; {grammar}."
        )
    genres = tuple(genre_list.split("+")) if slash else tuple(GENRES)
    if not set(genres) <= set(GENRES) or len(set(genres)) < len(genres):
        raise CorpusError(
            f"synthetic:{rest} asks for the genres '{genre_list}'; there are {'+'.join(GENRES)}; {grammar}."
        )
    options: dict[str, int] = {}
    for option in query.split("&") if query else []:
        key, _, value = option.partition("=")
        low, high = LIMITS.get(key, (0, 0))
        if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
            allowed = ", ".join(f"{key} from {low} to {high}" for key, (low, high) in LIMITS.items())
            raise CorpusError(f"synthetic:{rest} has the option '{option}'; allowed are {allowed}; {grammar}.")
        options[key] = int(value)
    return SyntheticSpec(name, tuple(genre for genre in GENRES if genre in genres), **options)


def load_synthetic(rest: str) -> tuple[list[Document], dict[str, str], float]:
    """Documents of a synthetic language, the versions behind them and the entropy floor in bits per byte.

    The genres are laid out one after the other. See `Language.entropy_floor` for what the floor means.
    """
    spec = parse_synthetic(rest)
    language = load_language(spec.name, spec.n_words, spec.n_topics)
    documents = [
        Document(f"{spec.name}/{genre}/{index:06d}", genre, text, "CC0-1.0 (generated)")
        for genre in spec.genres
        for index, text in enumerate(language.sample(genre, spec.n_documents, spec.n_sentences))
    ]
    versions = {"synthetic": GENERATOR_VERSION, "numpy": np.__version__}
    return documents, versions, language.entropy_floor(spec.genres, spec.n_sentences)


@lru_cache(maxsize=8)
def load_language(name: str, n_words: int = 400, n_topics: int = 16) -> Language:
    """The language a name stands for; equal arguments give the same, read-only object."""
    return Language(name, n_words, n_topics)


class Language:
    """Lexicon, tables and probabilities of one artificial language.

    Symbols are the `V` words (the `C` common ones first, then every topic's) and, at index `V`, the end of a sentence;
    states are the `V` words (the last one read) and, at index `V`, the start of a sentence.
    """

    def __init__(self, name: str, n_words: int, n_topics: int) -> None:
        self.name, self.n_common, self.n_topics = name, n_words, n_topics
        self.n_symbols = n_words + len(GENRES) * n_topics * WORDS_PER_TOPIC  # V
        self.words = _draw_lexicon(_generator(name, "lexicon"), self.n_symbols)
        self.index = {word: number for number, word in enumerate(self.words)}
        self.topic_weights = _normalised(1.0 / np.arange(1, WORDS_PER_TOPIC + 1))  # (WORDS_PER_TOPIC,)
        self.successors = {genre: self._draw_successors(genre) for genre in GENRES}  # each (V + 1, C), rows sum to 1

    def topic_words(self, genre: str) -> Array:
        """Word indices (n_topics, WORDS_PER_TOPIC) of a genre's topics, the most frequent word first."""
        first = self.n_common + list(GENRES).index(genre) * self.n_topics * WORDS_PER_TOPIC
        # down the columns: words are sorted by length, and no topic should get all the short ones
        return first + np.arange(self.n_topics * WORDS_PER_TOPIC).reshape(WORDS_PER_TOPIC, self.n_topics).T

    def _draw_successors(self, genre: str) -> Array:
        zipf = _normalised(1.0 / np.arange(2, self.n_common + 2))
        shared = _draw_bigrams(_generator(self.name, "shared"), self.n_symbols, zipf)
        own = _draw_bigrams(_generator(self.name, genre), self.n_symbols, zipf)
        weights = GENRES[genre]
        table = weights.shared_ratio * shared + weights.own_ratio * own
        table += (1 - weights.shared_ratio - weights.own_ratio) * zipf
        # openings of two genres are disjoint: the first word tells the genre, which keeps the entropy in closed form
        openings = np.zeros(self.n_common)
        openings[list(GENRES).index(genre) : 2 * OPENINGS_PER_GENRE : 2] = 1.0 / np.arange(1, OPENINGS_PER_GENRE + 1)
        return np.vstack([table, _normalised(openings)])

    def sample(self, genre: str, n_documents: int, n_sentences: int) -> list[str]:
        """Draw the first `n_documents` texts of a genre; always the same ones."""
        texts: list[str] = []
        cumulative = np.cumsum(self.successors[genre], axis=1)
        cumulative[:, -1] = 1.0
        rows = (cumulative + np.arange(self.n_symbols + 1)[:, None]).ravel()  # ascending: one search serves every row
        for block in range(-(-n_documents // BLOCK)):
            rng = _generator(self.name, f"{genre} {n_sentences} {block}")
            topics = np.repeat((rng.random(BLOCK) * self.n_topics).astype(np.int64), n_sentences)
            sentences = self._draw_sentences(rng, genre, topics, rows)
            texts += [self.render(sentences[i * n_sentences : (i + 1) * n_sentences]) for i in range(BLOCK)]
        return texts[:n_documents]

    def _draw_sentences(self, rng: np.random.Generator, genre: str, topics: Array, rows: Array) -> list[list[int]]:
        end_ratio, topic_ratio = GENRES[genre].end_ratio, GENRES[genre].topic_ratio
        topic_words, topic_cumulative = self.topic_words(genre), np.cumsum(self.topic_weights)[:-1]
        sentences: list[list[int]] = [[] for _ in topics]
        alive, state = np.arange(len(topics)), np.full(len(topics), self.n_symbols)
        while len(alive):
            kind, which = rng.random(len(alive)), rng.random(len(alive))
            common = np.searchsorted(rows, state + which, side="right") - state * self.n_common
            topical = topic_words[topics[alive], np.searchsorted(topic_cumulative, which, side="right")]
            # `kind` below topic_ratio: a topic word; at the top: the end, but never before the first word
            word = np.where(kind < topic_ratio, topical, np.minimum(common, self.n_common - 1))
            goes_on = (kind < 1 - end_ratio) | (state == self.n_symbols)
            alive, state = alive[goes_on], word[goes_on]
            for sentence, symbol in zip(alive.tolist(), state.tolist(), strict=True):
                sentences[sentence].append(symbol)
        return sentences

    def render(self, sentences: list[list[int]]) -> str:
        """Write word indices as text; `parse` is the inverse."""
        written = [" ".join(self.words[symbol] for symbol in sentence) + "." for sentence in sentences]
        step = SENTENCES_PER_PARAGRAPH
        return "\n\n".join(" ".join(written[i : i + step]) for i in range(0, len(written), step))

    def parse(self, text: str) -> list[list[int]]:
        """Word indices of each sentence.

        Raises
        ------
        CorpusError
            When `text` is not a whole number of sentences of this language.
        """
        sentences: list[list[int]] = [[]]
        for token in text.split():
            sentences[-1].append(self.index.get(token.removesuffix("."), -1))
            if token.endswith("."):
                sentences.append([])
        if sentences.pop() or any(-1 in sentence for sentence in sentences) or self.render(sentences) != text:
            raise CorpusError(f"This text is not in the language {self.name}: {text[:60]!r}")
        return sentences

    def document_log_probability(self, text: str, genres: tuple[str, ...] = tuple(GENRES)) -> float:
        """Log2 of a text's probability, exact: summed over every genre in `genres` and every topic, none revealed.

        The number of sentences counts as known, as it does for a language model that is not scored on where a document
        ends; `-log2 p / len(text.encode())` is in bits per byte.
        """
        symbols = np.array([symbol for sentence in self.parse(text) for symbol in (*sentence, self.n_symbols)])
        states = np.concatenate([[self.n_symbols], symbols[:-1]])  # an end's index is the start's
        totals = np.concatenate([self._log_likelihoods(genre, states, symbols) for genre in genres])
        highest = totals.max()
        if highest == -np.inf:
            return -np.inf
        return float(highest + np.log2(np.exp2(totals - highest).sum()) - np.log2(len(totals)))

    def _log_likelihoods(self, genre: str, states: Array, symbols: Array) -> Array:
        """Log2 likelihood (n_topics,) of the symbols under each topic of a genre."""
        ratios, is_topical = GENRES[genre], (symbols >= self.n_common) & (symbols < self.n_symbols)
        is_end, is_start = symbols == self.n_symbols, states == self.n_symbols
        is_common = ~is_topical & ~is_end
        kept = 1 - ratios.topic_ratio - np.where(is_start, 0.0, ratios.end_ratio)
        topical = np.zeros((self.n_topics, self.n_symbols))
        np.put_along_axis(topical, self.topic_words(genre), ratios.topic_ratio * self.topic_weights[None], axis=1)
        with np.errstate(divide="ignore"):  # log2(0): impossible under this topic
            common = np.log2(kept[is_common] * self.successors[genre][states[is_common], symbols[is_common]]).sum()
            ends = np.log2(np.where(is_start[is_end], 0.0, ratios.end_ratio)).sum()
            return np.asarray(common + ends + np.log2(topical[:, symbols[is_topical]]).sum(axis=1))

    def next_symbol_probabilities(self, symbols: list[int], genres: tuple[str, ...] = tuple(GENRES)) -> Array:
        """Probabilities (V + 1,) of the next word, or of the sentence's end (index V), after the symbols read."""
        state, read = ([self.n_symbols, *symbols])[-1], np.array(symbols, dtype=np.int64)
        states = np.concatenate([[self.n_symbols], read])[:-1].astype(np.int64)
        totals = np.stack([self._log_likelihoods(genre, states, read) for genre in genres])  # (genres, n_topics)
        posterior = np.exp2(totals - totals.max())
        posterior /= posterior.sum()
        result = np.zeros(self.n_symbols + 1)
        for genre, weights in zip(genres, posterior, strict=True):
            ratios = GENRES[genre]
            end_ratio = 0.0 if state == self.n_symbols else ratios.end_ratio
            result[: self.n_common] += (
                weights.sum() * (1 - ratios.topic_ratio - end_ratio) * self.successors[genre][state]
            )
            result[self.topic_words(genre)] += ratios.topic_ratio * weights[:, None] * self.topic_weights[None]
            result[self.n_symbols] += weights.sum() * end_ratio
        return result

    def entropy_floor(self, genres: tuple[str, ...], n_sentences: int) -> float:
        """Expected bits of a document over its expected bytes: no model reads these documents in fewer bits per byte.

        In closed form, `H(X) = H(G) + H(K) - H(K|X) + H(X|G,K)` for text X, genre G and topic K, because the first word
        tells the genre and any topic word tells the topic: H(K|X) is P(no topic word) x H(K).
        """
        bits = n_bytes = 0.0
        for genre in genres:
            sentence_bits, sentence_bytes, no_topic_word = self._sentence_expectations(genre)
            bits += n_sentences * sentence_bits + np.log2(self.n_topics) * (1 - no_topic_word**n_sentences)
            n_bytes += n_sentences * sentence_bytes + n_sentences - 1 + (n_sentences - 1) // SENTENCES_PER_PARAGRAPH
        return float((bits / len(genres) + np.log2(len(genres))) / (n_bytes / len(genres)))

    def _sentence_expectations(self, genre: str) -> tuple[float, float, float]:
        """Entropy in bits given the topic, expected bytes, and the probability of no topic word, for one sentence."""
        end, topic = GENRES[genre].end_ratio, GENRES[genre].topic_ratio
        table, go_on = self.successors[genre], 1 - topic - end
        # expected visits of each state, averaged over topics; topic words are drawn whatever the state is
        visits = np.zeros(self.n_symbols + 1)
        visits[self.n_symbols] = 1.0
        visits[self.topic_words(genre)] = topic * (1 + 1 / end) * self.topic_weights[None] / self.n_topics
        inflow = go_on * visits[self.n_common : -1] @ table[self.n_common : -1] + (1 - topic) * table[-1]
        visits[: self.n_common] = np.linalg.solve(np.eye(self.n_common) - go_on * table[: self.n_common].T, inflow)
        topic_bits, row_bits = _entropy(self.topic_weights), _entropy(table)
        state_bits = _entropy(np.array([end, topic, go_on])) + topic * topic_bits + go_on * row_bits
        state_bits[-1] = _entropy(np.array([topic, 1 - topic])) + topic * topic_bits + (1 - topic) * row_bits[-1]
        lengths = np.array([len(word) + 1 for word in self.words])  # a space or the full stop follows every word
        no_topic_word = (1 - topic) * end / (end + topic)
        return float(visits @ state_bits), float(visits[:-1] @ lengths), no_topic_word


def _entropy(probabilities: Array) -> Array:
    """Entropy in bits along the last axis."""
    positive = np.where(probabilities > 0, probabilities, 1.0)
    return np.asarray(-(positive * np.log2(positive)).sum(axis=-1))


def _normalised(weights: Array) -> Array:
    return np.asarray(weights / np.cumsum(weights)[-1])  # cumsum adds in one order everywhere, sum does not


def _generator(name: str, purpose: str) -> np.random.Generator:
    """A stream that depends on the names alone. Only `random()` is used of it: its values are the same everywhere."""
    digest = hashlib.sha256(f"nrlib synthetic {GENERATOR_VERSION} {name} {purpose}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def _draw_bigrams(rng: np.random.Generator, n_states: int, zipf: Array) -> Array:
    """A table (n_states, C): each state likes a few successors, frequent words being liked by many."""
    drawn = np.searchsorted(np.cumsum(zipf)[:-1], rng.random((n_states, SUCCESSORS_PER_WORD)), side="right")
    table = np.zeros((n_states, len(zipf)))
    liking = _normalised(1.0 / np.arange(1, SUCCESSORS_PER_WORD + 1))
    np.add.at(table, (np.arange(n_states)[:, None], drawn), liking[None])
    return table


def _draw_lexicon(rng: np.random.Generator, n_words: int) -> tuple[str, ...]:
    """Pronounceable words from the language's own letters, the short (and so the frequent) ones first."""

    def choose(letters: str, n_letters: int) -> list[str]:
        return [letters[i] for i in np.argsort(rng.random(len(letters)), kind="stable")[:n_letters]]

    onsets, vowels = choose("bcdfghjklmnpqrstvwxz", 7), choose("aeiouy", 3)
    codas = ["", "", "", *choose("".join(onsets), 3)]
    words: dict[str, None] = {}  # a set that keeps its order
    while len(words) < n_words:
        draws = rng.random(13)
        n_syllables = 1 + int(draws[0] * 3.4)  # 1 to 4, the last seldom
        parts = [
            choices[int(draw * len(choices))]
            for choices, draw in zip([onsets, vowels, codas] * n_syllables, draws[1:], strict=False)
        ]
        word = "".join(parts)
        if len(word) > 2:  # two letters are too likely to be a word of the next language as well
            words[word] = None
    return tuple(sorted(words, key=len))
