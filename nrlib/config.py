"""What a run is: frozen dataclasses, validated when they are made, with the profiles that fill them.

Every field is described here and nowhere else; the book's parameter page and the command line's help are made from
these descriptions.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .profiles import ALL_METHODS, DEFAULTS_BY_METHOD, FIXED_BY_METHOD, PROFILES
from .storage import fingerprint

GATES = ("none", "sigmoid", "relu", "elu")
LOCAL_LOSSES = ("none", "l1", "domain_cross_entropy", "l1_everywhere")
ACTIVATIONS = ("silu", "gelu", "relu", "identity")
INITIALISATIONS = ("low_variance", "he")
POSITIONS = ("parallel", "serial")
SITES = ("ffn", "attention", "persistent_memory")
# Persistent vectors are read by the block's own queries, which are made of its input.
PLACEMENTS = tuple(p for p in itertools.product(POSITIONS, SITES) if p != ("serial", "persistent_memory"))
LAYER_CHOICES = ("all", "first_half", "last_half", "every_other")
PRECISIONS = ("auto", "float32", "bfloat16")


CORPUS_ROLES = ("original", "proxy", "new_domain", "unseen_original")  # the parameters that hold a corpus spec


def parameter(
    default: Any,
    description: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    is_later: bool = False,
) -> Any:
    """A dataclass field with its description and the values it allows.

    A field that came later (`is_later`) is left out of the canonical form at its default, so that the runs made before
    it keep their names.
    """
    allowed = {"description": description, "choices": choices, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata={**allowed, "is_later": is_later})


@dataclass(frozen=True)
class DataConfig:
    """Which text: corpus specs (see `nrlib.corpora`), one for each role."""

    original: str = parameter("synthetic:aurelian", "corpus the backbone was pretrained on: the original domain")
    proxy: str = parameter(
        "synthetic:aurelian/plain", "stand-in for the original domain in the training mix; may be ''"
    )
    new_domain: str = parameter("synthetic:borealic", "corpus to learn")
    unseen_original: str = parameter(
        "synthetic:aurelian/manual", "original-domain text outside the proxy: where forgetting is measured"
    )
    n_evaluation_bytes: int = parameter(60_000, "size of each held-out test set, in bytes of text", minimum=1_000)
    new_text_ratio: float = parameter(
        1.0, "share of the new domain's training documents that is used", minimum=0.0, maximum=1.0, is_later=True
    )


@dataclass(frozen=True)
class BackboneConfig:
    """The model that is extended: trained here from these numbers, or any causal language model by name."""

    backbone_name: str = parameter(
        "", "local folder or hub name of a causal language model; '' trains one from the fields below"
    )
    d_model: int = parameter(128, "model width D", minimum=8)
    n_layers: int = parameter(4, "layers L", minimum=1)
    n_heads: int = parameter(4, "attention heads", minimum=1)
    ffn_width: int = parameter(352, "width of the feed-forward block", minimum=8)
    vocabulary_size: int = parameter(4096, "entries of the byte-level BPE, trained on the original domain", minimum=300)
    pretraining_tokens: int = parameter(6_000_000, "tokens of pretraining", minimum=1)
    pretraining_learning_rate: float = parameter(3e-3, "peak learning rate of pretraining", minimum=0.0)
    pretraining_seed: int = parameter(0, "seed of the backbone's weights and data order", minimum=0)


@dataclass(frozen=True)
class MethodConfig:
    """How the backbone learns the new domain."""

    method: str = parameter("neutral_residues", "training method", choices=ALL_METHODS)
    extra_ratio: float = parameter(
        0.2, "extra weights as a share of all backbone weights; the adapter width or the rank follows from it",
        minimum=0.0, maximum=10.0,
    )  # fmt: skip
    gate: str = parameter("elu", "activation of the block gate; none = no gate", choices=GATES)
    local_loss: str = parameter(
        "l1",
        "penalty on residues or gates of original-domain tokens; l1_everywhere: of all tokens",
        choices=LOCAL_LOSSES,
    )
    local_loss_weight: float = parameter(5.0, "weight of the local loss in the training loss", minimum=0.0)
    initialisation: str = parameter(
        "low_variance", "variance of W_i, W_g and w: 1/(D·L), or He's 2/D", choices=INITIALISATIONS
    )
    position: str = parameter(
        "parallel", "adapter reads the block's input (parallel) or output (serial)", choices=POSITIONS
    )
    site: str = parameter(
        "ffn",
        "block the adapter stands beside; persistent_memory: in its place, key and value vectors for the heads of the "
        "attention block",
        choices=SITES,
    )
    layers: str = parameter("all", "all, first_half, last_half, every_other, or indices such as '0,2,3'")
    activation: str = parameter(
        "silu", "activation inside the adapter's gated linear unit", choices=ACTIVATIONS, is_later=True
    )
    gate_memory: int = parameter(
        1, "tokens the block gate weighs together, the present one the last; 1 reads that one alone, as in the paper", minimum=1,
        is_later=True,
    )  # fmt: skip
    kl_weight: float = parameter(
        0.0, "weight of the KL divergence from the backbone on original-domain tokens (distillation)",
        minimum=0.0, is_later=True,
    )  # fmt: skip
    ewc_weight: float = parameter(
        0.0, "weight of elastic weight consolidation's penalty on moving important weights", minimum=0.0, is_later=True
    )
    interpolation_ratio: float = parameter(
        1.0, "weight interpolation: 0 is the backbone, 1 the fine-tuned model", minimum=0.0, maximum=1.0, is_later=True
    )


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    n_tokens: int = parameter(40_960, "tokens of training, both domains together", minimum=1)
    context_length: int = parameter(128, "tokens T of one sequence", minimum=8)
    batch_size: int = parameter(16, "sequences B of one optimiser step", minimum=1)
    accumulation_steps: int = parameter(1, "micro-batches one optimiser step is split into", minimum=1)
    learning_rate: float = parameter(3e-3, "peak learning rate", minimum=0.0, maximum=10.0)
    mix_ratio: float = parameter(0.1, "share of training sequences taken from the proxy", minimum=0.0, maximum=1.0)
    warmup_ratio: float = parameter(0.05, "share of the steps over which the rate rises", minimum=0.0, maximum=1.0)
    final_learning_rate_ratio: float = parameter(
        0.1, "learning rate at the end of the cosine, over its peak", minimum=0.0, maximum=1.0
    )
    weight_decay: float = parameter(0.0, "AdamW weight decay on matrices", minimum=0.0)
    max_gradient_norm: float = parameter(
        1.0, "clipping threshold of the gradient's norm; a large one never clips", minimum=1e-6
    )
    precision: str = parameter("auto", "auto uses bfloat16 where the processor gains from it", choices=PRECISIONS)


@dataclass(frozen=True)
class RunConfig:
    """One training run. Two equal configurations are the same run and share one record."""

    profile: str = parameter("smoke", "profile the other defaults come from")
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = parameter(0, "seed of the new weights and of the data order", minimum=0)

    def __post_init__(self) -> None:
        for part in (self, self.data, self.backbone, self.method, self.training):
            _check_fields(part)
        if not self.data.proxy and self.training.mix_ratio > 0:
            raise ConfigError(
                f"mix_ratio = {self.training.mix_ratio} asks for original-domain sequences, but proxy is empty. Name "
                "a proxy corpus (for example proxy = 'debian-docs:en/libreoffice+gnome') or set mix_ratio = 0."
            )
        if self.training.batch_size % self.training.accumulation_steps:
            raise ConfigError(
                f"batch_size = {self.training.batch_size} cannot be split into accumulation_steps = "
                f"{self.training.accumulation_steps} equal parts. Choose a divisor of the batch size."
            )
        if self.method.kl_weight > 0 and self.training.mix_ratio == 0:
            raise ConfigError(
                f"kl_weight = {self.method.kl_weight:g} acts on original-domain tokens, but mix_ratio = 0 brings none into "
                "the training data. Give a mix_ratio above 0, or kl_weight = 0."
            )
        if self.method.ewc_weight > 0 and not self.data.proxy:
            raise ConfigError(
                f"ewc_weight = {self.method.ewc_weight:g} measures on the proxy which weights matter, but proxy is empty. "
                "Name a proxy corpus (for example proxy = 'debian-docs:en/libreoffice+gnome')."
            )
        check_layers(self.method.layers)
        check_placement(self.method.position, self.method.site, self.method.activation)
        check_gate_memory(self.method.gate, self.method.gate_memory)

    def to_dict(self) -> dict[str, Any]:
        """The canonical form: what a record stores and what the run's name is made of."""
        parts = dataclasses.asdict(self)
        for part, cls in _PARTS.items():
            for f in dataclasses.fields(cls):
                if f.metadata["is_later"] and parts[part][f.name] == f.default:
                    del parts[part][f.name]
        return parts

    @property
    def run_id(self) -> str:
        """Readable part and 8 hexadecimal digits of the canonical configuration."""
        name = self.method.method
        short = name if name == "lora" else "".join(word[0] for word in name.split("_"))
        return f"{self.profile}-{short}-s{self.seed}-{fingerprint(self.to_dict(), 8)}"


