"""What a transformer of `nrlib.companions.associative_memory` still knows of an old language, and knows of a new one, after
an extension: read off memory by memory, by what it does, by its weights, and by putting parts back as they were.

The two languages share part of their vocabulary and two of their triggers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .associative_memory import MemoryTransformer, behaviour, table_divergence
from .associative_memory_bigrams import BigramLanguage, Sequences

N_TOKENS = 64
OLD_TOKENS, SHARED_TOKENS, NEW_TOKENS = range(24), range(24, 40), range(40, 64)
OLD_TRIGGERS, SHARED_TRIGGERS, NEW_TRIGGERS = (0, 1, 2), (24, 25), (61, 62, 63)
GROUPS = {"old": OLD_TOKENS, "shared": SHARED_TOKENS, "new": NEW_TOKENS}
PARTS = {"key_1": "keys.0", "key_2": "keys.1", "output": "outputs.1", "feed_forward": "feed_forward"}


@torch.no_grad()
def read_memories(model: MemoryTransformer, language: BigramLanguage, batch: Sequences) -> dict[str, float]:
    """What the model's memories do on sequences of a language.

    Returns
    -------
    loss, and what `behaviour` returns; `divergence`, the mean KL divergence in nats from the language's table to the
    prediction after tokens that are no triggers, and the same by token group: `divergence_shared` and so on.
    """
    found = {"loss": mean_loss(model, batch), **behaviour(model, batch)}
    is_global = batch.occurrence == 0
    log_predictions = model(batch.inputs).log_softmax(-1)
    divergence = table_divergence(log_predictions, language.bigram[batch.inputs])  # (B, T)
    found["divergence"] = divergence[is_global].mean().item()
    for group, tokens in GROUPS.items():
        if (chosen := is_global & _is_among(batch.inputs, tokens)).any():
            found[f"divergence_{group}"] = divergence[chosen].mean().item()
    return found


@torch.no_grad()
def drift(model: MemoryTransformer, backbone: MemoryTransformer, batch: Sequences) -> float:
    """Mean KL divergence in nats from the backbone's predictions to the model's."""
    before, after = (m(batch.inputs).log_softmax(-1).flatten(0, 1) for m in (backbone, model))
    return F.kl_div(after, before, log_target=True, reduction="batchmean").item()  # exactly 0 for equal predictions


def weight_changes(model: MemoryTransformer, backbone: MemoryTransformer) -> dict[str, float]:
    """||W - W_backbone|| / ||W_backbone|| of each memory; exactly 0 for one that was left alone."""
    before = dict(backbone.named_parameters())
    after = dict(model.named_parameters())
    return {
        part: ((after[name] - before[name]).norm() / before[name].norm()).item()
        for part, name in PARTS.items()
        if name in before
    }


def restored(model: MemoryTransformer, backbone: MemoryTransformer) -> Iterator[tuple[str, MemoryTransformer]]:
    """The model with one part as it was before the extension, for each part that has changed: with a matrix of the
    backbone, or without the adapter of a layer."""
    before, after = dict(backbone.named_parameters()), dict(model.named_parameters())
    for part, name in PARTS.items():
        if not torch.equal(after[name], before[name]):
            changed = copy.deepcopy(model)
            changed.load_state_dict({**model.state_dict(), name: before[name]})
            yield part, changed
    for layer in range(len(model.adapters)):
        changed = copy.deepcopy(model)
        adapter: Any = changed.adapters[layer]
        adapter.output_projection.weight.data.zero_()
        yield f"adapter_{layer + 1}", changed


@torch.no_grad()
def reuse(model: MemoryTransformer, batch: Sequences) -> dict[str, float]:
    """In-context accuracy on the new language, by whether the old one has the trigger and by whether it has the output;
    then what is left of it, over all, when one memory of the induction head is emptied."""

    def accuracy(model: MemoryTransformer, chosen: Tensor) -> float:
        return (model(batch.inputs).argmax(-1) == batch.targets)[chosen].double().mean().item()

    has_old_trigger = _is_among(batch.inputs, SHARED_TRIGGERS)
    has_old_output = _is_among(batch.targets, SHARED_TOKENS)
    found = {}
    for trigger, is_trigger in (("old", has_old_trigger), ("new", ~has_old_trigger)):
        for output, is_output in (("old", has_old_output), ("new", ~has_old_output)):
            chosen = batch.is_in_context & is_trigger & is_output
            found[f"{trigger}_trigger_{output}_output"] = accuracy(model, chosen)
    for part in ("key_1", "key_2", "output"):
        cut = copy.deepcopy(model)
        dict(cut.named_parameters())[PARTS[part]].data.zero_()
        found[f"without_{part}"] = accuracy(cut, batch.is_in_context)
    return found


@torch.no_grad()
def match_scores(model: MemoryTransformer, batch: Sequences) -> dict[str, float]:
    """How a trigger finds, in layer 2, what followed it: its mean score there over that on all earlier tokens, for old and
    new triggers, and as a sum of two parts: `stream`, what W_K2 makes of the backbone's own hidden states, and
    `residue`, what the adapter of layer 1 adds to them. Empty for a model without adapters."""
    if not model.adapters:
        return {}
    with _captured(model) as outputs:
        model(batch.inputs)
    stream, residue = outputs[0]
    followed = F.pad(batch.inputs, (1, -1), value=-1)
    is_earlier = torch.ones(batch.inputs.shape[1], batch.inputs.shape[1], dtype=torch.bool).tril()
    is_match = (batch.inputs[:, :, None] == followed[:, None, :]) & is_earlier  # (B, T, T)

    def advantage(x: Tensor, chosen: Tensor) -> float:
        scores = x @ (x @ model.keys[1].T).transpose(1, 2) / x.shape[-1] ** 0.5
        matched = (scores * is_match).sum(-1) / is_match.sum(-1).clamp(min=1)
        everywhere = (scores * is_earlier).sum(-1) / is_earlier.sum(-1)
        return (matched - everywhere)[chosen].mean().item()

    found = {}
    for name, triggers in (("old", SHARED_TRIGGERS), ("new", NEW_TRIGGERS)):
        chosen = batch.is_in_context & _is_among(batch.inputs, triggers)
        found[f"{name}_trigger_stream"] = advantage(stream, chosen)
        found[f"{name}_trigger_residue"] = advantage(stream + residue, chosen) - found[f"{name}_trigger_stream"]
    return found


@torch.no_grad()
def residues(model: MemoryTransformer, batch: Sequences) -> dict[str, float]:
    """Mean ||residue||_1 / D of each adapter by the token it stands at: `adapter_1_shared` and so on."""
    with _captured(model) as outputs:
        model(batch.inputs)
    found = {}
    for layer, (_, residue) in enumerate(outputs, 1):
        size = residue.abs().mean(-1)  # (B, T)
        for group, tokens in GROUPS.items():
            if (chosen := _is_among(batch.inputs, tokens)).any():
                found[f"adapter_{layer}_{group}"] = size[chosen].mean().item()
    return found


@contextmanager
def _captured(model: MemoryTransformer) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, what goes into each adapter and the residue that comes out, layer by layer."""
    outputs: list[tuple[Tensor, Tensor]] = []
    handles = [a.register_forward_hook(lambda _m, x, residue: outputs.append((x[0], residue))) for a in model.adapters]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _is_among(values: Tensor, tokens: Any) -> Tensor:
    return torch.isin(values, torch.tensor(list(tokens)))


@torch.no_grad()
def mean_loss(model: MemoryTransformer, batch: Sequences) -> float:
    """Cross-entropy over all tokens, in nats per token."""
    return F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten()).item()
