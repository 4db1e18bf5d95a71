"""The arms of each notebook's experiment: what is varied, and what is held fixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .config import PLACEMENTS, RunConfig, make_config
from .profiles import ALL_METHODS, FIXED_BY_METHOD, METHODS, PRESETS, STRENGTHS

# Each method at its best learning rate: chosen on the validation text in the notebook `methods`; a test holds this table
# against the published records.
TUNED_LEARNING_RATES: dict[str, dict[str, float]] = {
    "smoke": {"fine_tuning": 1e-2, "lora": 1e-2, "vanilla_adapter": 1e-2, "neutral_residues": 1e-2},
    "laptop": {"fine_tuning": 1e-2, "lora": 1e-2, "vanilla_adapter": 1e-2, "neutral_residues": 1e-2},
}

# One rate beyond the grid of the rivals: higher where the best rate was its highest, and lower for those of them that
# change every weight, which forget least at low rates.
FURTHER_RATES = {
    "block_expansion": 0.1,
    "weight_interpolation": 0.001,
    "orthogonal_finetuning": 0.1,
    "elastic_weight_consolidation": 0.001,
    "distillation": 0.001,
}

# Gates with the local losses that make sense for them, as in the paper's comparison of gates. The first two, the
# paper's choice and ours, are run with every seed.
GATES_AND_LOSSES = (
    ("relu", "l1"),
    ("elu", "l1"),
    ("none", "l1"),
    ("sigmoid", "l1"),
    ("sigmoid", "domain_cross_entropy"),
)


def tuned_learning_rate(profile: str, method: str) -> float:
    """The learning rate a method is best at on a profile; the profile's default where it was not tuned."""
    default = make_config(profile).training.learning_rate
    return TUNED_LEARNING_RATES.get(profile, {}).get(method, default)


def arm(profile: str, method: str, **changes: Any) -> RunConfig:
    """One run at the method's tuned learning rate; changes a method has no use for are left out."""
    fixed = FIXED_BY_METHOD[method]
    used = {name: value for name, value in changes.items() if name not in fixed}
    return make_config(profile, method=method, **{"learning_rate": tuned_learning_rate(profile, method), **used})


def references(profile: str) -> list[RunConfig]:
    """Fine-tuning at its tuned rate with three seeds, to whose mean learning is relative on every page."""
    return [arm(profile, "fine_tuning", seed=seed) for seed in range(3)]


def methods(profile: str, learning_rates: Sequence[float], seed: int, **changes: Any) -> list[RunConfig]:
    """Every method at every learning rate, with an equal budget of extra weights: the search for the best rates."""
    return [
        arm(profile, method, learning_rate=rate, seed=seed, **changes) for method in METHODS for rate in learning_rates
    ]


def repeats(
    profile: str,
    best_learning_rates: Mapping[str, float],
    seeds: Sequence[int],
    length: float,
    local_loss_weights: Sequence[float],
    **changes: Any,
) -> list[RunConfig]:
    """Every method at its best learning rate, with every seed, trained `length` times as long as the profile says;
    neutral residues at every weight of their local loss."""
    n_tokens = round(length * make_config(profile).training.n_tokens)
    return [
        arm(profile, method, learning_rate=rate, seed=seed, local_loss_weight=weight, n_tokens=n_tokens, **changes)
        for method, rate in best_learning_rates.items()
        for weight in (local_loss_weights if method == "neutral_residues" else local_loss_weights[:1])
        for seed in seeds
    ]


def gate_sparsity(
    profile: str, local_loss_weights: Sequence[float], seeds: Sequence[int], **changes: Any
) -> list[RunConfig]:
    """Gates and local losses at every local-loss weight: the paper's pair and ours with every seed, the others with the
    first. At weight 0 the local losses coincide: one run for each gate.
    """
    arms = {}
    for gate, local_loss in GATES_AND_LOSSES:
        for weight in local_loss_weights:
            for seed in seeds if (gate, local_loss) in GATES_AND_LOSSES[:2] else seeds[:1]:
                loss = {"local_loss": local_loss if weight > 0 else "none", "local_loss_weight": weight}
                config = arm(profile, "neutral_residues", gate=gate, seed=seed, **loss, **changes)
                arms[config.run_id] = config
    return list(arms.values())


