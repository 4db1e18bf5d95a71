"""The console command: what it prints as data, where it stops, and that it stops before any work."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from nrlib import cli, notebooks, runs
from nrlib.cli import app
from nrlib.commands import doctor, extend, reproduce
from nrlib.config import make_config, parameters
from nrlib.errors import ConfigError
from nrlib.records import Record, save_record
from nrlib.runs import run_or_load

COMMANDS = ("run", "extend", "plan", "records", "corpora", "bench", "doctor", "reproduce", "evaluate")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("NRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NRLIB_RESULTS", str(tmp_path / "results"))
    for name in ("NRLIB_PUBLISH", "NRLIB_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, list(arguments), prog_name="nrlib")


def refused(*arguments):
    """Exit code 2, one paragraph on standard error, nothing on standard output."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return result.stderr


def make_record(method="neutral_residues", seed=0, notebook="methods", new=2.0, profile="smoke", **changes):
    config = make_config(profile, method=method, seed=seed, **changes)
    before = {
        "unseen_original": 1.5,
        "proxy": 1.4,
        "new": 4.0,
        "unseen_original_validation": 1.5,
        "new_validation": 4.0,
    }
    results = {
        "bits_per_byte": {**before, "new": new, "new_validation": new},
        "backbone_bits_per_byte": before,
        "forgetting": {"unseen_original": 0.01, "proxy": 0.0},
        "drift": {"unseen_original": 0.1, "proxy": 0.1},
        "n_backbone_weights": 1000,
        "n_extra_weights": 200,
        "tokens_per_second": 10,
        "gate_statistics": [],
    }
    names = ("seed", "device", "precision", "seconds", "peak_memory_mb", "git_commit", "created")
    provenance = {**dict.fromkeys(names, "x"), "seconds": 1.0, "is_dirty": False}
    return Record(config.run_id, notebook, config.to_dict(), results, [], provenance)


def publish(monkeypatch, *records):
    monkeypatch.setenv("NRLIB_PUBLISH", "1")
    for record in records:
        save_record(record)
    monkeypatch.delenv("NRLIB_PUBLISH")


def never_called(*_arguments, **_options):
    pytest.fail("work began")


# --- the command itself -----------------------------------------------------------------------------------------------


def test_every_command_has_a_help_with_an_example():
    assert call("--help").exit_code == 0
    for command in COMMANDS:
        result = call(command, "--help")
        assert result.exit_code == 0
        assert "xample" in result.stdout and f"nrlib {command}" in result.stdout


def test_the_version_is_that_of_the_package():
    import nrlib

    assert call("--version").stdout.split() == ["nrlib", nrlib.__version__]


def test_the_help_needs_no_heavy_library():
    """What cli.py imports at its top, and what that imports, is the standard library and typer."""
    waiting, seen, others = ["cli"], set(), set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for node in ast.parse((Path(cli.__file__).parent / f"{name}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                others |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                others.add(node.module.partition(".")[0])
            elif isinstance(node, ast.ImportFrom) and node.module not in seen:
                waiting.append(node.module)
    assert others - sys.stdlib_module_names == {"typer"}


def test_an_error_shows_its_traceback_only_when_asked(monkeypatch):
    refused("run", "no-such-notebook")
    monkeypatch.setenv("NRLIB_TRACEBACK", "1")
    assert isinstance(call("run", "no-such-notebook").exception, ConfigError)


def test_an_interruption_says_that_the_same_command_resumes(monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "list_notebooks", interrupt)
    result = call("run", "--list")
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr and "Traceback" not in result.stderr


# --- run --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    source = 'profile = "smoke"  # type: str  which\nseeds = [0]  # type: list[int]  seeds of the runs'
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source, "outputs": []}
    path = tmp_path / "study.ipynb"
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return str(path)


def test_run_passes_the_changes_on_and_says_where_copy_and_page_are(study, tmp_path, monkeypatch):
    seen = {}

    def execute(path, changes, **options):
        seen.update(path=path, changes=changes, **options)
        return tmp_path / "copy.ipynb"

    monkeypatch.setattr(notebooks, "execute_notebook", execute)
    monkeypatch.setattr(notebooks, "render_page", lambda executed: executed.with_suffix(".html"))
    result = call("run", study, "-p", "seeds=1,2", "--profile", "laptop", "--publish")
    assert result.exit_code == 0, result.output
    assert (seen["path"], seen["changes"]) == (Path(study), {"seeds": "1,2", "profile": "laptop"})
    assert seen["publish"] is True
    assert str(tmp_path / "copy.ipynb") in result.stdout and str(tmp_path / "copy.html") in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "seed=1"], "Did you mean seeds?"),
        (["-p", "seeds=a"], "list[int]"),
        (["-p", "seeds=-1"], "out of range"),
        (["-p", "seeds"], "not of the form name=value"),
        (["-p", "seeds=1", "-p", "seeds=2"], "seeds twice"),
        (["--profile", "huge"], "profile = 'huge' is unknown. Allowed: smoke, laptop"),
        (["--profile", "smoke", "-p", "profile=laptop"], "profile twice"),
    ],
)
def test_run_refuses_what_cannot_be_before_it_starts(study, monkeypatch, arguments, message):
    monkeypatch.setattr(notebooks, "_run_papermill", never_called)
    assert message in refused("run", study, *arguments)


