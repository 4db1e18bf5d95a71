"""Neutral residues as a PEFT method: injection, switching, saving and loading come from PEFT.

import nrlib
model = peft.get_peft_model(backbone, nrlib.NeutralResiduesConfig(extra_ratio=0.2))
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from .adapter import GatedAdapter, GatedResidue
from .architecture import (
    JoinedFeedForward,
    attention_shape,
    count_layers,
    find_blocks,
    layer_children,
    model_width,
    select_layers,
    width_for_budget,
)
from .config import MethodConfig, check_gate_memory, check_layers, check_placement, check_value
from .errors import ConfigError
from .gate_memory import BlockGate, Sequences
from .model_card import write_model_card
from .persistent_memory import PersistentMemory
from .profiles import PRESETS
from .sparse_inference import add_residue
from .weights import check_fit, refuse_pickles, shapes_differ

PEFT_NAME = "neutral_residues"
_FIELDS = {f.name: f for f in dataclasses.fields(MethodConfig)}
_DEFAULTS: dict[str, Any] = {name: f.default for name, f in _FIELDS.items()}


def _extend_peft_types() -> None:
    # PEFT's registry takes only members of this closed enum. A member of that name in a later PEFT wins.
    if PEFT_NAME.upper() in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_NAME.upper())
    member._name_, member._value_ = PEFT_NAME.upper(), PEFT_NAME.upper()
    PeftType._member_map_[member.name] = member
    PeftType._value2member_map_[member.value] = member
    PeftType._member_names_.append(member.name)
    type.__setattr__(PeftType, member.name, member)


_extend_peft_types()


@dataclass
class NeutralResiduesConfig(PeftConfig):
    """Options of the adapters; each is described at the field of the same name in `nrlib.config.MethodConfig`."""

    extra_ratio: float = _DEFAULTS["extra_ratio"]
    gate: str = _DEFAULTS["gate"]
    local_loss: str = _DEFAULTS["local_loss"]
    local_loss_weight: float = _DEFAULTS["local_loss_weight"]
    initialisation: str = _DEFAULTS["initialisation"]
    activation: str = _DEFAULTS["activation"]
    position: str = _DEFAULTS["position"]
    site: str = _DEFAULTS["site"]
    layers: str | list[int] = _DEFAULTS["layers"]
    gate_memory: int | None = field(
        default=None,
        metadata={"help": "tokens the block gate weighs together; None: the recommended number, 1 without a gate"},
    )
    width: int | None = field(
        default=None,
        metadata={
            "help": "adapter width H, or number N of persistent vectors of each head; None: as wide as extra_ratio allows, "
            "filled in at injection"
        },
    )
    target_modules: list[str] | tuple[str, ...] | None = field(
        default=None, metadata={"help": "full names of the wrapped blocks; None: found from site and layers"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_NAME.upper()]
        if isinstance(self.layers, (list, tuple)):
            self.layers = ",".join(str(index) for index in self.layers)
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        if self.gate_memory is None:
            self.gate_memory = 1 if self.gate == "none" else PRESETS["recommended"]["gate_memory"]
        for name in _FIELDS.keys() & {f.name for f in dataclasses.fields(self)} - {"layers"}:
            value, declared = getattr(self, name), _FIELDS[name]
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            check_value(name, float(value) if is_whole and isinstance(declared.default, float) else value, declared)
        if self.width is not None and (
            isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1
        ):
            raise ConfigError(
                f"width = {self.width!r}: allowed are whole numbers from 1, or None for as wide as extra_ratio pays for."
            )
        check_layers(self.layers)
        check_placement(self.position, self.site, self.activation)
        check_gate_memory(self.gate, self.gate_memory)
        if self.local_loss == "domain_cross_entropy" and self.gate == "none":
            raise ConfigError(
                "local_loss = 'domain_cross_entropy' trains the block gate as a domain classifier, but gate = 'none'. "
                "Choose gate = 'sigmoid' (the paper's pairing), or local_loss = 'l1' or 'none'."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the options; PEFT does so first, so that a pickle beside them is refused before it is opened."""
        refuse_pickles(Path(pretrained_model_name_or_path) / (subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the options, and a model card that says how to load them."""
        super().save_pretrained(save_directory, **kwargs)
        write_model_card(self, save_directory)


class NeutralResiduesLayer(nn.Module, BaseTunerLayer):
    """A backbone block (feed-forward or attention) with adapters beside it.

    parallel: output = block(x) + residue(x); serial: output = block(x) + residue(block(x)). Persistent memory is parallel,
    and reads with the block's own queries.
    """

    adapter_layer_names = ("neutral_residues_adapters",)
    other_param_names = ("neutral_residues_positions",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.neutral_residues_adapters = nn.ModuleDict()
        self.neutral_residues_positions: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # copied or unpickled, and not filled yet
                raise
            return getattr(self.base_layer, name)  # some decoder layers ask their block what it is (Gemma 3, OLMoE)

    def update_layer(self, adapter_name: str, config: Any, d_model: int, n_layers: int) -> None:
        """Add an adapter, on the device of the block: of its first weight (a buffer, where a library packs them) that is in
        memory. Of a block that is offloaded as a whole the device is not known."""
        width, gate, initialisation = config.width, config.gate, config.initialisation
        memory = config.gate_memory
        adapter: GatedResidue
        if config.site == "persistent_memory":
            n_heads, d_head = attention_shape(self.base_layer)
            adapter = PersistentMemory(d_model, n_heads, d_head, width, n_layers, gate, initialisation, memory)
        else:
            adapter = GatedAdapter(d_model, width, n_layers, gate, initialisation, config.activation, memory)
        weights = itertools.chain(self.base_layer.parameters(), self.base_layer.buffers())
        weight = next((w for w in weights if not w.is_meta), None)
        if weight is not None and not any(p.is_meta for p in adapter.parameters()):
            adapter.to(weight.device, weight.dtype if weight.dtype.is_floating_point else None)
        self.neutral_residues_adapters[adapter_name] = adapter
        self.neutral_residues_positions[adapter_name] = config.position
        self.set_adapter(self.active_adapters)

    def active_adapter_modules(self) -> list[GatedResidue]:
        """The adapters that take part in the forward pass now."""
        if self.disable_adapters:
            return []
        adapters: Any = self.neutral_residues_adapters
        return [adapters[name] for name in self.active_adapters if name in adapters]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        x = args[0] if args else kwargs["hidden_states"]  # (B, T, D)
        block_output = output[0] if isinstance(output, tuple) else output
        extended = block_output
        adapters: Any = self.neutral_residues_adapters
        for name in self.active_adapters:
            if name not in adapters:
                continue
            adapter = adapters[name]
            if isinstance(adapter, PersistentMemory):
                extended = extended + adapter(x, self.base_layer).to(extended.dtype)
            else:
                adapter_input = x if self.neutral_residues_positions[name] == "parallel" else block_output
                extended = add_residue(extended, adapter, adapter_input)
        return (extended, *output[1:]) if isinstance(output, tuple) else extended

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_CANNOT_MERGE)


_CANNOT_MERGE = (
    "A neutral residue depends on its input through a gate, so it cannot be merged into the backbone's weights. Keep "
    "the adapter beside the backbone, or call unload() to get the backbone back."
)


class NeutralResiduesModel(BaseTuner):
    """The PEFT tuner: finds the blocks, replaces them by `NeutralResiduesLayer`s."""

    prefix = "neutral_residues_"
    tuner_layer_cls = NeutralResiduesLayer
    sequences: Sequences | None = None  # for gates with a memory

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> NeutralResiduesConfig:
        for name, value in getattr(peft_config, "_filled_in", {}).items():  # for another model, perhaps of another size
            if getattr(peft_config, name) == value:
                setattr(peft_config, name, None)
        filled_in: dict[str, Any] = {}
        if peft_config.target_modules is None:
            names = find_blocks(self.model, peft_config.site)
            filled_in["target_modules"] = [names[index] for index in select_layers(peft_config.layers, len(names))]
        targets = filled_in.get("target_modules", peft_config.target_modules)
        known = {name for name, _ in self.model.named_modules()}
        missing = [name for name in targets if name not in known]
        if missing:
            raise ConfigError(
                f"target_modules names {missing[0]!r}, which {type(self.model).__name__} does not have. Its decoder layers "
                f"hold: {', '.join(layer_children(self.model))}."
            )
        per_unit = 3 * model_width(self.model)
        if peft_config.site == "persistent_memory":  # asked of every block, before any is changed
            per_unit = 2 * max(math.prod(attention_shape(self.model.get_submodule(name))) for name in targets)
        if peft_config.width is None:
            has_gate = peft_config.gate != "none"
            filled_in["width"] = width_for_budget(self.model, peft_config.extra_ratio, len(targets), has_gate, per_unit)
        for name, value in filled_in.items():
            setattr(peft_config, name, value)
        # From 20 names on, PEFT abbreviates a list or set of them to endings; a tuple it leaves alone.
        peft_config.target_modules = tuple(targets)
        if "target_modules" in filled_in:
            filled_in["target_modules"] = peft_config.target_modules
        peft_config._filled_in = filled_in
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.target_modules  # full names: nothing is matched by accident or skipped in silence

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if target_name == "fc1" and not isinstance(target, NeutralResiduesLayer):
            target = JoinedFeedForward.join(parent)
        layer = target if isinstance(target, NeutralResiduesLayer) else NeutralResiduesLayer(target)
        layer.update_layer(adapter_name, peft_config, model_width(self.model), count_layers(self.model))
        adapter: Any = layer.neutral_residues_adapters[adapter_name]
        self._tell_of_sequences(adapter.block_gate, current_key)
        if adapter_name not in self.active_adapters:
            layer.neutral_residues_adapters[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _tell_of_sequences(self, gate: BlockGate | None, block_name: str) -> None:
        if gate is None or gate.memory == 1:
            return
        if self.sequences is None:
            self.sequences = Sequences.of(self.model, block_name, count_layers(self.model))
        self.sequences.follow(gate)

    def unload(self) -> nn.Module:
        if self.sequences is not None:
            self.sequences.remove()
            self.sequences = None
        return super().unload()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own version reads `.weight`, which a whole block lacks
        if isinstance(new_module, JoinedFeedForward):  # the adapters are being removed
            new_module.split(parent)

    def _check_merge_allowed(self) -> None:
        raise ValueError(_CANNOT_MERGE)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's default looks for the name in the last two parts only; an adapter here is a module with parts.
        return key.replace(f"neutral_residues_adapters.{adapter_name}.", "neutral_residues_adapters.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        # Everything PEFT loads passes here. It warns of missing weights at most, and says nothing of unknown ones.
        given = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        part = f"neutral_residues_adapters.{adapter_name}."
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if part in name}
        found = {name: tuple(value.shape) for name, value in given.items()}
        known = {f"{start}{name}" for name in model.state_dict() for start in ("", "base_model.model.")}
        check_fit(
            f"the adapter {adapter_name!r}",
            f"{type(model).__name__} with width = {config.width} in {len(config.target_modules)} blocks",
            missing=expected.keys() - found.keys(),
            unexpected=found.keys() - known,  # saved embeddings, for one, are known
            mismatched=[
                shapes_differ(name, found[name], shape)
                for name, shape in expected.items()
                if found.get(name, shape) != shape
            ],
            remedy="Load them with the adapter_config.json they were saved with, into the backbone they were trained on.",
        )
        return given


register_peft_method(name=PEFT_NAME, config_cls=NeutralResiduesConfig, model_cls=NeutralResiduesModel)


def active_adapters(model: nn.Module) -> list[GatedResidue]:
    """The adapters that take part in the forward pass of `model`, first layer first."""
    return [adapter for _, adapter in adapters_with_layers(model)]


def adapters_with_layers(model: nn.Module) -> list[tuple[int, GatedResidue]]:
    """The active adapters, each with the index of its decoder layer, first layer first."""
    modules = list(model.named_modules())
    blocks = [(name, m.active_adapter_modules()) for name, m in modules if isinstance(m, NeutralResiduesLayer)]
    if not blocks:  # adapters used without PEFT
        blocks = [(name, [m]) for name, m in modules if isinstance(m, GatedResidue)]
    return [(_last_index(name), adapter) for name, adapters in blocks for adapter in adapters]


def active_config(model: nn.Module) -> NeutralResiduesConfig:
    """The options of the active adapter, which say what its local loss is.

    Raises
    ------
    ConfigError
        When no neutral residues are active, or several with different local losses.
    """
    layer = next((m for m in model.modules() if isinstance(m, NeutralResiduesLayer)), None)
    options: dict[str, Any] = getattr(model, "peft_config", {})
    names = [] if layer is None else [n for n in layer.active_adapters if n in layer.neutral_residues_adapters]
    configs = [options[name] for name in names if name in options]
    if not configs:
        raise ConfigError(
            f"{type(model).__name__} has no active neutral residues, so there is no local loss. Extend it with "
            "get_peft_model(model, nrlib.NeutralResiduesConfig()), or activate the adapter with set_adapter."
        )
    if len({(c.local_loss, c.local_loss_weight) for c in configs}) > 1:
        raise ConfigError(
            f"The active adapters {', '.join(names)} have different local losses. Train one at a time: set_adapter."
        )
    return configs[0]


def _last_index(name: str) -> int:
    return next((int(part) for part in reversed(name.split(".")) if part.isdecimal()), 0)
