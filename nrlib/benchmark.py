"""Speed and memory of training and inference, side by side in one run.

The cases take turns (A B C D A B C D …) in one process, so that another program on the machine slows all of them, and
are compared round by round. Processor time is compared as well: it hardly moves when other programs take the cores.
Peak memory is measured apart, in a fresh process for each case.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .backbone import build_backbone
from .batches import Batch, MixedBatches, TokenStream
from .config import RunConfig, make_config
from .losses import LocalLoss
from .machine import describe_device, keep_large_blocks, package_versions, pick_device, pick_precision
from .methods import apply_method
from .training import Hooks, learning_rate_at, make_optimizer, train

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


@dataclass(frozen=True)
class Timing:
    """One round of one case."""

    n_tokens: int
    seconds: float
    user_seconds: float
    system_seconds: float

    @staticmethod
    def of(case: Case) -> Timing:
        start, end, n_tokens = case()
        user, system = end.user_seconds - start.user_seconds, end.system_seconds - start.system_seconds
        return Timing(n_tokens, end.seconds - start.seconds, user, system)

    @property
    def processor_seconds(self) -> float:
        return self.user_seconds + self.system_seconds


def run_benchmark(quick: bool = False, progress: bool = True, settings: Settings | None = None) -> dict[str, Any]:
    """Measure all cases; the result can be written as JSON.

    Speeds are tokens per second, as median, lowest and highest over the rounds. A ratio is the speed of neutral
    residues over the other case's in the same round, so above 1 neutral residues are faster; `processor_ratio` is the
    same by processor time, of all threads together. `kernel_time_ratio` is the system's share of the processor time.
    `peak_memory_mb` counts what the case needs above the imported libraries: weights, gradients, optimiser state and
    temporaries.
    """
    settings = settings or (QUICK if quick else Settings())
    keep_large_blocks()  # for every case alike: our loop does it, Trainer profits from it here
    start = time.perf_counter()
    cases = {(kind, name): make_case(kind, name, settings) for kind, names in CASES.items() for name in names}
    timings: dict[tuple[str, str], list[Timing]] = {key: [] for key in cases}
    bar = tqdm(total=settings.n_rounds * len(cases), desc="benchmark", disable=not progress, unit="case", leave=False)
    for case in cases.values():
        case()
    for _ in range(settings.n_rounds):
        for key, case in cases.items():
            bar.set_postfix_str(" ".join(key), refresh=False)
            timings[key].append(Timing.of(case))
            bar.update()
        if time.perf_counter() - start > settings.seconds:
            break
    bar.close()
    result = _describe(settings, n_rounds=len(timings["training", OURS]))
    memory = _measure_memory(settings, progress) if settings.with_memory else {}
    for kind, names in CASES.items():
        result[kind] = {
            name: _summary(timings[kind, name], timings[kind, OURS], memory.get((kind, name))) for name in names
        }
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def format_table(result: dict[str, Any]) -> str:
    """The result as text: one line for each case."""
    machine = result["machine"]
    lines = [
        f"{machine['device']}; {machine['n_threads']} threads; training in {result['precision']}, inference in float32; "
        f"{result['n_rounds']} rounds in {result['seconds']} s",
        "ratio: speed of neutral residues over this case's in the same round, median (lowest to highest), by wall clock",
        "and by processor time; kernel: its share of the processor time; memory: peak, above the imported libraries",
        "",
        f"{'':48} {'tokens/s':>9}  {'ratio, wall clock':<20} {'ratio, processor':<20} {'kernel':>6} {'memory':>7}",
    ]
    for kind in CASES:
        for name, row in result[kind].items():
            ratios = ["" if name == OURS else _format_spread(row[key]) for key in ("ratio", "processor_ratio")]
            memory = "" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']} MB"
            lines.append(
                f"{kind:10} {TITLES[name]:37} {row['tokens_per_second']['median']:>9,.0f}  {ratios[0]:<20} "
                f"{ratios[1]:<20} {row['kernel_time_ratio']:>6.1%} {memory:>7}"
            )
    return "\n".join(lines)


def _format_spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def make_case(kind: str, name: str, settings: Settings) -> Case:
    """One round of a case as a function, with its own model."""
    method = name if name in ("fine_tuning", "lora") else OURS
    config = make_config(settings.profile, method=method)
    model: Any = build_backbone(config, config.backbone.vocabulary_size, eos_token_id=0)
    model.to(pick_device()).eval()
    if name != "bare_backbone":
        model = apply_method(model, config.method, seed=0)
    if kind == "training":
        batches = _random_batches(config, settings.n_steps + 1)
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

    class LocalLossTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(_Steps(batches), batch_size=None)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with LocalLoss(model, config.method.local_loss, inputs["domain"]) as collected:
                logits = model(input_ids=inputs["inputs"], use_cache=False).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), inputs["targets"].flatten())
                return loss + config.method.local_loss_weight * collected.mean()

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
        return {"inputs": batch.inputs, "targets": batch.targets, "domain": batch.domain}


def _random_batches(config: RunConfig, n_steps: int) -> MixedBatches:
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


def _spread(values: list[float], digits: int) -> dict[str, float]:
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"median": round(middle, digits), "lowest": round(low, digits), "highest": round(high, digits)}


def _summary(rounds: list[Timing], ours: list[Timing], peak_memory_mb: int | None) -> dict[str, Any]:
    pairs = list(zip(ours, rounds, strict=True))
    processor_seconds = max(sum(t.processor_seconds for t in rounds), 1e-9)
    return {
        "tokens_per_second": _spread([t.n_tokens / t.seconds for t in rounds], 1),
        "ratio": _spread([other.seconds / mine.seconds for mine, other in pairs], 4),
        "processor_ratio": _spread([other.processor_seconds / mine.processor_seconds for mine, other in pairs], 4),
        "kernel_time_ratio": round(sum(t.system_seconds for t in rounds) / processor_seconds, 4),
        "peak_memory_mb": peak_memory_mb,
    }


def _describe(settings: Settings, n_rounds: int) -> dict[str, Any]:
    config, device = make_config(settings.profile), pick_device()
    shape = {key: getattr(config.backbone, key) for key in ("d_model", "n_layers", "ffn_width", "vocabulary_size")}
    shape |= {key: getattr(config.training, key) for key in ("context_length", "batch_size")}
    return {
        "profile": settings.profile,
        "shape": shape | {"extra_ratio": config.method.extra_ratio},
        "machine": {
            "device": describe_device(device),
            "n_threads": torch.get_num_threads(),
            # above the number of cores, other programs were running too
            "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        },
        "versions": package_versions(),
        "precision": str(pick_precision(config.training.precision, device)).removeprefix("torch."),
        "n_rounds": n_rounds,
        "n_steps_per_round": settings.n_steps,
    }


# Memory. ru_maxrss would be wrong: a child process inherits its parent's value, which is large here. The kernel's high
# water mark VmHWM belongs to the process's own memory, and can be set back to the present size.


def peak_memory_of(action: Callable[[], object]) -> int:
    """Highest memory, in MB, that `action` needs above what the process holds at its start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        action()
        return round(torch.cuda.max_memory_allocated() / 1e6)
    _reset_high_water_mark()
    before = _resident_mb("VmRSS")
    action()
    return round(_resident_mb("VmHWM") - before)