def test_run_shows_the_parameters_of_a_notebook(study):
    assert "seeds = [0]" in call("run", study, "--show-parameters").stdout


# --- extend -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix-ratio", "1.5"], "mix_ratio = 1.5 is out of range"),
        (["--method", "prompting"], "method = 'prompting' is not allowed"),
        (["-p", "gate=tanh"], "gate = 'tanh' is not allowed"),
        (["-p", "batch_size=many"], "batch_size = 'many'"),
        (["-p", "gates=relu"], "Did you mean gate?"),
        (["--seed", "1", "-p", "seed=2"], "Give it once"),
        (["-p", "profile=laptop"], "Use --profile laptop"),
        (["--proxy", ""], "proxy is empty"),
        (["--original", "wikipedia"], "'wikipedia'"),
        (["--new-domain", "file:no/such/*.txt"], "no/such"),
        (["-p", "layers=0,7"], "layer 7"),
        (["-p", "extra_ratio=1e-6"], "extra_ratio"),
        (["--method", "lora", "-p", "extra_ratio=1e-6"], "extra_ratio"),
        (["--n-tokens", "100"], "n_tokens = 100 is less than one batch"),
        (["-p", "n_heads=3"], "n_heads = 3"),
        (["--backbone", "./no-such-model"], "no-such-model"),
        (["--preset", "best"], "Allowed: recommended, paper, with_kl"),
        (["--preset", "with_kl", "--method", "lora"], "has no meaning for method = 'lora'"),
        (["--method", "gated_lora", "--save", "somewhere"], "gated_lora stands here for comparison"),
    ],
)
def test_extend_checks_every_input_before_any_work(monkeypatch, arguments, message):
    for name in ("run", "run_or_load", "prepare_text"):
        monkeypatch.setattr(runs, name, never_called)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in refused("extend", "--profile", "smoke", *arguments)


def test_extend_refuses_a_folder_that_is_not_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run", never_called)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    assert "not an empty folder" in refused("extend", "--profile", "smoke", "--save", str(tmp_path / "model"))


def test_extend_explains_every_parameter():
    stdout = call("extend", "--show-parameters", "--profile", "smoke").stdout
    assert all(f"{name} = " in stdout for name in parameters())
    assert "d_model = 32 " in stdout  # the profile's value, not the field's default


@pytest.mark.parametrize(
    ("named", "memory"),
    [
        ([], 64),
        (["-p", "gate_memory=4"], 4),
        (["--preset", "paper"], 1),
        (["-p", "gate=none"], 1),
        (["--method", "lora"], 1),
    ],
)
def test_the_recommended_settings_are_the_default_where_there_is_a_gate(named, memory, monkeypatch):
    seen = []
    monkeypatch.setattr(
        extend, "extend_and_report", lambda profile, changes, *rest: seen.append(make_config(profile, **changes))
    )
    call("extend", "--profile", "smoke", *named)
    assert seen[0].method.gate_memory == memory


def test_a_preset_gives_way_to_what_is_named(monkeypatch):
    seen = []
    monkeypatch.setattr(extend, "extend_and_report", lambda profile, changes, *rest: seen.append(changes) or "")
    call("extend", "--preset", "paper", "-p", "gate=sigmoid")
    assert seen == [{"gate": "sigmoid", "local_loss": "l1", "local_loss_weight": 0.01}]


def test_extend_reports_a_stored_run_without_training(monkeypatch):
    monkeypatch.setattr(runs, "run", never_called)
    publish(monkeypatch, make_record(new=2.5), make_record("fine_tuning", new=2.0))
    result = call("extend", "--profile", "smoke", "-p", "gate_memory=1")
    assert result.exit_code == 0, result.output
    assert "learning   75.0%" in result.stdout  # (4 - 2.5) / (4 - 2)
    assert str(make_config("smoke").run_id) in result.stdout


