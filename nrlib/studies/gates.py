"""What the gates of neutral residues have learned: when they open, in which layer, and for which tokens.

A study trains neutral residues as the experiments do, then reads gates and hidden units on held-out text of both
languages. Nothing in it changes the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter import ACTIVATION_FUNCTIONS, GatedAdapter
from ..backbone import delete_checkpoint
from ..batches import TokenStream, evaluation_batches
from ..config import RunConfig
from ..experiments import arm
from ..losses import adapters_with_layers
from ..records import Record
from ..runs import run_and_keep
from ..texts import PreparedText, prepare_text

TEXTS = {"old": "unseen_original", "new": "new"}
N_SINGULAR_VALUES = 24
N_DOCUMENTS = 200  # of each language
MIN_DOCUMENTS = 20  # of each language, for an area under the curve


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
    """Gates (T,) and mean |hidden unit| (H,) of every batch, by layer, while the context is open."""
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def keep(layer: int) -> Any:
        def hook(adapter: GatedAdapter, inputs: tuple[Tensor, ...], residue: Tensor) -> None:
            x = inputs[0]
            gates = adapter.gate_values(x)  # (B, T, 1)
            activate = ACTIVATION_FUNCTIONS[adapter.activation]
            hidden = gates * activate(adapter.gate_projection(x)) * adapter.input_projection(x)  # (B, T, H)
            kept.setdefault(layer, []).append((gates.flatten(), hidden.abs().flatten(0, -2).mean(0)))

        return hook

    handles = [adapter.register_forward_hook(keep(layer)) for layer, adapter in adapters_with_layers(model)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def read_gates(
    model: nn.Module, stream: TokenStream, context_length: int, n_batches: int = 8
) -> dict[int, tuple[Tensor, Tensor]]:
    """For each layer the gates (tokens,) on a text and the mean size of every hidden unit behind them (H,)."""
    with _recorded(model) as kept:
        for index, (inputs, _) in enumerate(evaluation_batches(stream, context_length)):
            if index == n_batches:
                break
            model(input_ids=inputs, use_cache=False)
    return {
        layer: (torch.cat([gates for gates, _ in parts]), torch.stack([units for _, units in parts]).mean(0))
        for layer, parts in kept.items()
    }


def area_under_curve(old: Tensor, new: Tensor) -> float:
    """The chance that a token of the new domain has a larger |gate| than one of the original domain; ties count half.

    0.5 is no detector, 1 a perfect one.
    """
    values = torch.cat([old, new]).abs().double()
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks = (last - (counts - 1) / 2)[inverse]  # mean rank of equal values
    rank_sum = ranks[len(old) :].sum().item()
    return (rank_sum - len(new) * (len(new) + 1) / 2) / (len(old) * len(new))


@torch.no_grad()
def gate_activity(
    profile: str, gate: str, gate_memory: int, local_loss: str, local_loss_weight: float, seed: int
) -> dict[str, Any]:
    """Study: train neutral residues with a gate, then describe the gates of every layer.

    Returns
    -------
    rows : for each layer the mean |gate|, share of gates exactly 0 and share open (beyond 0.01) on old and new text, the
        area under the curve of |gate| as a detector of the new language, the share of hidden units at least four times as
        active on new text as on old, and the same the other way round.
    singular_values : for each layer those of W_g over the largest.
    forgetting, learning_gain : of the run, the second in bits per byte.
    switched : tokens, and gates by layer, of a text whose language changes sentence by sentence.
    """
    config, record, model, text = _trained(profile, gate, gate_memory, local_loss, local_loss_weight, seed)
    read = {
        name: read_gates(model, text.held_out[held_out], config.training.context_length)
        for name, held_out in TEXTS.items()
    }
    rows, singular_values = [], {}
    for layer, adapter in adapters_with_layers(model):
        (old, old_units), (new, new_units) = read["old"][layer], read["new"][layer]
        row: dict[str, Any] = {"layer": layer, "auc": area_under_curve(old, new)}
        for name, gates in (("old", old), ("new", new)):
            row |= {
                f"mean_{name}": gates.abs().mean().item(),
                f"zero_{name}": (gates == 0).float().mean().item(),
                f"open_{name}": (gates.abs() > 0.01).float().mean().item(),
            }
        row["units_new"] = (new_units > 4 * old_units).float().mean().item()
        row["units_old"] = (old_units > 4 * new_units).float().mean().item()
        rows.append({key: round(value, 5) for key, value in row.items()})
        projection: Any = adapter.gate_projection  # of a gated adapter: this study has no persistent vectors
        values = torch.linalg.svdvals(projection.weight)[:N_SINGULAR_VALUES]
        singular_values[str(layer)] = [round(v, 4) for v in (values / values[0]).tolist()]
    before, after = record.results["backbone_bits_per_byte"], record.results["bits_per_byte"]
    return {
        "rows": rows, "singular_values": singular_values,
        "forgetting": record.results["forgetting"]["unseen_original"],
        "learning_gain": round(before["new"] - after["new"], 5),
        "switched": switched_text(model, text),
    }  # fmt: skip


@torch.no_grad()
def gates_by_document(
    profile: str, gate: str, gate_memory: int, local_loss: str, local_loss_weight: float, seed: int
) -> dict[str, Any]:
    """Study: train neutral residues with a gate, then read held-out documents of both languages, each by itself.

    Returns
    -------
    documents : by language, 'old' and 'new', the mean |gate| of each document over its tokens and all layers.
    auc : the area under the curve of that number as a detector of documents of the new language.
    auc_by_token : the same when no more than the first 1, 2, 4 … tokens of a document are read, by layer and, under 'mean',
        for the mean over layers; of documents that have so many.
    """
    config, _, model, text = _trained(profile, gate, gate_memory, local_loss, local_loss_weight, seed)
    read = {
        name: read_documents(model, text.held_out[held_out], config.training.context_length)
        for name, held_out in TEXTS.items()
    }
    documents = {name: torch.stack([gates.mean() for gates in found]) for name, found in read.items()}
    auc_by_token: dict[str, dict[str, float]] = {}
    n_tokens = 1
    while all(sum(gates.shape[1] >= n_tokens for gates in found) >= MIN_DOCUMENTS for found in read.values()):
        begun = {
            name: torch.stack([gates[:, :n_tokens].mean(1) for gates in found if gates.shape[1] >= n_tokens])
            for name, found in read.items()
        }  # (documents, layers)
        by_layer = {
            str(layer): (begun["old"][:, layer], begun["new"][:, layer]) for layer in range(begun["old"].shape[1])
        }
        by_layer["mean"] = (begun["old"].mean(1), begun["new"].mean(1))
        auc_by_token[str(n_tokens)] = {name: round(area_under_curve(*pair), 5) for name, pair in by_layer.items()}
        n_tokens *= 2
    return {
        "documents": {name: [round(v, 5) for v in values.tolist()] for name, values in documents.items()},
        "auc": round(area_under_curve(documents["old"], documents["new"]), 5),
        "auc_by_token": auc_by_token,
    }


def read_documents(
    model: nn.Module, stream: TokenStream, context_length: int, n_documents: int = N_DOCUMENTS
) -> list[Tensor]:
    """|gate| (layers, tokens) of documents spread evenly over a text, each read by itself after an end-of-text token (or
    what the stream's windows begin with), which is left out; of a long one no more than a context."""
    ends = np.flatnonzero(stream.tokens == stream.tokens[0])  # a text begins and ends with the separator
    chosen = np.unique(np.linspace(0, len(ends) - 2, min(n_documents, len(ends) - 1)).round().astype(int))
    found = []
    for start, end in zip(ends[chosen], ends[chosen + 1], strict=True):
        tokens = stream.sequence(start, min(end, start + context_length))
        if tokens.shape[1] > 1:
            with _recorded(model) as kept:
                model(input_ids=tokens, use_cache=False)
            found.append(torch.stack([kept[layer][0][0][1:].abs() for layer in sorted(kept)]))
    return found


def _trained(
    profile: str, gate: str, gate_memory: int, local_loss: str, local_loss_weight: float, seed: int
) -> tuple[RunConfig, Record, nn.Module, PreparedText]:
    config = arm(
        profile, "neutral_residues", gate=gate, gate_memory=gate_memory, local_loss=local_loss,
        local_loss_weight=local_loss_weight, seed=seed,
    )  # fmt: skip
    with torch.enable_grad():
        record, model = run_and_keep(config, notebook="gates", progress=False)
    delete_checkpoint(config.run_id)
    return config, record, model.eval(), prepare_text(config.data, config.backbone, progress=False)


def switched_text(model: nn.Module, text: PreparedText, n_tokens: int = 24, n_switches: int = 4) -> dict[str, Any]:
    """Pieces of held-out old and new text in turn, read as one sequence: tokens and gates by layer."""
    pieces: list[Tensor] = []
    for turn in range(n_switches):
        stream = text.held_out[TEXTS["old" if turn % 2 == 0 else "new"]]
        start = 400 + 37 * turn
        pieces.append(torch.as_tensor(stream.tokens[start : start + n_tokens].astype("int64")))
    tokens = torch.cat(pieces)
    with _recorded(model) as kept:
        model(input_ids=tokens[None], use_cache=False)
    return {
        "tokens": [text.tokenizer.decode([token]) for token in tokens.tolist()],
        "language": ["old" if (i // n_tokens) % 2 == 0 else "new" for i in range(len(tokens))],
        "gates": {str(layer): [round(v, 3) for v in parts[0][0].tolist()] for layer, parts in kept.items()},
    }