def data_mixing(
    profile: str, mix_ratios: Sequence[float], methods: Sequence[str], seeds: Sequence[int], **changes: Any
) -> list[RunConfig]:
    """Methods at every share of original-domain sequences in the training data."""
    return [
        arm(profile, method, mix_ratio=ratio, seed=seed, **changes)
        for method in methods
        for ratio in mix_ratios
        for seed in seeds
    ]


def adapter_placement(profile: str, layers: Sequence[str], seeds: Sequence[int], **changes: Any) -> list[RunConfig]:
    """Every position and site with every choice of layers, all at the same number of extra weights: the first choice of
    layers with every seed, the others with the first seed."""
    return [
        arm(profile, "neutral_residues", position=position, site=site, layers=choice, seed=seed, **changes)
        for position, site in PLACEMENTS
        for choice in layers
        for seed in (seeds if choice == layers[0] else seeds[:1])
    ]


def rivals(
    profile: str,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    methods: Sequence[str] = ALL_METHODS,
    **changes: Any,
) -> list[RunConfig]:
    """Each method at every rate and every strength of its dial."""
    return [
        arm(profile, method, learning_rate=rate, seed=seed, **strength, **changes)
        for method in methods
        for rate in learning_rates
        for strength in _strengths(method)
        for seed in seeds
    ]


def at_rates(
    profile: str, learning_rates: Mapping[str, float], seeds: Sequence[int], **changes: Any
) -> list[RunConfig]:
    """Each method at its own rate and every strength of its dial."""
    return [
        run for method, rate in learning_rates.items() for run in rivals(profile, [rate], seeds, [method], **changes)
    ]


