"""One training loop for everything: pretraining a small backbone and extending any backbone by any method. It knows
tensors and numbers, no files: checkpoints and measurements are functions it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from .batches import Batch, MixedBatches, load_ahead
from .config import TrainingConfig
from .distributed import (
    check_agreement,
    check_division,
    data_parallel,
    is_first_process,
    like,
    n_processes,
    process_index,
    whole,
    whole_state,
    without_sync,
)
from .language_loss import cross_entropy_and_logits, find_head
from .losses import ORIGINAL, LocalLoss, is_counted
from .machine import attention_in_float32, keep_large_blocks, pick_precision
from .meter import Meter
from .penalties import Penalty

N_CURVE_POINTS = 20
READ_EVERY = 16  # steps between readings of the losses on an accelerator: each makes the processor wait for it


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
    *,
    penalty: Penalty | None = None,
    forward: nn.Module | None = None,
    head: nn.Linear | None = None,
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of one batch; returns (language-model loss in nats per token, local loss), on the device.

    Micro-batches are weighted by their number of tokens, so that accumulation does not change the result. Of several
    processes each takes its part of the batch and returns its share of the losses: they add up to the whole batch's.

    Parameters
    ----------
    penalty : a further term of the loss; it needs the logits, so `head` must be None.
    forward : what to call, where it is not `model` itself (see `nrlib.distributed.data_parallel`).
    head : output layer to compute the language-model loss in (see `nrlib.language_loss`).
    """
    forward, device = forward or model, next(model.parameters()).device
    n_counted = is_counted(local_loss, batch.domain).sum().item()
    n_counted *= batch.inputs.shape[1]
    n_original = int((batch.domain == ORIGINAL).sum()) * batch.inputs.shape[1]
    n_sequences = len(batch.domain)
    n_here = n_sequences // n_processes()
    first, micro_size = process_index() * n_here, n_here // config.accumulation_steps
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(first, first + n_here, micro_size):
        part = slice(start, start + micro_size)
        inputs, targets, domain = (
            t[part].to(device, non_blocking=True) for t in (batch.inputs, batch.targets, batch.domain)
        )
        with (
            LocalLoss(model, local_loss, domain) as collected,
            attention_in_float32(device, dtype),
            without_sync(forward, is_last=start + micro_size == first + n_here),
        ):
            language_loss, logits = cross_entropy_and_logits(forward, inputs, targets, dtype, head)
            share = len(inputs) / n_sequences
            language_loss = language_loss * share
            local_sum, _ = collected.sum_and_count()
            local = local_sum / max(1, n_counted * len(collected.adapters))
            loss = language_loss + local_loss_weight * local
            if penalty is not None:
                loss = loss + penalty(inputs, domain, logits, n_original, share)
            # The backward pass averages over processes where the gradients of their parts have to be added.
            (loss * n_processes()).backward()
        totals[0] += language_loss.detach()
        totals[1] += local.detach()
    return totals[0], totals[1]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm, over all shards, is at most `max_norm`; returns the norm before."""
    parameters = list(parameters)
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = whole(norm)
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def train(
    model: nn.Module,
    batches: MixedBatches,
    config: TrainingConfig,
    *,
    local_loss: str = "none",
    local_loss_weight: float = 0.0,
    penalty: Penalty | None = None,
    hooks: Hooks | None = None,
    description: str = "train",
    progress: bool = True,
) -> TrainingState:
    """Train the parameters of `model` that require gradients, resuming from `hooks.load()` if it returns a checkpoint.

    Inside `nrlib.distributed.processes()` all processes call this with the same arguments. A model that has been
    sharded is trained so; any other is copied (DDP). The first process alone saves, all load and measure.

    Returns
    -------
    TrainingState with the learning curve: step, n_tokens, language_loss, local_loss and what `hooks.measure` returns.

    Raises
    ------
    FloatingPointError
        When the loss is no longer a number.
    ConfigError
        When the batch cannot be shared evenly by the processes.
    """
    check_division(batches.batch_size, config.accumulation_steps)
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
    meter = Meter(1 if device.type == "cpu" else READ_EVERY, n_steps, config.learning_rate)
    forward = data_parallel(model)
    head = None if penalty is not None else _head_to_compute_in(model, device)
    start, last_save = time.perf_counter() - state.seconds, time.perf_counter()
    is_shown = progress and is_first_process()
    bar = tqdm(total=n_steps, initial=state.step, desc=description, disable=not is_shown, unit="step", leave=False)
    model.train()
    for step, batch in _numbered_batches(batches, state.step, device):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, n_steps, config)
        losses = training_step(
            model, batch, config, local_loss, local_loss_weight, dtype, penalty=penalty, forward=forward, head=head
        )  # fmt: skip
        norm = clip_gradients(trainable.values(), config.max_gradient_norm)
        is_last, is_measured = step + 1 == n_steps, (step + 1) % measure_every == 0
        is_point = (step + 1) % record_every == 0 or is_last or is_measured
        is_due = time.perf_counter() - last_save >= hooks.seconds_between_saves
        reading = meter.add(step, losses, norm, is_due, read_now=is_point)  # raises before the weights are lost
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step, state.seconds = step + 1, time.perf_counter() - start
        if reading is not None:
            metrics = hooks.measure() if hooks.measure and (is_measured or is_last) else {}
            if is_point:
                point = {"step": state.step, "n_tokens": state.step * tokens_per_step, **reading.as_point()}
                state.curve.append(point | metrics)
            if hooks.log and is_first_process():
                hooks.log(state.step, {**reading.values(), "learning_rate": optimizer.param_groups[0]["lr"], **metrics})
        bar.update()
        if reading is None:
            continue
        bar.set_postfix_str(f"{state.step * tokens_per_step / state.seconds:,.0f} tokens/s, {reading}", refresh=False)
        if hooks.save and not is_last and reading.is_save_due:
            checkpoint = _checkpoint(state, trainable, optimizer)
            if is_first_process():
                hooks.save(checkpoint)
            last_save = time.perf_counter()
    bar.close()
    model.eval()
    return state


def _numbered_batches(batches: MixedBatches, first: int, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """The steps from `first` on with their batches, for a GPU made in another thread while it computes."""
    steps = range(first, batches.n_steps)
    if device.type == "cuda":
        return zip(steps, load_ahead(lambda step: batches.batch(step).pin_memory(), steps), strict=True)
    return ((step, batches.batch(step)) for step in steps)


def _head_to_compute_in(model: nn.Module, device: torch.device) -> nn.Linear | None:
    """The output layer on an accelerator. On a processor the logits are few, and are not worth computing twice."""
    return None if device.type == "cpu" else find_head(model)


def _checkpoint(
    state: TrainingState, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """What `hooks.save` gets: whole tensors, so that any number of processes can go on from it."""
    return {
        "step": state.step,
        "seconds": state.seconds,
        "curve": state.curve,
        "weights": whole_state({name: p.detach() for name, p in trainable.items()}),
        "optimizer": whole_state(optimizer.state_dict()),
    }


@torch.no_grad()
def _resume(hooks: Hooks, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> TrainingState:
    checkpoint = hooks.load() if hooks.load else None
    check_agreement(checkpoint["step"] if checkpoint else 0)
    if checkpoint is None:
        return TrainingState()
    for name, parameter in trainable.items():
        parameter.copy_(like(checkpoint["weights"][name], parameter))
    saved = checkpoint["optimizer"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    moments = {
        index: {name: like(value, p) for name, value in saved["state"][index].items()}
        for index, p in zip(indices, parameters, strict=True)
    }
    optimizer.load_state_dict({**saved, "state": moments})
    return TrainingState(checkpoint["step"], checkpoint["seconds"], list(checkpoint["curve"]))
