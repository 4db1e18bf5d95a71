"""Inference by domain: a gate that is open on as many tokens as the gates of trained extensions are.

Random gates would be open on half of all tokens. Which gates open changes what sparse inference has to compute, so each
case moves the biases of its block gates until the stated share of its own tokens opens them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import GatedAdapter
from ..config import RunConfig
from ..losses import active_adapters
from ..machine import pick_device
from .timing import Case, Settings, Stamp

# Share of open gates by text, of the published runs with a ReLU gate and the default local loss: the mean over layers and
# seeds in text of the original domain that the training mix does not hold, and in text of the new domain. A gate counts as
# open above 0.01 there. tests/test_benchmark.py reads the records.
OPEN_RATIOS = {"original_domain": 0.108, "new_domain": 0.717}


def inference_case(kind: str, name: str, model: Any, config: RunConfig, settings: Settings) -> Case:
    """One round of 'scoring', 'prefill', 'decoding' or 'decoding_one', of one sequence, as a function."""
    n_sequences = 1 if kind.startswith("decoding_one") else config.training.batch_size
    length = settings.prompt_length if kind.startswith("decoding") else config.training.context_length
    tokens = random_tokens(config, n_sequences, length)
    if kind.startswith("decoding"):
        one_round = _decoding(model, tokens, settings.n_generated)
    else:
        one_round = _reading(model, tokens, settings.n_steps, is_prefill=kind.startswith("prefill"))
    if name in OPEN_RATIOS:
        set_open_ratio(model, OPEN_RATIOS[name], one_round)
    return one_round


@torch.no_grad()
def set_open_ratio(model: nn.Module, open_ratio: float, run: Callable[[], object]) -> None:
    """Move the biases of all block gates so that a share of the tokens that `run` computes opens them.

    Residues are made too small to change a token, so that the gates of one layer do not depend on those of another.
    """
    scores: dict[nn.Module, list[Tensor]] = {}

    def keep(block_gate: nn.Module, inputs: Any, score: Tensor) -> None:
        scores.setdefault(block_gate, []).append(score.flatten().float())

    gates = []
    for adapter in active_adapters(model):
        assert isinstance(adapter, GatedAdapter), "a benchmark of gated adapters"
        adapter.output_projection.weight.normal_(0, 1e-6)  # not 0: a device may be faster with zeros
        if adapter.block_gate is not None:
            gates.append(adapter.block_gate)
    handles = [gate.register_forward_hook(keep) for gate in gates]
    run()
    for handle in handles:
        handle.remove()
    for gate in gates:
        score = torch.cat(scores[gate]).sort(descending=True).values
        n_open = round(open_ratio * len(score))
        gate.bias.sub_((score[n_open - 1] + score[n_open]) / 2)


def random_tokens(config: RunConfig, n_sequences: int, length: int) -> Tensor:
    """Tokens (B, T) on the device of the benchmark."""
    generator = torch.Generator().manual_seed(0)
    shape = (n_sequences, length)
    return torch.randint(1, config.backbone.vocabulary_size, shape, generator=generator).to(pick_device())


def _reading(model: Any, tokens: Tensor, n_steps: int, is_prefill: bool) -> Case:
    # A prefill fills the cache and asks for one next token; scoring a text asks for all.
    options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1} if is_prefill else {"use_cache": False}

    @torch.no_grad()
    def one_round() -> tuple[Stamp, Stamp, int]:
        start = Stamp.now()
        for _ in range(n_steps):
            model(input_ids=tokens, **options)
        return start, Stamp.now(), n_steps * tokens.numel()

    return one_round


def _decoding(model: Any, prompt: Tensor, n: int) -> Case:
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def one_round() -> tuple[Stamp, Stamp, int]:
        start = Stamp.now()
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        return start, Stamp.now(), n * len(prompt)

    return one_round
