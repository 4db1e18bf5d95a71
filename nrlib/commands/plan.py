"""`nrlib plan`: the figures of a plan as a table, all methods side by side, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import RunConfig, absolute_path
from ..errors import ConfigError
from ..hardware import parse_hardware
from ..plan import make_plans, method_config, notes
from ..plan_tables import plan_rows
from ..profiles import METHODS


def plan_and_report(
    profile: str, changes: Mapping[str, Any], hardware: str, methods: Sequence[str], *, as_json: bool = False
) -> str:
    """The plan of a run before anything is downloaded or trained.

    Raises
    ------
    ConfigError, BackboneError
        In words: what was given, what is allowed, what to do.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise ConfigError(f"method = {unknown[0]!r} is not allowed. Choose one of: {', '.join(METHODS)}.")
    device = parse_hardware(hardware)
    changes = {name: absolute_path(name, value) for name, value in changes.items()}
    config = method_config(profile, changes, "neutral_residues")
    plans = list(make_plans(profile, changes, device, methods or METHODS))
    remarks = notes(config, device, plans)
    if as_json:
        body = {"profile": profile, "hardware": vars(device), "config": config.to_dict(), "notes": remarks}
        return json.dumps({**body, "plans": [plan.to_dict() for plan in plans]}, ensure_ascii=False)
    rows = plan_rows(plans)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip
    return "\n".join([_title(config), "", *(line.rstrip() for line in lines), "", *remarks])


def _title(config: RunConfig) -> str:
    c = config.training
    name = config.backbone.backbone_name or "a backbone trained here"
    return (
        f"{name}, {c.n_tokens:,} tokens, batches of {c.batch_size} x {c.context_length} tokens in "
        f"{c.accumulation_steps} part{'s' if c.accumulation_steps > 1 else ''}"
    )
