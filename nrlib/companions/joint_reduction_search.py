"""The study of what an extension does to search: the translation of a paragraph, and the rest of a paragraph, among all
others, by vectors of the backbone and of extended models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backbone import delete_checkpoint, get_backbone
from ..config import RunConfig
from ..errors import ConfigError
from ..experiments import arm
from ..profiles import ALL_METHODS
from ..runs import extend
from ..texts import prepare_text
from .joint_reduction import Array, JointReduction, power_normalise, similarities
from .joint_reduction_text import encode, mean_states, parallel_paragraphs, token_histogram

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

RESULT_VERSION = 1
LANGUAGES = ("original", "new")
MIN_TOKENS = 16  # a paragraph of fewer has no halves worth looking for

Measured = dict[str, list[Array]]  # measurements by the name of the text


def paragraph_search(
    *, seed: int, method: str = "backbone", profile: str = "laptop", n_dimensions: int = 128
) -> dict[str, Any]:
    """Mean average precision of four searches by vectors of several kinds, all of `n_dimensions` where they have so many.

    Searches: `translation` (new to original domain, whole paragraphs), `original` and `new` (the first half of a paragraph
    looks for its second half in the same language), `old_index` (as `original`, but the index and the reduction are the
    backbone's). Vocabulary, means and directions come from validation pages, the paragraphs searched from test pages; no
    model was trained on either.

    Parameters
    ----------
    method : `backbone`, or a training method, which extends the backbone at its tuned settings first.

    Returns
    -------
    `rows`: vector, reduction, is_centred, search, mean_average_precision, found_first (share of queries);
    `n_pairs`, `n_held_out_pairs`; `cosine_to_backbone`: of a paragraph's vector to the one the backbone gives it, the mean by
    language and reduction.
    """
    if method not in ("backbone", *ALL_METHODS):
        raise ConfigError(f"method = {method!r} is unknown. Allowed: backbone, {', '.join(ALL_METHODS)}.")
    config = arm(profile, "neutral_residues" if method == "backbone" else method, seed=seed)
    text = prepare_text(config.data, config.backbone, progress=False)
    backbone = get_backbone(config, text, progress=False)
    sequences = _sequences(config, text.tokenizer)
    before = {name: mean_states(backbone, found) for name, found in sequences.items()}
    rows: list[dict[str, Any]] = []
    if method == "backbone":
        after = before
        tokens = {name: [token_histogram(found, len(text.tokenizer))] for name, found in sequences.items()}
        rows += _search_rows("tokens", tokens, n_dimensions, reductions=("none", "whitened"), exponent=0.5)
    else:
        model, _ = extend(config, text, backbone, progress=False)
        delete_checkpoint(config.run_id)
        after = {name: mean_states(model, found) for name, found in sequences.items()}
    for layer in range(len(after["original"])):
        one = {name: [measurements[layer]] for name, measurements in after.items()}
        rows += _search_rows(f"layer {layer}" if layer else "embeddings", one, n_dimensions)
    rows += _search_rows("all layers", after, n_dimensions, reductions=("none", "pca", "whitened"))
    cosines = {}
    for reduction in ("none", "whitened"):
        index = ParagraphIndex.learn(before, n_dimensions, reduction)
        first = index.vectors(after["original, first"], "original")
        second = index.vectors(before["original, second"], "original")
        rows.append(_row("all layers", reduction, True, "old_index", first, second))
        for language in LANGUAGES:
            old, new = (index.vectors(measured[language], language) for measured in (before, after))
            cosines[f"{language}, {reduction}"] = round(float((old * new).sum(axis=1).mean()), 4)
    return {
        "rows": rows,
        "n_pairs": len(sequences["original"]),
        "n_held_out_pairs": len(sequences["original, held out"]),
        "cosine_to_backbone": cosines,
    }


@dataclass(frozen=True)
class ParagraphIndex:
    """From measurements to short vectors: each language's mean is taken off (or none), then the joint reduction."""

    centres: dict[str, list[Array]] | None
    reduction: JointReduction | None
    exponent: float = 1.0

    @classmethod
    def learn(
        cls,
        measured: Measured,
        n_dimensions: int,
        reduction: str = "whitened",
        is_centred: bool = True,
        exponent: float = 1.0,
    ) -> ParagraphIndex:
        """Learn from the held-out texts of both languages."""
        held_out = {language: measured[f"{language}, held out"] for language in LANGUAGES}
        if exponent != 1:
            held_out = {name: [power_normalise(m, exponent) for m in found] for name, found in held_out.items()}
        centres = {name: [m.mean(axis=0) for m in found] for name, found in held_out.items()} if is_centred else None
        index = cls(centres, None, exponent)
        if reduction == "none":
            return index
        by_language = [index._centre(held_out[language], language) for language in LANGUAGES]
        joined = [np.concatenate(both) for both in zip(*by_language, strict=True)]
        n_dimensions = min(n_dimensions, sum(m.shape[1] for m in joined))
        return cls(centres, JointReduction(n_dimensions, reduction == "whitened").fit(joined), exponent)

    def vectors(self, measurements: Sequence[Array], language: str) -> Array:
        """Vectors (N, D') of length 1 of texts in `language`."""
        if self.exponent != 1:
            measurements = [power_normalise(m, self.exponent) for m in measurements]
        prepared = self._centre(measurements, language)
        return (
            power_normalise(np.hstack(prepared), 1.0) if self.reduction is None else self.reduction.transform(prepared)
        )

    def _centre(self, measurements: Sequence[Array], language: str) -> list[Array]:
        if self.centres is not None:
            measurements = [m - centre for m, centre in zip(measurements, self.centres[language], strict=True)]
        return [power_normalise(m, 1.0) for m in measurements]


def reciprocal_ranks(queries: Array, database: Array) -> Array:
    """One over the rank at which query i finds row i of the database: the average precision where one object is relevant."""
    scores = similarities(queries, database)
    return np.asarray(1.0 / (scores >= np.diag(scores)[:, None]).sum(axis=1))


def paragraph_searches(profile: str, methods: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Settings for `run_study`: the backbone once, every method with every seed; at profile `smoke` with the first one."""
    runs = [
        ("backbone", seeds[0]),
        *((method, seed) for method in methods for seed in (seeds[:1] if profile == "smoke" else seeds)),
    ]
    return [{"seed": seed, "method": method, "profile": profile} for method, seed in runs]


def search_table(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of all results with their method and seed."""
    import pandas as pd

    return pd.DataFrame(
        [{"method": result["method"], "seed": result["seed"], **row} for result in results for row in result["rows"]]
    )


def _sequences(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Token ids of the paragraphs by language: held out, and those searched, whole and in halves."""
    sequences: dict[str, list[list[int]]] = {}
    for split, pairs in parallel_paragraphs(config.data.original, config.data.new_domain, progress=False).items():
        encoded = [encode(texts, tokenizer, config.training.context_length) for texts in zip(*pairs, strict=True)]
        kept = [pair for pair in zip(*encoded, strict=True) if min(map(len, pair)) >= MIN_TOKENS]
        for language, found in zip(LANGUAGES, map(list, zip(*kept, strict=True)), strict=True):
            if split == "validation":
                sequences[f"{language}, held out"] = found
            else:
                sequences[language] = found
                sequences[f"{language}, first"] = [tokens[: len(tokens) // 2] for tokens in found]
                sequences[f"{language}, second"] = [tokens[len(tokens) // 2 :] for tokens in found]
    return sequences


def _search_rows(
    vector: str,
    measured: Measured,
    n_dimensions: int,
    reductions: Sequence[str] = ("whitened",),
    exponent: float = 1.0,
) -> list[dict[str, Any]]:
    rows = []
    for reduction in reductions:
        for is_centred in (False, True):
            index = ParagraphIndex.learn(measured, n_dimensions, reduction, is_centred, exponent)
            original, new = (index.vectors(measured[language], language) for language in LANGUAGES)
            rows.append(_row(vector, reduction, is_centred, "translation", new, original))
            for language in LANGUAGES:
                halves = [index.vectors(measured[f"{language}, {half}"], language) for half in ("first", "second")]
                rows.append(_row(vector, reduction, is_centred, language, *halves))
    return rows


def _row(vector: str, reduction: str, is_centred: bool, search: str, queries: Array, database: Array) -> dict[str, Any]:
    found = reciprocal_ranks(queries, database)
    return {
        "vector": vector,
        "reduction": reduction,
        "is_centred": is_centred,
        "search": search,
        "mean_average_precision": round(float(found.mean()), 4),
        "found_first": round(float((found == 1).mean()), 4),
    }
