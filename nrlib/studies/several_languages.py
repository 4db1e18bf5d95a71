"""Several new languages in one model: all at once, one after the other, each in an adapter of its own, or in turn with
text of the earlier ones mixed in.

The backbone is the experiments' own. Every step is as long as a run of one language; with replay a part of the later ones
is text of the earlier languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..backbone import get_backbone
from ..batches import MixedBatches
from ..config import RunConfig
from ..errors import ConfigError
from ..evaluation import bits_per_byte
from ..experiments import arm
from ..machine import seeded
from ..methods import apply_method
from ..profiles import PRESETS
from ..runs import make_batches
from ..texts import PreparedText, prepare_text
from ..training import train

WAYS = ("one after the other", "all at once", "an adapter each", "in turn with replay")


def several_languages(profile: str, languages: Sequence[str], way: str, method: str, seed: int) -> dict[str, Any]:
    """Study: teach the backbone several languages and measure all of them after each step.

    Parameters
    ----------
    languages : corpora of the new domains, in the order in which they are learned.
    way : one of WAYS. 'an adapter each' trains adapters apart and adds up their residues: each token's gates decide.
        'in turn with replay' mixes text of each earlier language in with the new one, as large a share as the original domain
        has; methods with adapters keep the earlier ones as they are and add one for each language.
    method : 'neutral_residues', as recommended, or any other; only methods with adapters can go 'an adapter each'.

    Returns
    -------
    stages : one dictionary for the backbone and one after each step, `stage` and bits per byte by text, where 'original' is
        held-out text of the original domain outside the proxy.

    Raises
    ------
    ConfigError
        For an unknown way, or a method that cannot go it.
    """
    if way not in WAYS or (way == "an adapter each" and method not in ("neutral_residues", "vanilla_adapter")):
        raise ConfigError(
            f"way = {way!r} with method = {method!r} is not possible. Ways: {', '.join(WAYS)}; adapters of their own only "
            "with neutral_residues or vanilla_adapter."
        )
    options = PRESETS["recommended"] if method == "neutral_residues" else {}
    configs = [arm(profile, method, new_domain=language, seed=seed, **options) for language in languages]
    texts = [prepare_text(config.data, config.backbone, progress=False) for config in configs]
    held_out = {"original": texts[0].held_out["unseen_original"]}
    held_out |= {language: text.held_out["new"] for language, text in zip(languages, texts, strict=True)}
    context_length = configs[0].training.context_length

    def measure(stage: str, model: nn.Module) -> dict[str, Any]:
        values = {name: bits_per_byte(model, stream, context_length) for name, stream in held_out.items()}
        return {"stage": stage, **{name: round(value, 5) for name, value in values.items()}}

    backbone = get_backbone(configs[0], texts[0], progress=False)
    stages = [measure("backbone", backbone.eval())]
    model: Any = apply_method(backbone, configs[0].method, seed)
    if way == "one after the other":
        for config, text in zip(configs, texts, strict=True):
            _teach(model, config, make_batches(config, text))
            stages.append(measure(config.data.new_domain, model))
    elif way == "all at once":
        _teach(model, configs[0], _pooled_batches(configs, texts))
        stages.append(measure("all", model))
    elif way == "an adapter each":
        _teach(model, configs[0], make_batches(configs[0], texts[0]))
        stages.append(measure(languages[0], model))
        for config, text in zip(configs[1:], texts[1:], strict=True):
            _add_adapter(model, config, text)
            stages.append(measure(config.data.new_domain, model))
    else:
        for index, (config, text) in enumerate(zip(configs, texts, strict=True)):
            if index and isinstance(model, PeftModel):
                _stack_adapter(model, config)
            replayed = _with_earlier(text, texts[:index], config.training.mix_ratio)
            n_adapters = 1 + index if isinstance(model, PeftModel) else 1
            _teach(model, config, make_batches(config, replayed), n_adapters)
            stages.append(measure(config.data.new_domain, model))
    return {"stages": stages}


def _teach(model: nn.Module, config: RunConfig, batches: MixedBatches, n_adapters: int = 1) -> None:
    method = config.method
    train(
        model, batches, config.training, local_loss=method.local_loss,
        local_loss_weight=n_adapters * method.local_loss_weight,  # the local loss is a mean over all active adapters
        description=config.run_id, progress=False,
    )  # fmt: skip


def _pooled_batches(configs: Sequence[RunConfig], texts: Sequence[PreparedText]) -> MixedBatches:
    """Batches of all languages together, as many as they would have one by one."""
    c = configs[0].training
    shortest = min(len(text.new.tokens) for text in texts)  # an equal share of each
    tokens = np.concatenate([text.new.tokens[:shortest] for text in texts])
    n_bytes = sum(text.new.n_bytes for text in texts)
    pooled = replace(texts[0].new, tokens=tokens, n_bytes=n_bytes, name="all languages")
    n_steps = len(configs) * (c.n_tokens // (c.batch_size * c.context_length))
    return MixedBatches(
        pooled, texts[0].proxy, mix_ratio=c.mix_ratio, n_steps=n_steps, batch_size=c.batch_size,
        context_length=c.context_length, seed=configs[0].seed,
    )  # fmt: skip


def _with_earlier(text: PreparedText, earlier: Sequence[PreparedText], share: float) -> PreparedText:
    """The text with so much of each earlier language among that of the new one that `share` of all sequences are of it,
    where the original domain has the same share; it is the beginning of their training text."""
    if not earlier:
        return text
    left = 1 - share * (1 + len(earlier))
    if left <= 0:
        raise ConfigError(
            f"A mix ratio of {share:g} for the original domain and each of {len(earlier)} earlier languages leaves nothing "
            "for the new one. Lower mix_ratio, or teach fewer languages."
        )
    n_replayed = round(share * len(text.new.tokens) / left)
    parts = [text.new.tokens, *(np.resize(other.new.tokens, n_replayed) for other in earlier)]  # repeated if too short
    n_bytes = sum(
        round(len(part) * t.new.n_bytes / len(t.new.tokens)) for part, t in zip(parts, (text, *earlier), strict=True)
    )
    name = f"{text.new.name} with replay"
    return replace(text, new=replace(text.new, tokens=np.concatenate(parts), n_bytes=n_bytes, name=name))


def _stack_adapter(model: Any, config: RunConfig) -> None:
    """Put new adapters beside those of `model`; they alone are trained from here on."""
    name = _adapter_name(config)
    with seeded(config.seed):
        model.add_adapter(name, model.peft_config["default"])
    model.base_model.set_adapter([*model.active_adapters, name])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{name}." in parameter_name)


def _add_adapter(model: Any, config: RunConfig, text: PreparedText) -> None:
    """Train adapters for one more language on a backbone of their own, and put them beside those of `model`."""
    other: Any = apply_method(get_backbone(config, text, progress=False), config.method, config.seed)
    _teach(other, config, make_batches(config, text))
    name = _adapter_name(config)
    model.add_adapter(name, other.peft_config["default"])
    set_peft_model_state_dict(model, get_peft_model_state_dict(other), adapter_name=name)
    model.base_model.set_adapter([*model.active_adapters, name])
    model.eval()


def _adapter_name(config: RunConfig) -> str:
    return config.data.new_domain.replace(":", "_").replace(".", "_").replace("/", "_")
