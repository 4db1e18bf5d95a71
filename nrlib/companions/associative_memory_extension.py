"""A second language for the transformer of `nrlib.companions.associative_memory`, whose memories can be read: what does
fine-tuning overwrite, what does a vanilla adapter disturb, and what do neutral residues leave alone?

Two bigram languages share part of their vocabulary and two of their triggers. The old one is learned first, then the
new one, by one of three methods; of the extension's text a share comes from a proxy of the old language. The adapters
are the project's own, `nrlib.adapter.GatedAdapter`, one behind the attention of each layer, beside W_F in the last.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..adapter import GatedAdapter
from ..errors import ConfigError
from ..losses import NEW, ORIGINAL, LocalLoss
from ..machine import seeded
from .associative_memory import MemoryTransformer, probe, train
from .associative_memory_bigrams import BigramLanguage, make_language, sample, with_other_rows
from .associative_memory_readings import (
    N_TOKENS,
    NEW_TOKENS,
    NEW_TRIGGERS,
    OLD_TOKENS,
    OLD_TRIGGERS,
    SHARED_TOKENS,
    SHARED_TRIGGERS,
    drift,
    match_scores,
    mean_loss,
    read_memories,
    residues,
    restored,
    reuse,
    weight_changes,
)

if TYPE_CHECKING:
    import pandas as pd

RESULT_VERSION = 1
METHODS = ("backbone", "fine_tuning", "vanilla_adapter", "neutral_residues")
_STREAMS = ("pretraining", "extension", "validation", "test")  # of random numbers, each from the seed


def languages(seed: int, proxy_ratio: float = 0.75) -> tuple[BigramLanguage, BigramLanguage, BigramLanguage]:
    """The old language, the new one, and a proxy of the old: `proxy_ratio` of its rows, the others of a third table."""
    triggers = {"old": OLD_TRIGGERS + SHARED_TRIGGERS, "new": SHARED_TRIGGERS + NEW_TRIGGERS}
    old_used, new_used = [*OLD_TOKENS, *SHARED_TOKENS], [*SHARED_TOKENS, *NEW_TOKENS]
    old = make_language(N_TOKENS, 3 * seed, used=old_used, triggers=triggers["old"])
    third = make_language(N_TOKENS, 3 * seed + 1, used=old_used, triggers=triggers["old"])
    new = make_language(N_TOKENS, 3 * seed + 2, used=new_used, triggers=triggers["new"])
    return old, new, with_other_rows(old, third, 1 - proxy_ratio, seed)


@functools.lru_cache(maxsize=2)
def make_backbone(seed: int, n_steps: int, d_model: int, context_length: int) -> MemoryTransformer:
    """A two-layer transformer with W_F, trained on all tokens of the old language; do not change what is returned."""
    old, _, _ = languages(seed)
    model = MemoryTransformer(N_TOKENS, d_model, context_length, has_feed_forward=True, seed=seed)
    generator = _generator(seed, "pretraining")
    train(model, lambda: sample(old, 64, context_length, generator), n_steps, 0.2, loss_on="all")
    return model


def apply_method(backbone: MemoryTransformer, method: str, seed: int, extra_ratio: float = 0.2) -> MemoryTransformer:
    """A copy to train. Fine-tuning trains the four memories; the adapters, at `extra_ratio` more weights, themselves."""
    if method not in METHODS:
        raise ConfigError(f"method = {method!r} is not allowed. Choose one of: {', '.join(METHODS)}.")
    model = copy.deepcopy(backbone)
    if method in ("backbone", "fine_tuning"):
        return model
    model.requires_grad_(False)
    d_model, n_layers = model.embedding.shape[1], len(model.keys)
    n_weights = sum(t.numel() for t in model.state_dict().values())
    width = int(extra_ratio * n_weights / n_layers / (3 * d_model))
    if width < 1:
        raise ConfigError(f"extra_ratio = {extra_ratio:g} does not pay for adapters of width 1. Give a larger one.")
    gate = "none" if method == "vanilla_adapter" else "elu"
    with seeded(seed):
        model.adapters = nn.ModuleList([GatedAdapter(d_model, width, n_layers, gate) for _ in range(n_layers)])
    return model


def extend(
    model: MemoryTransformer,
    new: BigramLanguage,
    proxy: BigramLanguage,
    generator: torch.Generator,
    *,
    learning_rate: float,
    local_loss_weight: float,
    mix_ratio: float,
    n_steps: int,
    batch_size: int = 32,
) -> None:
    """Train what requires gradients with AdamW, after a short warm-up at a rate that falls to zero.

    Raises
    ------
    FloatingPointError
        When the loss is no longer a number.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    n_proxy, context_length = round(mix_ratio * batch_size), len(model.position)
    domain = torch.tensor([ORIGINAL] * n_proxy + [NEW] * (batch_size - n_proxy))
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (1 - step / n_steps)
        texts = [(proxy, n_proxy), (new, batch_size - n_proxy)]
        parts = [sample(language, n, context_length, generator) for language, n in texts if n]
        inputs, targets = torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts])
        with LocalLoss(model, "l1" if local_loss_weight else "none", domain) as local_loss:
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss = loss + local_loss_weight * local_loss.mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"The loss is {loss.item()} at step {step}: choose a smaller learning_rate.")
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()


