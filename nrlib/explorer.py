"""What the book's explorer shows: every published run with the command that makes it, and the settings they are seeds of.

Only data; the page is made from it by book/_extensions/explorer.py.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .config import RunConfig, flat_values, make_config
from .errors import ConfigError
from .notebooks import find_notebook, list_notebooks, read_parameters
from .profiles import ALL_METHODS, FIXED_BY_METHOD, PRESETS, STRENGTHS
from .records import Record, pages_of_runs
from .storage import fingerprint
from .tables import flat_records


@dataclass(frozen=True)
class Dial:
    """A parameter, or two that are moved together, by which the explorer chooses among the settings."""

    name: str
    label: str
    parameters: tuple[str, ...]

    def value(self, values: Mapping[str, Any]) -> Any:
        """Where the dial stands for these parameters: their value, or their values side by side."""
        found = [values[name] for name in self.parameters]
        return found[0] if len(found) == 1 else " ".join(map(str, found))


DIALS = (
    Dial("local_loss_weight", "local-loss weight", ("local_loss_weight",)),
    Dial("mix_ratio", "mix ratio", ("mix_ratio",)),
    Dial("kl_weight", "KL weight", ("kl_weight",)),
    Dial("learning_rate", "learning rate", ("learning_rate",)),
    Dial("n_tokens", "training tokens", ("n_tokens",)),
    Dial("extra_ratio", "extra weights", ("extra_ratio",)),
    Dial("new_domain", "new domain", ("new_domain",)),
    Dial("gate", "gate", ("gate",)),
    Dial("local_loss", "local loss", ("local_loss",)),
    Dial("gate_memory", "memory of the gate", ("gate_memory",)),
    Dial("placement", "placement", ("site", "position")),
    Dial("layers", "layers", ("layers",)),
)
_ON_DIALS = {name for dial in DIALS for name in dial.parameters}


def changed_parameters(config: RunConfig) -> dict[str, Any]:
    """The parameters in which a run differs from what its profile and method give by themselves, without the seed."""
    method = config.method.method
    own, values = flat_values(make_config(config.profile, method=method)), flat_values(config)
    changes = {name: value for name, value in values.items() if value != own[name] and name not in ("method", "seed")}
    if config.method.local_loss == "none":
        changes.pop("local_loss_weight", None)  # follows
    return changes


def extend_command(config: RunConfig) -> str:
    """The command that makes this run, or shows its record where it has been made."""
    changes = {**changed_parameters(config), "seed": config.seed}
    if config.method.method == "neutral_residues" and config.method.gate != "none":  # where the command adds a preset
        values = flat_values(config)
        changes |= {name: values[name] for name, value in PRESETS["recommended"].items() if values[name] != value}
    words = ["nrlib", "extend", "--profile", config.profile, "--method", config.method.method]
    for name, value in changes.items():
        words += ["-p", f"{name}={text(value)}"]
    return shlex.join(words)


def text(value: Any) -> str:
    """A value as it stands in commands, links and on the dials: 5.0 is 5."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def reproduce_command(run_ids: Iterable[str]) -> str:
    """The command that trains published runs again and compares the numbers."""
    return shlex.join(["nrlib", "reproduce", *(word for run_id in run_ids for word in ("--run", run_id))])


def notebook_commands(records: Iterable[Record]) -> dict[str, dict[str, str]]:
    """For each notebook that asked for one of the runs, by profile, the command that executes it."""
    pairs = sorted({(record.notebook, record.config["profile"]) for record in records})
    commands: dict[str, dict[str, str]] = {}
    for notebook, profile in pairs:
        if notebook in list_notebooks() and "profile" in read_parameters(find_notebook(notebook)):
            commands.setdefault(notebook, {})[profile] = f"nrlib run {notebook} -p profile={profile}"
    return commands


def run_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One flat dictionary a run, for download: the columns of `flat_records`, a held-out text a column, the setting the
    run is a seed of, the notebooks of this build that use it, and its command."""
    rows, pages = [], pages_of_runs()
    for record, row in zip(records, flat_records(records), strict=True):
        for name in ("bits_per_byte", "backbone_bits_per_byte"):
            row |= {f"{name}_{text}": value for text, value in row.pop(name).items()}
        shown = {"setting": setting_id(record.run_config), "pages": " ".join(pages.get(record.run_id, ()))}
        rows.append(row | shown | {"command": extend_command(record.run_config)})
    return rows


def setting_id(config: RunConfig) -> str:
    """Eight hexadecimal digits that all seeds of a setting share."""
    return fingerprint({name: value for name, value in config.to_dict().items() if name != "seed"}, 8)


_RUN_COLUMNS = (
    "run_id", "notebook", "seed", "forgetting", "learning", "bits_per_byte_unseen_original", "bits_per_byte_new", "seconds",
    "device", "git_commit", "command",
)  # fmt: skip


def settings(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One dictionary a setting: method, profile, dials, its runs, and mean, lowest and highest over their seeds.

    A dial the method does not have is None. `other` holds what no dial shows: parameters that differ from the profile's
    own, and the strength of the method's own term.
    """
    rows = pd.DataFrame(run_rows(records))
    rows = rows.astype(object).where(rows.notna(), None)
    configs = {record.run_id: record.run_config for record in records}
    found = []
    for name, group in rows.groupby("setting", sort=False):
        config = configs[group["run_id"].iloc[0]]
        runs = group.sort_values("seed")[list(_RUN_COLUMNS)].to_dict("records")
        setting = {"id": name, "profile": config.profile, "method": config.method.method, **_dials(config)}
        found.append(setting | {"other": _other(config), **_summary(runs), "runs": runs})
    return sorted(found, key=_place)