@pytest.mark.parametrize("method", ["neutral_residues", "fine_tuning"])
def test_extend_saves_a_model_that_loads_with_the_measured_logits(tmp_path, monkeypatch, method):
    """One tiny run, for real: record, saved adapter, its own backbone and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kept = {}
    original_save = extend._save
    monkeypatch.setattr(extend, "_save", lambda model, *rest: (kept.update(model=model), original_save(model, *rest)))
    folder = tmp_path / "model"
    tiny = (
        "d_model=16",
        "n_heads=2",
        "ffn_width=24",
        "pretraining_tokens=2048",
        "n_tokens=2048",
        "vocabulary_size=300",
    )
    options = [text for pair in tiny for text in ("-p", pair)]
    options += ["--language", "la", "--language", "it", "--license", "cc-by-4.0"]
    result = call("extend", "--profile", "smoke", "--method", method, "--save", str(folder), *options)
    assert result.exit_code == 0, (result.output, result.exception)
    (record,) = (tmp_path / "cache" / "records").glob("*.json")
    assert str(record) in result.stdout
    assert not list((tmp_path / "cache" / "checkpoints").glob("*"))

    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)("mela tavi")["input_ids"]])
    if method == "fine_tuning":
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder / "backbone")
        plain = loaded(tokens).logits
        loaded.load_adapter(str(folder))
        assert not torch.equal(loaded(tokens).logits, plain)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, kept["model"](tokens).logits)
    if method == "neutral_residues":
        card = (folder / "README.md").read_text(encoding="utf-8")
        row = json.loads(record.read_text(encoding="utf-8"))["results"]
        assert f"{row['forgetting']['unseen_original']:.2%}" in card and "`synthetic:borealic`" in card
        assert "license: cc-by-4.0" in card and "- la" in card and "- it" in card
        assert f" {row['backbone_bits_per_byte']['new']:.3f} | {row['bits_per_byte']['new']:.3f} |" in card
        monkeypatch.chdir(folder.rename(tmp_path / "moved"))
        names: dict = {}
        exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], names)
        with torch.no_grad():
            torch.testing.assert_close(names["model"].eval()(tokens).logits, kept["model"](tokens).logits)


# --- records, corpora, bench, doctor ----------------------------------------------------------------------------------


def test_records_as_json_are_one_complete_object_a_line(monkeypatch):
    publish(monkeypatch, make_record(new=2.5), make_record("fine_tuning", notebook="data_mixing"))
    rows = [json.loads(line) for line in call("records", "--format", "json").stdout.splitlines()]
    promised = {
        "run_id", "notebook", "profile", "method", "original", "new_domain", "seed", "learning_rate", "extra_ratio",
        "mix_ratio", "gate", "local_loss", "local_loss_weight", "position", "site", "layers", "forgetting", "learning",
        "bits_per_byte", "seconds", "device", "git_commit", "is_dirty",
    }  # fmt: skip
    assert [row["method"] for row in rows] == ["fine_tuning", "neutral_residues"]
    assert all(promised <= set(row) for row in rows)
    assert rows[1]["learning"] == 0.75 and rows[1]["bits_per_byte"]["new"] == 2.5
    only = call("records", "--format", "json", "--notebook", "methods").stdout.splitlines()
    assert [json.loads(line)["learning"] for line in only] == [0.75]  # its reference is in the other notebook
    assert "fine_tuning" in call("records").stdout


def test_the_table_of_records_shows_what_differs_and_ones_own_runs_apart(monkeypatch):
    publish(monkeypatch, make_record("fine_tuning"))
    save_record(make_record(new=2.5))
    assert "neutral_residues" not in call("records").stdout
    own = call("records", "--own").stdout.splitlines()
    assert len(own) == 2 and own[0].split() == ["run_id", "notebook", "forgetting", "learning", "seconds"]
    assert "0.75" in own[1]  # the published fine-tuning is what its learning is measured by
    save_record(make_record(gate_memory=4))
    assert call("records", "--own").stdout.splitlines()[0].split()[-1] == "gate_memory"


def test_without_records_the_json_is_empty():
    result = call("records", "--format", "json")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No runs of your own" in call("records", "--own").stderr


def test_corpora_describes_a_corpus():
    result = call("corpora", "synthetic:aurelian/plain?n_documents=300", "--show", "2")
    assert result.exit_code == 0, result.output
    assert "300" in result.stdout and "train:" in result.stdout and result.stdout.count("\n--- ") == 2
    assert "debian-docs:<language>" in call("corpora").stdout
    assert "'nonsense'" in refused("corpora", "nonsense")


def test_bench_prints_the_benchmarks_result(monkeypatch):
    import types

    fake = types.ModuleType("nrlib.benchmark")
    fake.run_benchmark = lambda *, quick, progress: {"quick": quick}
    fake.format_table = lambda result: f"table of {result}"
    monkeypatch.setitem(sys.modules, "nrlib.benchmark", fake)
    assert json.loads(call("bench", "--quick", "--format", "json").stdout) == {"quick": True}
    assert call("bench").stdout.startswith("table of ")


def test_doctor_fails_only_when_something_needed_is_missing(monkeypatch):
    assert call("doctor").exit_code == 0
    monkeypatch.setattr(doctor, "NEEDED_PACKAGES", ("torch", "no-such-package"))
    result = call("doctor")
    assert result.exit_code == 1
    assert "no-such-package not installed" in result.stdout and "pip install" in result.stdout


def test_doctor_reads_pins(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text("# exact\ntorch==2.13.0  # CPU\n\nnumpy>=1\npeft == 0.21.2 ; python_version > '3'\n")
    assert doctor.read_pins(path) == {"torch": "2.13.0", "peft": "0.21.2"}


# --- reproduce --------------------------------------------------------------------------------------------------------


def test_reproduce_reports_differences_and_fails_beyond_the_tolerance(monkeypatch):
    publish(monkeypatch, *(make_record(seed=seed) for seed in range(4)), make_record("lora"))
    asked = []

    def reproduce_with(difference, failures=""):
        def fake(records, n_workers=None):
            asked.append([record.run_id for record in records])
            rows = [(r.run_id, "new", 2.0, 2.0 + difference, difference) for r in records]
            columns = ["run_id", "metric", "published", "reproduced", "difference"]
            return pd.DataFrame(rows, columns=columns), failures

        monkeypatch.setattr(reproduce, "reproduce", fake)

    reproduce_with(0.001)
    assert call("reproduce").exit_code == 0
    assert call("reproduce", "--limit", "2").exit_code == 0
    assert len(asked[0]) == 5 and {run_id.split("-")[1] for run_id in asked[1]} == {"lora", "nr"}
    assert call("reproduce", "--tolerance", "0.0001").exit_code == 1
    reproduce_with(float("nan"))
    assert call("reproduce").exit_code == 1
    reproduce_with(0.001, failures="1 of 5 runs failed")
    result = call("reproduce")
    assert result.exit_code == 1 and "1 of 5 runs failed" in result.output
    assert "no published records of the profile laptop" in refused("reproduce", "--profile", "laptop")


def test_reproduce_trains_again_and_compares(small_config, tmp_path, monkeypatch):
    monkeypatch.setenv("NRLIB_RESULTS", str(tmp_path / "published"))
    config = small_config(seed=61)
    record = run_or_load(config, progress=False)
    changed = {**record.results, "bits_per_byte": {**record.results["bits_per_byte"], "new": 1.0}}
    table, failures = reproduce.reproduce([replace(record, results=changed)], n_workers=1)
    differences = table.set_index("metric")["difference"]
    assert not failures and differences["new"] == pytest.approx(record.results["bits_per_byte"]["new"] - 1.0)
    assert (differences.drop("new") == 0).all()


def test_reproduce_uses_texts_of_the_cache_but_nothing_trained(tmp_path, monkeypatch):
    for name in ("tokens", "backbones", "checkpoints", "records"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    (tmp_path / "cache" / "tokens" / "a.npy").touch()
    monkeypatch.setenv("NRLIB_EXECUTOR", "tcp://127.0.0.1:9")
    with reproduce.fresh_cache() as cache:
        assert "NRLIB_EXECUTOR" not in os.environ  # workers that are there already have another cache
        assert reproduce.cache_directory() == cache
        assert [path.name for path in cache.iterdir()] == ["tokens"] and (cache / "tokens" / "a.npy").exists()
    assert (tmp_path / "cache" / "tokens" / "a.npy").exists() and not cache.exists()
    assert reproduce.cache_directory() == tmp_path / "cache" and os.environ["NRLIB_EXECUTOR"] == "tcp://127.0.0.1:9"


def test_a_licence_without_a_model_to_save_is_said_to_be_of_no_use():
    result = call("extend", "--profile", "smoke", "--license", "mit")
    assert result.exit_code != 0 and "--save FOLDER" in result.output


def test_a_card_names_files_without_the_path_of_one_machine():
    assert extend._without_path("file:/home/ada/texts/french/*.txt") == "file:french/*.txt"
    assert extend._without_path("debian-docs:en/manpages") == "debian-docs:en/manpages"


def test_the_settings_beside_a_model_do_not_describe_a_backbone_that_has_a_name():
    assert extend._settings(make_config("smoke", backbone_name="gpt2"))["backbone"] == {"backbone_name": "gpt2"}
    assert extend._settings(make_config("smoke")) == make_config("smoke").to_dict()
