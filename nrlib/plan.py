"""A plan before the bill: what each method adds, keeps in memory and computes, for a model, a corpus and a machine.

No weight is downloaded, no text is read: a backbone is a configuration here, built on PyTorch's meta device, and the cost
of a step comes from running it without numbers (`nrlib.step_cost`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .architecture import count_weights
from .backbone import backbone_shape, check_context_length
from .config import RunConfig, make_config
from .corpora.hub_datasets import parse_hub
from .hardware import Hardware
from .machine import pick_precision
from .methods import apply_method, count_extra_weights
from .profiles import FIXED_BY_METHOD, METHODS
from .step_cost import StepCost, step_cost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shapes only: sizes as the models' own configuration files give them, so that a plan needs no network. Training with such
# a name loads the model itself from the hub; `english-1.3b` is a shape of the size of the paper's English-only model, of
# which no weights are public.
SHAPES: dict[str, dict[str, Any]] = {
    "google/gemma-2b": {
        "model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 16384, "vocab_size": 256_000,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "english-1.3b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 5504, "vocab_size": 32_000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip

ASSUMED_BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True)
class Plan:
    """What one method costs.

    width, rank : of each adapter, or of LoRA; None where there is none.
    cost, cost_with_checkpointing : of one optimiser step, without and with activation checkpointing.
    hours, hours_with_checkpointing : of the whole training on one device.
    """

    method: str
    width: int | None
    rank: int | None
    n_backbone_weights: int
    n_extra_weights: int
    n_trainable_weights: int
    cost: StepCost
    cost_with_checkpointing: StepCost
    hours: float
    hours_with_checkpointing: float

    @property
    def n_weights(self) -> int:
        return self.n_backbone_weights + self.n_extra_weights

    def to_dict(self) -> dict[str, Any]:
        costs = {
            name: {**asdict(cost), "peak_bytes": cost.peak_bytes}
            for name, cost in (("cost", self.cost), ("cost_with_checkpointing", self.cost_with_checkpointing))
        }
        return {**asdict(self), "n_weights": self.n_weights, **costs}


def make_plans(
    profile: str, changes: Mapping[str, Any], hardware: Hardware, methods: Sequence[str] = METHODS
) -> Iterator[Plan]:
    """The plan of each method, all with the same budget.

    Parameters
    ----------
    changes : parameters of the run that differ from the profile; a method leaves out those it does not use.

    Raises
    ------
    ConfigError, BackboneError
        For what no run could be made of.
    """
    for method in methods:
        yield make_plan(method_config(profile, changes, method), hardware)


def method_config(profile: str, changes: Mapping[str, Any], method: str) -> RunConfig:
    """The configuration of one method among several, without the changes that have no meaning for it."""
    make_config(profile, **{**changes, "method": "neutral_residues"})  # reports what is wrong for every method
    used = {name: value for name, value in changes.items() if name not in FIXED_BY_METHOD.get(method, {})}
    return make_config(profile, **{**used, "method": method})


def make_plan(config: RunConfig, hardware: Hardware) -> Plan:
    """What one run costs on one device."""
    dtype = planned_precision(config, hardware)
    costs = []
    for has_checkpointing in (False, True):
        model, n_backbone = planned_model(config)
        options = getattr(model, "peft_config", {}).get("default")
        n_extra = count_extra_weights(model, n_backbone)
        n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        costs.append(
            step_cost(
                model,
                config.method,
                config.training,
                dtype,
                has_checkpointing=has_checkpointing,
                is_accelerator=hardware.is_accelerator,
            )
        )
    hours = [config.training.n_tokens * hardware.seconds_per_token(cost, dtype) / 3600 for cost in costs]
    return Plan(
        config.method.method, getattr(options, "width", None), getattr(options, "r", None), n_backbone, n_extra,
        n_trainable, costs[0], costs[1], hours[0], hours[1],
    )  # fmt: skip


def planned_precision(config: RunConfig, hardware: Hardware) -> torch.dtype:
    """The type of the matrix products on that hardware."""
    if hardware.is_accelerator and config.training.precision == "auto":
        return torch.bfloat16
    return pick_precision(config.training.precision, torch.device("cpu"))


def planned_model(config: RunConfig) -> tuple[torch.nn.Module, int]:
    """The extended model without weights, and the number of the backbone's."""
    backbone = planned_backbone(config)
    check_context_length(config, backbone)
    n_backbone = count_weights(backbone)
    with torch.device("meta"):
        return apply_method(backbone, config.method, config.seed), n_backbone