def _dials(config: RunConfig) -> dict[str, Any]:
    values = flat_values(config)
    return {dial.name: dial.value(values) if has_dial(config.method.method, dial) else None for dial in DIALS}


def _other(config: RunConfig) -> str:
    shown = changed_parameters(config)
    strength = STRENGTHS.get(config.method.method, ("",))[0]
    if strength:
        shown = {strength: flat_values(config)[strength], **shown}
    return ", ".join(f"{name} = {text(value)}" for name, value in shown.items() if name not in _ON_DIALS)


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"seeds": len({run["seed"] for run in runs})}
    for metric in ("forgetting", "learning"):
        values = [run[metric] for run in runs if run[metric] is not None]
        summary[metric] = round(sum(values) / len(values), 5) if values else None
        summary[f"{metric}_range"] = [min(values), max(values)] if values else None
    return summary


def _place(setting: Mapping[str, Any]) -> tuple[Any, ...]:
    dials = [(0, setting[dial.name]) if setting[dial.name] is not None else (1,) for dial in DIALS]
    return setting["profile"], ALL_METHODS.index(setting["method"]), dials, setting["other"]


def dial_values(found: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each dial among the settings, in order; a dial with one value only is left out."""
    values: dict[str, set[Any]] = {dial.name: set() for dial in DIALS}
    for setting, dial in itertools.product(found, DIALS):
        if setting[dial.name] is not None:
            values[dial.name].add(setting[dial.name])
    return {name: sorted(some) for name, some in values.items() if len(some) > 1}


def assignments(dial: str, value: Any) -> str:
    """What a command says to put a dial to a value: `-p mix_ratio=0.5`."""
    chosen = next(d for d in DIALS if d.name == dial)
    return " ".join(f"-p {shlex.quote(f'{name}={text(part)}')}" for name, part in _changes([(chosen, value)]))


def conflicts(values: Mapping[str, Sequence[Any]], profile: str, method: str) -> list[list[str]]:
    """Positions of dials (`mix_ratio=0`), single ones and pairs, that no run of this method can have."""
    own = [(dial, value) for dial in DIALS for value in values.get(dial.name, ()) if has_dial(method, dial)]
    alone = [position for position in own if not _is_possible(profile, method, [position])]
    pairs = [
        pair
        for pair in itertools.combinations([position for position in own if position not in alone], 2)
        if pair[0][0] is not pair[1][0] and not _is_possible(profile, method, pair)
    ]
    return [[f"{dial.name}={text(value)}" for dial, value in found] for found in [*([one] for one in alone), *pairs]]


def has_dial(method: str, dial: Dial) -> bool:
    """Whether a method has what the dial moves."""
    return not all(name in FIXED_BY_METHOD[method] for name in dial.parameters)


def _is_possible(profile: str, method: str, positions: Sequence[tuple[Dial, Any]]) -> bool:
    changes = dict(_changes(positions))
    try:
        made = flat_values(make_config(profile, method=method, **changes))
    except ConfigError:
        return False
    return all(made[name] == value for name, value in changes.items())  # local_loss = none takes the weight along


def _changes(positions: Sequence[tuple[Dial, Any]]) -> Iterator[tuple[str, Any]]:
    for dial, value in positions:
        yield from zip(dial.parameters, [value] if len(dial.parameters) == 1 else value.split(), strict=True)


def explorer_data(records: Sequence[Record]) -> dict[str, Any]:
    """What the page's script works on; every value of a dial is a text, as the page shows it."""
    found = settings(records)
    values = dial_values(found)
    profiles = sorted({setting["profile"] for setting in found})
    methods = [name for name in ALL_METHODS if name in {setting["method"] for setting in found}]
    return {
        "settings": [setting | {dial.name: _text(setting[dial.name]) for dial in DIALS} for setting in found],
        "dials": {name: {text(value): assignments(name, value) for value in some} for name, some in values.items()},
        "methods": {name: [dial.name for dial in DIALS if has_dial(name, dial)] for name in methods},
        "conflicts": {p: {m: conflicts(values, p, m) for m in methods} for p in profiles},
        "notebooks": notebook_commands(records),
    }


def _text(value: Any) -> str | None:
    return None if value is None else text(value)