def without_replay(
    profile: str, learning_rates: Mapping[str, float], seeds: Sequence[int], **changes: Any
) -> list[RunConfig]:
    """Each method at its best rate and the middle of its dial, with no original-domain text in the training data;
    distillation has nothing to act on then."""
    return [
        arm(profile, method, learning_rate=rate, seed=seed, mix_ratio=0.0, **strength, **changes)
        for method, rate in learning_rates.items()
        if method != "distillation"
        for strength in [_strengths(method)[len(_strengths(method)) // 2]]
        for seed in seeds
    ]


def _strengths(method: str) -> list[dict[str, float]]:
    name, values = STRENGTHS.get(method, ("", ()))
    return [{name: value} for value in values] or [{}]


def recipes(
    profile: str, kl_weights: Sequence[float], local_loss_weights: Sequence[float], seeds: Sequence[int]
) -> list[RunConfig]:
    """Neutral residues at every pair of weights of the KL divergence and of the local loss."""
    return [
        arm(
            profile, "neutral_residues", kl_weight=kl_weight, seed=seed,
            local_loss="l1" if weight > 0 else "none", local_loss_weight=weight,
        )
        for weight in local_loss_weights
        for kl_weight in kl_weights
        for seed in seeds
    ]  # fmt: skip


def longer_with_kl(profile: str, seeds: Sequence[int], length: float) -> list[RunConfig]:
    """The four methods as they are, and neutral residues with the KL term, trained `length` times as long as the profile
    says."""
    n_tokens = round(length * make_config(profile).training.n_tokens)
    settings = [*((method, {}) for method in METHODS), ("neutral_residues", PRESETS["with_kl"])]
    return [
        arm(profile, method, seed=seed, n_tokens=n_tokens, **options) for method, options in settings for seed in seeds
    ]


def gate_memories(
    profile: str, memories: Sequence[int], local_loss_weights: Sequence[float], seeds: Sequence[int]
) -> list[RunConfig]:
    """Neutral residues with every memory of the gate, and the recommended memory under every weight of the local loss."""
    recommended = PRESETS["recommended"]["gate_memory"]
    changed: list[dict[str, Any]] = [{"gate_memory": memory} for memory in memories]
    changed += [{"gate_memory": recommended, "local_loss_weight": weight} for weight in local_loss_weights]
    return _once(arm(profile, "neutral_residues", seed=seed, **change) for change in changed for seed in seeds)


def recommended(profile: str, seeds: Sequence[int], more_seeds: Sequence[int], length: float) -> list[RunConfig]:
    """The four methods, neutral residues as in the paper and as recommended, trained `length` times as long as the profile
    says; the recommended setting with more seeds."""
    n_tokens = round(length * make_config(profile).training.n_tokens)
    settings: list[tuple[str, Mapping[str, Any], Sequence[int]]] = [(method, {}, seeds) for method in METHODS]
    settings += [
        ("neutral_residues", PRESETS["paper"], seeds),
        ("neutral_residues", PRESETS["recommended"], more_seeds),
    ]
    return [
        arm(profile, method, seed=seed, n_tokens=n_tokens, **options)
        for method, options, chosen in settings
        for seed in chosen
    ]


def _once(runs: Iterable[RunConfig]) -> list[RunConfig]:
    return list({run.run_id: run for run in runs}.values())


def budgets(
    profile: str, extra_ratios: Sequence[float], methods: Sequence[str], seeds: Sequence[int], **changes: Any
) -> list[RunConfig]:
    """Methods at every budget of extra weights."""
    return [
        arm(profile, method, extra_ratio=ratio, seed=seed, **changes)
        for method in methods
        for ratio in extra_ratios
        for seed in seeds
    ]


# Stand-ins for the original domain, from near to far: what the backbone was trained on, one source of it, and text made
# by a machine in no language it knows.
PROXIES: dict[str, dict[str, str]] = {
    "smoke": {"same language": "synthetic:aurelian/plain", "machine-made": "synthetic:cinnabar"},
    "laptop": {
        "five groups": "debian-docs:en/debian+gnome+handbook+installation+libreoffice",
        "LibreOffice's help": "debian-docs:en/libreoffice",
        "GNOME's help": "debian-docs:en/gnome",
        "machine-made": "synthetic:aurelian",
    },
}


def proxies(profile: str, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, list[RunConfig]]:
    """Methods with every stand-in for the original domain and, under `none`, without one; by the stand-in's name."""
    named = {name: {"proxy": spec} for name, spec in PROXIES[profile].items()} | {"none": {"mix_ratio": 0.0}}
    return {
        name: [arm(profile, method, seed=seed, **changes) for method in methods for seed in seeds]
        for name, changes in named.items()
    }


def small_data(
    profile: str, new_text_ratios: Sequence[float], methods: Sequence[str], seeds: Sequence[int]
) -> list[RunConfig]:
    """Methods on a share of the new domain's text, repeated until the run is as long as any other."""
    return [
        arm(profile, method, new_text_ratio=ratio, seed=seed)
        for method in methods
        for ratio in new_text_ratios
        for seed in seeds
    ]


def activations(profile: str, names: Sequence[str], seeds: Sequence[int]) -> list[RunConfig]:
    """Neutral residues with every activation inside the adapter."""
    return [arm(profile, "neutral_residues", activation=name, seed=seed) for name in names for seed in seeds]


def lengths(profile: str, lengths: Sequence[float], methods: Sequence[str], seeds: Sequence[int]) -> list[RunConfig]:
    """Methods trained `lengths` times as long as the profile says."""
    n_tokens = make_config(profile).training.n_tokens
    return [
        arm(profile, method, n_tokens=round(length * n_tokens), seed=seed)
        for method in methods
        for length in lengths
        for seed in seeds
    ]


def rates_and_mixes(
    profile: str, learning_rates: Sequence[float], mix_ratios: Sequence[float], seeds: Sequence[int]
) -> list[RunConfig]:
    """Neutral residues at every pair of learning rate and mix ratio."""
    return [
        arm(profile, "neutral_residues", learning_rate=rate, mix_ratio=ratio, seed=seed)
        for rate in learning_rates
        for ratio in mix_ratios
        for seed in seeds
    ]


# New domains by the name of their language; the first is the one all other pages use.
NEW_DOMAINS: dict[str, dict[str, str]] = {
    "smoke": {"Borealic": "synthetic:borealic", "Cinnabar": "synthetic:cinnabar"},
    "laptop": {
        "French": "debian-docs:fr",
        "German": "debian-docs:de",
        "Russian": "debian-docs:ru",
        "Japanese": "debian-docs:ja",
        "Python": "debian-code:python",
    },
}


def languages(
    profile: str, corpora: Sequence[str], methods: Sequence[str], seeds: Sequence[int], length: float = 1.0
) -> list[RunConfig]:
    """Methods extending the same backbone to each of several new domains, one at a time, with nothing tuned again; neutral
    residues also as recommended."""
    n_tokens = round(length * make_config(profile).training.n_tokens)
    settings: list[tuple[str, Mapping[str, Any]]] = [(method, {}) for method in methods]
    settings.append(("neutral_residues", PRESETS["recommended"]))
    return [
        arm(profile, method, new_domain=corpus, n_tokens=n_tokens, seed=seed, **options)
        for corpus in corpora
        for method, options in settings
        for seed in seeds
    ]
