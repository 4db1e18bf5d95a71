"""Configurations: what is a run, which values it allows, and that equal runs have one name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nrlib import experiments
from nrlib.config import (
    PLACEMENTS,
    POSITIONS,
    SITES,
    RunConfig,
    config_from_dict,
    make_config,
    parameters,
)
from nrlib.errors import ConfigError
from nrlib.profiles import ALL_METHODS, FIXED_BY_METHOD, METHODS, PRESETS, PROFILES


def other_value(field, config):
    """A value the parameter allows that is not the one it has."""
    current = flat(config)[field.name]
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice not in (current, "none"))
    if isinstance(current, str):
        return {"layers": "0"}.get(field.name, "synthetic:cassian")
    return current / 2 if isinstance(current, float) and current else current + 1


def flat(config):
    values = {"seed": config.seed, "profile": config.profile}
    for part in ("data", "backbone", "method", "training"):
        values |= dataclasses.asdict(getattr(config, part))
    return values


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_profile_and_method_makes_a_run_that_survives_json(profile, method):
    config = make_config(profile, method=method)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.run_id.startswith(f"{profile}-") and config_from_dict(config.to_dict()).run_id == config.run_id
    assert flat(config).items() >= FIXED_BY_METHOD[method].items()


@pytest.mark.parametrize("name", sorted(set(parameters()) - {"profile", "accumulation_steps"}))
def test_every_parameter_is_part_of_the_name_and_is_described(name):
    field = parameters()[name]
    method = next(m for m in ("neutral_residues", *ALL_METHODS) if name not in FIXED_BY_METHOD[m])
    if name == "method":
        before, changed = make_config("smoke"), make_config("smoke", method="vanilla_adapter")
    else:
        before = make_config("smoke", method=method)
        changed = make_config("smoke", method=method, **{name: other_value(field, before)})
    assert flat(changed)[name] != flat(before)[name]
    assert changed.run_id != before.run_id
    assert len(field.metadata["description"]) > 5


def test_run_ids_are_distinct_and_readable():
    configs = [
        make_config("smoke", method=m, seed=s, n_tokens=n) for m in METHODS for s in (0, 1) for n in (1000, 2000)
    ]
    assert len({config.run_id for config in configs}) == len(configs)
    assert all(f"-s{config.seed}-" in config.run_id for config in configs)


def test_what_people_type_is_the_same_run():
    same = [
        {"layers": "0,1", "local_loss_weight": 1.0},
        {"layers": [0, 1], "local_loss_weight": 1},
        {"layers": (1, 0), "local_loss_weight": 1},
        {"layers": "1, 0", "local_loss_weight": 1.0},
    ]
    assert len({make_config("smoke", **changes).run_id for changes in same}) == 1


def test_what_a_method_does_not_use_is_not_part_of_its_name():
    assert make_config("smoke", method="lora", gate="none").run_id == make_config("smoke", method="lora").run_id
    weightless = make_config("smoke", local_loss="none", local_loss_weight=3.0)
    assert weightless.run_id == make_config("smoke", local_loss="none").run_id
    with pytest.raises(ConfigError, match="gate = 'relu' has no meaning for method = 'lora'"):
        make_config("smoke", method="lora", gate="relu")


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config("smoke").seed = 3


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_run_of_neutral_residues(preset):
    method = make_config("smoke", **PRESETS[preset]).method
    assert method.method == "neutral_residues"
    assert {name: getattr(method, name) for name in PRESETS[preset]} == PRESETS[preset]


def test_a_named_backbone_has_its_own_shape():
    with pytest.raises(ConfigError, match="d_model = 64 describes a backbone that is trained here"):
        make_config("smoke", backbone_name="gpt2", d_model=64)


@pytest.mark.parametrize("change", [{"batch_size": 6, "accumulation_steps": 4}])
def test_a_batch_must_split_evenly(change):
    with pytest.raises(ConfigError, match="divisor"):
        make_config("smoke", **change)
    assert make_config("smoke", batch_size=6, accumulation_steps=3).training.accumulation_steps == 3


def test_a_configuration_built_by_hand_is_checked_too():
    config = make_config("smoke")
    with pytest.raises(ConfigError, match="proxy is empty"):
        RunConfig(data=dataclasses.replace(config.data, proxy=""))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        RunConfig(training=dataclasses.replace(config.training, mix_ratio=2.0))


# --- the experiments of the notebooks ---------------------------------------------------------------------------------


def test_arms_of_the_methods():
    arms = experiments.methods("laptop", [1e-3, 2e-3, 4e-3], seed=1)
    assert len({config.run_id for config in arms}) == len(arms) == 4 * 3
    assert {(c.method.method, c.training.learning_rate, c.seed) for c in arms} == {
        (m, r, 1) for m in METHODS for r in (1e-3, 2e-3, 4e-3)
    }
    best = {"lora": 1e-3, "neutral_residues": 2e-3}
    repeated = experiments.repeats("laptop", best, [0, 1], length=2.0, local_loss_weights=[3.0])
    assert sorted((c.method.method, c.training.learning_rate, c.seed) for c in repeated) == [
        ("lora", 1e-3, 0), ("lora", 1e-3, 1), ("neutral_residues", 2e-3, 0), ("neutral_residues", 2e-3, 1)
    ]  # fmt: skip
    assert {c.training.n_tokens for c in repeated} == {2 * arms[0].training.n_tokens}
    assert {c.method.extra_ratio for c in arms if c.method.method != "fine_tuning"} == {0.2}


def test_weight_zero_is_one_run_for_each_gate():
    weights, seeds = [0, 0.1, 1, 10, 100], [0, 1, 2]
    arms = experiments.gate_sparsity("laptop", weights, seeds)
    gates = {gate for gate, _ in experiments.GATES_AND_LOSSES}
    n_repeated = 2 * 2 * len(weights)  # the first two pairs run with the other two seeds as well
    assert len({config.run_id for config in arms}) == len(arms)
    assert len(arms) == 4 * len(experiments.GATES_AND_LOSSES) + len(gates) + n_repeated
    without = [c for c in arms if c.method.local_loss == "none"]
    assert {c.method.gate for c in without} == gates and {c.method.local_loss_weight for c in without} == {0.0}


def test_arms_of_the_mix_and_of_the_placement():
    mixing = experiments.data_mixing("laptop", [0, 0.1], ["fine_tuning", "neutral_residues"], [0])
    assert sorted({(c.method.method, c.training.mix_ratio) for c in mixing}) == [
        ("fine_tuning", 0.0), ("fine_tuning", 0.1), ("neutral_residues", 0.0), ("neutral_residues", 0.1)
    ]  # fmt: skip
    placement = experiments.adapter_placement("laptop", ["all", "0,3"], [0])
    assert {(c.method.position, c.method.site, c.method.layers) for c in placement} == {
        (p, s, choice) for p in POSITIONS for s in SITES for choice in ("all", "0,3") if (p, s) in PLACEMENTS
    }
    assert {c.method.extra_ratio for c in placement} == {0.2}