def _reset_high_water_mark() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
            handle.write("5")
    except OSError:
        pass  # in a fresh process the mark is the present size, but for what the imports gave back


def _resident_mb(entry: str) -> float:
    try:
        with open("/proc/self/status", encoding="utf-8") as handle:
            return next(int(line.split()[1]) * 1.024e-3 for line in handle if line.startswith(entry + ":"))
    except (OSError, StopIteration):  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def _measure_memory(settings: Settings, progress: bool) -> dict[tuple[str, str], int]:
    keys = [(kind, name) for kind in ("training", "forward") for name in CASES[kind]]
    # The imports take ten times as long as the measurement. On Linux one new process does them and forks for each case.
    groups = [keys] if sys.platform == "linux" else [[key] for key in keys]
    peaks = (peak for group in groups for peak in _memory_in_new_process(group, settings.profile))
    bar = tqdm(peaks, total=len(keys), desc="peak memory", disable=not progress, unit="case", leave=False)
    return dict(zip(keys, bar, strict=True))


def _memory_in_new_process(keys: list[tuple[str, str]], profile: str) -> Iterator[int]:
    names = [f"{kind}/{name}" for kind, name in keys]
    command = [sys.executable, "-m", "nrlib.benchmark", profile, str(torch.get_num_threads()), *names]
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # CUDA must not be started before a fork
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield int(json.loads(line))
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"Measuring peak memory failed:\n{errors.read()[-2000:]}")


def _memory_process(profile: str, n_threads: str, *names: str) -> None:
    import transformers.trainer  # noqa: F401  before the measurement: the library itself is not counted

    for name in names:
        child = os.fork() if len(names) > 1 else 0
        if child:
            _, status = os.waitpid(child, 0)
            if status:
                raise SystemExit(1)
            continue
        torch.set_num_threads(int(n_threads))
        keep_large_blocks()
        kind, case = name.split("/")
        settings = Settings(profile=profile, n_steps=2)
        print(json.dumps(peak_memory_of(lambda: make_case(kind, case, settings)())), flush=True)  # noqa: B023
        if len(names) > 1:
            os._exit(0)


if __name__ == "__main__":
    _memory_process(*sys.argv[1:])
