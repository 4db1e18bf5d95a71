"""The explorer: its data are the records, its commands are accepted, its page asks no other host."""

from __future__ import annotations

import csv
import importlib
import json
import random
import re
import shlex
import shutil
from collections import defaultdict
from dataclasses import replace
from html import unescape
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from lxml import html as lxml_html
from typer.testing import CliRunner

from nrlib import cli, notebooks
from nrlib.commands import extend, reproduce
from nrlib.config import flat_values, make_config
from nrlib.errors import ConfigError
from nrlib.explorer import DIALS, explorer_data, extend_command, run_rows, settings
from nrlib.figures import METHOD_STYLE
from nrlib.pages import check_pages
from nrlib.profiles import ALL_METHODS, FIXED_BY_METHOD
from nrlib.records import published_records, write_counts
from nrlib.storage import project_directory

ROOT = project_directory()
LARGEST_PAGE = 500_000  # bytes


@pytest.fixture(scope="module", autouse=True)
def published():
    """The records of the checkout, which the other tests do not see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NRLIB_RESULTS", str(ROOT / "data" / "results"))
        patch.syspath_prepend(str(ROOT / "book" / "_extensions"))
        yield


@pytest.fixture(scope="module")
def records(published):
    found = list(published_records())
    assert found
    return found


@pytest.fixture(scope="module")
def data(records):
    return explorer_data(records)


@pytest.fixture
def changes_of(monkeypatch):
    """What a `nrlib extend …` command asks for, as the command line understands it: profile and changes."""

    def parse(command):
        program, *arguments = shlex.split(command)
        assert program == "nrlib"
        found = []
        monkeypatch.setattr(extend, "extend_and_report", lambda *given: found.append(given) or "")
        result = CliRunner().invoke(cli.app, arguments, prog_name="nrlib")
        assert result.exit_code == 0, result.output
        return found[0][:2]

    return parse


def positions(setting):
    return {f"{dial.name}={setting[dial.name]}" for dial in DIALS if setting[dial.name] is not None}


# --- the reader's pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("builder", "n_links"), [("html", 2), ("singlehtml", 1)])
def test_every_picture_opens_alone_on_a_page_and_none_on_paper(monkeypatch, builder, n_links):
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_extensions"))
    reader = importlib.import_module("reader")
    linked = '<a class="image-reference" href="big.png"><img alt="b" src="../_images/b.png"></a>'
    context = {"body": f'<p><img alt="a" src="../_images/a.png"/></p>{linked}<img src="_static/logo.svg">'}
    reader.link_pictures(SimpleNamespace(builder=SimpleNamespace(name=builder)), "page", "", context, None)
    assert context["body"].count("<a ") == n_links and linked in context["body"]
    assert ('href="../_images/a.png"><img alt="a" src="../_images/a.png"/></a>' in context["body"]) == (
        builder == "html"
    )


# --- data -------------------------------------------------------------------------------------------------------------


def test_rows_name_the_pages_of_a_build_that_show_the_run(records, monkeypatch, tmp_path):
    monkeypatch.setenv("NRLIB_COUNTS", str(tmp_path / "runs.jsonl"))
    assert {row["pages"] for row in run_rows(records[:2])} == {""}
    write_counts(notebook="methods", loaded=[records[0].run_id, records[1].run_id])
    write_counts(notebook="data_mixing", trained=[records[0].run_id])
    assert [row["pages"] for row in run_rows(records[:3])] == ["data_mixing methods", "methods", ""]


def test_rows_equal_the_records(records):
    rows = run_rows(records)
    assert [row["run_id"] for row in rows] == [record.run_id for record in records]
    tuned = defaultdict(list)  # fine-tuning at rate 0.01, the best one: what learning is relative to
    for record in records:
        values = flat_values(record.run_config)
        if (values["method"], values["learning_rate"], values["mix_ratio"], values["new_text_ratio"]) == (
            "fine_tuning", 0.01, 0.1, 1.0,
        ):  # fmt: skip
            tuned[values["profile"], values["n_tokens"], values["new_domain"]].append(
                record.results["bits_per_byte"]["new"]
            )
    for record, row in zip(records, rows, strict=True):
        before, after = record.results["backbone_bits_per_byte"], record.results["bits_per_byte"]
        lost = after["unseen_original"] / before["unseen_original"] - 1
        assert row["forgetting"] == pytest.approx(lost, abs=2e-5)
        if record.config["profile"] == "laptop":
            best = tuned["laptop", record.config["training"]["n_tokens"], record.config["data"]["new_domain"]]
            gain = (before["new"] - after["new"]) / (before["new"] - sum(best) / len(best))
            assert row["learning"] == pytest.approx(gain, abs=2e-5)
        assert row["bits_per_byte_new"] == after["new"]
        assert (row["git_commit"], row["device"]) == tuple(record.provenance[k] for k in ("git_commit", "device"))
        assert all(row[name] == value for name, value in flat_values(record.run_config).items() if name != "precision")


def test_settings_hold_every_run_once_and_average_over_seeds(records):
    found = settings(records)
    names = [run["run_id"] for setting in found for run in setting["runs"]]
    assert sorted(names) == sorted(record.run_id for record in records)
    by_name = {record.run_id: record for record in records}
    assert max(setting["seeds"] for setting in found) == 5
    for setting in found:
        configs = {str({**by_name[run["run_id"]].config, "seed": 0}) for run in setting["runs"]}
        assert len(configs) == 1 and setting["seeds"] == len({run["seed"] for run in setting["runs"]})
        for metric in ("forgetting", "learning"):
            values = [run[metric] for run in setting["runs"]]
            assert setting[metric] == pytest.approx(sum(values) / len(values), abs=1e-5)
            assert setting[f"{metric}_range"] == [min(values), max(values)]
        values = flat_values(by_name[setting["runs"][0]["run_id"]].run_config)
        for dial in DIALS:
            used = not set(dial.parameters) <= set(FIXED_BY_METHOD[setting["method"]])
            assert setting[dial.name] == (dial.value(values) if used else None)


def test_settings_of_one_method_differ_in_what_is_shown(data):
    shown = [(s["profile"], s["method"], *sorted(positions(s)), s["other"]) for s in data["settings"]]
    assert len(set(shown)) == len(shown)


def test_records_of_other_profiles_have_their_place(records):
    """A new profile has no fine-tuning to compare with at first: its runs are in the table and not in the plane."""
    config = make_config("gpu", method="lora", n_tokens=1_000_000)
    new = replace(records[0], config=config.to_dict(), run_id=config.run_id)
    found = explorer_data([*records, new])
    assert list(found["conflicts"]) == ["gpu", "laptop"]
    setting = next(s for s in found["settings"] if s["profile"] == "gpu")
    assert setting["learning"] is None and setting["learning_range"] is None
    assert "1000000" in found["dials"]["n_tokens"]
    assert setting["runs"][0]["command"] == "nrlib extend --profile gpu --method lora -p n_tokens=1000000 -p seed=0"


# --- commands ---------------------------------------------------------------------------------------------------------


def test_every_run_has_a_command_that_asks_for_it(data, records, changes_of):
    commands = {run["run_id"]: run["command"] for setting in data["settings"] for run in setting["runs"]}
    for record in records:
        profile, changes = changes_of(commands[record.run_id])
        assert make_config(profile, **changes) == record.run_config


def test_commands_quote_what_a_shell_would_read(changes_of):
    config = make_config("smoke", layers="0,1", new_domain="file:/texts/a b*.txt", initialisation="he", seed=3)
    profile, changes = changes_of(extend_command(config))
    assert make_config(profile, **changes) == config


def test_positions_of_dials_make_commands_that_are_accepted_or_count_as_clashes(data, changes_of):
    """What the page's script does for a place no published run has."""
    draw = random.Random(0)
    outcomes = {True: 0, False: 0}
    while min(outcomes.values()) < 20:
        method = draw.choice(["neutral_residues", "vanilla_adapter", "distillation"])
        own = [name for name in data["methods"][method] if name in data["dials"]]
        asked = {name: draw.choice(list(data["dials"][name])) for name in own if draw.random() < 0.6}
        places = {f"{name}={value}" for name, value in asked.items()}
        clashes = any(set(clash) <= places for clash in data["conflicts"]["laptop"][method])
        outcomes[clashes] += 1
        if clashes:
            continue
        words = " ".join(data["dials"][name][value] for name, value in asked.items())
        profile, changes = changes_of(f"nrlib extend --profile laptop --method {method} {words}")
        values = flat_values(make_config(profile, **changes))
        for dial in DIALS:
            if dial.name in asked:
                value = dial.value(values)
                assert float(asked[dial.name]) == value if isinstance(value, float) else asked[dial.name] == str(value)


