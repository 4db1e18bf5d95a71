"""One run in several processes, as `torchrun` starts them: who is who, how a model is spread over them, and how its state
is put together again.

`ddp` keeps the whole model in every process and adds up gradients; `fsdp` (FSDP2, `fully_shard`) keeps one part of every
weight, gradient and optimiser state in each. Every process takes its part of each batch, so the numbers do not depend on
how many there are. Without `torchrun` all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .architecture import decoder_layers
from .errors import ConfigError, StorageError

WRAPPINGS = ("ddp", "fsdp")
_LONGEST_WAIT = timedelta(days=2)  # for the first process, which may be downloading a corpus
_CHOSEN = {"wrapping": "ddp"}  # for this process, while it is inside `processes()`


def process_index() -> int:
    """Which process this is, counted from 0: torchrun's RANK."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def n_processes() -> int:
    """How many processes share the run: torchrun's WORLD_SIZE."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this process prints, and writes files."""
    return process_index() == 0


@contextmanager
def processes(parallel: str = "") -> Iterator[None]:
    """Inside, this process works together with those that torchrun started beside it; without torchrun it is alone.

    Parameters
    ----------
    parallel : 'ddp', 'fsdp', or '' for ddp under torchrun and nothing otherwise.

    Raises
    ------
    ConfigError
        For an unknown value, or where torchrun is missing.
    """
    if parallel not in ("", *WRAPPINGS):
        raise ConfigError(f"parallel = {parallel!r} is unknown. Allowed: {', '.join(WRAPPINGS)}.")
    if "RANK" not in os.environ:
        if parallel:
            raise ConfigError(
                f"parallel = {parallel!r} needs several processes, and this is a single one. Start the same command with "
                f"torchrun: torchrun --nproc-per-node 2 -m nrlib.cli extend --parallel {parallel} …"
            )
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _CHOSEN["wrapping"] = parallel or "ddp"
    try:
        yield
    finally:
        _CHOSEN["wrapping"] = "ddp"
    dist.destroy_process_group()  # not after an error: the others may still be waiting for this process


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block, then the others: what it wrote into the cache they only read."""
    if n_processes() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    if not is_first_process():
        dist.barrier(group)
    yield
    if is_first_process():
        dist.barrier(group)


def check_division(batch_size: int, accumulation_steps: int) -> None:
    """Raise ConfigError unless each process gets the same number of sequences of every micro-batch."""
    n_parts = n_processes() * accumulation_steps
    if batch_size % n_parts:
        raise ConfigError(
            f"batch_size = {batch_size} cannot be shared evenly by {n_processes()} processes with accumulation_steps = "
            f"{accumulation_steps}. Choose a multiple of {n_parts}, or start another number of processes."
        )


def shards_models() -> bool:
    """Whether models are to be spread over the processes, since one device may be too small for them."""
    return n_processes() > 1 and _CHOSEN["wrapping"] == "fsdp"


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been applied to `model`."""
    if n_processes() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def shard(model: nn.Module) -> nn.Module:
    """Spread every weight of `model` over the processes, in place, trainable and frozen ones alike (FSDP2).

    The weights of one decoder layer at a time are gathered where they are needed. Activations are computed again in the
    backward pass: a model that does not fit leaves no room for them either, and mixed precision would otherwise keep a
    copy of every gathered weight for the backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _recompute_activations(model)
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (n_processes(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def _recompute_activations(model: nn.Module) -> None:
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not getattr(inner, "supports_gradient_checkpointing", False):
        return
    name = "activation_checkpointing_enable"  # its name in later versions of transformers
    if not hasattr(inner, name):
        name = "gradient_checkpointing_enable"
    getattr(inner, name)({"use_reentrant": False})


def data_parallel(model: nn.Module) -> nn.Module:
    """What to call for the forward pass, so that the backward pass averages gradients over the processes."""
    if n_processes() == 1 or is_sharded(model):
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def without_sync(model: nn.Module, is_last: bool) -> Any:
    """The context of a micro-batch: only the last one of a step adds up gradients over the processes. A sharded model adds
    up after each, because it has no room for gradients of all its weights."""
    is_deferred = isinstance(model, nn.parallel.DistributedDataParallel) and not is_last
    return model.no_sync() if is_deferred else nullcontext()  # type: ignore[operator]


def add_up(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if n_processes() > 1:
        dist.all_reduce(values)
    return values


def whole(value: Any) -> Any:
    """A sharded tensor put together, on every process; anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole_state(state: Any) -> Any:
    """A state of nested dictionaries and lists with every sharded tensor put together, on the first process only and in
    main memory; the others get None for it. All processes have to call this."""
    if isinstance(state, Mapping):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [whole_state(value) for value in state]
    if hasattr(state, "full_tensor"):
        full = state.full_tensor()
        return full.cpu() if is_first_process() else None
    return state


def like(value: Any, parameter: Tensor) -> Any:
    """The whole tensor `value` spread as `parameter` is; what is not of its shape (a step count) as it is."""
    if not hasattr(parameter, "placements") or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The trainable weights of a sharded model by name, for `save_pretrained(..., state_dict=...)`; None for a model that
    is whole anyway. All processes have to call this, and only the first gets the weights."""
    if not is_sharded(model):
        return None
    state: dict[str, Tensor] = whole_state({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    return state


def check_agreement(step: int) -> None:
    """Raise StorageError unless all processes resume at the same step, as they do if they read the same checkpoint."""
    if n_processes() == 1:
        return
    steps = [torch.zeros(1, dtype=torch.long) for _ in range(n_processes())]
    dist.all_gather(steps, torch.tensor([step]))
    if len({int(s) for s in steps}) > 1:
        raise StorageError(
            f"The processes would resume at different steps: {[int(s) for s in steps]}. They need one cache: set "
            "NRLIB_CACHE to a folder that every machine sees."
        )
