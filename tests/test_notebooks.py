"""Notebooks: parameters are read strictly, values checked before anything runs, and a copy is whole or absent."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from nrlib import notebooks, records
from nrlib.errors import ConfigError, CorpusError, NrlibError
from nrlib.notebooks import check_parameters, execute_notebook, find_notebook, read_parameters, render_page
from nrlib.storage import project_directory

CELL = """\
# shares and seeds
mix_ratios = [0.0, 0.1]  # type: list[float]  shares of the proxy
seeds = [0, 1]  # type: list[int]  seeds
gates = ["relu", "none"]  # type: list[str]  gates to compare
layers = ["all", "0,1"]  # type: list[str]  layers with an adapter
n_tokens = 20480  # type: int  tokens of training
learning_rate = 0.01  # type: float  peak learning rate

new_domain = "synthetic:borealic"  # type: str  a '#' in a text is no comment: hub:x#20000
is_shown = False  # type: bool  whether the figure is shown
"""


def write_notebook(path, parameters, *cells):
    content = [
        {
            "cell_type": "code",
            "id": f"cell-{n}",
            "metadata": {},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for n, source in enumerate((parameters, *cells))
    ]
    content[0]["metadata"] = {"tags": ["parameters"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    path.write_text(json.dumps({"cells": content, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "study.ipynb", CELL)


def never_run(*_arguments, **_options):
    pytest.fail("the notebook was run")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_parameters_are_read_with_type_default_and_description(notebook):
    parameters = read_parameters(notebook)
    assert list(parameters) == [line.split(" ")[0] for line in CELL.splitlines() if " = " in line]
    assert parameters["mix_ratios"].default == [0.0, 0.1]
    assert parameters["is_shown"].default is False
    assert parameters["new_domain"].type == "str"
    assert parameters["new_domain"].description == "a '#' in a text is no comment: hub:x#20000"


@pytest.mark.parametrize(
    "line",
    [
        "x: int = 1  # type: int  annotated",
        "x = y = 1  # type: int  two names",
        "x = 2 * 3  # type: int  not a literal",
        "x = -y  # type: int  not a literal",
        "x = 1",
        "x = 1  # how many",
        "x = 1  # type: int",
        "x = 1  # type: complex  no such type",
        "x = 0.5  # type: int  wrong default",
        "x = None  # type: int  no value",
        "x = True  # type: int  a truth value is no number",
        "x = '3'  # type: int  a text is no number",
        "x = []  # type: list[int]  nothing to do",
        "x = [1, 'a']  # type: list[int]  mixed",
        "x = float('nan')  # type: float  not a literal",
        "x = [  # type: list[int]  on several lines",
        "import os",
        "seed = 1  # type: int  there twice",
    ],
)
def test_a_line_that_is_no_parameter_is_an_error_that_names_notebook_and_line(tmp_path, line):
    path = write_notebook(tmp_path / "bad.ipynb", f"seed = 0  # type: int  seed\n\n{line}\n")
    with pytest.raises(ConfigError, match=r"bad\.ipynb, parameters cell, line 3: .+ it is: " + line[:5].strip()[0]):
        read_parameters(path)


def test_a_notebook_needs_one_parameters_cell(tmp_path):
    path = tmp_path / "none.ipynb"
    for content in ('{"cells": [], "metadata": {}}', "no json", "[]"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"none\.ipynb"):
            read_parameters(path)


def test_papermill_reads_the_same_parameters(notebook):
    from papermill import inspect_notebook

    seen = inspect_notebook(str(notebook), parameters={})
    assert {name: p["inferred_type_name"] for name, p in seen.items()} == {
        name: p.type for name, p in read_parameters(notebook).items()
    }


def test_every_notebook_of_the_project_has_valid_parameters():
    for path in (Path(__file__).parent.parent / "notebooks").glob("*.ipynb"):
        parameters = read_parameters(path)
        assert 0 < len(parameters) <= 8, path.name
        check_parameters(path, {name: p.default for name, p in parameters.items()})


# --- checking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mix_ratios": "0,0.5,1"}, {"mix_ratios": [0.0, 0.5, 1.0]}),
        ({"mix_ratios": "[0.5]"}, {"mix_ratios": [0.5]}),
        ({"mix_ratios": (0, 1)}, {"mix_ratios": [0.0, 1.0]}),
        ({"mix_ratios": np.array([0.25])}, {"mix_ratios": [0.25]}),
        ({"seeds": "3"}, {"seeds": [3]}),
        ({"layers": '["0,1", "all"]'}, {"layers": ["0,1", "all"]}),
        ({"gates": "elu,sigmoid"}, {"gates": ["elu", "sigmoid"]}),
        ({"n_tokens": "30720"}, {"n_tokens": 30720}),
        ({"n_tokens": np.int64(30720)}, {"n_tokens": 30720}),
        ({"learning_rate": "1e-3"}, {"learning_rate": 0.001}),
        ({"learning_rate": 1}, {"learning_rate": 1.0}),
        ({"is_shown": "true"}, {"is_shown": True}),
    ],
)
def test_values_are_converted_to_the_declared_type(notebook, changes, expected):
    converted = check_parameters(notebook, changes)
    assert converted == expected
    assert json.dumps(converted) == json.dumps(expected)  # no numpy scalar, and 1.0 is not 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix_ratio": 0.1}, "mix_ratio is not a parameter of the notebook study. Did you mean mix_ratios?"),
        ({"zzz": 1}, "Allowed: mix_ratios, seeds, gates, layers, n_tokens"),
        ({"n_tokens": 1.5}, "n_tokens = 1.5"),
        ({"n_tokens": "many"}, "n_tokens = 'many'"),
        ({"n_tokens": True}, "must be of type int"),
        ({"n_tokens": ""}, "must be of type int"),
        ({"learning_rate": "nan"}, "must be of type float"),
        ({"is_shown": "perhaps"}, "must be of type bool"),
        ({"is_shown": 1}, "must be of type bool"),
        ({"new_domain": 3}, "must be of type str"),
        ({"seeds": "1,,2"}, "a JSON list"),
        ({"seeds": "[1"}, "a JSON list"),
        ({"seeds": []}, "one or more values"),
        ({"seeds": [0.5]}, "list[int]"),
        ({"n_tokens": 0}, "n_tokens = 0 is out of range"),
        ({"seeds": [0, -1]}, "seed = -1 is out of range"),
        ({"mix_ratios": [0.1, 1.5]}, "mix_ratio = 1.5 is out of range: it must be between 0 and 1"),
        ({"gates": ["relu", "tanh"]}, "gate = 'tanh' is not allowed. Choose one of: none, sigmoid, relu, elu"),
        ({"layers": ["all", "firsthalf"]}, "layers = 'firsthalf' is not allowed"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0 is out of range"),
    ],
)
def test_what_no_run_can_have_is_refused_before_anything_runs(notebook, monkeypatch, changes, message):
    monkeypatch.setattr(notebooks, "_run_papermill", never_run)
    with pytest.raises(ConfigError) as caught:
        execute_notebook(notebook, changes, output_directory=notebook.parent / "out")
    assert message in str(caught.value)
    assert not (notebook.parent / "out").exists()


def test_corpora_are_checked_and_relative_files_found_from_the_commands_folder(notebook, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert check_parameters(notebook, {"new_domain": "file:*.txt"}) == {
        "new_domain": f"file:{tmp_path / 'elsewhere' / '*.txt'}"
    }
    for spec in ("file:*.jsonl", "file:", "wikipedia", "", "debian-docs:klingon"):
        with pytest.raises(CorpusError):
            check_parameters(notebook, {"new_domain": spec})


def test_values_are_checked_together(tmp_path):
    path = write_notebook(
        tmp_path / "study.ipynb",
        'profile = "smoke"  # type: str  profile\nmethod = "lora"  # type: str  method\n'
        'mix_ratio = 0.1  # type: float  share\ngate = "relu"  # type: str  gate\n'
        'proxy = ""  # type: str  proxy; the profile\'s if empty\n',
    )
    assert check_parameters(path, {"profile": "laptop", "mix_ratio": 0.0, "proxy": ""})["proxy"] == ""
    with pytest.raises(ConfigError, match="proxy is empty"):
        check_parameters(path, {"proxy": ""})
    with pytest.raises(ConfigError, match="has no meaning for method = 'lora'"):
        check_parameters(path, {"gate": "elu"})
    with pytest.raises(ConfigError, match="profile = 'big' is unknown"):
        check_parameters(path, {"profile": "big"})


# --- running ----------------------------------------------------------------------------------------------------------


def test_an_unknown_notebook_names_those_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr(notebooks, "project_directory", lambda: tmp_path)
    study = write_notebook(tmp_path / "notebooks" / "study.ipynb", CELL)
    assert find_notebook("study") == find_notebook("study.ipynb") == find_notebook(study) == study
    with pytest.raises(ConfigError, match=r"no notebook 'studies'.*Allowed: study"):
        find_notebook("studies")


def test_one_notebook_end_to_end(tmp_path, monkeypatch):
    """Executed with a change: kernel, folder and environment are right, copy and page whole; then a failure."""
    facts = (
        "import importlib.util, json, os, sys\nfrom ipykernel.connect import get_connection_info\n"
        "assert importlib.util.find_spec('nrlib')\n"
        "print('progress', file=sys.stderr)\n"
        "print(json.dumps([sys.executable, os.getcwd(), os.environ.get('NRLIB_PUBLISH'), n_tokens,\n"
        "                  get_connection_info(unpack=True)['transport']]))"
    )
    failure = "if n_tokens == 2:\n    raise ValueError('first line\\nthe last line')"
    study = write_notebook(
        tmp_path / "study.ipynb", "n_tokens = 1  # type: int  tokens", facts, failure, "print('end')"
    )
    output = tmp_path / "build"
    monkeypatch.setattr(records, "git_state", lambda: ("0" * 40, False))
    monkeypatch.chdir(project_directory())

    executed = execute_notebook(study, {"n_tokens": 3}, output_directory=output, progress=False, publish=True)
    assert executed.parent == output and executed.stem.startswith("study-") and len(executed.stem) == len("study-") + 8
    printed = [
        text
        for cell in json.loads(executed.read_text())["cells"]
        for out in cell.get("outputs", [])
        if out.get("name") == "stdout"
        for text in ["".join(out["text"])]
    ]
    assert json.loads(printed[0]) == [sys.executable, str(tmp_path), "1", 3, "tcp"]
    assert printed[1] == "end\n"
    page = render_page(executed).read_text(encoding="utf-8")
    assert "end" in page and "n_tokens" in page

    with pytest.raises(NrlibError, match=r"study\.ipynb failed in cell 3 \(In \[4\]\): ValueError: the last line"):
        execute_notebook(study, {"n_tokens": 2}, output_directory=output, progress=False)
    assert sorted(path.name.partition("-")[2][8:] for path in output.glob("*.ipynb")) == [".failed.ipynb", ".ipynb"]
    assert not list(output.glob(".*"))


def _fails_with(error):
    def run(path, output, changes, **_options):
        cells = [{"metadata": {"papermill": {"status": status}}} for status in ("completed", "completed", "pending")]
        output.write_text(json.dumps({"cells": cells}))
        raise error

    return run


def test_a_dead_kernel_is_said_plainly_and_an_interruption_leaves_nothing(notebook, tmp_path, monkeypatch):
    from nbclient.exceptions import DeadKernelError

    output = tmp_path / "build"
    monkeypatch.setattr(notebooks, "_run_papermill", _fails_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        execute_notebook(notebook, output_directory=output)
    assert list(output.iterdir()) == []
    monkeypatch.setattr(notebooks, "_run_papermill", _fails_with(DeadKernelError("Kernel died")))
    with pytest.raises(NrlibError, match="the kernel died in cell 2"):
        execute_notebook(notebook, output_directory=output)
    assert [path.name for path in output.iterdir()] == ["study.failed.ipynb"]


def test_the_copy_is_named_after_what_differs_from_the_notebook(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(
        notebooks, "_run_papermill", lambda path, output, changes, **_options: shutil.copy(path, output)
    )

    def name(**changes):
        return execute_notebook(notebook, changes, output_directory=tmp_path / "build").name

    assert name() == name(seeds=[0, 1], n_tokens="20480") == "study.ipynb"
    assert name(seeds="5,6") == name(seeds=[5, 6]) != name(seeds=[6, 5])


def test_publishing_from_a_changed_tree_stops_before_anything_runs(notebook, monkeypatch):
    monkeypatch.setattr(records, "git_state", lambda: ("0" * 40, True))
    monkeypatch.setattr(notebooks, "_run_papermill", never_run)
    with pytest.raises(NrlibError, match="uncommitted changes"):
        execute_notebook(notebook, publish=True, output_directory=notebook.parent / "build")


def test_conclusions_say_when_they_were_written_about_other_runs(tmp_path):
    study = write_notebook(tmp_path / "study.ipynb", 'profile = "smoke"  # type: str  profile', "print(profile)")
    notebook = json.loads(study.read_text())
    notebook["cells"].append(
        {"cell_type": "markdown", "id": "see", "metadata": {}, "source": "## What we see\n\nMuch."}
    )
    study.write_text(json.dumps(notebook))

    def conclusions(**changes):
        executed = execute_notebook(study, changes, output_directory=tmp_path / "build", progress=False)
        return "".join(json.loads(executed.read_text())["cells"][-1]["source"])

    assert conclusions(profile="laptop") == "## What we see\n\nMuch."
    assert "profile = 'smoke'" in conclusions() and conclusions().endswith("Much.")
