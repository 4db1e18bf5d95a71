"""What one training step costs in memory and arithmetic, found without weights, data or an accelerator.

The step that trains, `nrlib.training.training_step`, is run on PyTorch's fake tensors, which have a shape and a type but
no numbers. A dispatch mode looks on: it adds up the floating-point operations, by the formulae of PyTorch's own counter,
and follows which tensors are alive. So what autograd keeps for a frozen layer, what activation checkpointing gives back
and what mixed precision copies are not described here: they happen.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from .architecture import text_config
from .batches import Batch
from .config import MethodConfig, TrainingConfig
from .errors import BackboneError
from .language_loss import find_head
from .machine import keep_attention_precision
from .training import make_optimizer, training_step

PARTS = ("weights", "optimiser", "gradients", "weight_copies", "logits", "activations")


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimiser step.

    forward_flops, training_flops : floating-point operations per token of a forward pass, and of training.
    moved_bytes : bytes per token that operations other than matrix products and attention read and write in training.
    memory : bytes of each of PARTS at the moment when their sum is highest.
    """

    forward_flops: float
    training_flops: float
    moved_bytes: float
    memory: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


def step_cost(
    model: Any,
    method: MethodConfig,
    training: TrainingConfig,
    dtype: torch.dtype,
    *,
    has_checkpointing: bool = False,
    is_accelerator: bool = True,
) -> StepCost:
    """The cost of a step of `model`, which is on the meta device and is used up.

    Parameters
    ----------
    model : what `nrlib.methods.apply_method` made of a backbone without weights.
    dtype : type of the matrix products; the weights are float32, as in training.
    has_checkpointing : keep only the inputs of each decoder layer and compute the rest again in the backward pass.
    is_accelerator : False follows what training does on a processor: attention in float32, all logits at once.

    Raises
    ------
    BackboneError
        When the model's tensors have sizes that depend on its input, as those of experts do.
    """
    model.train()
    if has_checkpointing:
        enable_checkpointing(model)
    n_sequences = training.batch_size // training.accumulation_steps
    step = CostTracker(text_config(model).vocab_size)
    attention = keep_attention_precision() if is_accelerator else contextlib.nullcontext()
    try:
        with FakeTensorMode(), attention, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of checkpointing a frozen embedding, and of the like: nothing is trained
            _give_fake_weights(model)
            head = _find_head(model) if is_accelerator else None
            tokens = torch.zeros(n_sequences, training.context_length, dtype=torch.int64)
            batch = Batch(tokens, tokens, torch.zeros(n_sequences, dtype=torch.int64))
            optimizer = _prepare_for_second_step(model, training, step)
            of_optimizer = step.n_moved_bytes
            with _labelled_gradients(model, step), step:
                one_micro_batch = replace(training, batch_size=n_sequences, accumulation_steps=1)
                weight = method.local_loss_weight
                training_step(model, batch, one_micro_batch, method.local_loss, weight, dtype, head=head)
            del optimizer
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise BackboneError(
            f"{type(model).__name__} cannot be planned: what it computes depends on its input, as the choice of experts "
            f"does ({type(error).__name__}: {error}). Plan with a dense model of the same width and depth."
        ) from error
    n_tokens = tokens.numel()
    moved = (step.n_moved_bytes - of_optimizer) / n_tokens + of_optimizer / (n_tokens * training.accumulation_steps)
    return StepCost(step.n_forward_flops / n_tokens, step.n_flops / n_tokens, moved, step.at_peak)