def planned_backbone(config: RunConfig) -> PreTrainedModel:
    """The backbone on the meta device: one of SHAPES, a folder or configuration file, a hub name, or one trained here."""
    shape = SHAPES.get(config.backbone.backbone_name)
    if shape is None:
        return backbone_shape(config)
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))


def notes(config: RunConfig, hardware: Hardware, plans: Sequence[Plan]) -> list[str]:
    """What a reader of the figures should know: assumptions, what does not fit, text that would run out."""
    precision = str(planned_precision(config, hardware)).removeprefix("torch.")
    peak = hardware.tflops if precision == "bfloat16" else hardware.tflops_float32
    moving = f" + moved bytes / {hardware.bandwidth_gb:g} GB/s" if hardware.bandwidth_gb else ""
    found = [
        f"Hours: operations / ({peak:.3g} TFLOPS, {hardware.source}, {precision} x utilisation {hardware.utilisation:g}, "
        f"assumed unless you gave it){moving}. Evaluation, loading and saving are not in them."
    ]
    if config.backbone.backbone_name in SHAPES:
        found.append(f"{config.backbone.backbone_name}: a shape that nrlib knows; nothing was downloaded.")
    found += [_memory_note(config, hardware, plan) for plan in plans if plan.cost.peak_bytes > hardware.memory_gb * 1e9]
    return [*found, *_text_notes(config)]


def _memory_note(config: RunConfig, hardware: Hardware, plan: Plan) -> str:
    c, available = config.training, hardware.memory_gb * 1e9
    n_sequences = c.batch_size // c.accumulation_steps
    constant = sum(plan.cost.memory[part] for part in ("weights", "optimiser")) + 4 * plan.n_trainable_weights
    per_sequence = (plan.cost.memory["logits"] + plan.cost.memory["activations"]) / n_sequences
    fitting = (available - constant - plan.cost.memory["weight_copies"]) / per_sequence
    smaller = [n for n in range(1, n_sequences) if c.batch_size % n == 0 and n <= fitting]
    remedies = [f"accumulation_steps = {c.batch_size // max(smaller)}"] if smaller else []
    if plan.cost_with_checkpointing.peak_bytes <= available:
        remedies.append("activation checkpointing")
    remedy = " or ".join(remedies) or "a shorter context_length, a device with more memory, or several (sharded)"
    return (
        f"{plan.method} does not fit: {plan.cost.peak_bytes / 1e9:.1f} GB with {n_sequences} sequences at a time, and "
        f"there are {hardware.memory_gb:g} GB. What would: {remedy}."
    )


def _text_notes(config: RunConfig) -> Iterator[str]:
    c = config.training
    for role, share in (("new_domain", 1 - c.mix_ratio), ("proxy", c.mix_ratio)):
        kind, _, rest = getattr(config.data, role).partition(":")
        if kind != "hub" or not share:
            continue
        limit, needed = parse_hub(rest).limit, share * c.n_tokens
        if not limit.endswith("MB"):
            continue
        n_epochs = needed * ASSUMED_BYTES_PER_TOKEN / (float(limit.removesuffix("MB")) * 1e6)
        if n_epochs > 1:
            yield (
                f"{role}: {kind}:{rest} stops at {limit}, so training would read the same text about {n_epochs:,.0f} "
                f"times (at {ASSUMED_BYTES_PER_TOKEN:g} bytes a token). To read every token once, append "
                f"#{needed * ASSUMED_BYTES_PER_TOKEN / 1e6:.0f}MB to the name: all of it is held in memory."
            )
