"""Bridging two vocabularies: a linear map between the word vectors of two languages, learnt from a small lexicon.

Joulin, Bojanowski, Mikolov, Jégou and Grave, "Loss in translation: learning bilingual word mapping with a retrieval
criterion" (EMNLP 2018), https://arxiv.org/abs/1804.07745. The map is trained for the criterion it is used with, CSLS:

    source (V_x, D_x) --W (D_y, D_x)--> target (V_y, D_y)       csls(x, y) = 2 cos(Wx, y) − r_Y(Wx) − r_X(y)

r is the mean similarity to the k nearest neighbours in the other vocabulary, so that a *hub*, a word near everything,
is nobody's translation. faiss finds the neighbours block by block (no V_x × V_y matrix is ever held), numpy's singular
value decomposition solves Procrustes; the loss, its gradient and the steps are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .vocabulary_words import Vectors

MAPS = ("least_squares", "procrustes", "rcsls_spectral", "rcsls")
RULES = ("nearest", "csls")
MIN_LEARNING_RATE = 1e-4

Pairs = NDArray[np.int64]


def unit_rows(vectors: Vectors, name: str = "vectors") -> Vectors:
    """The rows of `vectors` (V, D) at length 1, in a new array.

    Raises
    ------
    ConfigError
        For an array that is not (V, D) with V ≥ 2, or a row that is zero or not finite.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) < 2:
        raise ConfigError(
            f"{name} has the shape {vectors.shape}; it must be (words, dimensions) with two words or more, since a word "
            "is told from its neighbours."
        )
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    is_bad = ~(np.isfinite(length) & (length > 0))[:, 0]
    if is_bad.any():
        raise ConfigError(
            f"{name}: {is_bad.sum()} of {len(vectors)} rows are zero or hold NaN or infinity, row {is_bad.argmax()} the "
            "first. They have no direction to compare; leave these words out."
        )
    return vectors / length


# --- maps -------------------------------------------------------------------------------------------------------------


def least_squares(source: Vectors, target: Vectors, pairs: Pairs) -> Vectors:
    """The map (D_y, D_x) with the smallest mean squared error on the pairs of normalised rows."""
    x, y = _paired(source, target, pairs)
    return np.asarray(np.linalg.lstsq(x, y, rcond=None)[0].T)


def procrustes(source: Vectors, target: Vectors, pairs: Pairs) -> Vectors:
    """The orthogonal map (D_y, D_x) with the smallest mean squared error: U Vᵀ, where YᵀX = U S Vᵀ."""
    x, y = _paired(source, target, pairs)
    left, _, right = np.linalg.svd(y.T @ x, full_matrices=False)
    return np.asarray(left @ right)


def rcsls(
    source: Vectors,
    target: Vectors,
    pairs: Pairs,
    *,
    n_neighbours: int = 10,
    n_iterations: int = 10,
    learning_rate: float = 10.0,
    is_spectral: bool = False,
) -> Vectors:
    """The map (D_y, D_x) of the relaxed CSLS criterion, from the Procrustes map by full-batch subgradient steps.

    A step that does not lower the loss is undone and the rate halved. The loss is positively homogeneous in the map, so
    without the constraint it has no minimum: few steps are the regulariser, and losses of two runs do not compare.

    Parameters
    ----------
    source, target : vectors (V_x, D_x), (V_y, D_y) of both vocabularies; unpaired words enter as neighbours.
    pairs : (n, 2) indices of translations.
    n_neighbours : k of CSLS.
    is_spectral : after each step, clip the singular values of the map to at most 1 (the convex hull of rotations).

    Raises
    ------
    ConfigError
        For vectors or pairs that cannot be used, or fewer than k words on a side.
    """
    source, target, pairs = unit_rows(source, "source"), unit_rows(target, "target"), np.asarray(pairs)
    mapping = procrustes(source, target, pairs)
    loss, gradient = rcsls_loss(mapping, source, target, pairs, n_neighbours)
    for _ in range(n_iterations):
        candidate = mapping - learning_rate * gradient
        if is_spectral:
            candidate = _clip_singular_values(candidate)
        new_loss, new_gradient = rcsls_loss(candidate, source, target, pairs, n_neighbours)
        if new_loss < loss:
            mapping, loss, gradient = candidate, new_loss, new_gradient
        else:
            learning_rate /= 2
            if learning_rate < MIN_LEARNING_RATE:
                break
    return mapping


def rcsls_loss(
    mapping: Vectors, source: Vectors, target: Vectors, pairs: Pairs, n_neighbours: int = 10
) -> tuple[float, Vectors]:
    """The relaxed CSLS loss of `mapping` (D_y, D_x) on normalised vectors, and a subgradient of it:

    mean over pairs of −2 yᵀWx + mean of yᵀ_j Wx over Wx's k nearest targets + mean of yᵀWx_j over y's k nearest mapped
    sources. With the neighbours held fixed each term is linear in W, and the largest of linear functions is convex.
    """
    x, y = source[pairs[:, 0]], target[pairs[:, 1]]
    mapped = source @ mapping.T
    near_y = target[nearest(x @ mapping.T, target, n_neighbours)[1]].mean(axis=1)  # (n, D_y)
    near_x = source[nearest(y, mapped, n_neighbours)[1]].mean(axis=1)  # (n, D_x)
    gradient = (-2 * y.T @ x + near_y.T @ x + y.T @ near_x) / len(pairs)
    # Linear in W where the neighbours are fixed: loss = <gradient, W>.
    return float((gradient * mapping).sum()), gradient


