"""The exercises of the book: `check(name, answer)` says whether an answer is right, and where it is not, gives a hint.

A number is right within half a per cent; a function is called on random tensors and compared with the package's own. The
solutions stand in the chapters, folded away; a test checks each of them here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter import GatedAdapter
from .config import make_config
from .errors import ConfigError
from .evaluation import forgetting, learning
from .gate_memory import causal_mean
from .losses import NEW, ORIGINAL, LocalLoss
from .machine import seeded


@dataclass(frozen=True)
class Verdict:
    """What `check` returns; a notebook shows it as text."""

    is_right: bool
    text: str

    def __repr__(self) -> str:
        return self.text


def check(name: str, answer: Any) -> Verdict:
    """Whether `answer` solves the exercise `name`.

    Raises
    ------
    ConfigError
        When there is no exercise of that name.
    """
    if name not in EXERCISES:
        near = difflib.get_close_matches(name, EXERCISES, n=1) or sorted(EXERCISES)
        raise ConfigError(f"There is no exercise {name!r}. Did you mean {near[0]!r}?")
    if answer is None:
        return Verdict(False, "No answer yet: replace None and run this cell.")
    is_right, hint = EXERCISES[name]
    try:
        right = is_right(answer)
    except Exception as error:  # the reader's own code: whatever it raises belongs into the verdict
        return Verdict(False, f"Your answer stopped with {type(error).__name__}: {error}. Hint: {hint}")
    return Verdict(True, "Right.") if right else Verdict(False, f"Not yet. Hint: {hint}")


def _number(expected: float) -> Callable[[Any], bool]:
    return lambda answer: math.isclose(float(answer), expected, rel_tol=5e-3, abs_tol=1e-9)


def _same(expected: Any) -> Callable[[Any], bool]:
    return lambda answer: answer == expected


def _function(reference: Callable[..., Any], *arguments: Callable[[], Any]) -> Callable[[Any], bool]:
    """The answer as a function: equal to `reference` on five draws of its arguments."""

    def is_right(answer: Any) -> bool:
        for seed in range(5):
            with seeded(seed):
                values = [make() for make in arguments]
            given, expected = torch.as_tensor(answer(*values)), torch.as_tensor(reference(*values))
            if given.shape != expected.shape or not torch.allclose(
                given.double(), expected.double(), rtol=1e-4, atol=1e-6
            ):
                return False
        return True

    return is_right


def _positive() -> float:
    return float(torch.rand(()) + 0.5)


def _adapter() -> GatedAdapter:
    adapter = GatedAdapter(6, 4, n_layers=2, gate="relu").requires_grad_(False)
    adapter.output_projection.weight.normal_()
    adapter.gate_projection.weight.normal_()
    return adapter


def _hidden_states() -> Tensor:
    return torch.randn(3, 5, 6)


def _domains() -> Tensor:
    return torch.tensor([ORIGINAL, NEW, ORIGINAL])


def _local_loss(residue: Tensor, domain: Tensor) -> Tensor:
    class Fixed(GatedAdapter):
        def forward(self, x: Tensor) -> Tensor:
            return x

    adapter = Fixed(6, 1, n_layers=1)
    with LocalLoss(adapter, "l1", domain) as collected:
        adapter(residue)
        return collected.mean()


def _kl(before: Tensor, after: Tensor) -> Tensor:
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def _front(answer: Any) -> bool:
    return sorted(answer) == ["A", "C", "D"]


_LENGTH = make_config("smoke").training

# name -> (whether an answer is right, hint)
EXERCISES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "forgetting_by_hand": (
        _number(forgetting(1.54, 1.40)), "forgetting is relative to what the backbone needs, and a share, not a per cent"
    ),
    "learning_function": (
        _function(lambda method, backbone, fine_tuning: learning(method, backbone, fine_tuning), _positive, lambda: 3.0, lambda: 0.4),
        "the gain of the method over the gain of fine-tuning; gains are what bits per byte went down by",
    ),
    "lora_rank": (
        _number(256 * 1024 / (256 + 1024)), "rank r takes r·D weights for one factor and r·F for the other"
    ),
    "width_for_budget": (
        _number((0.2 * 1_000_000 / 4 - 129) // (3 * 128)),
        "a layer gets a quarter of the budget; the gate takes D + 1 of it, and each unit of width 3·D; round down",
    ),
    "residue_by_hand": (
        lambda answer: torch.allclose(torch.as_tensor(answer).double(), torch.tensor([0.0, -4.404]).double(), atol=0.02),
        "W_g x = 2, and silu(2) = 2 · sigmoid(2) = 1.762; W_i x = -1; the gate is relu(2 · 1 + 0.5)",
    ),
    "residue_function": (
        _function(lambda x, adapter: adapter(x), _hidden_states, _adapter),
        "relu of the block gate, times the output projection of silu(gate projection) * input projection",
    ),
    "local_loss_function": (
        _function(_local_loss, _hidden_states, _domains),
        "keep the sequences whose domain is ORIGINAL, then the mean of the absolute values is already the L1 norm over D",
    ),
    "closed_gates": (_same("relu"), "which of the functions is exactly 0 for a whole range of inputs?"),
    "number_of_steps": (
        _number(307_200 // (_LENGTH.batch_size * _LENGTH.context_length)),
        "one step reads batch_size sequences of context_length tokens; `make_config('smoke').training` has both",
    ),
    "front": (_front, "a point is on the front if no other point learns at least as much and forgets less"),
    "chosen_on": (_same("validation"), "a text on which something was chosen cannot measure it without flattering"),
    "l1_by_hand": (_number((0.5 + 0.5 + 0.0 + 1.0) / 4), "absolute values, then the mean over D = 4 dimensions"),
    "gate_cross_entropy": (
        _number(-math.log(1 - 0.9)), "the gate says 0.9 for new; the truth is original, whose probability is what is left"
    ),
    "proxy_sequences": (_number(0.1 * 819_200 / 128), "how many sequences of 128 tokens are there in all?"),
    "half_the_layers": (_same("double"), "the budget stays, and half as many adapters share it"),
    "interpolate": (
        _function(lambda a, b, ratio: a + ratio * (b - a), _hidden_states, _hidden_states, _positive),
        "at ratio 0 the result is the backbone, at ratio 1 the fine-tuned weights",
    ),
    "memory_mean": (
        _function(lambda scores, memory: causal_mean(scores[None], memory)[0], lambda: torch.randn(9), lambda: int(torch.randint(1, 5, ()))),
        "token t averages the scores from t − memory + 1, or from 0, up to t itself",
    ),
    "gate_auc": (
        _function(lambda old, new: (new.abs()[:, None] > old.abs()).float().mean(), lambda: torch.randn(6), lambda: torch.randn(8) + 1),
        "compare every token of the new language with every one of the old: in how many pairs is its gate the larger one?",
    ),
    "share_lost": (
        _function(lambda start, learned, end: (end - learned) / (start - learned), lambda: 4.0 + _positive(), lambda: 1.5, lambda: 1.5 + _positive()),
        "bits per byte went down from `start` to `learned`, then up again to `end`: what share of the way down was that?",
    ),
    "times_read": (
        _number(0.9 * 819_200 / 30_000), "nine tenths of the tokens of the run are new text, and the text is 30,000 tokens long"
    ),
    "taken_function": (
        _function(lambda logits, n_old: -logits.softmax(-1)[..., :n_old].sum(-1).log(), lambda: torch.randn(4, 9), lambda: 6),
        "softmax over all tokens; the probabilities of the first n_old; minus the logarithm of their sum",
    ),
    "kl_function": (
        _function(_kl, lambda: torch.randn(4, 7), lambda: torch.randn(4, 7)),
        "softmax both; the sum over the vocabulary of p·(log p − log q), where p is the backbone's; mean over tokens",
    ),
}  # fmt: skip
