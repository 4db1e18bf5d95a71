"""Evaluation tasks made from held-out text, in the form EleutherAI's lm-evaluation-harness reads.

Two tasks for a corpus: bits per byte of its test documents, and a multiple-choice cloze, in which the true continuation
of a paragraph stands among three taken from other documents. Both are made from test documents only, whatever the model,
its tokenizer and its context length; the same text gives the same items always.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .corpora import load_corpus
from .corpora.documents import Document
from .errors import CorpusError
from .storage import atomic_directory, cache_directory, fingerprint
from .texts import held_out_documents

TASKS_VERSION = 1  # raise it when the same text gives other items
SEED = 0  # of the distractors, their places, and of which paragraphs are taken where there are too many
N_CHOICES = 4
CONTEXT_BYTES = 160  # at most; at least as many as the continuation has
CONTINUATION_BYTES = 64  # at most; at least three quarters of it
MAX_CLOZE_ITEMS = 500

KINDS = ("bits_per_byte", "cloze")

Item = dict[str, Any]


def make_local_tasks(name: str, spec: str, n_evaluation_bytes: int, progress: bool = True) -> list[dict[str, Any]]:
    """Task configurations `<name>_bits_per_byte` and `<name>_cloze` over the test documents of a corpus.

    The documents are those that `nrlib extend` measures on for the same spec and number of bytes. Their items are kept in
    the cache under the fingerprint of the corpus.

    Parameters
    ----------
    name
        What the tasks are called after, e.g. "new_domain".
    n_evaluation_bytes
        About how much of the test text is used.

    Raises
    ------
    CorpusError
        When the corpus cannot be had or is too small for a test text or a cloze.
    """
    corpus = load_corpus(spec, progress=progress)
    key: list[Any] = [TASKS_VERSION, SEED, N_CHOICES, CONTEXT_BYTES, CONTINUATION_BYTES, MAX_CLOZE_ITEMS]
    key += [corpus.fingerprint, n_evaluation_bytes]
    folder = cache_directory().absolute() / "harness" / fingerprint(key, 16)
    if not folder.exists():
        documents = held_out_documents(corpus.documents, n_evaluation_bytes)
        if not documents:
            raise CorpusError(
                f"The corpus '{spec}' has {len(corpus.documents)} documents and none of them is a test document, so there "
                "is nothing to evaluate on. About 5% of the documents are: give at least 100."
            )
        items = {"bits_per_byte": text_items(documents), "cloze": cloze_items(documents, spec)}
        with atomic_directory(folder) as temporary:
            for kind, rows in items.items():
                _write_lines(temporary / f"{kind}.jsonl", rows)
    return [_task_config(f"{name}_{kind}", kind, folder / f"{kind}.jsonl", spec) for kind in KINDS]


def text_items(documents: Sequence[Document]) -> list[Item]:
    """One item a document: its text."""
    return [{"id": document.id, "text": document.text} for document in documents]


def cloze_items(documents: Sequence[Document], spec: str = "") -> list[Item]:
    """Items of a cloze: `context`, `choices` (each with its leading white space) and `answer`, an index into them.

    Context and true continuation are the beginning of a paragraph; each distractor is a continuation cut in the same way
    from a paragraph of another document, so that all are of similar length and begin in the middle of a text.

    Raises
    ------
    CorpusError
        When there are not enough long paragraphs in different documents.
    """
    parts = [
        (document.id, *cut)
        for document in documents
        for paragraph in document.text.split("\n\n")
        if (cut := _cut_paragraph(" ".join(paragraph.split())))
    ]
    generator = np.random.default_rng(SEED)
    chosen = sorted(generator.permutation(len(parts))[:MAX_CLOZE_ITEMS].tolist())
    items: list[Item] = []
    for index in chosen:
        name, context, truth = parts[index]
        others = sorted({continuation for other, _, continuation in parts if other != name} - {truth})
        if len(others) < N_CHOICES - 1:
            items.clear()
            break
        distractors = [others[place] for place in generator.choice(len(others), N_CHOICES - 1, replace=False)]
        answer = int(generator.integers(N_CHOICES))
        choices = [*distractors[:answer], truth, *distractors[answer:]]
        items.append({"id": name, "context": context, "choices": choices, "answer": answer})
    if not items:
        raise CorpusError(
            f"The test text of '{spec}' is too small for a cloze: {len(documents)} documents have {len(parts)} paragraphs "
            f"of {2 * CONTINUATION_BYTES} bytes or more. Every item needs {N_CHOICES - 1} continuations from other "
            "documents: give more documents, or raise --n-evaluation-bytes."
        )
    return items


def _cut_paragraph(text: str) -> tuple[str, str] | None:
    """Beginning and continuation of a paragraph; None where it is too short for both."""
    context = _cut(text, min(CONTEXT_BYTES, len(text.encode()) - CONTINUATION_BYTES))
    continuation = _cut(text[len(context) :], CONTINUATION_BYTES)
    is_long = min(len(context.encode()), len(continuation.encode())) >= CONTINUATION_BYTES * 3 // 4
    return (context, continuation) if is_long else None


def _cut(text: str, n_bytes: int) -> str:
    """A beginning of at most `n_bytes` bytes: whole words, or whole characters where no space is near."""
    start = text.encode()[: max(0, n_bytes)].decode(errors="ignore")
    if text[len(start) : len(start) + 1] not in ("", " "):
        words = start[: start.rfind(" ") + 1]
        if len(words.encode()) > n_bytes * 3 // 4:
            start = words
    return start.rstrip()


def _write_lines(path: Path, rows: Sequence[Item]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _task_config(name: str, kind: str, path: Path, spec: str) -> dict[str, Any]:
    """What lm-evaluation-harness calls a task's YAML. Its columns are named, not put into templates, which would change
    texts that look like a template or a list."""
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "datasets")},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": TASKS_VERSION, "corpus": spec},
    }
    if kind == "bits_per_byte":
        metrics = [{"metric": "bits_per_byte"}]
        return config | {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text", "metric_list": metrics
        }  # fmt: skip
    # acc_bytes chooses by log-likelihood per byte; acc_norm, per character, would not be the same for every script
    accuracy = [{"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True}]
    return config | {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",  # the choices bring their own white space: not every script has any
        "metric_list": accuracy,
    }
