"""Many runs: records are loaded, missing ones trained in parallel. One arm's failure does not stop the others, and a
sweep that was killed continues where it stood."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from .backbone import get_backbone
from .cluster import VARIABLE, open_executor
from .config import RunConfig
from .errors import ClusterError, NrlibError
from .machine import pick_device
from .records import Record, check_clean_tree, is_publishing, write_counts
from .runs import check_run, keep_record, make_batches, run_or_load, stored_record
from .tasks import backbone_task, expect, run_task
from .texts import prepare_text

N_TRIES = 2  # a worker killed from outside (out of memory, say) takes its pool along; the rest gets a new pool

# Two busy OpenMP pools that wait actively starve each other five- to tenfold; workers get one thread and wait passively.
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip

Task = tuple[RunConfig, dict[str, Any]]  # the arguments of a function that a worker calls


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
    executor : any `concurrent.futures.Executor`, for example Dask's `client.get_executor(pure=False)`. Without one, and
        without `n_workers`, the Dask cluster that the environment variable NRLIB_EXECUTOR names (see `nrlib.cluster`);
        else a process pool on this machine.

    Raises
    ------
    SweepError
        When arms failed, after all others have finished and are stored.
    ClusterError
        When the cluster cannot be used, before anything is trained.
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
        with _executor(executor, n_workers) as executor:
            _prepare(missing, executor, progress)
            bar = tqdm(
                total=len(arms), initial=n_loaded, desc=f"runs {notebook}".strip(), unit="run", disable=not progress
            )
            for run_id, outcome in _outcomes(missing, notebook, n_workers, executor, progress):
                if isinstance(outcome, Record):
                    records[run_id] = outcome
                else:
                    failures[run_id] = outcome
                bar.update()
                bar.set_postfix_str(f"{len(failures)} failed" if failures else run_id)
            bar.close()
    trained = {run_id for run_id in records if run_id in {config.run_id for config in missing}}
    loaded = sorted(records.keys() - trained)
    write_counts(notebook=notebook, loaded=loaded, trained=sorted(trained), failed=sorted(failures))
    print(f"{n_loaded} runs loaded, {len(trained)} trained" + (f", {len(failures)} failed" if failures else ""))
    if failures:
        lines = "\n".join(f"  {run_id}: {type(error).__name__}: {error}" for run_id, error in failures.items())
        raise SweepError(
            f"{len(failures)} of {len(arms)} runs failed; the other records are stored, and running the same command "
            f"again repeats only these:\n{lines}"
        )
    return [records[config.run_id] for config in configs]


@contextmanager
def _executor(executor: Executor | None, n_workers: int | None) -> Iterator[Executor | None]:
    """The executor that was given or that the environment names; None is a process pool of our own."""
    address = os.environ.get(VARIABLE)
    if executor is None and n_workers is None and address:
        with open_executor(address) as executor:
            yield executor
    else:
        yield executor


def _prepare(configs: Sequence[RunConfig], executor: Executor | None, progress: bool) -> None:
    """Text and backbones once, instead of once in every worker: the text here, where there is a network if anywhere, and
    the backbones here with all threads, or with an executor where the runs will be."""
    for config in configs:
        make_batches(config, prepare_text(config.data, config.backbone, progress))
    distinct = list({_what_makes_a_backbone(config): config for config in configs}.values())
    if executor is None:
        for config in distinct:
            get_backbone(config, prepare_text(config.data, config.backbone, progress), progress)
        return
    tasks = {c.run_id: (c, {"expected": expect(c, progress)}) for c in distinct if not c.backbone.backbone_name}
    bar = tqdm(total=len(tasks), desc="backbones", disable=not progress or not tasks)
    for run_id, outcome in _submit(executor, backbone_task, tasks):
        if isinstance(outcome, NrlibError):
            raise outcome
        if outcome is not None:
            raise SweepError(f"The backbone of {run_id} could not be trained: {type(outcome).__name__}: {outcome}")
        bar.update()
    bar.close()


def _what_makes_a_backbone(config: RunConfig) -> tuple[Any, ...]:
    return config.data, config.backbone, config.training.context_length, config.training.precision


def _outcomes(
    configs: Sequence[RunConfig], notebook: str, n_workers: int | None, executor: Executor | None, progress: bool
) -> Iterator[tuple[str, Record | Exception]]:
    if executor is not None:
        expected = {key: expect(c, progress) for key, c in {_what_makes_a_backbone(c): c for c in configs}.items()}
        tasks: dict[str, Task] = {
            c.run_id: (c, {"notebook": notebook, "expected": expected[_what_makes_a_backbone(c)]}) for c in configs
        }
        for run_id, outcome in _submit(executor, run_task, tasks):
            yield run_id, _keep(outcome)
        return
    n_workers = min(n_workers or _default_workers(), len(configs))
    if n_workers == 1:
        for config in configs:
            yield config.run_id, _run_here(config, notebook, progress)
        return
    waiting: dict[str, Task] = {c.run_id: (c, {"notebook": notebook, "progress": False}) for c in configs}
    for _ in range(N_TRIES):
        with _worker_environment(), _pool(n_workers) as pool:
            for run_id, outcome in _submit(pool, run_or_load, dict(waiting)):
                if not isinstance(outcome, BrokenProcessPool):
                    del waiting[run_id]
                    yield run_id, outcome
        if not waiting:
            return
    for run_id, task in waiting.items():  # one of these kills its workers: a pool each, so that it takes no other along
        with _worker_environment(), _pool(1) as pool:
            yield from _submit(pool, run_or_load, {run_id: task})


def _submit(executor: Executor, function: Callable[..., Any], tasks: Mapping[str, Task]) -> Iterator[tuple[str, Any]]:
    """Results or exceptions of `function`, by name of the task, as they come."""
    futures: dict[Future[Any], str] = {}
    try:
        for name, (config, arguments) in tasks.items():
            futures[executor.submit(function, config, **arguments)] = name
    except BrokenProcessPool as error:
        submitted = set(futures.values())
        yield from ((name, error) for name in tasks if name not in submitted)
    for future in as_completed(list(futures)):
        name, outcome = futures.pop(future), _outcome(future)
        del future  # as long as anyone holds it, Dask makes a result again whose worker was lost, collected or not
        yield name, outcome


def _outcome(future: Future[Any]) -> Any:
    if future.cancelled():
        return ClusterError(
            "The run was cancelled: its executor, or the executor's scheduler, was closed before it ended."
        )
    failure = future.exception()
    return future.result() if failure is None else _as_exception(failure)


def _keep(outcome: Record | Exception) -> Record | Exception:
    """Store what a worker sent, which may have stored it on a disk of its own."""
    try:
        return keep_record(outcome) if isinstance(outcome, Record) else outcome
    except NrlibError as error:
        return error


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
