"""What the benchmark measures: one round of each case, as a function that can be called again and again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..backbone import build_backbone
from ..batches import Batch, MixedBatches, TokenStream
from ..config import RunConfig, make_config
from ..machine import pick_device, pick_precision
from ..methods import apply_method
from ..penalties import Penalty
from ..trainer import LocalLossMixin
from ..training import Hooks, learning_rate_at, make_optimizer, train
from .inference import OPEN_RATIOS, inference_case
from .timing import Case, Settings, Stamp

OURS = "neutral_residues"
_INFERENCE = ("bare_backbone", "original_domain", "new_domain", "elu_gate")
# The first case of each kind is the one that the others' times are compared with.
CASES = {
    "training": (OURS, "fine_tuning", "lora", "transformers_trainer"),
    "scoring": (*_INFERENCE, "extension_disabled"),
    "prefill": _INFERENCE,
    "decoding": (*_INFERENCE, "extension_disabled"),
    "decoding_one": _INFERENCE,
    "prefill_wide": _INFERENCE,
    "decoding_one_wide": _INFERENCE,
}
TITLES = {
    OURS: "neutral residues",
    "fine_tuning": "full fine-tuning",
    "lora": "LoRA (PEFT), same budget",
    "transformers_trainer": "same extension, transformers Trainer",
    "bare_backbone": "bare backbone",
    "original_domain": "ReLU gate, original-domain text",
    "new_domain": "ReLU gate, new-domain text",
    "elu_gate": "ELU gate, any text",
    "extension_disabled": "extension disabled",
}


def make_case(kind: str, name: str, settings: Settings) -> Case:
    """One round of a case as a function, with its own model."""
    model, config = make_model(kind, name, settings)
    return case_of(model, config, kind, name, settings)


def make_model(kind: str, name: str, settings: Settings) -> tuple[Any, RunConfig]:
    """The model of a case, with random weights, and its configuration."""
    device = pick_device()
    changes = {**settings.changes, "method": name if name in ("fine_tuning", "lora") else OURS}
    if kind.endswith("_wide"):
        changes |= settings.wide
    if name in OPEN_RATIOS:
        changes["gate"] = "relu"
    elif name == "elu_gate":
        changes["gate"] = "elu"
    config = make_config(settings.profile, **changes)
    model: Any = build_backbone(config, config.backbone.vocabulary_size, eos_token_id=0)
    model.to(device)
    if name != "bare_backbone":
        model = apply_method(model, config.method, seed=0)
    if name == "extension_disabled":
        model.base_model.disable_adapter_layers()
    return (model if kind == "training" else model.to(inference_dtype(device)).eval()), config


def case_of(model: Any, config: RunConfig, kind: str, name: str, settings: Settings) -> Case:
    """One round of a case on the model that was made for it."""
    if kind != "training":
        return inference_case(kind, name, model, config, settings)
    batches = random_batches(config, settings.n_steps + 1)
    one_round = train_with_transformers if name == "transformers_trainer" else train_with_our_loop
    return lambda: one_round(model, batches, config)


def inference_dtype(device: torch.device) -> torch.dtype:
    """The type of weights and tensors at inference: float32 on a processor."""
    return torch.float32 if device.type == "cpu" else pick_precision("auto", device)


def train_with_our_loop(
    model: nn.Module,
    batches: MixedBatches,
    config: RunConfig,
    penalty: Penalty | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> tuple[Stamp, Stamp, int]:
    """All batches through `nrlib.training.train`, timed from the end of the first step to the end of the last."""
    stamps: list[Stamp] = []

    def stamp() -> dict[str, float]:
        after_step()
        stamps.append(Stamp.now())
        return {}

    m = config.method
    hooks = Hooks(measure=stamp, n_measurements=batches.n_steps)
    train(
        model, batches, config.training, local_loss=m.local_loss, local_loss_weight=m.local_loss_weight, penalty=penalty,
        hooks=hooks, progress=False,
    )  # fmt: skip
    return stamps[0], stamps[-1], (len(stamps) - 1) * batches.batch_size * batches.context_length


def train_with_transformers(model: nn.Module, batches: MixedBatches, config: RunConfig) -> tuple[Stamp, Stamp, int]:
    """The same batches, optimiser, schedule and losses through `transformers.Trainer`, with all its extras off."""
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import DataLoader
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    stamps: list[Stamp] = []

    class StampSteps(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(Stamp.now())

    class LocalLossTrainer(LocalLossMixin, Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(_Steps(batches), batch_size=None)

    c, device = config.training, next(model.parameters()).device
    optimizer = make_optimizer(model, c)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_at(step, batches.n_steps, c) / c.learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=batches.n_steps,
            per_device_train_batch_size=batches.batch_size,
            max_grad_norm=c.max_gradient_norm,
            bf16=pick_precision(c.precision, device) == torch.bfloat16,
            use_cpu=device.type == "cpu",
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
        )
        trainer = LocalLossTrainer(
            model, arguments, train_dataset=_Steps(batches), optimizers=(optimizer, schedule), callbacks=[StampSteps()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return stamps[0], stamps[-1], (len(stamps) - 1) * batches.batch_size * batches.context_length


class _Steps(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One item for each optimiser step, as Trainer wants it."""

    def __init__(self, batches: MixedBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches.n_steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        batch: Batch = self.batches.batch(step)
        targets = batch.targets.contiguous()  # already shifted: each is the next of the inputs
        return {"input_ids": batch.inputs, "labels": targets, "shift_labels": targets, "domain": batch.domain}


def random_batches(config: RunConfig, n_steps: int) -> MixedBatches:
    c = config.training
    generator = np.random.default_rng(0)
    n_tokens = (n_steps * c.batch_size + 1) * c.context_length + 1
    new, original = (
        TokenStream(generator.integers(0, config.backbone.vocabulary_size, n_tokens, dtype=np.int32), n_tokens, name)
        for name in ("random new domain", "random original domain")
    )
    return MixedBatches(
        new, original, mix_ratio=c.mix_ratio, n_steps=n_steps, batch_size=c.batch_size,
        context_length=c.context_length, seed=0,
    )  # fmt: skip
