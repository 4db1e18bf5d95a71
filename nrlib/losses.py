"""The local loss and the gate statistics: what adapters say about each domain (arXiv 2410.02744, section 3).

    training loss = language-model loss + local_loss_weight · local loss

Both are collected with forward hooks that reduce each layer at once to a sum and a count, so nothing of size (B, T, D)
outlives its layer, nothing is stored on a module, and sums over data-parallel shards can simply be added.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import GATE_FUNCTIONS, GatedResidue
from .config import LOCAL_LOSSES
from .errors import ConfigError
from .peft_method import active_adapters, adapters_with_layers

ORIGINAL, NEW, IGNORED = 0, 1, -1  # domain of a token; IGNORED is padding


def is_counted(kind: str, domain: Tensor) -> Tensor:
    """Which tokens or sequences enter a local loss: the original domain's for 'l1', all of them for the other kinds."""
    return domain == ORIGINAL if kind == "l1" else domain != IGNORED


class LocalLoss:
    """Collects the local loss of every active adapter during one forward pass.

    Use as a context around the forward *and* the backward pass, so that activation checkpointing, which runs the
    forward pass again during the backward pass, repeats the same operations; each adapter counts once all the same.

        with LocalLoss(model, "l1", domain) as local_loss:
            loss = model(tokens).loss + local_loss_weight * local_loss.mean()
            loss.backward()

    Parameters
    ----------
    model : any module that contains `GatedResidue`s.
    kind : 'l1', mean over layers and original-domain tokens of ||residue||_1 / D; 'domain_cross_entropy', mean over
        layers and tokens of the cross-entropy of the gate as a classifier of the new domain; 'l1_everywhere', like 'l1'
        over the tokens of both domains, to see what being local is worth; or 'none'.
    domain : (B,) or (B, T), ORIGINAL, NEW or IGNORED for each sequence or token.
    """

    def __init__(self, model: nn.Module, kind: str, domain: Tensor) -> None:
        if kind not in LOCAL_LOSSES:
            raise ConfigError(f"The local loss {kind!r} is unknown. Choose one of: {', '.join(LOCAL_LOSSES)}.")
        if not isinstance(domain, Tensor) or domain.is_floating_point() or domain.dim() not in (1, 2):
            raise ConfigError(
                "domain must be a tensor of whole numbers of shape (B,) or (B, T), for each sequence or token "
                f"nrlib.ORIGINAL, nrlib.NEW or nrlib.IGNORED; given is {domain!r:.80}."
            )
        self.adapters = [] if kind == "none" else active_adapters(model)
        if kind == "domain_cross_entropy" and any(adapter.block_gate is None for adapter in self.adapters):
            raise ConfigError(
                "The local loss 'domain_cross_entropy' trains block gates, but an adapter has gate = 'none'. Choose gate = "
                "'sigmoid', or the local loss 'l1' or 'none'."
            )
        if kind != "none" and not any(isinstance(module, GatedResidue) for module in model.modules()):
            raise ConfigError(
                f"The local loss {kind!r} is a loss on adapters, and {type(model).__name__} has none. Extend it with "
                "get_peft_model(model, NeutralResiduesConfig()) first, or choose the local loss 'none'."
            )
        self.kind = kind
        self.domain = domain
        self._sums: dict[nn.Module, Tensor] = {}
        self._counts: dict[nn.Module, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> LocalLoss:
        for adapter in self.adapters:
            if self.kind != "domain_cross_entropy":
                self._handles.append(adapter.register_forward_hook(self._add_l1))
            elif adapter.block_gate is not None:
                self._handles.append(adapter.block_gate.register_forward_hook(self._add_cross_entropy))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def sum_and_count(self) -> tuple[Tensor, Tensor]:
        """Sum over layers and tokens, and number of (layer, token) pairs: what to add up over data-parallel ranks."""
        if self.adapters and not self._sums:
            raise RuntimeError("The local loss has collected nothing: run the model inside the `with` block first.")
        if not self._sums:
            zero = torch.zeros((), device=self.domain.device)
            return zero, zero
        return torch.stack(list(self._sums.values())).sum(), torch.stack(list(self._counts.values())).sum()

    def mean(self) -> Tensor:
        """The local loss, a scalar; 0 for a batch without a token that counts."""
        total, count = self.sum_and_count()
        return total / count.clamp(min=1)

    def _add_l1(self, adapter: nn.Module, inputs: tuple[Tensor, ...], residue: Tensor) -> None:
        counts = is_counted(self.kind, _per_token(self.domain, residue)).float()
        per_token = residue.float().abs().mean(dim=-1)  # ||residue||_1 / D, (B, T)
        self._keep(adapter, (per_token * counts).sum(), counts.sum())

    def _add_cross_entropy(self, block_gate: nn.Module, inputs: tuple[Tensor, ...], score: Tensor) -> None:
        domain = _per_token(self.domain, score)
        counts = is_counted("domain_cross_entropy", domain).float()
        is_new = (domain == NEW).float()
        per_token = F.binary_cross_entropy_with_logits(score.float().squeeze(-1), is_new, reduction="none")
        self._keep(block_gate, (per_token * counts).sum(), counts.sum())

    def _keep(self, module: nn.Module, total: Tensor, count: Tensor) -> None:
        if module in self._sums:
            return  # a recomputation repeats the work (checkpointing compares the operations) but adds nothing
        if module.training and not torch.is_grad_enabled():
            raise RuntimeError(
                "The local loss was collected in training without gradients, as reentrant activation checkpointing does. "
                "Use gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        self._sums[module] = total
        self._counts[module] = count


class GateStatistics:
    """Per-layer means over tokens by domain, gathered over any number of forward passes without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.adapters = adapters_with_layers(model)
        self._totals: dict[tuple[int, str], Tensor] = {}

    @contextmanager
    def collect(self, name: str) -> Iterator[None]:
        """Add everything that passes through the adapters to the statistics of the text called `name`."""
        handles = []
        for index, (_, adapter) in enumerate(self.adapters):
            handles.append(adapter.register_forward_hook(self._residue_hook(index, name)))
            if adapter.block_gate is not None:
                handles.append(adapter.block_gate.register_forward_hook(self._gate_hook(index, name, adapter.gate)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def table(self) -> list[dict[str, Any]]:
        """One row for each adapter and text: decoder layer, mean gate, share of gates that are open (beyond ±0.01), mean
        ||residue||_1 / D."""
        rows = []
        for (index, name), totals in sorted(self._totals.items()):
            n_tokens, residue, gate, n_open = totals.tolist()
            layer, adapter = self.adapters[index]
            row = {"layer": layer, "text": name, "mean_residue": residue / n_tokens}
            if adapter.block_gate is not None:
                row |= {"mean_gate": gate / n_tokens, "open_ratio": n_open / n_tokens}
            rows.append({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()})
        return rows

    def _row(self, index: int, name: str) -> Tensor:
        return self._totals.setdefault((index, name), torch.zeros(4, dtype=torch.float64))

    def _residue_hook(self, index: int, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, residue: Tensor) -> None:
            row = self._row(index, name)
            row[0] += residue.shape[:-1].numel()
            row[1] += residue.float().abs().mean(dim=-1).sum().item()

        return hook

    def _gate_hook(self, index: int, name: str, gate: str) -> Any:
        def hook(module: nn.Module, inputs: Any, score: Tensor) -> None:
            value = GATE_FUNCTIONS[gate](score.float())
            row = self._row(index, name)
            row[2] += value.sum().item()
            row[3] += (value.abs() > 0.01).sum().item()

        return hook


def _per_token(domain: Tensor, values: Tensor) -> Tensor:
    """The domain of every token, from one per sequence or per token, for values (B, T, ·) or flattened (B·T, ·)."""
    n_tokens = values.shape[:-1].numel()
    return domain.reshape(len(domain), -1).expand(-1, n_tokens // len(domain)).reshape(values.shape[:-1])