_PARTS = {"data": DataConfig, "backbone": BackboneConfig, "method": MethodConfig, "training": TrainingConfig}


_SHAPE = {f.name for f in dataclasses.fields(BackboneConfig)} - {"backbone_name"}


def parameters() -> dict[str, dataclasses.Field[Any]]:
    """Every parameter of a run by its flat name; names are unique over the parts."""
    flat = {f.name: f for part in _PARTS.values() for f in dataclasses.fields(part)}
    flat.update({f.name: f for f in dataclasses.fields(RunConfig) if f.name not in _PARTS})
    return flat


def make_config(profile: str = "smoke", **changes: Any) -> RunConfig:
    """The configuration of a profile with some parameters changed, by flat name.

    Raises
    ------
    ConfigError
        For an unknown profile or parameter, a wrong type, a value out of range, or a parameter the method does not use.
    """
    if profile not in PROFILES:
        raise ConfigError(f"profile = {profile!r} is unknown. Allowed: {', '.join(PROFILES)}.")
    known = parameters()
    for name in changes:
        if name not in known or name == "profile":
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{name} is not a parameter of a run.{hint} Allowed: {', '.join(sorted(known))}.")
    method = changes.get("method", "neutral_residues")
    check_value("method", method, known["method"])
    fixed = FIXED_BY_METHOD.get(method, {})
    for name, value in fixed.items():
        if name in changes and changes[name] not in (value, None):
            using = [other for other, fixed_there in FIXED_BY_METHOD.items() if name not in fixed_there]
            raise ConfigError(
                f"{name} = {changes[name]!r} has no meaning for method = {method!r}, which has {name} = {value!r}. "
                f"Leave {name} out, or choose a method that uses it: {', '.join(using)}."
            )
    if changes.get("backbone_name") and (unused := _SHAPE & changes.keys()):
        raise ConfigError(
            f"{min(unused)} = {changes[min(unused)]!r} describes a backbone that is trained here, but backbone_name = "
            f"{changes['backbone_name']!r} names one that is there already. Leave one of the two out."
        )
    values = {**PROFILES[profile], **DEFAULTS_BY_METHOD.get(method, {}), **changes, **fixed}
    if values.get("local_loss") == "none":
        values["local_loss_weight"] = 0.0
    return config_from_flat(profile, values)


