"""A language identifier instead of gates: what is forgotten when an extension is switched off wherever the last tokens look
like the original domain.

    tokens (B, T) ──► log P(token | new) − log P(token | original) ──► mean over the last M tokens ──► on where > 0

The identifier is naive Bayes over the tokens of the training text: counted, not trained. Adapters without a gate are
switched off inside the model, token by token. Fine-tuning leaves nothing to switch off: two whole models are kept, and each
prediction is taken from one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone import get_backbone
from ..batches import TokenStream
from ..errors import ConfigError
from ..evaluation import bits_per_byte, forgetting
from ..experiments import arm
from ..gate_memory import causal_mean
from ..peft_method import active_adapters
from ..runs import extend
from ..texts import prepare_text

METHODS = ("vanilla_adapter", "fine_tuning")
TEXTS = ("unseen_original", "new")


def language_identifier(
    profile: str, new_domain: str, method: str, memories: Sequence[int], seed: int
) -> dict[str, Any]:
    """Study: train as usual, then read the held-out texts with an identifier in charge, once for each memory.

    Parameters
    ----------
    new_domain : its corpus.
    method : one of METHODS.
    memories : M, tokens the identifier weighs together, the present one the last of them; 0 leaves the extension on throughout.

    Returns
    -------
    rows : one a memory: bits per byte of both texts and of the backbone, forgetting, and the share of each text's tokens
        at which the extension is on.

    Raises
    ------
    ConfigError
        For another method.
    """
    if method not in METHODS:
        raise ConfigError(f"method = {method!r} is not allowed here. Give one of {', '.join(METHODS)}.")
    config = arm(profile, method, new_domain=new_domain, seed=seed)
    text = prepare_text(config.data, config.backbone, progress=False)
    assert text.proxy is not None  # the profiles have one
    model, _ = extend(config, text, get_backbone(config, text, progress=False), progress=False)
    backbone: Any = get_backbone(config, text, progress=False).eval()
    log_odds = count_log_odds(text.new, text.proxy, backbone.get_input_embeddings().num_embeddings)
    context_length = config.training.context_length
    before = {name: bits_per_byte(backbone, text.held_out[name], context_length) for name in TEXTS}
    rows = []
    for memory in memories:
        with switched(model.eval(), backbone, log_odds, memory) as (reader, shares):
            row: dict[str, Any] = {"memory": memory}
            for name in TEXTS:
                shares.clear()
                row[f"bits_per_byte_{name}"] = round(bits_per_byte(reader, text.held_out[name], context_length), 5)
                row[f"backbone_{name}"] = round(before[name], 5)
                row[f"share_on_{name}"] = round(float(torch.cat(shares).float().mean()), 5) if memory else 1.0
        rows.append(row | {"forgetting": forgetting(row["bits_per_byte_unseen_original"], before["unseen_original"])})
    return {"rows": rows}


def count_log_odds(new: TokenStream, original: TokenStream, vocabulary_size: int) -> Tensor:
    """log P(token | new) − log P(token | original), (V,), from counts with one added to each."""
    counts = np.stack([np.bincount(stream.tokens, minlength=vocabulary_size) + 1.0 for stream in (new, original)])
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    return torch.from_numpy(log_p[0] - log_p[1]).float()


@contextmanager
def switched(
    model: nn.Module, backbone: nn.Module, log_odds: Tensor, memory: int
) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """The model with its extension on only where the last tokens look new, and a list that gathers where that was."""
    shares: list[Tensor] = []
    now: list[Tensor] = []  # of the pass that is under way

    def identify(tokens: Tensor) -> Tensor:
        is_new = causal_mean(log_odds.to(tokens.device)[tokens], memory).unsqueeze(-1) > 0  # (B, T, 1)
        shares.append(is_new.flatten())
        return is_new

    adapters = active_adapters(model)
    if memory == 0:
        yield model, shares
    elif not adapters:
        yield _TwoModels(model, backbone, identify), shares
    else:
        before = model.register_forward_pre_hook(
            lambda _, args, kwargs: now.__setitem__(slice(None), [identify(kwargs["input_ids"])]), with_kwargs=True
        )
        handles = [before, *(a.register_forward_hook(lambda _, args, residue: residue * now[0]) for a in adapters)]
        try:
            yield model, shares
        finally:
            for handle in handles:
                handle.remove()


class _TwoModels(nn.Module):
    """Predictions of one model where the text is new, of the other elsewhere."""

    def __init__(self, new: nn.Module, original: nn.Module, identify: Any) -> None:
        super().__init__()
        self.new, self.original, self.identify = new, original, identify

    def forward(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
        new, original = (model(input_ids=input_ids, **options).logits for model in (self.new, self.original))
        return SimpleNamespace(logits=torch.where(self.identify(input_ids), new, original))
