"""Images to search, and the study of what several vocabularies bring: an artificial set and two of real pictures.

An image is an array (n, d) of local descriptors. Each set comes in two parts that share no object: images to learn
vocabularies and directions from, and images to search among, of which several show one object. The real pictures ship
inside scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import ConfigError
from .joint_reduction import (
    Array,
    JointReduction,
    count_words,
    learn_vocabulary,
    power_normalise,
    same_object_precision,
)

if TYPE_CHECKING:
    import pandas as pd

RESULT_VERSION = 1
PIECE = 48  # side of a piece of a photograph, in pixels


@dataclass(frozen=True)
class ImageSet:
    """Descriptors by kind, (N, n, d) each: `held_out` to learn from, `searched`, and what the searched images show."""

    held_out: dict[str, Array]
    searched: dict[str, Array]
    labels: Array  # (N,)


def image_search(
    *, seed: int, source: str = "synthetic", n_words: int = 256, n_held_out: int = 3000, n_dimensions: Sequence[int]
) -> dict[str, Any]:
    """Mean average precision of one vocabulary, one four times as large, and several joined, reduced in three ways.

    Returns
    -------
    `rows`: vocabularies, n_words, reduction (`none`, `pca`, `whitened`), n_dimensions, mean_average_precision;
    `n_held_out_images`, `n_searched` and `n_objects`: the sizes of the set.
    """
    if source not in SOURCES:
        raise ConfigError(f"source = {source!r} is unknown. Allowed: {', '.join(SOURCES)}.")
    images = SOURCES[source](seed, n_held_out)
    kinds = list(images.searched)
    first = kinds[0]
    joined = {
        f"1 × {n_words}": [(first, n_words, 0)],
        f"1 × {4 * n_words}": [(first, 4 * n_words, 0)],
        f"2 × {n_words}, seeds": [(first, n_words, index) for index in range(2)],
        f"4 × {n_words}, seeds": [(first, n_words, index) for index in range(4)],
    }
    if len(kinds) > 1:
        joined[f"{len(kinds)} × {n_words}, kinds"] = [(kind, n_words, index) for index, kind in enumerate(kinds)]
    measured = {key: _measure(images, *key, seed) for key in sorted({key for keys in joined.values() for key in keys})}
    rows: list[dict[str, Any]] = []
    for name, keys in joined.items():
        held_out, searched = ([measured[key][side] for key in keys] for side in (0, 1))
        width = sum(n for _, n, _ in keys)
        reduced = {("none", width): power_normalise(np.hstack(searched), 1.0)}
        for n in n_dimensions:
            reduced["pca", n] = JointReduction(n, is_whitened=False).fit(held_out).transform(searched)
            reduced["whitened", n] = JointReduction(n).fit(held_out).transform(searched)
        for (reduction, n), vectors in reduced.items():
            precision = round(same_object_precision(vectors, images.labels), 4)
            row = {"vocabularies": name, "n_words": width, "reduction": reduction, "n_dimensions": n}
            rows.append({**row, "mean_average_precision": precision})
    sizes = {"n_held_out_images": len(next(iter(images.held_out.values()))), "n_searched": len(images.labels)}
    return {"rows": rows, **sizes, "n_objects": len(set(images.labels.tolist()))}


def image_searches(profile: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Settings for `run_study`: every source with every seed; at profile `smoke` smaller, and with the first seed only."""
    small = {"n_words": 32, "n_held_out": 400, "n_dimensions": [8, 16, 32]}
    full = {"n_words": 256, "n_held_out": 3000, "n_dimensions": [16, 32, 64, 128]}
    size, seeds = (small, seeds[:1]) if profile == "smoke" else (full, seeds)
    return [{"seed": seed, "source": source, **size} for source in SOURCES for seed in seeds]


SIZES = ("one", "large", "two", "four", "kinds")  # the sets of vocabularies, in the order of a result's rows


