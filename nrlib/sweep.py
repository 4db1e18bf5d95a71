"""Many runs: records are loaded, missing ones trained in parallel. One arm's failure does not stop the others, and a
sweep that was killed continues where it stood."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from tqdm import tqdm

from .backbone import get_backbone
from .config import RunConfig
from .errors import NrlibError
from .machine import pick_device
from .records import Record, check_clean_tree, is_publishing, write_counts
from .runs import check_run, make_batches, run_or_load, stored_record
from .texts import prepare_text

N_TRIES = 2  # a worker killed from outside (out of memory, say) takes its pool along; the rest gets a new pool

# Two busy OpenMP pools that wait actively starve each other five- to tenfold; workers get one thread and wait passively.
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


class SweepError(NrlibError):
    """Some arms failed; the records of the others are stored."""


def sweep(
    configs: Sequence[RunConfig],
    *,
    notebook: str = "",
    n_workers: int | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> list[Record]:
    """The records of `configs`, in their order; what is not stored is trained.

    Parameters
    ----------
    notebook : name of the experiment, written into new records.
    n_workers : processes, one thread each; default one a core. Ignored with an executor.
    executor : any `concurrent.futures.Executor`, for example Dask's; default a process pool on this machine.

    Raises
    ------
    SweepError
        When arms failed, after all others have finished and are stored.
    """
    arms = {config.run_id: config for config in configs}
    records = {run_id: record for run_id, config in arms.items() if (record := stored_record(config)) is not None}
    missing = [config for run_id, config in arms.items() if run_id not in records]
    n_loaded, failures = len(records), {}
    for config in missing:
        check_run(config)
    if missing:
        if is_publishing():
            check_clean_tree()
        _prepare(missing, progress)
        bar = tqdm(total=len(arms), initial=n_loaded, desc=f"runs {notebook}".strip(), unit="run", disable=not progress)
        for run_id, outcome in _outcomes(missing, notebook, n_workers, executor, progress):
            if isinstance(outcome, Record):
                records[run_id] = outcome
            else:
                failures[run_id] = outcome
            bar.update()
            bar.set_postfix_str(f"{len(failures)} failed" if failures else run_id)
        bar.close()
    trained = {run_id for run_id in records if run_id in {config.run_id for config in missing}}
    write_counts(loaded=sorted(records.keys() - trained), trained=sorted(trained), failed=sorted(failures))
    print(f"{n_loaded} runs loaded, {len(trained)} trained" + (f", {len(failures)} failed" if failures else ""))
    if failures:
        lines = "\n".join(f"  {run_id}: {type(error).__name__}: {error}" for run_id, error in failures.items())
        raise SweepError(
            f"{len(failures)} of {len(arms)} runs failed; the other records are stored, and running the same command "
            f"again repeats only these:\n{lines}"
        )
    return [records[config.run_id] for config in configs]


def _prepare(configs: Sequence[RunConfig], progress: bool) -> None:
    """Text and backbones once, here, with all threads, instead of once in every worker."""
    for config in configs:
        make_batches(config, prepare_text(config.data, config.backbone, progress))
    for config in {(c.data, c.backbone, c.training.context_length, c.training.precision): c for c in configs}.values():
        get_backbone(config, prepare_text(config.data, config.backbone, progress), progress)


def _outcomes(
    configs: Sequence[RunConfig], notebook: str, n_workers: int | None, executor: Executor | None, progress: bool
) -> Iterator[tuple[str, Record | Exception]]:
    if executor is not None:
        yield from _submit(executor, configs, notebook)
        return
    n_workers = min(n_workers or _default_workers(), len(configs))
    if n_workers == 1:
        for config in configs:
            yield config.run_id, _run_here(config, notebook, progress)
        return
    waiting = {config.run_id: config for config in configs}
    for _ in range(N_TRIES):
        with _worker_environment(), _pool(n_workers) as pool:
            for run_id, outcome in _submit(pool, list(waiting.values()), notebook):
                if not isinstance(outcome, BrokenProcessPool):
                    del waiting[run_id]
                    yield run_id, outcome
        if not waiting:
            return
    for config in waiting.values():  # one of these kills its workers: a pool for each, so that it takes no other along
        with _worker_environment(), _pool(1) as pool:
            yield from _submit(pool, [config], notebook)


def _submit(
    executor: Executor, configs: Sequence[RunConfig], notebook: str
) -> Iterator[tuple[str, Record | Exception]]:
    futures: dict[Future[Record], str] = {}
    try:
        for config in configs:
            futures[executor.submit(run_or_load, config, notebook=notebook, progress=False)] = config.run_id
    except BrokenProcessPool as error:
        submitted = set(futures.values())
        yield from ((config.run_id, error) for config in configs if config.run_id not in submitted)
    for future in as_completed(futures):
        failure = future.exception()
        yield futures[future], future.result() if failure is None else _as_exception(failure)


def _run_here(config: RunConfig, notebook: str, progress: bool) -> Record | Exception:
    try:
        return run_or_load(config, notebook=notebook, progress=progress)
    except Exception as error:
        return error


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _default_workers() -> int:
    return 1 if pick_device().type != "cpu" else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


@contextmanager
def worker_pool(n_workers: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each that wait passively, by default one a core, and end with this one."""
    with _worker_environment(), _pool(n_workers or _default_workers()) as pool:
        yield pool


@contextmanager
def _pool(n_workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # fork would copy a process whose threads already run
    with ProcessPoolExecutor(n_workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:  # interrupted: what has not begun shall not
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(parent: int) -> None:
    torch.set_num_threads(1)

    def stop_with_parent() -> None:  # a sweep killed from outside must not leave its workers training
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=stop_with_parent, daemon=True).start()


@contextmanager
def _worker_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
