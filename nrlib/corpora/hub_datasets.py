"""Text streamed from the Hugging Face hub, or from a local folder in a form `datasets` reads, and cached once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CorpusError
from ..hub import is_reachable
from ..storage import atomic_directory, cache_directory, fingerprint
from .documents import Document
from .text_files import Row, documents_from_rows

DEFAULT_HUB_LIMIT = "200MB"
HUB_CACHE_VERSION = 1  # raise it when the same rows give other documents


@dataclass(frozen=True)
class HubSpec:
    """What a hub spec says; `limit` is a number of documents, or of megabytes of text with the unit."""

    dataset: str  # a name on the hub, or a local folder of .parquet or .jsonl files
    config: str | None
    revision: str | None  # branch, tag or commit; without one the newest is fetched and its commit recorded
    limit: str


def parse_hub(rest: str) -> HubSpec:
    match = re.fullmatch(r"([^:@#]+)(?::([^:@#]+))?(?:@([^:@#]+))?(?:#([1-9]\d*(?:MB)?))?", rest)
    if match is None:
        raise CorpusError(
            f"hub:{rest} cannot be read. Write hub:<dataset>[:<config>][@<revision>][#<documents>] or "
            f"[#<megabytes>MB] (default {DEFAULT_HUB_LIMIT}), e.g. hub:HuggingFaceFW/fineweb-2:fra_Latn#20000."
        )
    dataset, config, revision, limit = match.groups()
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset)
    if not is_name and not Path(dataset).expanduser().is_dir():
        raise CorpusError(f"hub:{rest}: '{dataset}' is neither a dataset's name (owner/name) nor a folder here.")
    return HubSpec(dataset, config, revision, limit or DEFAULT_HUB_LIMIT)


def load_hub(rest: str, *, progress: bool = True) -> tuple[list[Document], dict[str, str]]:
    hub = parse_hub(rest)
    folder = Path(hub.dataset).expanduser()
    # a local folder may change under the same name: its files' sizes and times take the part of a revision
    stamp = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
    key = fingerprint([HUB_CACHE_VERSION, asdict(hub), stamp if folder.is_dir() else None], 16)
    cached = cache_directory() / "hub" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', hub.dataset)[-40:]}-{key}"
    if not cached.exists():
        with atomic_directory(cached) as temporary:
            documents, versions = _fetch_hub(hub, folder.is_dir(), progress)
            lines = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents)
            with open(temporary / "documents.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
            (temporary / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    with open(cached / "documents.jsonl", encoding="utf-8", newline="\n") as file:
        documents = [Document(**json.loads(line)) for line in file]
    return documents, json.loads((cached / "versions.json").read_text(encoding="utf-8"))


def _fetch_hub(hub: HubSpec, is_local: bool, progress: bool) -> tuple[list[Document], dict[str, str]]:
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise CorpusError("hub: corpora need the package datasets: pip install datasets, then run again.") from error
    try:
        if is_local:
            name, commit = str(Path(hub.dataset).expanduser()), None
        elif not is_reachable():
            raise ConnectionError("no connection to the hub")
        else:
            info = huggingface_hub.HfApi().dataset_info(hub.dataset, revision=hub.revision, timeout=30)
            name, commit = hub.dataset, info.sha
        stream = datasets.load_dataset(name, hub.config, split="train", streaming=True, revision=commit)
        documents, versions = documents_from_rows(_take(stream, hub, progress), f"see the card of {hub.dataset}")
    except CorpusError:
        raise
    except Exception as error:  # datasets, huggingface_hub, httpx and fsspec each raise classes of their own
        raise CorpusError(_explain_hub_failure(hub, error)) from error
    if not documents:
        raise CorpusError(f"hub:{hub.dataset} gave no text: every row of its column 'text' is blank.")
    return documents, {"datasets": datasets.__version__, f"hub:{hub.dataset}": commit or "local folder", **versions}


def _take(stream: Iterable[dict[str, Any]], hub: HubSpec, progress: bool) -> Iterator[Row]:
    """Rows of a stream until the limit of documents or bytes is reached."""
    is_bytes = hub.limit.endswith("MB")
    limit, taken = int(hub.limit.removesuffix("MB")) * (10**6 if is_bytes else 1), 0
    for number, record in enumerate(stream, start=1):
        if "text" not in record:
            raise CorpusError(f"hub:{hub.dataset} has no column 'text'; it has {', '.join(record)}.")
        yield Row(f"hub:{hub.dataset}, row {number}", record.get("id"), record["text"], hub.config or hub.dataset)
        taken += len((record["text"] or "").encode(errors="replace")) if is_bytes else 1
        if progress and number % 10_000 == 0:
            print(f"hub:{hub.dataset}: {number} rows, {taken / limit:.0%} of {hub.limit}", file=sys.stderr)
        if taken >= limit:
            return


def _explain_hub_failure(hub: HubSpec, error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    names = " ".join(cls.__name__ for cls in type(error).__mro__)
    if "gated" in str(error).lower() or "GatedRepo" in names:
        advice = (
            f"The dataset is gated: accept its conditions at https://huggingface.co/datasets/{hub.dataset}, then log "
            "in with 'hf auth login' (or set HF_TOKEN) and run again."
        )
    elif re.search("Connect|Offline|Timeout|Transport|LocalEntryNotFound", names):
        advice = (
            "The Hugging Face hub cannot be reached. Run once with a network (and without HF_HUB_OFFLINE): the text is "
            "then cached. Or use debian-docs:<language>, file:<glob> or synthetic:<name>, which need no hub."
        )
    else:
        advice = "Check the dataset's name, its config, its revision and that it has a split 'train'."
    return f"hub:{hub.dataset} (config {hub.config}, revision {hub.revision}) could not be read. {advice} [{reason}]"
