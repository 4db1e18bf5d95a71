"""Persistent vectors as an extension: keys and values, learned and independent of the context, for the heads of an
attention block. Sukhbaatar et al., https://arxiv.org/abs/1907.01470, put them into a model that is trained whole; here the
model is frozen, and the vectors are gated like every other residue.

    x ──► queries of the block (frozen) ──► softmax over N keys ──► values ──► output projection (frozen) ──► (·) residue
    x ──► w·x + b ──► elu ─────────────────────────────────────────────────────────────────────────────────────▲ gate

Their softmax is their own. In one softmax with the context, vectors whose values are zero still take attention away from it,
so the extended model would not start at the backbone; `nrlib.companions.persistent_memory_extension` measures by how much.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import GatedResidue, initial_variance
from .architecture import attention_output, attention_queries


class PersistentMemory(GatedResidue):
    """N persistent key and value vectors for each head of an attention block.

        memory(x)  = W_out [ softmax(q_h(x) · K_h / √d_h) V_h for each head h ],   K = √d_h · keys, V = √N · values
        residue(x) = gate(x) · memory(x)

    The queries q_h have no position in them (they are those before a rotation), and W_out has no bias. As in the paper the
    stored keys have variance 1/d_h, those in use 1; both scales let an optimiser's step count for as much as elsewhere.

    Parameters
    ----------
    d_model : D, width of the hidden state.
    n_heads, d_head : heads of the block's queries, and their width d_h.
    width : N, vectors of each head.
    n_layers, gate, initialisation, gate_memory : as in `nrlib.adapter.GatedAdapter`; the initialisation is that of the
        gate.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        width: int,
        n_layers: int,
        gate: str = "elu",
        initialisation: str = "low_variance",
        gate_memory: int = 1,
    ) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(n_heads, width, d_head))
        self.values = nn.Parameter(torch.empty(n_heads, width, d_head))
        self.add_gate(d_model, gate, gate_memory)
        self.initialise(initial_variance(d_model, n_layers, initialisation))

    @torch.no_grad()
    def initialise(self, variance: float) -> None:
        """Values of zero, so that the extended model equals the backbone before the first step; the gate's weights get
        `variance`."""
        self.keys.normal_(0, self.keys.shape[-1] ** -0.5)
        self.values.zero_()
        if self.block_gate is not None:
            self.block_gate.weight.normal_(0, variance**0.5)
            self.block_gate.bias.zero_()

    def forward(self, x: Tensor, block: nn.Module) -> Tensor:
        """Residue (B, T, D) of the hidden states x (B, T, D) that the attention block reads."""
        mixed = self.read(attention_queries(block, x).to(self.keys.dtype))
        memory = attention_output(block, mixed.flatten(-2).to(x.dtype)).to(self.keys.dtype)
        return memory if self.block_gate is None else self.gate_values(x.to(self.keys.dtype)) * memory

    def read(self, queries: Tensor) -> Tensor:
        """What the queries (…, heads, d_h) find in the vectors, of the same shape."""
        _, n_vectors, d_head = self.keys.shape
        q = queries.reshape(1, -1, *queries.shape[-2:]).transpose(1, 2)  # (1, heads, tokens, d_h)
        found = F.scaled_dot_product_attention(q, d_head**0.5 * self.keys[None], n_vectors**0.5 * self.values[None])
        return found.transpose(1, 2).reshape(queries.shape)
