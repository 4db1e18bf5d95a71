"""The losses of a run, kept on the device and read now and then: reading makes the processor wait for an accelerator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import add_up, is_first_process


@dataclass(frozen=True)
class Reading:
    """What the last step gave, over all processes."""

    language_loss: float
    local_loss: float
    gradient_norm: float
    is_save_due: bool

    def __str__(self) -> str:
        return f"loss {self.language_loss:.3f}, local {self.local_loss:.4f}"

    def values(self) -> dict[str, float]:
        """The three numbers by name."""
        return {
            "language_loss": self.language_loss,
            "local_loss": self.local_loss,
            "gradient_norm": self.gradient_norm,
        }

    def as_point(self) -> dict[str, float]:
        """The three numbers as they stand in a learning curve."""
        return {
            "language_loss": round(self.language_loss, 4),
            "local_loss": round(self.local_loss, 6),
            "gradient_norm": round(self.gradient_norm, 4),
        }


class Meter:
    """Collects losses and gradient norms, and reads them every `read_every` steps."""

    def __init__(self, read_every: int, n_steps: int, learning_rate: float) -> None:
        self.read_every, self.n_steps, self.learning_rate = read_every, n_steps, learning_rate
        self._unread: list[tuple[int, Tensor]] = []

    def add(
        self, step: int, losses: tuple[Tensor, Tensor], norm: Tensor, is_save_due: bool, read_now: bool = False
    ) -> Reading | None:
        """Add a step, with this process's share of its losses; a `Reading` where it is time for one.

        Whether to save is for the first process to say, since the clocks of the others differ.

        Raises
        ------
        FloatingPointError
            When a loss or a norm of a step since the last reading is no number.
        """
        self._unread.append((step, torch.stack([*losses, norm.detach().to(losses[0])])))
        if len(self._unread) < self.read_every and not read_now:
            return None
        steps, values = [s for s, _ in self._unread], torch.stack([v for _, v in self._unread])
        self._unread.clear()
        norms = values[:, 2].clone()
        values[:, 2] = float(is_save_due and is_first_process())
        rows = torch.cat([add_up(values), norms[:, None]], dim=1).tolist()
        for at, (language_loss, local_loss, _, gradient_norm) in zip(steps, rows, strict=True):
            self._check(at, "loss", language_loss, language_loss + local_loss)
            self._check(at, "gradient", gradient_norm, gradient_norm)
        language_loss, local_loss, vote, gradient_norm = rows[-1]
        return Reading(language_loss, local_loss, gradient_norm, bool(vote))

    def _check(self, step: int, what: str, shown: float, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The {what} became {shown} at step {step} of {self.n_steps}: learning_rate = {self.learning_rate:g} is "
                "probably too high for this method."
            )
