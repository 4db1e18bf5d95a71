"""Tasks of EleutherAI's lm-evaluation-harness: the paper's by language, their names, their data and what can be missing.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import ConfigError, CorpusError
from .hub import is_reachable

FEW_SHOT_SEED = 1234  # the harness's own

# The code of each language in Belebele. The other translations are called by the two-letter code.
_BELEBELE = {
    "da": "dan_Latn", "de": "deu_Latn", "es": "spa_Latn", "fr": "fra_Latn", "hu": "hun_Latn", "it": "ita_Latn",
    "nl": "nld_Latn", "pt": "por_Latn", "ro": "ron_Latn", "ru": "rus_Cyrl", "sk": "slk_Latn", "sv": "swe_Latn",
    "uk": "ukr_Cyrl", "vi": "vie_Latn",
}  # fmt: skip

# The paper's tasks by language, under the harness's names. It has no translation of CommonsenseQA into these languages.
PAPER_TASKS: dict[str, tuple[str, ...]] = {
    "en": ("arc_easy", "arc_challenge", "hellaswag", "mmlu", "commonsense_qa", "belebele_eng_Latn")
} | {
    language: (f"arc_{language}", f"hellaswag_{language}", f"m_mmlu_{language}", f"belebele_{code}")
    for language, code in _BELEBELE.items()
}


def paper_tasks(languages: Sequence[str]) -> list[str]:
    """The paper's tasks in some languages, by two-letter code.

    Raises
    ------
    ConfigError
        For a language without tasks.
    """
    if unknown := [language for language in languages if language not in PAPER_TASKS]:
        raise ConfigError(
            f"languages = {unknown[0]!r} has no tasks of the paper. Allowed: {', '.join(PAPER_TASKS)}. Tasks of other "
            "languages can be given by name with --tasks."
        )
    return [task for language in dict.fromkeys(languages) for task in PAPER_TASKS[language]]


def check_harness() -> None:
    """Raise ConfigError unless lm-evaluation-harness is installed; says how to install it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "Evaluation needs EleutherAI's lm-evaluation-harness, the extra 'evaluation'. Install it with: "
            "pip install -c constraints.txt -e '.[evaluation]' (or pip install 'lm-eval>=0.4.13')."
        )


def check_hub() -> None:
    """Raise CorpusError, within seconds, unless the hub can be reached. Offline mode (cached data only) passes."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not is_reachable():
        raise CorpusError(
            f"{constants.ENDPOINT} cannot be reached, and the data of tasks given by name comes from there. Connect to a "
            "network; or set HF_HUB_OFFLINE=1 if the data was downloaded before; or leave --tasks and --paper-tasks out: "
            "the tasks made from --original and --new-domain need no network."
        )


def check_task_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that lm-evaluation-harness does not know; suggests names that are close."""
    known = _task_manager(bool(names)).all_tasks
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(
                f"tasks = {name!r} is not a task of lm-evaluation-harness.{hint} All {len(known):,} names are listed by: "
                "lm_eval ls tasks"
            )


def load_tasks(names: Sequence[str], local: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Tasks by name, with their data from the hub or its cache, and tasks by configuration.

    Returns
    -------
    dict
        What lm-evaluation-harness's `TaskManager.load` returns: tasks, groups, group_map.

    Raises
    ------
    ConfigError
        For an unknown name.
    CorpusError
        When the data of a task cannot be had.
    """
    check_task_names(names)
    manager = _task_manager(bool(names))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    specs: list[Any] = [*local, *names]
    for spec in specs:
        try:
            with quiet(bars=isinstance(spec, str) and sys.stderr.isatty()):  # a download may take minutes
                part = manager.load([spec])
        except Exception as error:  # datasets, huggingface_hub and tasks written in Python raise classes of their own
            name = spec if isinstance(spec, str) else spec["task"]
            reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
            raise CorpusError(
                f"The task {name!r} could not be loaded. If the data is the reason, check the network connection, unset "
                f"HF_HUB_OFFLINE, and log in with `hf auth login` where a data set asks for it. ({reason})"
            ) from error
        for key, entries in part.items():
            loaded[key] |= entries
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


@functools.cache
def _task_manager(has_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=has_defaults)  # reads thousands of files: seconds


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Without the harness's and `datasets`' progress reports and advice for their own command lines."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not bars:
        datasets.disable_progress_bars()
    try:
        # Some of the harness's bars cannot be switched off; what is logged goes where it went before.
        with contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if had_bars and not bars:
            datasets.enable_progress_bars()
