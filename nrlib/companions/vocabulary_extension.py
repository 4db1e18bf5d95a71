"""The study of new tokens on the page *Bridging vocabularies*: how their rows begin, and what that is worth in steps of
training neutral residues and in bits per byte of the original domain. The rows come from `vocabulary_tokens`."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..backbone import get_backbone
from ..config import RunConfig, make_config
from ..errors import BackboneError, ConfigError
from ..evaluation import bits_per_byte
from ..experiments import arm
from ..methods import apply_method
from ..runs import make_batches
from ..texts import PreparedText
from ..training import Hooks, train
from .vocabulary_libraries import PACKAGES, is_installed, library_rows
from .vocabulary_material import DIMENSION, DIMENSIONS, prepare_material, profile_lexicon, profile_text
from .vocabulary_tokens import INITIALISATIONS, initial_rows, split_texts

RESULT_VERSION = 1

ROWS = ("none", *INITIALISATIONS, *PACKAGES)  # none: the backbone's own tokens only
N_MEASUREMENTS = 20
N_NEW_TOKENS = {"smoke": 256}  # elsewhere a quarter of the laptop's vocabulary


def sizes(profile: str) -> dict[str, int]:
    """New tokens and tokens of training of `new_rows` on a profile: a quarter of its usual length."""
    return {"n_new_tokens": N_NEW_TOKENS.get(profile, 1024), "n_tokens": make_config(profile).training.n_tokens // 4}


def affordable(profile: str, beginnings: Sequence[str]) -> list[str]:
    """The ways to begin the rows that can be run: on smoke, where no record is published, a library that is not installed
    is left out, and said to be."""
    absent = [name for name in beginnings if profile == "smoke" and name in PACKAGES and not is_installed(name)]
    for name in absent:
        print(f"left out: {name}, since the package {PACKAGES[name]} is not installed")
    return [name for name in beginnings if name not in absent]


def new_rows(
    *, seed: int, profile: str, initialisation: str, n_new_tokens: int = 1024, n_tokens: int = 204_800
) -> dict[str, Any]:
    """Neutral residues with new tokens whose rows begin by one of ROWS and are trained along; "none" adds no token.

    The rows are those of the input and of the tied output matrix; the backbone's own stay as they are. Bits per byte of
    the original domain are measured twice: with all tokens to choose from, and with the backbone's own alone.
    """
    if initialisation not in ROWS:
        raise ConfigError(f"initialisation = {initialisation!r} is unknown. Allowed: {', '.join(ROWS)}.")
    config = arm(profile, "neutral_residues", seed=seed, n_tokens=n_tokens)
    own_text, material = profile_text(profile), prepare_material(profile, n_new_tokens)
    is_extended = initialisation != "none"
    text = material.text if is_extended else own_text
    backbone = get_backbone(config, own_text, progress=False)
    own_rows = backbone.get_input_embeddings().weight.detach().cpu().double().numpy()
    model: Any = apply_method(backbone, config.method, seed)
    result: dict[str, Any] = {"n_extra_rows": 0}
    if is_extended:
        if initialisation in PACKAGES:
            rows = _library_rows(initialisation, profile, n_new_tokens)
        else:
            rows = initial_rows(
                initialisation, own_rows, material.tokens, seed=seed, source=material.source, target=material.target,
                pairs=material.pairs,
            )  # fmt: skip
        add_rows(model, torch.from_numpy(rows).float())
        result = {
            "n_extra_rows": len(rows),
            "n_pairs": len(material.pairs),
            "n_changed": material.n_changed,
            "n_held_out": material.n_held_out,
        }
    new = text.held_out["new"]
    result["tokens_per_byte"] = round((len(new.tokens) - 1) / new.n_bytes, 4)
    result["start"] = _measure(model, text, config, len(own_rows))
    values = [_validate(model, text, config)]

    def measure() -> dict[str, float]:
        model.eval()
        values.append(_validate(model, text, config))
        model.train()
        return {}

    state = train(
        model, make_batches(config, text), config.training, local_loss=config.method.local_loss,
        local_loss_weight=config.method.local_loss_weight,
        hooks=Hooks(measure=measure, n_measurements=N_MEASUREMENTS), progress=False,
    )  # fmt: skip
    every = max(1, state.step // N_MEASUREMENTS)
    result["curve"] = [[min(i * every, state.step), value] for i, value in enumerate(values)]
    result["end"] = _measure(model, text, config, len(own_rows))
    return result


@functools.lru_cache(maxsize=2)
def _library_rows(name: str, profile: str, n_new_tokens: int) -> NDArray[np.float64]:
    material, old_text = prepare_material(profile, n_new_tokens), profile_text(profile)
    config = arm(profile, "neutral_residues")
    backbone = get_backbone(config, old_text, progress=False)
    rows = backbone.get_input_embeddings().weight.detach().cpu().double().numpy()
    new_texts = list(split_texts(material.text.new.tokens, material.tokens.tokenizer))
    original_texts = list(split_texts(old_text.pretraining.tokens, old_text.tokenizer))
    return library_rows(
        name, rows, material.tokens, old_text.tokenizer, new_texts, original_texts, profile_lexicon(profile),
        DIMENSIONS.get(profile, DIMENSION),
    )  # fmt: skip


def add_rows(model: Any, rows: Tensor) -> None:
    """Give a PEFT model of a backbone with tied embeddings new rows (n_new, D) that are trained, beside its adapters.

    PEFT's `TrainableTokens` keeps the old rows: their weight matrix is frozen, and the new rows are written over a copy.

    Raises
    ------
    BackboneError
        When the output matrix is not the input matrix.
    """
    from peft import TrainableTokensConfig, inject_adapter_in_model

    backbone = model.get_base_model()
    embeddings = backbone.get_input_embeddings()
    if backbone.get_output_embeddings().weight is not embeddings.weight:
        raise BackboneError(
            f"{type(backbone).__name__} has an output matrix of its own; new rows are begun here for input and output "
            "alike. Choose a backbone with tied embeddings."
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    n_old = len(embeddings.weight)
    backbone.resize_token_embeddings(n_old + len(rows), mean_resizing=False)
    with torch.no_grad():
        backbone.get_input_embeddings().weight[n_old:] = rows
    indices = list(range(n_old, n_old + len(rows)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the adapters: both are meant
        inject_adapter_in_model(TrainableTokensConfig(token_indices=indices), backbone, adapter_name="new_rows")
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained or "trainable_tokens_delta" in name)


class OldVocabulary(nn.Module):
    """A model that can only predict the first `n_old` tokens, its backbone's own."""

    def __init__(self, model: nn.Module, n_old: int) -> None:
        super().__init__()
        self.model, self.n_old = model, n_old

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(**inputs).logits[..., : self.n_old])


