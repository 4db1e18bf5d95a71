"""Is a backbone with persistent vectors still the backbone, before they are trained? The trap of the joint softmax.

The vectors' values are zero. In one softmax with the context they add nothing, but they are attended to: with the context's
share s of a head's attention, the head puts out s times what it did. A bias on their scores makes that rare, not absent. With
a softmax of their own (`nrlib.persistent_memory`) nothing changes at all.

The joint softmax needs no attention code here: a key-value cache of transformers holds the vectors, and an additive mask
their bias, in any causal language model that takes both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from ..backbone import get_backbone
from ..config import SITES, RunConfig, make_config
from ..errors import ConfigError
from ..evaluation import bits_per_byte
from ..experiments import arm
from ..machine import seeded
from ..peft_method import NeutralResiduesConfig
from ..texts import prepare_text

RESULT_VERSION = 1


class JointSoftmax(nn.Module):
    """A frozen language model whose heads share one softmax between the context and persistent vectors of value zero.

    Parameters
    ----------
    backbone : a causal language model of transformers with full attention.
    n_vectors : N, vectors of each key head; 0 leaves the model as it is.
    logit_bias : added to the scores of the vectors; 0 or less.
    seed : of the keys, which have variance 1 as in the paper.

    Raises
    ------
    ConfigError
        For a negative number of vectors, or a bias that is above 0 or not a number.
    """

    def __init__(self, backbone: Any, n_vectors: int, logit_bias: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if n_vectors < 0 or not -math.inf < logit_bias <= 0:
            raise ConfigError(
                f"n_vectors = {n_vectors} and logit_bias = {logit_bias}: allowed are 0 vectors or more, and a bias of at most 0 "
                "that is finite (-10 makes the vectors all but invisible)."
            )
        self.backbone, self.n_vectors, self.logit_bias = backbone, n_vectors, logit_bias
        config = backbone.config
        n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(config.num_hidden_layers, 1, n_heads, n_vectors, d_head, generator=generator)
        self.register_buffer("keys", keys.to(backbone.device, backbone.dtype))

    def forward(self, input_ids: Tensor, use_cache: bool = False, **options: Any) -> Any:
        """The backbone's output for tokens (B, T); nothing is cached, whatever `use_cache` says."""
        n_sequences, n_tokens = input_ids.shape
        if self.n_vectors == 0:
            return self.backbone(input_ids=input_ids, use_cache=False, **options)
        cache = DynamicCache()
        for layer, keys in enumerate(self.keys):  # type: ignore[arg-type]
            expanded = keys.expand(n_sequences, -1, -1, -1)
            cache.update(expanded, torch.zeros_like(expanded), layer)
        like: Any = {"device": input_ids.device, "dtype": self.keys.dtype}
        future = torch.full((n_tokens, n_tokens), -math.inf, **like).triu(1)
        vectors = torch.full((n_tokens, self.n_vectors), self.logit_bias, **like)
        mask = torch.cat([vectors, future], dim=1).expand(n_sequences, 1, -1, -1)
        positions = torch.arange(n_tokens, device=input_ids.device)[None]
        return self.backbone(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=False, **options
        )  # fmt: skip


def arms(profile: str, seeds: Sequence[int]) -> list[RunConfig]:
    """Neutral residues at every site, in parallel in all layers, with every seed at the same budget; persistent memory with
    the first seed without a local loss too: what it can learn when nothing holds it back."""
    compared = [arm(profile, "neutral_residues", site=site, seed=seed) for site in SITES for seed in seeds]
    free = {"local_loss": "none", "local_loss_weight": 0.0}
    return [*compared, arm(profile, "neutral_residues", site="persistent_memory", seed=seeds[0], **free)]


def neutrality(
    *, seed: int, profile: str, n_vectors: Sequence[int], logit_biases: Sequence[float], text: str = "unseen_original"
) -> dict[str, Any]:
    """A study: bits per byte of a profile's backbone with persistent vectors of value zero, before any training.

    `rows` holds the backbone itself, the joint softmax with every number of vectors and, for the largest number, every
    bias, and for every number the gated softmax of their own (`site='persistent_memory'`).

    Raises
    ------
    ConfigError
        For no number of vectors, or one below 1.
    """
    if not n_vectors or min(n_vectors) < 1:
        raise ConfigError(f"n_vectors = {list(n_vectors)}: give one number of vectors or more, each 1 or more.")
    config = make_config(profile)
    prepared = prepare_text(config.data, config.backbone, False)
    backbone: Any = get_backbone(config, prepared, progress=False)
    rows: list[dict[str, Any]] = []

    def measure(model: nn.Module, kind: str, n: int, bias: float = 0.0) -> None:
        value = bits_per_byte(model, prepared.held_out[text], config.training.context_length)
        rows.append({"kind": kind, "n_vectors": n, "logit_bias": bias, "bits_per_byte": round(value, 5)})

    measure(backbone, "backbone", 0)
    for n in n_vectors:
        measure(JointSoftmax(backbone, n, seed=seed), "joint", n)
    for bias in logit_biases:
        measure(JointSoftmax(backbone, max(n_vectors), bias, seed), "biased", max(n_vectors), bias)
    for n in n_vectors:
        with seeded(seed):
            extended = get_peft_model(backbone, NeutralResiduesConfig(site="persistent_memory", width=n))
        measure(extended.eval(), "separate", n)
        backbone = extended.unload()
    return {"rows": rows}