class CostTracker(TorchDispatchMode):
    """Adds up the floating-point operations of what runs inside, and follows the bytes of all living tensors by part.

    n_flops, n_forward_flops : operations so far, and those of them outside a backward pass; n_moved_bytes : bytes
    that all other operations have read and written; at_peak : bytes of each of PARTS when their sum was highest.

    `torch.utils.flop_counter.FlopCounterMode` counts the same, but its hooks on modules keep tensors of checkpointed
    layers alive, so it cannot look on at the same time.
    """

    def __init__(self, n_vocabulary: int) -> None:
        super().__init__()
        self.n_vocabulary = n_vocabulary
        self.n_flops = self.n_forward_flops = self.n_moved_bytes = 0
        self.alive = dict.fromkeys(PARTS, 0)
        self.at_peak = dict(self.alive)
        self._part_of: dict[int, str] = {}  # by storage: views share one

    def add(self, tensor: Tensor, part: str) -> None:
        """Count the memory of `tensor` under `part` from now until it is freed, or move it there."""
        storage = tensor.untyped_storage()
        known = self._part_of.get(storage._cdata)
        if known is None:
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        else:
            self.alive[known] -= storage.nbytes()
        self._part_of[storage._cdata] = part
        self.alive[part] += storage.nbytes()
        if sum(self.alive.values()) > sum(self.at_peak.values()):
            self.at_peak = dict(self.alive)

    def _drop(self, key: int, n_bytes: int) -> None:
        self.alive[self._part_of.pop(key)] -= n_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(): a fake tensor has no number to give
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.equal.default:  # nor can two be compared: what is one tensor is equal
            return args[0].untyped_storage()._cdata == args[1].untyped_storage()._cdata
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := FLOP_FORMULAE.get(func._overloadpacket):
            n_flops = formula(*args, **kwargs, out_val=result)
            self.n_flops += n_flops
            # checkpointing runs layers again within the backward pass, which has an identity then
            self.n_forward_flops += n_flops if torch._C._current_graph_task_id() == -1 else 0
        elif not _only_looks(func):
            tensors = (t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            self.n_moved_bytes += sum(t.numel() * t.element_size() for t in tensors)
        is_copy = func is torch.ops.aten._to_copy.default and self._is_weight(args[0])
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._part_of:
                self.add(tensor, "weight_copies" if is_copy else self._part(tensor))
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        return self._part_of.get(tensor.untyped_storage()._cdata) == "weights"

    def _part(self, tensor: Tensor) -> str:
        return "logits" if tensor.dim() and tensor.shape[-1] == self.n_vocabulary else "activations"


def _find_head(model: Any) -> nn.Linear | None:
    with CostTracker(text_config(model).vocab_size):  # it compares tensors
        return find_head(model)


def _only_looks(func: Any) -> bool:
    """Whether an operation moves no data: a view, or memory that is not filled."""
    return func.is_view or func.namespace != "aten" or func._overloadpacket in _WITHOUT_DATA


_WITHOUT_DATA = {
    getattr(torch.ops.aten, name) for name in ("_unsafe_view", "detach", "empty", "empty_like", "empty_strided")
}


def _give_fake_weights(model: nn.Module) -> None:
    """Replace meta tensors by fake ones, which have a device: autocast asks for it. Tied weights stay tied."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_weight else fake
                tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]


def _prepare_for_second_step(model: nn.Module, training: TrainingConfig, tracker: CostTracker) -> torch.optim.Optimizer:
    """Count the weights and, by taking an empty step, the optimiser's state, which is there from the second step on.

    Returns the optimiser: its state lives as long as it does.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tracker.add(tensor, "weights")
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    optimizer = make_optimizer(model, training)
    with tracker:
        optimizer.step()
    for state in optimizer.state.values():
        for tensor in state.values():
            tracker.add(tensor, "optimiser")
    for parameter in trainable:
        if training.accumulation_steps > 1:  # the gradient of the micro-batches before
            tracker.add(parameter.grad, "gradients")  # type: ignore[arg-type]
        else:
            parameter.grad = None
    return optimizer


@contextlib.contextmanager
def _labelled_gradients(model: nn.Module, tracker: CostTracker) -> Iterator[None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: tracker.add(p.grad, "gradients")) for p in trainable]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def enable_checkpointing(model: Any) -> nn.Module:
    """Keep only the inputs of each decoder layer of `model`, which is returned, for the backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5; the old name works in all versions
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return cast(nn.Module, model)


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward_flops(
    gradient: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, q, k, v))


# PyTorch's counter knows the fused attention of accelerators only. Its convention: causal attention counts in full.
PROCESSOR_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
FLOP_FORMULAE = {**flop_registry, **{op: shape_wrapper(formula) for op, formula in PROCESSOR_ATTENTION.items()}}
