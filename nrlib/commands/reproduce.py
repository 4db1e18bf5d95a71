"""`nrlib reproduce`: train published records again and say how far the numbers are from the published ones."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..profiles import PROFILES
from ..storage import cache_directory, results_directory

if TYPE_CHECKING:
    import pandas as pd

    from ..records import Record

_TRAINED = ("backbones", "checkpoints", "records")  # folders of the cache that hold what training made


def choose_records(profile: str = "", limit: int = 0, run_ids: Sequence[str] = ()) -> list[Record]:
    """Published records of a profile ('' is any), at most `limit` (0 is all), spread evenly over methods and runs; with
    `run_ids`, these only."""
    from ..records import published_records

    if profile not in ("", *PROFILES):
        raise ConfigError(f"profile = {profile!r} is unknown. Allowed: {', '.join(PROFILES)}.")
    found = [record for record in published_records() if profile in ("", record.config["profile"])]
    if not found:
        of_profile = f" of the profile {profile}" if profile else ""
        raise ConfigError(
            f"There are no published records{of_profile} in {results_directory()}, so there is nothing to reproduce. "
            "Records come with the project's checkout; `nrlib run NOTEBOOK --publish` writes new ones."
        )
    if run_ids:
        names = {record.run_id for record in found}
        for run_id in run_ids:
            if run_id not in names:
                close = difflib.get_close_matches(run_id, names, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ConfigError(
                    f"There is no published record {run_id!r} in {results_directory()}.{hint} `nrlib records` lists them."
                )
        found = [record for record in found if record.run_id in run_ids]
    found.sort(key=lambda record: (record.config["method"]["method"], record.run_id))
    n_chosen = min(limit or len(found), len(found))
    return [found[index * len(found) // n_chosen] for index in range(n_chosen)]


def reproduce_and_report(records: Sequence[Record], tolerance: float) -> tuple[str, bool]:
    """Train `records` again; returns the report and whether all differences are within `tolerance` bits per byte."""
    from ..machine import describe_device, pick_device

    table, failures = reproduce(records)
    then = sorted({record.provenance["device"] for record in records})
    header = f"{len(records)} runs, published on {'; '.join(then)}, trained again on {describe_device(pick_device())}."
    report = "\n".join(filter(None, [header, summarise(table, tolerance) if len(table) else "", failures]))
    return report, not failures and bool((table["difference"].abs() <= tolerance).all())


def reproduce(records: Sequence[Record], n_workers: int | None = None) -> tuple[pd.DataFrame, str]:
    """Train the runs of `records` again. Returns what is different (run_id, metric, published, reproduced, difference)
    and what failed."""
    import pandas as pd

    from ..records import load_record
    from ..sweep import SweepError, sweep

    rows, failures = [], ""
    with fresh_cache():
        try:
            sweep([record.run_config for record in records], notebook="reproduce", n_workers=n_workers)
        except SweepError as error:
            failures = str(error)
        for old in records:
            new = load_record(old.run_config)
            if new is None:
                continue
            for metric, value in old.results["bits_per_byte"].items():
                again = new.results["bits_per_byte"][metric]
                rows.append((old.run_id, metric, value, again, again - value))
    return pd.DataFrame(rows, columns=["run_id", "metric", "published", "reproduced", "difference"]), failures


def summarise(table: pd.DataFrame, tolerance: float) -> str:
    """Median and largest difference of each metric, and the runs beyond the tolerance."""
    sizes = table.assign(size=table["difference"].abs()).groupby("metric")["size"]
    lines = [f"{'bits per byte':30s} median difference   largest"]
    lines += [f"{name:30s} {sizes.median()[name]:17.5f} {sizes.max()[name]:9.5f}" for name in sizes.groups]
    beyond = table[~(table["difference"].abs() <= tolerance)]  # counts NaN as beyond
    for row in beyond.itertuples():
        lines.append(f"beyond {tolerance:g}: {row.run_id} {row.metric} {row.published:.5f} -> {row.reproduced:.5f}")
    verdict = f"{len(beyond)} of {len(table)} values differ" if len(beyond) else f"all {len(table)} values agree"
    return "\n".join([*lines, f"{verdict} {'by more than' if len(beyond) else 'within'} {tolerance:g} bits per byte."])


@contextmanager
def fresh_cache() -> Iterator[Path]:
    """A temporary cache that shares the texts of the usual one, but nothing that was trained, and no records. Inside, no
    cluster is used: its workers have folders of their own and would find there what is to be made again."""
    usual, before = (
        cache_directory().absolute(),
        {name: os.environ.get(name) for name in ("NRLIB_CACHE", "NRLIB_RESULTS", "NRLIB_EXECUTOR")},
    )
    usual.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=usual, prefix=".reproduce-") as name:
        for entry in usual.iterdir():
            if entry.is_dir() and entry.name not in _TRAINED and not entry.name.startswith("."):
                Path(name, entry.name).symlink_to(entry)
        os.environ.update({"NRLIB_CACHE": name, "NRLIB_RESULTS": str(Path(name, "published"))})  # workers inherit them
        os.environ.pop("NRLIB_EXECUTOR", None)
        try:
            yield Path(name)
        finally:
            for variable, value in before.items():
                os.environ.pop(variable, None) if value is None else os.environ.update({variable: value})
