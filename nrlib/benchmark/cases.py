"""What the benchmark measures: one round of each case, as a function that can be called again and again."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..backbone import build_backbone
from ..batches import Batch, MixedBatches, TokenStream
from ..config import RunConfig, make_config
from ..machine import pick_device, pick_precision
from ..methods import apply_method
from ..trainer import LocalLossMixin
from ..training import Hooks, learning_rate_at, make_optimizer, train

OURS = "neutral_residues"
CASES = {
    "training": (OURS, "fine_tuning", "lora", "transformers_trainer"),
    "forward": (OURS, "extension_disabled", "bare_backbone"),
    "generation": (OURS, "extension_disabled", "bare_backbone"),
}
TITLES = {
    OURS: "neutral residues",
    "fine_tuning": "full fine-tuning",
    "lora": "LoRA (PEFT), same budget",
    "transformers_trainer": "same extension, transformers Trainer",
    "extension_disabled": "extension disabled",
    "bare_backbone": "bare backbone",
}


@dataclass(frozen=True)
class Settings:
    """How much is measured. Weights and tokens are random: neither changes the speed.

    n_steps : timed steps of a round; one more, which is not timed, goes before them and pays for the set-up.
    seconds : no new round is started after this time.
    """

    profile: str = "laptop"
    n_rounds: int = 12
    n_steps: int = 8
    seconds: float = float("inf")
    prompt_length: int = 16
    n_generated: int = 48
    with_memory: bool = True


QUICK = Settings(n_rounds=5, n_steps=2, seconds=35.0, n_generated=24)


@dataclass(frozen=True)
class Stamp:
    """A moment: wall clock and the processor time this process has used."""

    seconds: float
    user_seconds: float
    system_seconds: float

    @staticmethod
    def now() -> Stamp:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Stamp(time.perf_counter(), usage.ru_utime, usage.ru_stime)


Case = Callable[[], tuple[Stamp, Stamp, int]]  # runs one round; returns start, end and tokens between them


def make_case(kind: str, name: str, settings: Settings) -> Case:
    """One round of a case as a function, with its own model."""
    method = name if name in ("fine_tuning", "lora") else OURS
    config = make_config(settings.profile, method=method)
    model: Any = build_backbone(config, config.backbone.vocabulary_size, eos_token_id=0)
    model.to(pick_device()).eval()
    if name != "bare_backbone":
        model = apply_method(model, config.method, seed=0)
    if kind == "training":
        batches = random_batches(config, settings.n_steps + 1)
        one_round = train_with_transformers if name == "transformers_trainer" else train_with_our_loop
        return lambda: one_round(model, batches, config)
    if name == "extension_disabled":
        model.base_model.disable_adapter_layers()
    return _generation_case(model, config, settings) if kind == "generation" else _forward_case(model, config, settings)


def train_with_our_loop(model: nn.Module, batches: MixedBatches, config: RunConfig) -> tuple[Stamp, Stamp, int]:
    """All batches through `nrlib.training.train`, timed from the end of the first step to the end of the last."""
    stamps: list[Stamp] = []

    def stamp() -> dict[str, float]:
        stamps.append(Stamp.now())
        return {}

    m = config.method
    hooks = Hooks(measure=stamp, n_measurements=batches.n_steps)
    train(
        model, batches, config.training, local_loss=m.local_loss, local_loss_weight=m.local_loss_weight, hooks=hooks,
        progress=False,
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


def _random_tokens(config: RunConfig, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (config.training.batch_size, length)
    return torch.randint(1, config.backbone.vocabulary_size, shape, generator=generator).to(pick_device())


def _forward_case(model: nn.Module, config: RunConfig, settings: Settings) -> Case:
    tokens = _random_tokens(config, config.training.context_length)

    @torch.no_grad()
    def one_round() -> tuple[Stamp, Stamp, int]:
        start = Stamp.now()
        for _ in range(settings.n_steps):
            model(input_ids=tokens, use_cache=False)
        return start, Stamp.now(), settings.n_steps * tokens.numel()

    return one_round


def _generation_case(model: Any, config: RunConfig, settings: Settings) -> Case:
    prompt, n = _random_tokens(config, settings.prompt_length), settings.n_generated
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def one_round() -> tuple[Stamp, Stamp, int]:
        start = Stamp.now()
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        return start, Stamp.now(), n * len(prompt)

    return one_round
