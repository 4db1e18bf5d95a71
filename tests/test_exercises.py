"""Exercises: every one stands in a chapter, its folded solution is right, and other answers are not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from nrlib.errors import ConfigError
from nrlib.exercises import EXERCISES, check

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"```\{admonition\} Solution\n:class: dropdown\n`answer = ([^`]+)`")


def exercises_and_solutions():
    """(notebook, exercise, solution as Python) in their order."""
    for path in NOTEBOOKS:
        asked = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if "exercise" in cell["metadata"].get("tags", []):
                asked += re.findall(r'check\("(\w+)", answer\)', source)
            for solution in SOLUTION.findall(source):
                yield path.stem, asked.pop(0), solution
        assert not asked, f"{path.name}: {asked} have no solution"


CASES = list(exercises_and_solutions())


def test_every_exercise_is_asked_once():
    assert sorted(name for _, name, _ in CASES) == sorted(EXERCISES)


@pytest.mark.parametrize(("notebook", "name", "solution"), CASES, ids=[name for _, name, _ in CASES])
def test_the_solution_in_the_chapter_is_right(notebook, name, solution):
    verdict = check(name, eval(solution, {"torch": torch}))
    assert verdict.is_right and repr(verdict) == "Right."


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("answer", [0.51, "no", [1.0, 2.0], ["B"], lambda *values: values[0] * 1.1, object()])
def test_other_answers_are_not_right_and_get_a_hint(name, answer):
    verdict = check(name, answer)
    assert not verdict.is_right and "Hint: " in verdict.text


def test_no_answer_is_said_to_be_none_yet():
    assert "No answer yet" in repr(check("front", None))


def test_an_unknown_exercise_names_its_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'front'"):
        check("frnt", 1)


def test_every_chapter_of_the_first_three_parts_has_an_exercise():
    parts = yaml.safe_load((NOTEBOOKS[0].parent.parent / "_toc.yml").read_text(encoding="utf-8"))["parts"][:3]
    chapters = [Path(entry["file"]) for part in parts for entry in part["chapters"]]
    names = {path.name for path in chapters if path.parent.name == "notebooks"}
    assert len(names) > 10
    assert names <= {notebook for notebook, _, _ in CASES}
