"""Studies: kept, found again, computed once, refused early."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from nrlib import study
from nrlib.errors import ConfigError, RecordError
from nrlib.study import published_studies, run_study
from nrlib.sweep import SweepError


def count(*, seed: int, n: int = 2, folder: str = "") -> dict[str, object]:
    """A study that leaves a trace of every computation."""
    if n < 0:
        raise ValueError("n is negative")
    with open(f"{folder}/{seed}", "a", encoding="utf-8") as handle:
        handle.write("x")
    return {"total": seed + n, "parts": [seed, n]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NRLIB_COUNTS", str(tmp_path / "counts.jsonl"))
    return tmp_path


def test_a_study_is_computed_once_and_kept_in_order(folder):
    settings = [{"seed": seed, "folder": str(folder)} for seed in (2, 1)]
    first = run_study(count, settings, progress=False)
    assert [(row["seed"], row["total"], row["parts"]) for row in first] == [(2, 4, [2, 2]), (1, 3, [1, 2])]
    assert run_study(count, [*settings, {**settings[0], "n": 2}], progress=False)[:2] == first
    assert (folder / "1").read_text() == (folder / "2").read_text() == "x"


def test_a_failure_leaves_the_others_stored(folder):
    settings = [{"seed": 1, "folder": str(folder)}, {"seed": 2, "n": -1, "folder": str(folder)}]
    with pytest.raises(SweepError, match=r"1 of 2 computations failed.*\n.*n is negative"):
        run_study(count, settings, progress=False)
    assert run_study(count, settings[:1], progress=False)[0]["total"] == 3
    assert (folder / "1").read_text() == "x"


def test_what_the_study_does_not_take_is_refused(folder):
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'm'.*seed"):
        run_study(count, [{"seed": 0, "m": 1}], progress=False)
    with pytest.raises(ConfigError, match="missing a required"):
        run_study(count, [{}], progress=False)


def test_only_results_of_the_study_as_it_is_now_count_as_published(folder, monkeypatch):
    monkeypatch.setenv("NRLIB_RESULTS", str(folder / "results"))
    run_study(count, [{"seed": seed, "folder": str(folder)} for seed in (0, 1)], progress=False)
    (folder / "results").mkdir()
    (folder / "cache" / "studies").rename(folder / "results" / "studies")
    assert [row["seed"] for row in published_studies(count)] == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "RESULT_VERSION", 2, raising=False)
        assert published_studies(count) == []
    with monkeypatch.context() as patch:
        patch.setattr(count, "__module__", "nrlib.study")  # one of the same name elsewhere
        assert published_studies(count) == []


def test_the_device_is_that_which_held_tensors(folder, monkeypatch):
    monkeypatch.setattr(study, "pick_device", lambda: torch.device("meta"))
    for n_bytes, name in ((0, "cpu"), (8, "meta")):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda n_bytes=n_bytes: n_bytes)
        stored = study._compute_and_store(count, {"seed": 0, "folder": str(folder)}, "count-s0-0.json")
        assert stored["provenance"]["device"].startswith(f"{name}: ")


def test_a_damaged_file_is_named(folder):
    run_study(count, [{"seed": 0, "folder": str(folder)}], progress=False)
    (path,) = (folder / "cache" / "studies").glob("count-s0-*.json")
    assert json.loads(path.read_text())["provenance"]["seconds"] >= 0
    path.write_text("{}")
    with pytest.raises(RecordError, match="is not the result of a study"):
        run_study(count, [{"seed": 0, "folder": str(folder)}], progress=False)