def test_clashes_are_impossible_or_mean_something_else(data):
    clashes = data["conflicts"]["laptop"]["neutral_residues"]
    assert ["mix_ratio=0", "kl_weight=2"] in clashes and ["local_loss_weight=5", "local_loss=none"] in clashes
    assert not any(set(clash) <= positions(s) for s in data["settings"] for clash in data["conflicts"]["laptop"][s["method"]])  # fmt: skip
    with pytest.raises(ConfigError):
        make_config("laptop", mix_ratio=0.0, kl_weight=2.0)


def test_commands_of_notebooks_and_of_reproduce_are_accepted(data, records, monkeypatch):
    for profiles in data["notebooks"].values():
        for command in profiles.values():
            _, verb, name, *rest = shlex.split(command)
            assert verb == "run"
            notebooks.check_parameters(notebooks.find_notebook(name), cli.split_assignments(rest[1::2]))
    assert set(data["notebooks"]) == {record.notebook for record in records}

    chosen = []
    monkeypatch.setattr(reproduce, "reproduce_and_report", lambda found, _: chosen.extend(found) or ("", True))
    names = [records[5].run_id, records[2].run_id]
    result = CliRunner().invoke(cli.app, ["reproduce", "--run", names[0], "--run", names[1]])
    assert result.exit_code == 0 and sorted(r.run_id for r in chosen) == sorted(names)
    result = CliRunner().invoke(cli.app, ["reproduce", "--run", names[0][:-1]])
    assert result.exit_code == 2 and f"Did you mean {names[0]}?" in result.output


