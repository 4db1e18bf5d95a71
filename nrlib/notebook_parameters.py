"""The parameters of a notebook: read from its `parameters` cell, checked before anything runs.

Papermill only warns about an unknown name and accepts any value. Here each line of the cell is
`name = literal  # type: x  what it means` (which papermill's own inspection understands), and whatever does not fit is
an error.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import math
import os
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import CORPUS_ROLES, absolute_path, make_config
from .config import parameters as run_parameters
from .corpora import check_spec
from .errors import ConfigError
from .profiles import FIXED_BY_METHOD

SCALARS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
TYPES = (*SCALARS, "list[int]", "list[float]", "list[str]")
LINE = "name = literal  # type: x  what it means"

_ALIASES = {
    "backbone": "backbone_name"
}  # what a run parameter is called in a notebook, where its own name says too little
_CORPORA = (*CORPUS_ROLES, "corpus")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell."""

    name: str
    type: str  # one of TYPES
    default: Any
    description: str


def read_parameters(path: Path | str) -> dict[str, Parameter]:
    """The parameters of a notebook, in their order.

    Raises
    ------
    ConfigError
        When the file is no notebook, has not exactly one cell tagged `parameters`, or has a line in it that is no
        parameter; the message names notebook and line.
    """
    path = Path(path)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as a notebook ({error}). Give a .ipynb file.") from error
    if len(sources) != 1:
        raise ConfigError(
            f"{path.name} has {len(sources)} cells tagged 'parameters'; it must have one. Tag the cell whose lines are "
            f"'{LINE}' (in JupyterLab: property inspector, cell tags)."
        )
    found: dict[str, Parameter] = {}
    for number, line in enumerate(sources[0].splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            parameter = _parse_line(line)
            if parameter.name in found:
                raise ConfigError(f"{parameter.name} stands there twice")
        except ConfigError as error:
            raise ConfigError(
                f"{path.name}, parameters cell, line {number}: {error}. Each line must be '{LINE}', with one of the "
                f"types {', '.join(TYPES)}; it is: {line.strip()}"
            ) from None
        found[parameter.name] = parameter
    return found


def _parse_line(line: str) -> Parameter:
    try:
        statements = ast.parse(line).body
        comments = [
            t.string for t in tokenize.generate_tokens(io.StringIO(line).readline) if t.type == tokenize.COMMENT
        ]
    except (SyntaxError, tokenize.TokenError, ValueError) as error:
        raise ConfigError("not one whole line of Python") from error
    match statements:
        case [ast.Assign(targets=[ast.Name(id=name)], value=expression)]:
            pass
        case _:
            raise ConfigError("not an assignment to one name")
    try:
        default = ast.literal_eval(expression)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the value of {name} is not a literal") from error
    comment = re.match(r"#\s*type:\s*(\S+)\s*(.*)", comments[0]) if comments else None
    if comment is None or comment[1] not in TYPES:
        raise ConfigError(f"{name} has no comment '# type: x' with a known type")
    if not comment[2]:
        raise ConfigError(f"{name} has no description after its type")
    parameter = Parameter(name, comment[1], default, comment[2].strip())
    return Parameter(name, parameter.type, convert_value(parameter, default, is_text=False), parameter.description)


def convert_value(parameter: Parameter, value: Any, *, is_text: bool | None = None) -> Any:
    """`value` as the parameter's type: paths, numpy scalars and text from a command line are converted.

    Parameters
    ----------
    is_text : whether a string is parsed, as from a command line; by default where the type is no string.

    Raises
    ------
    ConfigError
        For a value of another type, an empty list, or a number that is not finite.
    """
    given = value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        value = value.tolist()
    try:
        if isinstance(value, str) and parameter.type != "str" and is_text is not False:
            value = _parse_text(parameter.type, value)
        if not parameter.type.startswith("list["):
            return _as_scalar(parameter.type, value)
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError
        return [_as_scalar(parameter.type[5:-1], item) for item in value]
    except ValueError:
        example = "one or more values, as 1,2,3 or a JSON list" if parameter.type.startswith("list[") else "one value"
        raise ConfigError(
            f"{parameter.name} = {given!r} is not allowed: it must be of type {parameter.type}, {example} "
            f"({parameter.description}), for example {parameter.default!r}."
        ) from None


def _parse_text(type_name: str, text: str) -> Any:
    if type_name.startswith("list["):
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [_parse_text(type_name[5:-1], part.strip()) for part in text.split(",")]
    if type_name != "bool":
        return SCALARS[type_name](text)
    if text.lower() not in _TRUTH:
        raise ValueError
    return _TRUTH[text.lower()]


def _as_scalar(type_name: str, value: Any) -> Any:
    if type_name == "float" and type(value) is int:
        value = float(value)
    if type(value) is not SCALARS[type_name] or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError
    return value


def check_parameters(path: Path | str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes as the notebook will get them: converted to its types, corpus files with absolute paths.

    Raises
    ------
    ConfigError, CorpusError
        For a name the notebook does not have, a wrong type, or a value no run can have.
    """
    path, declared = Path(path), read_parameters(path)
    for name in changes:
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{name} is not a parameter of the notebook {path.stem}.{hint} Allowed: {', '.join(declared)}. "
                f"`nrlib run {path.stem} --show-parameters` explains them."
            )
    converted = {name: _resolve(declared[name], convert_value(declared[name], v)) for name, v in changes.items()}
    _check_runs({name: converted.get(name, parameter.default) for name, parameter in declared.items()}, set(changes))
    return converted


def _resolve(parameter: Parameter, value: Any) -> Any:
    """Check corpora, and make relative paths absolute: the notebook runs in another folder than the command."""
    if isinstance(value, list):
        return [_resolve(parameter, item) for item in value]
    singular = _singular(parameter.name)
    value = absolute_path("original" if singular in _CORPORA else singular, value)
    if singular in _CORPORA and (value or not (singular == "proxy" or parameter.default == "")):
        check_spec(value)
    return value


def _check_runs(values: Mapping[str, Any], changed: set[str]) -> None:
    """Make the configurations these values stand for: each list item once, everything else as it is.

    An unchanged '' stands for the profile's own value.
    """
    known = run_parameters()
    own = {_singular(name): value for name, value in values.items() if _singular(name) in known and value != ""}
    own |= {_singular(name): values[name] for name in changed if _singular(name) in known}
    profile = own.pop("profile", "smoke")
    lists = {name: value for name, value in own.items() if isinstance(value, list)}
    single = {name: value for name, value in own.items() if name not in lists}
    asked = {_singular(name) for name in changed}
    variations = [{name: item} for name, items in lists.items() for item in items]
    for variation in variations or [{}]:
        combined = {**single, **variation}
        fixed = FIXED_BY_METHOD.get(combined.get("method", ""), {})
        kept = set(variation) if "method" in variation else asked | set(variation)
        make_config(profile, **{name: v for name, v in combined.items() if name not in fixed or name in kept})


def _singular(name: str) -> str:
    """The run parameter a notebook's parameter is about: mix_ratios holds values of mix_ratio."""
    known = (*run_parameters(), *_ALIASES, *_CORPORA)
    if name not in known:
        name = next((n for n in known if name in (f"{n}s", f"{n}es")), name)
    return _ALIASES.get(name, name)