def image_table(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of all results with their source and seed; `size` names the set of vocabularies whatever its n_words."""
    import pandas as pd

    rows = [{"source": result["source"], "seed": result["seed"], **row} for result in results for row in result["rows"]]
    sizes = {(r["source"], name): size for r in results for name, size in zip(_names(r), SIZES, strict=False)}
    return pd.DataFrame([{"size": sizes[row["source"], row["vocabularies"]], **row} for row in rows])


def _names(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["vocabularies"] for row in result["rows"]))


def _measure(images: ImageSet, kind: str, n_words: int, index: int, seed: int) -> tuple[Array, Array]:
    """Normalised histograms of the held-out and of the searched images by one vocabulary."""
    held_out, searched = images.held_out[kind], images.searched[kind]
    vocabulary = learn_vocabulary(held_out.reshape(-1, held_out.shape[-1]), n_words, 100 * seed + index)
    return power_normalise(count_words(vocabulary, held_out)), power_normalise(count_words(vocabulary, searched))


# --- an artificial set ------------------------------------------------------------------------------------------------


def synthetic_images(
    seed: int,
    n_held_out: int = 3000,
    *,
    n_objects: int = 120,
    n_views: int = 5,
    n_topics: int = 40,
    noise: float = 0.12,
) -> ImageSet:
    """Objects of 20 patches from ten of `n_topics` topics; an image shows 15 of them, moved a little, and 10 of a
    background of eight topics. Held-out images show other objects made of the same topics."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_topics, 24))

    def draw(n: int, n_patches: int, n_own_topics: int) -> Array:
        topics = np.argsort(rng.random((n, n_topics)), axis=1)[:, :n_own_topics]
        chosen = np.take_along_axis(topics, rng.integers(n_own_topics, size=(n, n_patches)), axis=1)
        return np.asarray(centres[chosen] + 0.5 * rng.normal(size=(n, n_patches, 24)))

    def show(objects: Array, times: int) -> dict[str, Array]:
        repeated = np.repeat(objects, times, axis=0)
        seen = np.argsort(rng.random(repeated.shape[:2]), axis=1)[:, :15, None]
        patches = np.concatenate([np.take_along_axis(repeated, seen, axis=1), draw(len(repeated), 10, 8)], axis=1)
        return {"patches": (patches + noise * rng.normal(size=patches.shape)).astype(np.float32)}

    held_out = show(draw(n_held_out, 20, 10), 1)
    return ImageSet(held_out, show(draw(n_objects, 20, 10), n_views), np.repeat(np.arange(n_objects), n_views))


# --- real pictures ----------------------------------------------------------------------------------------------------


def photographs(seed: int, n_held_out: int = 3000) -> ImageSet:
    """Pieces of scikit-learn's two photographs: overlapping ones of the left halves to learn from; of the right halves a
    grid of pieces, each searched with four distorted copies (turned, scaled, shifted, brightened, with noise)."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    halves = [np.array_split(image.mean(axis=2), 2, axis=1) for image in load_sample_images().images]
    pieces = np.concatenate(
        [sliding_window_view(left, (PIECE, PIECE))[::8, ::8].reshape(-1, PIECE, PIECE) for left, _ in halves]
    )
    held_out = pieces[rng.permutation(len(pieces))[:n_held_out]]
    searched: list[Array] = []
    labels: list[int] = []
    for _, right in halves:
        for y in range(0, right.shape[0] - PIECE + 1, PIECE):
            for x in range(0, right.shape[1] - PIECE + 1, PIECE):
                label = max(labels, default=-1) + 1
                searched += [right[y : y + PIECE, x : x + PIECE], *(_distort(right, y, x, rng) for _ in range(4))]
                labels += 5 * [label]
    return _by_kind(held_out, np.array(searched), np.array(labels), sizes=(8, 12), stride=5, is_contrast=True)


def digits(seed: int, n_held_out: int = 1000) -> ImageSet:
    """Scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, divided at random; what is to be found is the same digit."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.images))
    held_out, searched = order[: min(n_held_out, 1000)], order[1000:]
    return _by_kind(
        found.images[held_out],
        found.images[searched],
        found.target[searched],
        sizes=(4, 5),
        stride=1,
        is_contrast=False,
    )


def _distort(image: Array, y: int, x: int, rng: np.random.Generator) -> Array:
    from scipy import ndimage

    angle, scale = np.deg2rad(rng.uniform(-8, 8)), np.exp(rng.uniform(-0.12, 0.12))
    centre = np.array([y, x]) + PIECE / 2 + rng.uniform(-6, 6, 2)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = centre - matrix @ np.full(2, PIECE / 2)
    piece = ndimage.affine_transform(image, matrix, offset, output_shape=(PIECE, PIECE), order=1, mode="reflect")
    noise = rng.normal(0, 4, piece.shape)
    return np.asarray(piece * np.exp(rng.uniform(-0.3, 0.3)) + rng.uniform(-20, 20) + noise)


def _by_kind(
    held_out: Array, searched: Array, labels: Array, *, sizes: tuple[int, int], stride: int, is_contrast: bool
) -> ImageSet:
    """Four kinds of descriptors: small patches, their square roots, fewer principal components of them, large patches."""
    from sklearn.decomposition import PCA

    def patches(images: Array, size: int) -> Array:
        windows: Array = np.asarray(sliding_window_view(images, (size, size), (1, 2)))[:, ::stride, ::stride]  # type: ignore[call-overload]
        flat = windows.reshape(len(images), -1, size * size).astype(np.float32)
        if not is_contrast:
            return flat
        flat = flat - flat.mean(axis=-1, keepdims=True)  # brightness goes, contrast too
        contrast = np.linalg.norm(flat, axis=-1, keepdims=True)
        return np.asarray(flat / (contrast + 20))  # where there is none, noise stays small

    pca = PCA(sizes[0] * 2, svd_solver="covariance_eigh")
    pca.fit(patches(held_out, sizes[0]).reshape(-1, sizes[0] ** 2))
    kinds: dict[str, Callable[[Array], Array]] = {
        "patches": lambda images: patches(images, sizes[0]),
        "roots": lambda images: np.sign(p := patches(images, sizes[0])) * np.abs(p) ** 0.5,
        "components": lambda images: _each(pca.transform, patches(images, sizes[0])),
        "large patches": lambda images: patches(images, sizes[1]),
    }
    described = [{name: describe(images) for name, describe in kinds.items()} for images in (held_out, searched)]
    return ImageSet(described[0], described[1], labels)


def _each(transform: Callable[[Array], Array], descriptors: Array) -> Array:
    n_images, n_descriptors, width = descriptors.shape
    return transform(descriptors.reshape(-1, width)).reshape(n_images, n_descriptors, -1).astype(np.float32)


SOURCES: dict[str, Callable[[int, int], ImageSet]] = {
    "synthetic": synthetic_images,
    "photographs": photographs,
    "digits": digits,
}
