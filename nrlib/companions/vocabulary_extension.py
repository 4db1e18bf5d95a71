"""The study of new tokens on the page *Bridging vocabularies*: how their rows begin, and what that is worth in steps of
training neutral residues and in bits per byte of the original domain. The rows come from `vocabulary_tokens`."""

from __future__ import annotations

import difflib
import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..backbone import get_backbone
from ..batches import TokenStream
from ..config import RunConfig, make_config
from ..errors import BackboneError, ConfigError
from ..evaluation import bits_per_byte
from ..experiments import arm
from ..methods import apply_method
from ..runs import make_batches
from ..texts import PreparedText, prepare_text
from ..training import Hooks, train
from .vocabulary_studies import FREEDICT, respell, synthetic_lexicon
from .vocabulary_tokens import (
    INITIALISATIONS,
    NewTokens,
    TokenVectors,
    add_tokens,
    initial_rows,
    split_texts,
    token_pairs,
    token_vectors,
)
from .vocabulary_words import freedict

RESULT_VERSION = 1

ROWS = ("none", *INITIALISATIONS)  # none: the backbone's own tokens only
N_MEASUREMENTS = 20
DIMENSIONS = {"smoke": 24}  # of the tokens' static vectors, fewer than pairs
DIMENSION = 64
N_NEW_TOKENS = {"smoke": 256}  # elsewhere a quarter of the laptop's vocabulary


def sizes(profile: str) -> dict[str, int]:
    """New tokens and tokens of training of `new_rows` on a profile: a quarter of its usual length."""
    return {"n_new_tokens": N_NEW_TOKENS.get(profile, 1024), "n_tokens": make_config(profile).training.n_tokens // 4}


@dataclass(frozen=True)
class Material:
    """What all ways to begin the rows share: the text with the new language in the extended tokenizer, static vectors of
    tokens in both languages, pairs of tokens, and how the extension encodes held-out text of the original domain."""

    text: PreparedText
    tokens: NewTokens
    source: TokenVectors
    target: TokenVectors
    pairs: tuple[tuple[int, int], ...]
    n_changed: int  # tokens that differ from the backbone's own encoding, of n_held_out
    n_held_out: int


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
    material = prepare_material(profile, n_new_tokens)
    is_extended = initialisation != "none"
    text = material.text if is_extended else _text(profile)
    backbone = get_backbone(config, text, progress=False)
    own_rows = backbone.get_input_embeddings().weight.detach().double().numpy()
    model: Any = apply_method(backbone, config.method, seed)
    result: dict[str, Any] = {"n_extra_rows": 0}
    if is_extended:
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


@functools.lru_cache(maxsize=1)
def prepare_material(profile: str, n_new_tokens: int) -> Material:
    """Tokens, vectors and pairs for a profile; nothing of it has seen held-out text of the new language."""
    text, dimension = _text(profile), DIMENSIONS.get(profile, DIMENSION)
    old = text.tokenizer
    lexicon = synthetic_lexicon() if profile == "smoke" else freedict(FREEDICT["fr"], progress=False)[0]
    new_texts = list(split_texts(text.new.tokens, old))
    original_texts = list(split_texts(text.pretraining.tokens, old))
    tokens = add_tokens(old, new_texts, original_texts, n_new_tokens)
    held_out = dict(text.held_out)
    for name in ("new", "new_validation"):
        held_out[name] = _encode(split_texts(held_out[name].tokens, old), tokens.tokenizer, name)
    stream = _encode(new_texts, tokens.tokenizer, text.new.name)
    own = [n for n in held_out if not n.startswith("new")]
    again = [_encode(split_texts(held_out[n].tokens, old), tokens.tokenizer, n).tokens for n in own]
    separator = old.eos_token_id
    return Material(
        replace(text, tokenizer=tokens.tokenizer, new=stream, held_out=held_out),
        tokens,
        token_vectors(stream.tokens, separator, len(tokens.tokenizer), dimension),
        token_vectors(text.pretraining.tokens, separator, len(old), dimension),
        tuple(token_pairs(lexicon, old, tokens.tokenizer)),
        sum(_n_differing(held_out[n].tokens, tokens_again) for n, tokens_again in zip(own, again, strict=True)),
        sum(len(held_out[n].tokens) for n in own),
    )


def _text(profile: str) -> PreparedText:
    """The text of a profile. On synthetic text the new language is the original one, word by word in the lexicon of
    another: there is something to align."""
    config = arm(profile, "neutral_residues")
    text = prepare_text(config.data, config.backbone, False)
    if profile != "smoke":
        return text
    lexicon = synthetic_lexicon()

    def translated(stream: TokenStream, name: str) -> TokenStream:
        texts = split_texts(stream.tokens, text.tokenizer)
        return _encode([respell(t, lexicon) for t in texts], text.tokenizer, name)

    held_out = dict(text.held_out)
    held_out["new"] = translated(held_out["unseen_original"], "new")
    held_out["new_validation"] = translated(held_out["unseen_original_validation"], "new_validation")
    return replace(text, new=translated(text.pretraining, "new"), held_out=held_out)


def _encode(texts: Iterable[str], tokenizer: Any, name: str) -> TokenStream:
    separator, n_bytes = tokenizer.eos_token_id, 0
    parts = [np.array([separator], dtype=np.int32)]
    for text in texts:
        n_bytes += len(text.encode())
        parts.append(np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], separator], dtype=np.int32))
    return TokenStream(np.concatenate(parts), n_bytes, name)


def _n_differing(before: NDArray[np.int32], after: NDArray[np.int32]) -> int:
    """Tokens of `before` that `after` has not kept."""
    if np.array_equal(before, after):
        return 0
    matcher = difflib.SequenceMatcher(None, before.tolist(), after.tolist(), autojunk=False)
    return len(before) - sum(block.size for block in matcher.get_matching_blocks())


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