def extension(
    *,
    seed: int,
    method: str,
    learning_rate: float = 0.003,
    local_loss_weight: float = 0.0,
    mix_ratio: float = 0.1,
    n_steps: int = 400,
    n_pretraining_steps: int = 400,
    d_model: int = 128,
    context_length: int = 64,
    n_evaluation: int = 256,
) -> dict[str, Any]:
    """A study: learn the old language, extend by the new one, read every memory; losses in nats per token."""
    old, new, proxy = languages(seed)
    backbone = make_backbone(seed, n_pretraining_steps, d_model, context_length)
    model = apply_method(backbone, method, seed)
    if method != "backbone":
        extend(
            model, new, proxy, _generator(seed, "extension"), learning_rate=learning_rate,
            local_loss_weight=local_loss_weight, mix_ratio=mix_ratio, n_steps=n_steps,
        )  # fmt: skip
    held_out = _generator(seed, "validation")
    validation = sample(new, n_evaluation, context_length, held_out)
    test = _generator(seed, "test")
    spoken = {"old": old, "new": new}
    texts = {name: sample(language, n_evaluation, context_length, test) for name, language in spoken.items()}
    found: dict[str, Any] = {
        "loss_new_validation": mean_loss(model, validation),
        "loss_old_backbone": mean_loss(backbone, texts["old"]),
        "loss_new_backbone": mean_loss(backbone, texts["new"]),
        "drift": drift(model, backbone, texts["old"]),
    }
    for name, language in spoken.items():
        found |= {f"{key}_{name}": value for key, value in read_memories(model, language, texts[name]).items()}
    found["stored"] = {name: probe(model, language) for name, language in spoken.items()}
    found["change"] = weight_changes(model, backbone)
    found["restored"] = {
        part: {name: mean_loss(changed, batch) for name, batch in texts.items()}
        for part, changed in restored(model, backbone)
    }
    found["reuse"] = reuse(model, texts["new"])
    found["match"] = match_scores(model, texts["new"])
    found["residue"] = {name: residues(model, batch) for name, batch in texts.items()}
    rounded: dict[str, Any] = _rounded(found)
    return rounded


def _generator(seed: int, stream: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(_STREAMS) * seed + _STREAMS.index(stream))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 5) if isinstance(value, float) else value


SMOKE = {"n_steps": 40, "n_pretraining_steps": 60, "d_model": 64, "context_length": 32, "n_evaluation": 64}


def search_settings(
    profile: str, learning_rates: list[float], local_loss_weight: float, mix_ratio: float, seed: int
) -> list[dict[str, Any]]:
    """Settings of `extension`: every method at every rate; the profile smoke is small, all others are one size."""
    return [
        {
            "seed": seed, "method": method, "learning_rate": rate, "mix_ratio": mix_ratio,
            "local_loss_weight": local_loss_weight if method == "neutral_residues" else 0.0,
            **(SMOKE if profile == "smoke" else {}),
        }
        for method in METHODS[1:]
        for rate in learning_rates
    ]  # fmt: skip


def best_settings(settings: list[dict[str, Any]], rows: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    """Of the settings tried with one seed, for each method those with the lowest loss on validation text of the new
    language, for every seed; the backbone is added."""
    chosen = []
    for method in METHODS[1:]:
        tried = [(row["loss_new_validation"], n) for n, row in enumerate(rows) if row["method"] == method]
        chosen.append(settings[min(tried)[1]])
    backbone = {**chosen[0], "method": "backbone", "learning_rate": 0.0, "mix_ratio": 0.0, "local_loss_weight": 0.0}
    return [{**setting, "seed": seed} for seed in seeds for setting in [backbone, *chosen]]


def results_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a run of a method, as `nrlib.tables.summary` takes them: `forgetting` on the old language, `learning` as a
    share of fine-tuning's gain with the same seed, at its rate of lowest validation loss among the rows; and `drift`."""
    import pandas as pd

    tuned = [row for row in rows if row["method"] == "fine_tuning"]
    best = {}
    for row in sorted(tuned, key=lambda row: -row["loss_new_validation"]):
        best[row["seed"]] = row["loss_new_backbone"] - row["loss_new"]
    table = [
        {
            **{key: row[key] for key in ("method", "seed", "learning_rate", "drift", "seconds", "device")},
            "forgetting": row["loss_old"] / row["loss_old_backbone"] - 1,
            "learning": (row["loss_new_backbone"] - row["loss_new"]) / best[row["seed"]],
        }
        for row in rows
        if row["method"] != "backbone"
    ]
    frame = pd.DataFrame(table)
    frame["method"] = pd.Categorical(frame["method"], METHODS[1:], ordered=True)
    return frame


def means_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean over seeds of everything `extension` reads, one row a method; nested names are joined: `reuse_without_key_1`."""
    import pandas as pd

    return pd.json_normalize(rows, sep="_").groupby("method", sort=False).mean(numeric_only=True)