def config_from_flat(profile: str, values: Mapping[str, Any]) -> RunConfig:
    """Sort flat values into the parts of a `RunConfig`."""
    parts = {
        part: cls(**{f.name: _coerce(f, values[f.name]) for f in dataclasses.fields(cls) if f.name in values})
        for part, cls in _PARTS.items()
    }
    return RunConfig(profile=profile, seed=values.get("seed", 0), **parts)


def flat_values(config: RunConfig) -> dict[str, Any]:
    """Every parameter of a run with its value, by flat name."""
    parts = dataclasses.asdict(config)
    flat = {name: value for part in parts.values() if isinstance(part, dict) for name, value in part.items()}
    return flat | {name: value for name, value in parts.items() if not isinstance(value, dict)}


def absolute_path(name: str, value: Any) -> Any:
    """The value of a parameter, with a relative path in it (`file:` corpora, a local backbone) made absolute, so that it
    means the same from any folder."""
    if name in CORPUS_ROLES and value.startswith("file:") and value != "file:":
        return f"file:{Path(value.removeprefix('file:')).expanduser().absolute()}"
    if name == "backbone_name" and value and Path(value).is_dir():
        return str(Path(value).absolute())
    return value


def config_from_dict(stored: Mapping[str, Any]) -> RunConfig:
    """The inverse of `RunConfig.to_dict`."""
    parts = {part: cls(**stored[part]) for part, cls in _PARTS.items()}
    return RunConfig(profile=stored["profile"], seed=stored["seed"], **parts)