def fit_map(name: str, source: Vectors, target: Vectors, pairs: Pairs, **options: Any) -> Vectors:
    """The map called `name`, one of MAPS; options are those of `rcsls`."""
    if name not in MAPS:
        raise ConfigError(f"map = {name!r} is unknown. Allowed: {', '.join(MAPS)}.")
    if name in ("least_squares", "procrustes"):
        return {"least_squares": least_squares, "procrustes": procrustes}[name](source, target, pairs)
    return rcsls(source, target, pairs, is_spectral=name == "rcsls_spectral", **options)


def _paired(source: Vectors, target: Vectors, pairs: Pairs) -> tuple[Vectors, Vectors]:
    source, target, pairs = unit_rows(source, "source"), unit_rows(target, "target"), np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or (pairs < 0).any() or (pairs >= [len(source), len(target)]).any():
        raise ConfigError(
            f"pairs has the shape {pairs.shape}; it must be (n, 2): indices of a source row, below {len(source)}, and of "
            f"a target row, below {len(target)}."
        )
    if len(pairs) < source.shape[1]:
        raise ConfigError(
            f"{len(pairs)} pairs do not determine a map from {source.shape[1]} dimensions. Give a larger lexicon, at "
            "least one pair a dimension, or shorter vectors."
        )
    return source[pairs[:, 0]], target[pairs[:, 1]]


def _clip_singular_values(mapping: Vectors) -> Vectors:
    left, values, right = np.linalg.svd(mapping, full_matrices=False)
    return np.asarray((left * np.minimum(values, 1.0)) @ right)


# --- retrieval --------------------------------------------------------------------------------------------------------


def nearest(queries: Vectors, vectors: Vectors, k: int) -> tuple[Vectors, Pairs]:
    """The k rows of `vectors` (V, D) with the largest dot product with each query (Q, D): products and indices (Q, k),
    largest first. Computed block by block, in 32-bit floats.

    Raises
    ------
    ConfigError
        When there are fewer than k rows, or a value is NaN or infinite.
    """
    import faiss

    for name, values in (("queries", queries), ("vectors", vectors)):
        is_bad = ~np.isfinite(values).all(axis=1)
        if is_bad.any():
            raise ConfigError(
                f"{is_bad.sum()} of {len(values)} rows of {name} hold NaN or infinity, row {is_bad.argmax()} the first: nothing "
                "is near them. Leave these rows out."
            )

    if not 1 <= k <= len(vectors):
        raise ConfigError(
            f"{k} neighbours were asked for among {len(vectors)} words. Choose n_neighbours between 1 and "
            f"{len(vectors)}, or give a larger vocabulary."
        )
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    products, indices = index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
    return products.astype(np.float64), indices


def translate(
    mapping: Vectors,
    source: Vectors,
    target: Vectors,
    queries: NDArray[np.int64],
    *,
    rule: str = "csls",
    n_neighbours: int = 10,
    n_best: int = 1,
) -> tuple[Vectors, Pairs]:
    """Scores and target indices (Q, n_best), best first, for the source words with the indices `queries` (Q,).

    rule : "nearest" (cosine) or "csls", 2 cos(Wx, y) − r_X(y). What CSLS takes off for the query itself, r_Y(Wx), is
        the same for all its candidates and left out.
    """
    if rule not in RULES:
        raise ConfigError(f"rule = {rule!r} is unknown. Allowed: {', '.join(RULES)}.")
    mapped, target = (
        unit_rows(unit_rows(source, "source") @ mapping.T, "the mapped source"),
        unit_rows(target, "target"),
    )
    if rule == "nearest":
        return nearest(mapped[queries], target, n_best)
    crowding = nearest(target, mapped, n_neighbours)[0].mean(axis=1)  # r_X(y)
    # 2 Wx·y − r_X(y) is one dot product in a space with one more dimension.
    left = np.hstack([2 * mapped[queries], np.full((len(queries), 1), -1.0)])
    return nearest(left, np.hstack([target, crowding[:, None]]), n_best)


def precision_at_1(found: Iterable[int], answers: Iterable[Iterable[int]]) -> float:
    """The share of words whose first candidate is among the right ones.

    Raises
    ------
    ConfigError
        When there is no word.
    """
    hits = [int(best) in set(right) for best, right in zip(found, answers, strict=True)]
    if not hits:
        raise ConfigError("There are no words (0) to take a share of. Give at least one word with its translations.")
    return sum(hits) / len(hits)


def compare_maps(
    source: Vectors,
    target: Vectors,
    pairs: Pairs,
    test: Mapping[int, Iterable[int]],
    learning_rates: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Precision at 1 on `test` (source index: right target indices) of every map under both rules; `learning_rates` by
    map, those of `rcsls` where none is given."""
    queries = np.array(list(test))
    result: dict[str, dict[str, float]] = {}
    for name in MAPS:
        options = {"learning_rate": learning_rates[name]} if learning_rates and name in learning_rates else {}
        mapping = fit_map(name, source, target, pairs, **options)
        best = {r: translate(mapping, source, target, queries, rule=r)[1][:, 0] for r in RULES}
        result[name] = {rule: round(precision_at_1(best[rule], test.values()), 4) for rule in RULES}
    return result
