"""One training loop for everything: pretraining a small backbone and extending any backbone by any method. It knows
tensors and numbers, no files: checkpoints and measurements are functions it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .batches import Batch, MixedBatches
from .config import TrainingConfig
from .losses import LocalLoss, is_counted
from .machine import attention_in_float32, keep_large_blocks, pick_precision

N_CURVE_POINTS = 20


@dataclass
class TrainingState:
    """Where a run stands: what a checkpoint holds besides the weights."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Hooks:
    """What the loop calls out to.

    measure : metrics of the model, called `n_measurements` times over the run and at its end.
    save, load : write and read a checkpoint; `save` is called every `seconds_between_saves`.
    log : called after every step with its number, losses, gradient norm, learning rate and, where there are any, metrics.
    """

    measure: Callable[[], dict[str, float]] | None = None
    n_measurements: int = 5
    save: Callable[[dict[str, Any]], None] | None = None
    load: Callable[[], dict[str, Any] | None] | None = None
    seconds_between_saves: float = 60.0
    log: Callable[[int, Mapping[str, float]], None] | None = None


def learning_rate_at(step: int, n_steps: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to `final_learning_rate_ratio` of the peak."""
    n_warmup = max(1, round(config.warmup_ratio * n_steps))
    if step < n_warmup:
        return config.learning_rate * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    low = config.final_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def training_step(
    model: nn.Module,
    batch: Batch,
    config: TrainingConfig,
    local_loss: str,
    local_loss_weight: float,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Accumulate the gradient of one batch; returns (language-model loss in nats per token, local loss).

    Micro-batches are weighted by their number of tokens, so that accumulation does not change the result.
    """
    device = next(model.parameters()).device
    n_counted = is_counted(local_loss, batch.domain).sum().item()
    n_counted *= batch.inputs.shape[1]
    micro_size = len(batch.domain) // config.accumulation_steps
    totals = [0.0, 0.0]
    for start in range(0, len(batch.domain), micro_size):
        part = slice(start, start + micro_size)
        inputs, targets, domain = (t[part].to(device) for t in (batch.inputs, batch.targets, batch.domain))
        with LocalLoss(model, local_loss, domain) as collected, attention_in_float32(device, dtype):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                logits = model(input_ids=inputs, use_cache=False).logits
            language_loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            language_loss = language_loss * (len(inputs) / len(batch.domain))
            local_sum, _ = collected.sum_and_count()
            local = local_sum / max(1, n_counted * len(collected.adapters))
            (language_loss + local_loss_weight * local).backward()
        totals[0] += language_loss.item()
        totals[1] += local.item()
    return totals[0], totals[1]


def train(
    model: nn.Module,
    batches: MixedBatches,
    config: TrainingConfig,
    *,
    local_loss: str = "none",
    local_loss_weight: float = 0.0,
    hooks: Hooks | None = None,
    description: str = "train",
    progress: bool = True,
) -> TrainingState:
    """Train the parameters of `model` that require gradients, resuming from `hooks.load()` if it returns a checkpoint.

    Returns
    -------
    TrainingState with the learning curve: step, n_tokens, language_loss, local_loss and what `hooks.measure` returns.

    Raises
    ------
    FloatingPointError
        When the loss is no longer a number.
    """
    keep_large_blocks()
    hooks = hooks or Hooks()
    device = next(model.parameters()).device
    dtype = pick_precision(config.precision, device)
    optimizer = make_optimizer(model, config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = _resume(hooks, trainable, optimizer)
    n_steps, tokens_per_step = batches.n_steps, batches.batch_size * batches.context_length
    record_every = max(1, -(-n_steps // N_CURVE_POINTS))
    measure_every = max(1, n_steps // max(1, hooks.n_measurements))
    start, last_save = time.perf_counter() - state.seconds, time.perf_counter()
    bar = tqdm(total=n_steps, initial=state.step, desc=description, disable=not progress, unit="step", leave=False)
    model.train()
    for step in range(state.step, n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, n_steps, config)
        losses = training_step(model, batches.batch(step), config, local_loss, local_loss_weight, dtype)
        if not math.isfinite(sum(losses)):
            raise FloatingPointError(
                f"The loss became {losses[0]} at step {step} of {n_steps}: learning_rate = {config.learning_rate:g} is "
                "probably too high for this method."
            )
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), config.max_gradient_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient became {float(norm)} at step {step} of {n_steps}: learning_rate = "
                f"{config.learning_rate:g} is probably too high for this method."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step, state.seconds = step + 1, time.perf_counter() - start
        is_last, is_measured = step + 1 == n_steps, (step + 1) % measure_every == 0
        metrics = hooks.measure() if hooks.measure and (is_measured or is_last) else {}
        if (step + 1) % record_every == 0 or is_last or is_measured:
            state.curve.append(_point(state.step, tokens_per_step, losses, float(norm)) | metrics)
        if hooks.log:
            values = {"language_loss": losses[0], "local_loss": losses[1], "gradient_norm": float(norm)}
            hooks.log(state.step, {**values, "learning_rate": optimizer.param_groups[0]["lr"], **metrics})
        bar.update()
        bar.set_postfix_str(
            f"{(step + 1) * tokens_per_step / state.seconds:,.0f} tokens/s, loss {losses[0]:.3f}, local {losses[1]:.4f}",
            refresh=False,
        )
        if hooks.save and not is_last and time.perf_counter() - last_save >= hooks.seconds_between_saves:
            hooks.save(_checkpoint(state, trainable, optimizer))
            last_save = time.perf_counter()
    bar.close()
    model.eval()
    return state


def _point(step: int, tokens_per_step: int, losses: tuple[float, float], norm: float) -> dict[str, float]:
    return {
        "step": step,
        "n_tokens": step * tokens_per_step,
        "language_loss": round(losses[0], 4),
        "local_loss": round(losses[1], 6),
        "gradient_norm": round(norm, 4),
    }


def _checkpoint(
    state: TrainingState, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    return {
        "step": state.step,
        "seconds": state.seconds,
        "curve": state.curve,
        "weights": {name: p.detach() for name, p in trainable.items()},
        "optimizer": optimizer.state_dict(),
    }


@torch.no_grad()
def _resume(hooks: Hooks, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> TrainingState:
    checkpoint = hooks.load() if hooks.load else None
    if checkpoint is None:
        return TrainingState()
    for name, parameter in trainable.items():
        parameter.copy_(checkpoint["weights"][name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return TrainingState(checkpoint["step"], checkpoint["seconds"], list(checkpoint["curve"]))