def check_layers(layers: str) -> None:
    """Raise ConfigError unless `layers` is a known choice or a comma-separated list of indices."""
    if layers in LAYER_CHOICES or all(part.strip().isdecimal() for part in layers.split(",")):
        return
    raise ConfigError(
        f"layers = {layers!r} is not allowed. Give one of {', '.join(LAYER_CHOICES)}, or layer indices separated by "
        "commas, such as '0,2,3'."
    )


def check_placement(position: str, site: str, activation: str) -> None:
    """Raise ConfigError for a position or an activation that the site does not have."""
    if site == "persistent_memory" and activation != MethodConfig.activation:
        raise ConfigError(
            f"activation = {activation!r} has no meaning for site = 'persistent_memory', which has no gated linear unit. Leave "
            "activation out, or choose site = 'ffn' or 'attention'."
        )
    if (position, site) not in PLACEMENTS:
        raise ConfigError(
            f"position = {position!r} has no meaning for site = {site!r}: persistent vectors are read by the attention block's "
            "own queries, which are made of its input. Leave position out, or choose site = 'attention' or 'ffn'."
        )


def check_gate_memory(gate: str, gate_memory: int) -> None:
    """Raise ConfigError for a memory without a gate."""
    if gate == "none" and gate_memory > 1:
        raise ConfigError(
            f"gate_memory = {gate_memory} says how many tokens the block gate weighs together, but gate = 'none'. Choose a "
            "gate, or leave gate_memory out."
        )


def _coerce(f: dataclasses.Field[Any], value: Any) -> Any:
    # A literal 1 for a float and [0, 2] for a list of layers are what people type.
    if f.name == "layers" and isinstance(value, (list, tuple)):
        value = ",".join(str(index) for index in value)
    if f.name == "layers" and isinstance(value, str) and all(part.strip().isdecimal() for part in value.split(",")):
        return ",".join(str(index) for index in sorted(int(part) for part in value.split(",")))  # one run, one name
    if isinstance(f.default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _check_fields(part: Any) -> None:
    for f in dataclasses.fields(part):
        if "description" in f.metadata:
            check_value(f.name, getattr(part, f.name), f)


def check_value(name: str, value: Any, f: dataclasses.Field[Any]) -> None:
    """Raise ConfigError unless `value` has the type of the field's default and lies in its allowed range."""
    expected = type(f.default)
    if not isinstance(value, expected) or isinstance(value, bool) is not (expected is bool):
        raise ConfigError(
            f"{name} = {value!r} has the type {type(value).__name__}; it must be {expected.__name__} "
            f"({f.metadata['description']}), for example {f.default!r}."
        )
    choices, minimum, maximum = (f.metadata.get(key) for key in ("choices", "minimum", "maximum"))
    if choices and value not in choices:
        raise ConfigError(f"{name} = {value!r} is not allowed. Choose one of: {', '.join(choices)}.")
    too_low = minimum is not None and not value >= minimum  # "not >=" also catches NaN
    too_high = (maximum is not None and not value <= maximum) or value == math.inf
    if too_low or too_high:
        span = f"between {minimum:g} and {maximum:g}" if maximum is not None else f"at least {minimum:g} and finite"
        raise ConfigError(f"{name} = {value!r} is out of range: it must be {span} ({f.metadata['description']}).")