def test_links_of_the_notebooks_lead_to_runs(data):
    found = 0
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = "".join(
            line for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for line in cell["source"]
        )
        for link in re.findall(r'href="\.\./book/explorer\.html#([^"]+)"', text):
            asked = {name: value[0] for name, value in parse_qs(unescape(link)).items()}
            methods = asked.pop("method", ",".join(ALL_METHODS)).split(",")
            assert set(methods) <= set(data["methods"])
            assert all(value in data["dials"][name] for name, value in asked.items())
            shown = [s for s in data["settings"] if s["method"] in methods and all(s[name] in (None, value) for name, value in asked.items())]  # fmt: skip
            assert {run["notebook"] for setting in shown for run in setting["runs"]} >= {path.stem}
            found += 1
    assert found >= 6


# --- page -------------------------------------------------------------------------------------------------------------


def build(folder):
    """The page, built by Sphinx alone from the records, as in the book but for the theme."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    source, output = folder / "source", folder / "site"
    (source / "book").mkdir(parents=True)
    shutil.copy(ROOT / "book" / "explorer.md", source / "book")
    for name in ("method", "reproduce"):
        (source / "book" / f"{name}.md").write_text(f"# {name}\n", encoding="utf-8")
    contents = "# Book\n\n```{toctree}\nbook/explorer\nbook/method\nbook/reproduce\n```\n"
    (source / "index.md").write_text(contents, encoding="utf-8")
    settings = {
        "extensions": ["myst_parser", "explorer"],
        "html_theme": "basic",
        "html_static_path": [str(ROOT / "book" / "_static")],
    }
    doctrees = folder / "doctrees"
    with docutils_namespace():
        Sphinx(source, None, output, doctrees, "html", settings, status=None, warningiserror=True).build()
    return output


@pytest.fixture(scope="module")
def site(published, tmp_path_factory):
    return build(tmp_path_factory.mktemp("explorer"))


def test_page_passes_the_checks_and_is_small(site):
    page = site / "book" / "explorer.html"
    assert check_pages(site) == []
    assert page.stat().st_size < LARGEST_PAGE - 100_000  # the book's theme adds some
    text = page.read_text(encoding="utf-8")
    for name in ("data.js", "plane.svg"):
        assert f"../_static/explorer/{name}" in text and (site / "_static" / "explorer" / name).exists()


def test_page_without_script_shows_every_setting(site, data):
    root = lxml_html.parse(site / "book" / "explorer.html").getroot()
    rows = {row.get("data-id"): row for row in root.xpath("//tr[@data-id]")}
    assert list(rows) == [setting["id"] for setting in data["settings"]]
    heads = root.xpath("//table/thead/tr/th/button/text()")
    for setting in data["settings"]:
        cells = dict(zip(heads, (cell.text_content() for cell in rows[setting["id"]]), strict=True))
        assert cells["forgetting"].startswith(f"{100 * setting['forgetting']:.2f}%")
        assert cells["learning"].startswith(f"{100 * setting['learning']:.1f}%")
        assert cells["seeds"] == str(setting["seeds"])
        assert cells["mix ratio"] == setting["mix_ratio"]
        assert cells["gate"] == (setting["gate"] or "–")
    drawn = (site / "_static" / "explorer" / "plane.svg").read_text(encoding="utf-8")
    n_runs = sum(len(setting["runs"]) for setting in data["settings"])
    assert drawn.count("<path") >= n_runs + len(data["settings"])


def test_dials_and_files_are_those_of_the_data(site, data, records):
    root = lxml_html.parse(site / "book" / "explorer.html").getroot()
    for name, values in data["dials"].items():
        (control,) = root.xpath(f"//*[@name='{name}']")
        stops = control.get("data-stops", "").split() or control.xpath("option/@value")
        assert stops[1:] == list(values)
        assert root.xpath(f"//label[@for='{control.get('id')}']")
    folder = site / "_static" / "explorer"
    script = (folder / "data.js").read_text(encoding="utf-8")
    written = json.loads(script.removeprefix("window.explorerData = ").rstrip().removesuffix(";"))
    assert {name: written[name] for name in data} == json.loads(json.dumps(data))
    rows = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    assert rows == json.loads(json.dumps(run_rows(records)))
    with open(folder / "records.csv", encoding="utf-8", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["command"] for line in lines] == [row["command"] for row in rows]
    assert [float(line["forgetting"]) for line in lines] == [row["forgetting"] for row in rows]
    assert {line["git_commit"] for line in lines} == {record.provenance["git_commit"] for record in records}


def test_marks_are_those_of_the_figures(site):
    import explorer_plot
    from matplotlib.colors import to_hex

    marks = [explorer_plot.marker(method) for method in ALL_METHODS]
    assert len(set(marks)) == len(marks)
    assert explorer_plot.marker("fine_tuning") == "M-1,1L1,1L1,-1L-1,-1Z"  # the square
    text = (site / "book" / "explorer.html").read_text(encoding="utf-8")
    for method in ALL_METHODS:
        assert f'fill="{to_hex(METHOD_STYLE[method][0])}"' in text


def test_scripts_name_no_host_they_would_ask(site):
    folder = site / "_static"
    own = (folder / "explorer.js").read_text(encoding="utf-8") + (folder / "explorer" / "data.js").read_text("utf-8")
    assert "://" not in own and "actions: false" in own  # no link to an editor elsewhere
    vega = (folder / "explorer" / "vega.js").read_text(encoding="utf-8")
    hosts = {urlsplit(address).netloc for address in re.findall(r"https?://[^\"'`\s)<>]+", vega)}
    # names of XML, the schema and the editor, and an issue that an error message points to
    assert hosts <= {"www.w3.org", "vega.github.io", "github.com"}


def test_page_without_records_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NRLIB_RESULTS", str(tmp_path / "none"))
    output = build(tmp_path)
    assert check_pages(output) == []
    assert "no published records" in (output / "book" / "explorer.html").read_text(encoding="utf-8")
