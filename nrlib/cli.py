"""The console command `nrlib`. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import enum
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .config import parameters as run_parameters
from .errors import ConfigError, NrlibError
from .profiles import PRESETS, PROFILES
from .tracking import TRACKERS

if TYPE_CHECKING:
    from .records import Record

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130
SECONDS_FOR_THE_FIRST = 5


class Commands(TyperGroup):
    """All commands report errors in one way: a paragraph, no traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (NrlibError, FloatingPointError) as error:
            if os.environ.get("NRLIB_TRACEBACK") == "1":
                raise
            if os.environ.get("RANK", "0") != "0":
                time.sleep(SECONDS_FOR_THE_FIRST)  # most likely it reports the same, and torchrun ends this one
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            typer.echo(
                "\nInterrupted. Finished runs are kept; the same command goes on from the last checkpoint, of which there is one a minute.",
                err=True,
            )
            raise typer.Exit(EXIT_INTERRUPTED) from error


app = typer.Typer(
    cls=Commands, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)


class Format(str, enum.Enum):
    """How a result is printed."""

    table = "table"
    json = "json"


class Parallel(str, enum.Enum):
    """How the processes that torchrun started share a run."""

    ddp = "ddp"
    fsdp = "fsdp"


_PARALLEL_HELP = "Under torchrun: ddp (default) copies the model to every process, fsdp shards it."


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from . import __version__

        typer.echo(f"nrlib {__version__}")
        raise typer.Exit


@app.callback()
def nrlib(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Teach a language model a new domain without losing the old one (neutral residues, arXiv 2410.02744).

    \b
    Start with:  nrlib doctor
                 nrlib run quickstart
                 nrlib extend --help
    """


def split_assignments(texts: list[str]) -> dict[str, str]:
    """`name=value` texts as a dictionary."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equal, value = text.partition("=")
        if not equal or not name.strip():
            raise ConfigError(f"-p {text!r} is not of the form name=value, for example -p mix_ratio=0.1.")
        if name.strip() in pairs:
            raise ConfigError(f"-p gives {name.strip()} twice. Give each parameter once.")
        pairs[name.strip()] = value.strip()
    return pairs


Assignments = Annotated[
    list[str], typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="Change a parameter; may be repeated.")
]
ShowParameters = Annotated[bool, typer.Option("--show-parameters", help="Explain the parameters and stop.")]
_PROFILE_HELP = f"One of {', '.join(PROFILES)}."


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="Name of a notebook, or path of a .ipynb file.")] = "",
    parameter: Assignments = [],  # noqa: B006  (typer copies it)
    profile: Annotated[str, typer.Option(help=f"Short for -p profile=…: {_PROFILE_HELP}")] = "",
    publish: Annotated[bool, typer.Option("--publish", help="Write new records under data/results/.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the notebooks and stop.")] = False,
    show_parameters: ShowParameters = False,
    page: Annotated[bool, typer.Option(help="Make a page of the executed copy.")] = True,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default build/notebooks.")] = None,
) -> None:
    """Execute a notebook with changed parameters.

    \b
    Examples:  nrlib run --list
               nrlib run methods --show-parameters
               nrlib run quickstart -p local_loss_weight=0
               nrlib run methods --profile laptop -p learning_rates=0.001,0.003
    """
    from . import notebooks

    if list_all or not notebook:
        typer.echo("\n".join(notebooks.list_notebooks()))
        return
    path = notebooks.find_notebook(notebook)
    if show_parameters:
        for p in notebooks.read_parameters(path).values():
            typer.echo(f"{p.name} = {json.dumps(p.default)}  ({p.type})\n    {p.description}")
        return
    changes = split_assignments([*parameter, *([f"profile={profile}"] if profile else [])])
    executed = notebooks.execute_notebook(path, changes, output_directory=output, publish=publish)
    typer.echo(f"executed copy: {executed}")
    if page:
        typer.echo(f"page:          {notebooks.render_page(executed)}")


def _help(name: str) -> Any:
    return typer.Option(help=run_parameters()[name].metadata["description"], show_default=False)


