"""Training watched from outside: TensorBoard, trackio or Weights & Biases, through accelerate's trackers. What is logged
is no part of a run's configuration: a run is the same whether somebody watches or not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .storage import project_directory

TRACKERS = ("tensorboard", "trackio", "wandb")
PROJECT = "nrlib"  # under which trackio and Weights & Biases show the runs


def check_tracker(name: str) -> None:
    """Raise ConfigError for an unknown tracker or one whose package is missing."""
    if name not in TRACKERS:
        raise ConfigError(f"The tracker {name!r} is unknown. Choose one of: {', '.join(TRACKERS)}.")
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"Logging to {name} needs the package {name}, which is not installed: pip install {name}")


@contextmanager
def tracking(
    name: str, run_name: str, options: Mapping[str, Any], folder: Path | str | None = None
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function of step and values for `nrlib.training.Hooks.log`, and the tracker closed after the block.

    Parameters
    ----------
    name : 'tensorboard', 'trackio' or 'wandb'; where the last two send their values is theirs to configure.
    run_name : under which the values appear, such as a run_id.
    options : what the run is: its parameters, by name.
    folder : of TensorBoard's files, one folder a run in it; default `log_directory()`.
    """
    check_tracker(name)
    from accelerate import tracking as trackers

    tracker: Any
    if name == "tensorboard":
        tracker = trackers.TensorBoardTracker(run_name, logging_dir=str(folder or log_directory()))
    else:
        tracker = trackers.LOGGER_TYPE_TO_CLASS[name](PROJECT, name=run_name)
    if hasattr(tracker, "start"):  # older ones start when they are made
        tracker.start()
    try:
        tracker.store_init_configuration(dict(options))
        yield lambda step, values: tracker.log(dict(values), step=step)
    finally:
        tracker.finish()


def log_directory() -> Path:
    """`build/logs` of the checkout or the working directory: TensorBoard's files."""
    return project_directory() / "build" / "logs"
