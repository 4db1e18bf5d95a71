"""A Sphinx extension: the docstrings' plain conventions, said in reStructuredText.

`name : description` in a list of parameters carries a description, not a type, since types stand in the signature; an
indented passage is code; a bar is a bar.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_UNDERLINE = re.compile(r"-{3,}\s*$")
_PARAMETER = re.compile(r"(?P<names>\*{0,2}\w+(?:, \w+)*) : (?P<description>.+)")
_SECTIONS_WITH_NAMES = ("Parameters", "Attributes")


def translate(lines: list[str]) -> list[str]:
    """One docstring, line by line."""
    translated: list[str] = []
    section, is_code = "", False
    for index, line in enumerate(lines):
        following = lines[index + 1] if index + 1 < len(lines) else ""
        if line.strip() and _UNDERLINE.match(following.strip()):
            section = line.strip()
        is_indented = line.startswith("  ")
        is_block_start = is_indented and index > 0 and not lines[index - 1].strip() and not section
        if is_block_start and not is_code:
            is_code = True
            translated += ["::", ""]
        elif line.strip() and not is_indented:
            is_code = False
        if is_code:
            translated.append(line)
        elif section in _SECTIONS_WITH_NAMES and (match := _PARAMETER.fullmatch(line)):
            translated += [match["names"], "    " + _escape(match["description"])]
        else:
            translated.append(_escape(line))
    return translated


def _escape(line: str) -> str:
    """Escape bars and trailing underscores outside `code`, and let a letter follow `code` at once."""
    parts = line.split("`")
    for index in range(0, len(parts), 2):
        plain = re.sub(r"([|]|_(?=\W|$))", r"\\\1", parts[index])
        parts[index] = "\\ " + plain if index and plain[:1].isalnum() else plain
    return "`".join(parts)


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if name.startswith("nrlib"):
        lines[:] = translate(lines)
        if what in ("attribute", "data"):
            lines[:0] = ["..", ""]  # in a first line, napoleon takes what stands before a colon for a type


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
