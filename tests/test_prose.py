"""Numbers in prose: a result is glued from a record, what is typed is the value of a parameter.

Looked at are the conclusions of every notebook and every page that glues results. A typed number counts where it has a
percent sign or a decimal point; counts, years and names are free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nrlib.config import flat_values, make_config
from nrlib.notebooks import CONCLUSIONS, read_parameters
from nrlib.storage import project_directory

ROOT = project_directory()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [page for page in sorted((ROOT / "book").glob("*.md")) if "{glue" in page.read_text(encoding="utf-8")]
# Stated before there were results, and held against the records in test_claims.py: forgotten at most, learned at least.
GOAL = {0.01, 0.85, 0.003, 0.95}  # of the method, and of all that can be added to it
NUMBER = re.compile(r"(?<![\w.,-])(\d+\.\d+|\d+(?=\s?%))\s?(%?)")
# Not prose: code, equations, directives' options, roles, targets of links.
NOT_PROSE = [
    (r"(?ms)^(`{3,})\{(?:math|code|eval-rst|figure|include)[^\n]*\n.*?^\1\s*$", ""),
    (r"(?ms)^(`{3,})(?!\{)[^\n]*\n.*?^\1\s*$", ""),
    (r"(?m)^[`~:]{3,}.*$", ""),  # what is left are the fences of admonitions and tables, whose text is prose
    (r"(?s)\$\$.*?\$\$", ""),
    (r"\$[^$\n]+\$", ""),
    (r"\{[\w:]+\}`[^`]*`", " glued "),
    (r"`[^`]*`", " code "),
    (r"\]\([^)]*\)", "]"),
    (r"https?://\S+", ""),
    (r"(?m)^:[\w-]+:.*$", ""),
]


def prose(markdown: str) -> str:
    for pattern, replacement in NOT_PROSE:
        markdown = re.sub(pattern, replacement, markdown)
    return markdown


def typed_numbers(markdown: str) -> Iterator[tuple[float, str]]:
    """Each number typed in prose, a percentage as a share, and its line."""
    for line in prose(markdown).splitlines():
        for number, percent in NUMBER.findall(line):
            yield float(number) / (100 if percent else 1), line.strip()


def numbers_in(value: Any) -> set[float]:
    if isinstance(value, (list, tuple)):
        return {number for item in value for number in numbers_in(item)}
    return {float(value)} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


def settings() -> set[float]:
    """The defaults of every parameter of a run, on every profile of this book's own runs."""
    configs = [make_config(profile) for profile in ("smoke", "laptop")]
    return {number for config in configs for value in flat_values(config).values() for number in numbers_in(value)}


def unknown(markdown: str, known: set[float]) -> list[str]:
    return [
        f"{value:g} in: {line}"
        for value, line in typed_numbers(markdown)
        if not any(abs(value - other) < 1e-9 for other in known)
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_conclusions_glue_their_numbers(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    conclusions = [text for text in texts if text.startswith(CONCLUSIONS)]
    parameters = {number for each in read_parameters(path).values() for number in numbers_in(each.default)}
    for text in conclusions:
        body = text.removeprefix(CONCLUSIONS).split("\n## ")[0]
        assert not unknown(body, parameters | settings() | GOAL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_with_results_glue_all_of_them(path: Path) -> None:
    assert not unknown(path.read_text(encoding="utf-8"), settings() | GOAL)


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("It forgets 3.7% of it.", [0.037]),
        ("It forgets 4%, or 0.25 bits.", [0.04, 0.25]),
        ("It forgets {glue:text}`a_0.1_forgetting` at `mix_ratio=0.2`, $x = 0.3$.", []),
        ("```python\nx = 0.5\n```\nPython 3 and 12 runs.", []),
        ("```{admonition} Note\nThe rise is 7.5%.\n```", [0.075]),
        ("See [the paper](https://example.org/2410.02744).", []),
    ],
)
def test_typed_numbers_are_seen_and_others_are_not(markdown: str, expected: list[float]) -> None:
    assert [value for value, _ in typed_numbers(markdown)] == pytest.approx(expected)