@app.command()
def extend(
    backbone: Annotated[str | None, _help("backbone_name")] = None,
    original: Annotated[str | None, _help("original")] = None,
    proxy: Annotated[str | None, _help("proxy")] = None,
    unseen_original: Annotated[str | None, _help("unseen_original")] = None,
    new_domain: Annotated[str | None, _help("new_domain")] = None,
    method: Annotated[str | None, _help("method")] = None,
    mix_ratio: Annotated[float | None, _help("mix_ratio")] = None,
    learning_rate: Annotated[float | None, _help("learning_rate")] = None,
    n_tokens: Annotated[int | None, _help("n_tokens")] = None,
    seed: Annotated[int | None, _help("seed")] = None,
    parameter: Assignments = [],  # noqa: B006  (typer copies it)
    preset: Annotated[
        str | None,
        typer.Option(help=f"Settings of neutral residues by name: {', '.join(PRESETS)}.", show_default="recommended"),
    ] = None,
    profile: Annotated[str, typer.Option(help=f"Where all other values come from. {_PROFILE_HELP}")] = "laptop",
    save: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Save the extended model here.")] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Of the texts, for the model card; may be repeated.", show_default=False),
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="For the model card, as on the hub: apache-2.0, cc-by-sa-4.0, …")
    ] = None,
    parallel: Annotated[Parallel | None, typer.Option(help=_PARALLEL_HELP, show_default=False)] = None,
    log_to: Annotated[
        str | None, typer.Option(metavar="TRACKER", help=f"Log every step to one of {', '.join(TRACKERS)}.")
    ] = None,
    show_parameters: ShowParameters = False,
) -> None:
    """Extend a backbone to a new domain and measure what it learned and forgot.

    A run that was made before is not made again: its record is shown.

    \b
    Examples:  nrlib extend
               nrlib extend --profile smoke --method lora --save build/lora
               nrlib extend --backbone gpt2 --new-domain 'file:texts/*.txt' -p gate=elu
               torchrun --nproc-per-node 2 -m nrlib.cli extend --parallel fsdp
    """
    from .commands import extend as command
    from .distributed import is_first_process, processes

    if show_parameters:
        typer.echo(command.explain_parameters(profile))
        return
    named = {
        "backbone_name": backbone, "original": original, "proxy": proxy, "unseen_original": unseen_original,
        "new_domain": new_domain, "method": method, "mix_ratio": mix_ratio, "learning_rate": learning_rate,
        "n_tokens": n_tokens, "seed": seed,
    }  # fmt: skip
    changes = command.merge_changes(named, split_assignments(parameter))
    changes = command.preset_values(preset, changes) | changes
    with processes(parallel.value if parallel else ""):
        report = command.extend_and_report(profile, changes, save, log_to, language, license)
        if is_first_process():
            typer.echo(report)


@app.command()
def evaluate(
    backbone: Annotated[
        str, typer.Option(help="Local folder or hub name; without it, the one the extension was saved with.")
    ] = "",
    extension: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What `nrlib extend --save` wrote, or any PEFT adapter.")
    ] = None,
    original: Annotated[str, typer.Option(metavar="SPEC", help="Corpus of the original domain, for local tasks.")] = "",
    new_domain: Annotated[str, typer.Option(metavar="SPEC", help="Corpus of the new domain, for local tasks.")] = "",
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Tasks of lm-evaluation-harness, with commas.")] = "",
    paper_tasks: Annotated[bool, typer.Option("--paper-tasks", help="The paper's tasks and translations.")] = False,
    languages: Annotated[str, typer.Option(metavar="CODES", help="Of the paper's tasks; default en,fr.")] = "",
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="Only N items of each task; 0 is all.")] = 0,
    context_length: Annotated[
        int, typer.Option(min=0, metavar="T", help="Tokens the models see; 0: as trained, or all positions to 2048.")
    ] = 0,
    n_evaluation_bytes: Annotated[
        int, typer.Option(min=1000, help="Test text of each corpus; the default is the laptop profile's.")
    ] = PROFILES["laptop"]["n_evaluation_bytes"],
    format: Annotated[Format, typer.Option(help="json: one object a line.")] = Format.table,
) -> None:
    """Measure a backbone and its extension on tasks of lm-evaluation-harness.

    Tasks made from the test text of your corpora run offline; tasks given by name need the hub. Without --extension
    the backbone is measured alone.

    \b
    Examples:  nrlib evaluate --extension build/extended --original debian-docs:en --new-domain debian-docs:fr
               nrlib evaluate --backbone gpt2 --tasks arc_easy,hellaswag --limit 100
               nrlib evaluate --backbone google/gemma-2b --extension build/gemma-fr --paper-tasks --languages en,fr
    """
    from .commands import evaluate as command

    names = command.choose_tasks(tasks, paper_tasks, languages)
    rows = command.evaluate(
        backbone,
        extension,
        {"original": original, "new_domain": new_domain},
        names,
        n_evaluation_bytes=n_evaluation_bytes,
        context_length=context_length,
        limit=limit,
    )
    if format is Format.json:
        for row in rows:
            typer.echo(json.dumps(row.to_dict(), ensure_ascii=False))
    else:
        typer.echo(command.format_table(rows))


