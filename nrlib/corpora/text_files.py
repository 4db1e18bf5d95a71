"""The user's own text: .txt, .jsonl and .parquet files, each record checked and named in messages."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CorpusError
from .documents import Document

SUFFIXES = (".txt", ".jsonl", ".parquet")


class Row(NamedTuple):
    """A record of a file or a dataset before it is a document."""

    where: str  # for messages, e.g. "notes.jsonl, line 3"
    id: Any
    text: Any
    source: str


def documents_from_rows(rows: Iterable[Row], licence: str) -> tuple[list[Document], dict[str, str]]:
    """Check rows and name those that have no id by a hash of their text, so that equal texts share a split."""
    documents: dict[str, Document] = {}
    n_empty = n_repeated = 0
    for row in rows:
        if row.text is not None and not isinstance(row.text, str):
            raise CorpusError(f"{row.where}: 'text' is {type(row.text).__name__}, it must be a string.")
        text = (row.text or "").replace("\r\n", "\n").strip()
        if not text:
            n_empty += 1
            continue
        try:
            name = "text-" + hashlib.sha256(text.encode()).hexdigest()[:16] if row.id is None else str(row.id)
            text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{row.where}: the text holds half a surrogate pair and is no valid Unicode.") from error
        document = Document(name, row.source, text, licence)
        if documents.setdefault(name, document).text != text:
            raise CorpusError(
                f"{row.where}: the id '{name}' stands for two different texts. Make ids unique, or leave the field "
                "'id' out: documents are then named by a hash of their text."
            )
        n_repeated += documents[name] is not document
    left_out = {"empty_rows_left_out": n_empty, "repeated_rows_left_out": n_repeated}
    return list(documents.values()), {name: str(count) for name, count in left_out.items() if count}


def match_files(pattern: str) -> list[tuple[str, Path]]:
    """Files of a glob with their ids: the path from the first wildcard on, the same wherever the folder stands."""
    expanded = Path(pattern).expanduser()
    parts = expanded.parts
    n_fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    base = Path(*parts[:n_fixed])
    paths = [Path(name) for name in glob.glob(str(expanded), recursive=True) if Path(name).is_file()]
    wrong = [path for path in paths if path.suffix not in SUFFIXES]
    if not paths or wrong:
        hint = f" It is a folder: write file:{pattern}/*.txt." if expanded.is_dir() else ""
        problem = (
            f"matches {wrong[0]}, which nrlib cannot read" if wrong else f"matches no file (looked in {Path.cwd()})"
        )
        raise CorpusError(
            f"file:{pattern} {problem}.{hint} Give a glob of .txt files (one document a file), .jsonl files (field "
            "'text', optionally 'id') or .parquet files (column 'text', optionally 'id')."
        )
    for path in paths:
        if path.stat().st_size == 0:
            raise CorpusError(f"{path} is empty. Remove it or choose a glob that leaves it out.")
    return sorted((path.relative_to(base).as_posix(), path) for path in paths)


def load_files(pattern: str) -> tuple[list[Document], dict[str, str]]:
    files = match_files(pattern)
    rows = (row for name, path in files for row in READERS[path.suffix](name, path))
    documents, versions = documents_from_rows(rows, "as given by the user")
    if not documents:
        raise CorpusError(f"file:{pattern} holds {len(files)} files and no text: every record is blank.")
    return documents, {"n_files": str(len(files)), **versions}


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff" if offset == 0 else "")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not valid UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}. Save it as "
            f"UTF-8 (for example iconv -f latin1 -t utf-8 {path.name} > fixed{path.suffix}) and run again."
        ) from error


def _read_txt(name: str, path: Path) -> Iterator[Row]:
    yield Row(str(path), name, _decode(path.read_bytes(), path), path.resolve().parent.name)


def _read_jsonl(name: str, path: Path) -> Iterator[Row]:
    offset = 0
    with open(path, "rb") as lines:
        for number, data in enumerate(lines, start=1):
            where, line = f"{path}, line {number}", _decode(data, path, offset)
            offset += len(data)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{where} is not valid JSON: {error}. Each line must be one JSON object.") from error
            if not isinstance(record, dict) or "text" not in record:
                found = sorted(record) if isinstance(record, dict) else f"a {type(record).__name__}"
                raise CorpusError(f"{where} has no field 'text'; found {found}. Each line must be an object with one.")
            yield Row(where, record.get("id"), record["text"], path.stem)


def _read_parquet(name: str, path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # slow to import, and only needed here

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{path} is not a Parquet file: {error}.") from error
    if "text" not in table.schema_arrow.names:
        raise CorpusError(f"{path} has no column 'text'; it has {', '.join(table.schema_arrow.names)}. Rename one.")
    columns = [column for column in ("id", "text") if column in table.schema_arrow.names]
    number = 0
    for batch in table.iter_batches(columns=columns):
        for record in batch.to_pylist():
            number += 1
            yield Row(f"{path}, row {number}", record.get("id"), record["text"], path.stem)


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
