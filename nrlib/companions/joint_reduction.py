"""Short vectors for search: several descriptions of one object, joined and reduced together to a hundred dimensions.

Filip Radenović, Hervé Jégou and Ondřej Chum, "Multiple measurements and joint dimensionality reduction for large scale
image search with short vectors", ICMR 2015, https://arxiv.org/abs/1504.03285.

    parts of an object ─ words of vocabulary 1 ─ histogram ─ √, L2 ─┐
                       ─ words of vocabulary 2 ─ histogram ─ √, L2 ─┼─ one long vector ─ PCA, whitening ─ L2 ─ search
                       ─ …                                          ┘

A *measurement* is one description of all objects, an array (N, K): a histogram of words or any other vector. k-means and
principal components are scikit-learn's; here stands what joins them. Average precision is too, in its tests: its own
goes query by query, ten times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError

if TYPE_CHECKING:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES_PER_WORD = 64  # of the descriptors that a vocabulary is learnt from: more changes little
# Of the first direction's variance; whitening a direction below it would blow up rounding errors.
MIN_VARIANCE_RATIO = 1e-10


def learn_vocabulary(descriptors: Array, n_words: int, seed: int) -> KMeans:
    """A visual vocabulary: `n_words` centres among descriptors (N, d), by k-means.

    Another seed is another partition of the same space, and so another measurement.

    Raises
    ------
    ConfigError
        For fewer than two words, more words than descriptors, or descriptors that are not numbers.
    """
    from sklearn.cluster import KMeans

    _check_numbers(descriptors, "the descriptors")
    if n_words < 2:
        raise ConfigError(
            f"A vocabulary of n_words = {n_words} tells nothing apart: every part would be the same word. Give at least 2."
        )
    if len(descriptors) < n_words:
        raise ConfigError(
            f"n_words = {n_words} cannot be learnt from {len(descriptors)} descriptors. Give at least one descriptor for each "
            f"word ({SAMPLES_PER_WORD} are used if there are as many), or fewer words."
        )
    rng = np.random.default_rng(seed)
    n_samples = min(len(descriptors), SAMPLES_PER_WORD * n_words)
    sample = descriptors[rng.choice(len(descriptors), n_samples, replace=False)]
    return KMeans(n_words, init="random", n_init=1, max_iter=10, random_state=seed).fit(sample)


def count_words(vocabulary: KMeans, objects: Sequence[Array] | Array) -> Array:
    """Histograms (N, n_words): how often each word occurs among the descriptors (n_i, d) of each object.

    Raises
    ------
    ConfigError
        When there is no object.
    """
    if not len(objects):
        raise ConfigError("There are no objects (0) to count words in. Give at least one array (n, d) of descriptors.")
    words = vocabulary.predict(np.concatenate(objects))
    owners = np.repeat(np.arange(len(objects)), [len(descriptors) for descriptors in objects])
    histograms = np.zeros((len(objects), vocabulary.n_clusters), dtype=np.float32)
    np.add.at(histograms, (owners, words), 1)
    return histograms


def power_normalise(vectors: Array, exponent: float = 0.5) -> Array:
    """Each entry to the power `exponent`, its sign kept, then each row to length 1 (a row of zeros stays).

    The square root lets a word that is repeated within one object count for less than its repetitions.
    """
    powers = np.sign(vectors) * np.abs(vectors) ** exponent
    lengths = np.linalg.norm(powers, axis=1, keepdims=True)
    return np.asarray(powers / np.where(lengths > 0, lengths, 1.0))


class JointReduction:
    """PCA over the concatenation of several measurements, learnt on objects that are not searched.

    Parameters
    ----------
    n_dimensions
        D', the length of the vectors that come out.
    is_whitened
        Scale every direction to variance 1: what occurs together often counts once. Otherwise PCA alone.
    """

    def __init__(self, n_dimensions: int = 128, is_whitened: bool = True) -> None:
        self.n_dimensions, self.is_whitened = n_dimensions, is_whitened
        self._pca: PCA | None = None
        self._widths: list[int] = []

    def fit(self, measurements: Sequence[Array]) -> JointReduction:
        """Learn the mean and the directions from measurements (N, K_i), each normalised on its own before.

        Raises
        ------
        ConfigError
            For measurements that do not describe the same objects, hold NaN or have one entry only; for as many dimensions
            as objects or more, or more than the measurements have between them.
        """
        from sklearn.decomposition import PCA

        joined = _join(measurements)
        n_objects, width = joined.shape
        if n_objects <= self.n_dimensions:
            raise ConfigError(
                f"n_dimensions = {self.n_dimensions} directions cannot be learnt from {n_objects} objects: whitening would "
                f"amplify noise. Learn from more objects, several times n_dimensions, or reduce to fewer dimensions."
            )
        if not 1 <= self.n_dimensions <= width:
            raise ConfigError(
                f"n_dimensions = {self.n_dimensions} is not allowed: the measurements have {width} entries between them, and "
                f"a reduction keeps between 1 and {width}. Reduce to fewer dimensions, or add a measurement."
            )
        # Both are exact: the solver that draws blurs small variances.
        solver = "covariance_eigh" if width <= n_objects else "full"
        self._pca = PCA(self.n_dimensions, whiten=self.is_whitened, svd_solver=solver).fit(joined)
        variances = self._pca.explained_variance_
        n_found = int((variances > MIN_VARIANCE_RATIO * variances[0]).sum())
        if n_found < self.n_dimensions:
            raise ConfigError(
                f"The measurements vary in {n_found} directions only, and n_dimensions = {self.n_dimensions} are asked for. "
                f"Give n_dimensions of at most {n_found}, or a measurement that says something new."
            )
        self._widths = [measurement.shape[1] for measurement in measurements]
        return self

    def transform(self, measurements: Sequence[Array]) -> Array:
        """Vectors (N, D') of length 1; their dot products are the similarities.

        Raises
        ------
        ConfigError
            For measurements other than those it was fitted to.
        """
        joined = _join(measurements)
        widths = [measurement.shape[1] for measurement in measurements]
        if self._pca is None or widths != self._widths:
            raise ConfigError(
                f"The measurements have the sizes {widths}, but the reduction was fitted to {self._widths or 'none yet'}. "
                "Give the same measurements in the same order, made with the same vocabularies."
            )
        return power_normalise(self._pca.transform(joined), exponent=1.0)


def mean_average_precision(
    queries: Array, database: Array, is_relevant: Array, is_left_out: Array | None = None
) -> float:
    """mAP: database objects are ranked by dot product, the relevant ones to come first.

    Parameters
    ----------
    queries, database : vectors (Q, D') and (N, D') of length 1.
    is_relevant, is_left_out : (Q, N). What is left out is ranked last: the query itself, where it is in the database.

    Raises
    ------
    ConfigError
        For vectors of unequal length, NaN, or a query without a relevant object.
    """
    scores = similarities(queries, database)
    if not is_relevant.any(axis=1).all():
        query = int(np.flatnonzero(~is_relevant.any(axis=1))[0])
        raise ConfigError(f"Query {query} has no relevant object in the database, so no rank to find. Leave it out.")
    if is_left_out is not None:
        scores = np.where(is_left_out, -2.0, scores)  # below every cosine
    order = np.argsort(-scores, axis=1, kind="stable")
    is_hit = np.take_along_axis(is_relevant, order, axis=1)
    precisions = np.cumsum(is_hit, axis=1) / np.arange(1, is_hit.shape[1] + 1)  # among the first n found
    return float(((precisions * is_hit).sum(axis=1) / is_hit.sum(axis=1)).mean())


def similarities(queries: Array, database: Array) -> Array:
    """Dot products (Q, N) of vectors of equal length.

    Raises
    ------
    ConfigError
        For vectors of unequal length, or NaN.
    """
    _check_numbers(queries, "the queries")
    _check_numbers(database, "the database")
    if queries.shape[1] != database.shape[1]:
        raise ConfigError(
            f"Queries have {queries.shape[1]} entries and the database's vectors {database.shape[1]}: they cannot be "
            "compared. Make both with the same reduction."
        )
    return np.asarray(queries @ database.T)


def same_object_precision(vectors: Array, labels: Array) -> float:
    """Mean average precision (mAP) when each object is searched among all others; those of its label are relevant."""
    is_same, is_self = labels[:, None] == labels, np.eye(len(labels), dtype=bool)
    return mean_average_precision(vectors, vectors, is_same & ~is_self, is_self)


def _join(measurements: Sequence[Array]) -> Array:
    if not measurements:
        raise ConfigError("There is no measurement to reduce. Give at least one array (N, K), one row an object.")
    for index, measurement in enumerate(measurements):
        _check_numbers(measurement, f"measurement {index}")
        if measurement.shape[1] < 2:
            raise ConfigError(
                f"Measurement {index} has one entry for each object: a vocabulary of one word tells nothing apart. Leave it "
                "out, or learn a vocabulary of at least 2 words."
            )
    counts = [len(measurement) for measurement in measurements]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"The measurements describe {counts} objects, and each must describe the same ones in the same order. Compute "
            "all of them on one list of objects."
        )
    return np.hstack(measurements).astype(np.float64)  # whitening divides by small numbers


def _check_numbers(values: Array, name: str) -> None:
    if values.ndim != 2:
        raise ConfigError(
            f"The shape {values.shape} of {name} is not allowed: give a matrix (N, K) with one row for each."
        )
    is_bad = ~np.isfinite(values).all(axis=1)
    if is_bad.any():
        raise ConfigError(
            f"Row {int(np.flatnonzero(is_bad)[0])} of {name} holds NaN or an infinite number ({int(is_bad.sum())} such rows in "
            "all). Nothing can be compared with it: leave these rows out, or find out where the numbers come from."
        )
