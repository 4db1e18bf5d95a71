"""The gated adapter of neutral residues: Signe Talla, Grave and Jégou, https://arxiv.org/abs/2410.02744.

                       ┌──────────────► FFN ──────────────┐
    x (B, T, D) ───────┤                                  (+)──► output (B, T, D)
                       └─► W_i, W_g ─► GLU ─► W_o ─► (·) ─┘
                                                      ▲  residue (B, T, D)
                       x ──► w·x + b ──► elu ─────────┘  gate (B, T, 1)

The backbone is frozen; only what stands on the lower path is trained, so that the residue is near zero wherever the
text belongs to the original domain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gate_memory import BlockGate

Function = Callable[[Tensor], Tensor]
GATE_FUNCTIONS: dict[str, Function] = {"sigmoid": torch.sigmoid, "relu": F.relu, "elu": F.elu}
ACTIVATION_FUNCTIONS: dict[str, Function] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "identity": nn.Identity()}


class GatedResidue(nn.Module):
    """What is added beside a block of the backbone: something scaled by one gate per token, or by none."""

    block_gate: BlockGate | None
    gate: str

    def add_gate(self, d_model: int, gate: str, gate_memory: int) -> None:
        """The block gate, none for gate = 'none'."""
        self.block_gate = BlockGate(d_model, gate_memory) if gate != "none" else None  # w (1, D), b (1,)
        self.gate = gate

    def gate_values(self, x: Tensor) -> Tensor:
        """gate(x), (B, T, 1)."""
        block_gate = self.block_gate
        assert block_gate is not None, "gate = 'none' has no values"
        return GATE_FUNCTIONS[self.gate](block_gate(x))


def initial_variance(d_model: int, n_layers: int, initialisation: str) -> float:
    """Variance of the new weights that read a hidden state: 'low_variance' 1/(D·L), 'he' 2/D."""
    return 1 / (d_model * n_layers) if initialisation == "low_variance" else 2 / d_model


class GatedAdapter(GatedResidue):
    """A gated linear unit whose output is scaled by one gate per token.

        adapter(x) = W_o ( silu(W_g x) * (W_i x) )
        gate(x)    = elu(w · x + b)             relu in the paper
        residue(x) = gate(x) · adapter(x)

    Parameters
    ----------
    d_model : D, width of the hidden state.
    width : H, width of the adapter.
    n_layers : L, layers of the backbone; enters the low-variance initialisation.
    gate : 'elu', 'relu' (the paper's choice), 'sigmoid', or 'none' for a vanilla adapter.
    initialisation : 'low_variance' (1/(D·L)) or 'he' (2/D), the variance of W_i, W_g and w.
    activation : 'silu' (the paper's choice), 'gelu', 'relu' or 'identity', inside the gated linear unit.
    gate_memory : tokens whose w · x the gate averages, the present one the last of them; 1 in the paper.
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        n_layers: int,
        gate: str = "elu",
        initialisation: str = "low_variance",
        activation: str = "silu",
        gate_memory: int = 1,
    ) -> None:
        super().__init__()
        self.input_projection = nn.Linear(d_model, width, bias=False)  # W_i (H, D)
        self.gate_projection = nn.Linear(d_model, width, bias=False)  # W_g (H, D)
        self.output_projection = nn.Linear(width, d_model, bias=False)  # W_o (D, H)
        self.add_gate(d_model, gate, gate_memory)
        self.activation = activation
        self.initialise(initial_variance(d_model, n_layers, initialisation))

    @torch.no_grad()
    def initialise(self, variance: float) -> None:
        """W_o = 0, so that the extended model equals the backbone before the first step."""
        for linear in (self.input_projection, self.gate_projection, self.block_gate):
            if linear is not None:
                linear.weight.normal_(0, variance**0.5)
        if self.block_gate is not None:
            self.block_gate.bias.zero_()
        self.output_projection.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Residue (B, T, D) of the hidden states x (B, T, D)."""
        return self.glu(x) if self.block_gate is None else self.gate_values(x) * self.glu(x)

    def glu(self, x: Tensor) -> Tensor:
        """adapter(x), (B, T, D)."""
        activate = ACTIVATION_FUNCTIONS[self.activation]
        hidden = activate(self.gate_projection(x)) * self.input_projection(x)  # (B, T, H)
        return self.output_projection(hidden)