@app.command()
def plan(
    backbone: Annotated[
        str | None, typer.Option(help="Hub name, local folder, or config.json of a causal language model.")
    ] = None,
    n_tokens: Annotated[int | None, _help("n_tokens")] = None,
    method: Annotated[list[str], typer.Option(help="One method; may be repeated. Default: all.")] = [],  # noqa: B006
    hardware: Annotated[
        str, typer.Option(help="h200, h100, a100, rtx4090, cpu, or 'tflops=…,memory=…GB,utilisation=…,bandwidth=…GB'.")
    ] = "h100",
    parameter: Assignments = [],  # noqa: B006  (typer copies it)
    profile: Annotated[str, typer.Option(help=f"Where all other values come from. {_PROFILE_HELP}")] = "laptop",
    format: Annotated[Format, typer.Option(help="json: one object.")] = Format.table,
) -> None:
    """Say what a run would cost: adapter widths, weights, memory by part, arithmetic, hours.

    Nothing is downloaded or trained; all methods stand side by side at the same budget.

    \b
    Examples:  nrlib plan --profile paper
               nrlib plan --profile paper --backbone path/to/config.json -p n_tokens=1000000000 --hardware a100
               nrlib plan --profile gpu --method neutral_residues --hardware 'h100,utilisation=0.5'
    """
    from .commands import plan as command
    from .commands.extend import merge_changes

    changes = merge_changes({"backbone_name": backbone, "n_tokens": n_tokens}, split_assignments(parameter))
    typer.echo(command.plan_and_report(profile, changes, hardware, method, as_json=format is Format.json))


@app.command()
def records(
    format: Annotated[Format, typer.Option(help="json: one object a line.")] = Format.table,
    notebook: Annotated[str, typer.Option(help="Only the runs this notebook asked for first.")] = "",
    own: Annotated[bool, typer.Option("--own", help="Your own runs, not the published ones.")] = False,
) -> None:
    """Print the published records, or those of your own runs.

    \b
    Examples:  nrlib records
               nrlib records --own
               nrlib records --format json | jq .forgetting
    """
    from .records import own_records, published_records
    from .tables import differing_settings, flat_records

    published = list(published_records())
    rows = flat_records(own_records(), published) if own else flat_records(published)
    names = sorted({row["notebook"] for row in rows})
    if rows and notebook not in ("", *names):
        raise ConfigError(
            f"None of these runs was asked for by a notebook {notebook!r}. There are: {', '.join(names)}."
        )
    rows = [row for row in rows if notebook in ("", row["notebook"])]
    if format is Format.json:
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False))
    elif rows:
        import pandas as pd

        columns = ["run_id", "notebook", "forgetting", "learning", "seconds", *differing_settings(rows)]
        typer.echo(pd.DataFrame(rows)[columns].to_string(index=False))
    else:
        typer.echo("No runs of your own yet." if own else "No published records.", err=True)


@app.command()
def corpora(
    spec: Annotated[str, typer.Argument(help="Corpus to load; without it, the kinds are listed.")] = "",
    show: Annotated[int, typer.Option(min=0, metavar="N", help="Print N random paragraphs.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Which paragraphs.")] = 0,
) -> None:
    """List the kinds of corpora, or load one and describe it.

    \b
    Examples:  nrlib corpora
               nrlib corpora debian-docs:fr --show 3
               nrlib corpora 'file:texts/*.txt'
    """
    from .commands import corpora as command

    if not spec:
        typer.echo(command.describe_kinds())
        return
    for part in command.describe_corpus(spec, show, seed):
        typer.echo(part)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps; under two minutes.")] = False,
    format: Annotated[Format, typer.Option(help="json: one object.")] = Format.table,
) -> None:
    """Measure speed and memory of training and inference, all methods in turn.

    \b
    Examples:  nrlib bench --quick
               nrlib bench --format json
    """
    from .benchmark import format_table, run_benchmark

    result = run_benchmark(quick=quick, progress=sys.stderr.isatty())
    typer.echo(json.dumps(result) if format is Format.json else format_table(result))


@app.command()
def doctor() -> None:
    """Check that everything needed is there, and say what to do if not.

    \b
    Example:  nrlib doctor
    """
    from .commands.doctor import examine

    is_missing = False
    for check in examine():
        typer.echo(str(check))
        is_missing |= check.status == "missing"
    if is_missing:
        raise typer.Exit(1)


@app.command()
def reproduce(
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="Only N records, spread over all; 0 is all.")] = 0,
    profile: Annotated[str, typer.Option(help=f"Only records of this profile. {_PROFILE_HELP}")] = "",
    tolerance: Annotated[float, typer.Option(min=0, help="Difference in bits per byte that passes.")] = 0.02,
    run: Annotated[list[str], typer.Option(metavar="RUN_ID", help="Only this record; may be repeated.")] = [],  # noqa: B006
) -> None:
    """Train published records again, backbones included, and report the differences.

    \b
    Examples:  nrlib reproduce --limit 4
               nrlib reproduce --profile laptop
               nrlib reproduce --run laptop-nr-s0-06e8cc7c
    """
    from .commands import reproduce as command

    chosen: list[Record] = command.choose_records(profile, limit, run)
    report, is_within = command.reproduce_and_report(chosen, tolerance)
    typer.echo(report)
    if not is_within:
        raise typer.Exit(1)


def main() -> NoReturn:
    """The entry point of the console command."""
    app(prog_name="nrlib")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
