"""The names of the methods, in code and in print, and the values that methods and profiles fill in: data only."""

from __future__ import annotations

from typing import Any

METHODS = ("fine_tuning", "lora", "vanilla_adapter", "neutral_residues")
# Rivals live in nrlib/rivals, one file each, named like the method.
RIVALS = (
    "block_expansion",
    "weight_interpolation",
    "orthogonal_finetuning",
    "gated_lora",
    "elastic_weight_consolidation",
    "distillation",
)
ALL_METHODS = METHODS + RIVALS
METHOD_LABELS = {method: method.replace("_", " ") for method in ALL_METHODS} | {
    "fine_tuning": "fine-tuning", "lora": "LoRA", "orthogonal_finetuning": "orthogonal fine-tuning",
    "gated_lora": "gated LoRA",
}  # fmt: skip

# A method fixes some of MethodConfig's fields; what it does not use gets one canonical value, so that equal runs have
# equal configurations.
_WITHOUT_LOCAL_LOSS = {"local_loss": "none", "local_loss_weight": 0.0}
_WITHOUT_ADAPTER = {
    "gate": "none", **_WITHOUT_LOCAL_LOSS, "initialisation": "he", "position": "parallel", "site": "ffn", "layers": "all",
    "activation": "silu", "gate_memory": 1,
}  # fmt: skip
_WITHOUT_PENALTY = {"kl_weight": 0.0, "ewc_weight": 0.0, "interpolation_ratio": 1.0}


def _all_but(name: str) -> dict[str, float]:
    return {other: value for other, value in _WITHOUT_PENALTY.items() if other != name}


_EVERY_WEIGHT = {**_WITHOUT_ADAPTER, **_WITHOUT_PENALTY, "extra_ratio": 0.0}
FIXED_BY_METHOD: dict[str, dict[str, Any]] = {
    "fine_tuning": _EVERY_WEIGHT,
    "lora": {**_WITHOUT_ADAPTER, **_WITHOUT_PENALTY},
    "vanilla_adapter": {"gate": "none", "gate_memory": 1, **_WITHOUT_LOCAL_LOSS, **_WITHOUT_PENALTY},
    "neutral_residues": {"ewc_weight": 0.0, "interpolation_ratio": 1.0},
    "block_expansion": {**_WITHOUT_ADAPTER, **_WITHOUT_PENALTY},
    "weight_interpolation": {**_WITHOUT_ADAPTER, **_all_but("interpolation_ratio"), "extra_ratio": 0.0},
    "orthogonal_finetuning": {**_WITHOUT_ADAPTER, **_WITHOUT_PENALTY},
    "gated_lora": {**_WITHOUT_ADAPTER, **_WITHOUT_PENALTY},
    "elastic_weight_consolidation": {**_WITHOUT_ADAPTER, **_all_but("ewc_weight"), "extra_ratio": 0.0},
    "distillation": {**_WITHOUT_ADAPTER, **_all_but("kl_weight"), "extra_ratio": 0.0},
}

# What a method cannot do without, where the parameter's own default switches it off.
DEFAULTS_BY_METHOD: dict[str, dict[str, Any]] = {
    "weight_interpolation": {"interpolation_ratio": 0.5},
    "elastic_weight_consolidation": {"ewc_weight": 100.0},
    "distillation": {"kl_weight": 1.0},
}

# The dial each method has between learning and forgetting besides its rate, with the settings that are tried; a method
# without one is tried at its rates alone.
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "neutral_residues": ("local_loss_weight", (1.0, 5.0, 20.0)),
    "weight_interpolation": ("interpolation_ratio", (0.25, 0.5, 0.75)),
    "elastic_weight_consolidation": ("ewc_weight", (10.0, 100.0, 1000.0)),
    "distillation": ("kl_weight", (0.3, 1.0, 10.0)),
}

# Settings of neutral residues with a name. `recommended` is what the notebook `gate_memory` arrives at, and the default
# of `NeutralResiduesConfig` and of `nrlib extend`; the other pages compare settings without a memory, as in the paper.
# `paper` is the paper's own, as far as it is known. `with_kl` holds the predictions as well; the notebook `recipe` says
# what that buys.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {"gate": "elu", "local_loss": "l1", "local_loss_weight": 5.0, "gate_memory": 64},
    "paper": {"gate": "relu", "local_loss": "l1", "local_loss_weight": 0.01},
    "with_kl": {"gate": "elu", "local_loss": "l1", "local_loss_weight": 5.0, "kl_weight": 2.0},
}

PROFILES: dict[str, dict[str, Any]] = {
    "smoke": {
        "d_model": 32, "n_layers": 2, "n_heads": 2, "ffn_width": 88, "vocabulary_size": 512,
        "pretraining_tokens": 60_000, "pretraining_learning_rate": 1e-2, "n_tokens": 102_400, "context_length": 64,
        "n_evaluation_bytes": 10_000, "learning_rate": 1e-2,
    },
    "laptop": {
        "original": "debian-docs:en", "proxy": "debian-docs:en/debian+gnome+handbook+installation+libreoffice", "new_domain": "debian-docs:fr",
        "unseen_original": "debian-docs:en/manpages", "n_evaluation_bytes": 120_000, "n_tokens": 819_200,
        "weight_decay": 0.1,
    },
    "gpu": {
        "original": "debian-docs:en", "proxy": "debian-docs:en/debian+gnome+handbook+installation+libreoffice", "new_domain": "debian-docs:fr",
        "unseen_original": "debian-docs:en/manpages", "n_evaluation_bytes": 400_000, "d_model": 512, "n_layers": 12,
        "n_heads": 8, "ffn_width": 1408, "vocabulary_size": 8192, "context_length": 512, "batch_size": 64,
        "pretraining_tokens": 200_000_000, "pretraining_learning_rate": 1e-3, "n_tokens": 20_000_000,
        "learning_rate": 1e-3,
    },
    "paper": {
        "original": "hub:HuggingFaceFW/fineweb-edu:sample-10BT", "proxy": "hub:wikimedia/wikipedia:20231101.en",
        "new_domain": "hub:HuggingFaceFW/fineweb-2:fra_Latn", "unseen_original": "hub:common-pile/pubmed_filtered",
        "backbone_name": "google/gemma-2b", "context_length": 4096, "batch_size": 64, "accumulation_steps": 64,
        "n_tokens": 25_000_000_000,
        "learning_rate": 1e-4, "n_evaluation_bytes": 4_000_000,
    },
}  # fmt: skip