def _measure(model: nn.Module, text: PreparedText, config: RunConfig, n_old: int) -> dict[str, float]:
    model.eval()
    length, original = config.training.context_length, text.held_out["unseen_original"]
    return {
        "new": round(bits_per_byte(model, text.held_out["new"], length), 5),
        "original": round(bits_per_byte(model, original, length), 5),
        "original_own_tokens": round(bits_per_byte(OldVocabulary(model, n_old), original, length), 5),
    }


def _validate(model: nn.Module, text: PreparedText, config: RunConfig) -> float:
    return round(bits_per_byte(model, text.held_out["new_validation"], config.training.context_length), 5)


def steps_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """The first step, interpolated between measurements [step, bits per byte], at which `target` is reached; infinite if
    it never is."""
    for (before, high), (after, low) in zip([curve[0], *curve], curve, strict=False):
        if low <= target:
            return after if high <= low else before + (after - before) * (high - target) / (high - low)
    return math.inf


def rows_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row for each result of `new_rows`: bits per byte of the new language before and after training, the steps that
    random rows with the same seed need over those to their final validation loss, and forgetting at both ends, with all
    tokens to choose from and with the backbone's own alone."""
    backbone = {r["seed"]: r["start"]["original"] for r in results if r["initialisation"] == "none"}
    targets = {r["seed"]: r["curve"][-1][1] for r in results if r["initialisation"] == "random"}
    rows = []
    for r in results:
        seed = r["seed"]
        forgotten = {
            f"{when}_forgetting{suffix}": r[when][key] / backbone[seed] - 1
            for when in ("start", "end")
            for suffix, key in (("", "original"), ("_own_tokens", "original_own_tokens"))
        }
        ends = {"start_new": r["start"]["new"], "end_new": r["end"]["new"]}
        steps = steps_to(r["curve"], targets[seed])
        rows.append({"initialisation": r["initialisation"], "seed": seed, **ends, "steps": steps, **forgotten})
    table = pd.DataFrame(rows)
    return table.assign(initialisation=pd.Categorical(table["initialisation"], ROWS))
