"""Corpora: every kind of spec gives documents, and everything that can be wrong with one is said in one paragraph."""

from __future__ import annotations

import hashlib
import json
import sys
import types

import pytest

from nrlib.corpora import check_spec, hub_datasets, load_corpus, parse_spec
from nrlib.corpora.documents import Document
from nrlib.errors import CorpusError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("NRLIB_CACHE", str(folder))
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path, *records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def texts(spec):
    return {document.id: document.text for document in load_corpus(spec, progress=False).documents}


# --- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "wikipedia", "files:a.txt", "Synthetic:a", ":a", "file:", "hub:"])
def test_a_spec_of_no_kind_names_the_four_kinds(spec):
    for function in (parse_spec, check_spec, load_corpus):
        with pytest.raises(CorpusError) as caught:
            function(spec)
        message = str(caught.value)
        assert (
            all(kind in message for kind in ("synthetic:", "debian-docs:", "file:", "hub:")) and f"'{spec}'" in message
        )


def test_a_spec_is_cut_at_the_first_colon():
    assert parse_spec(" hub:owner/name:config@v1#20 ") == ("hub", "owner/name:config@v1#20")


def test_synthetic():
    corpus = load_corpus("synthetic:aurelian/plain?n_documents=3")
    assert [document.source for document in corpus.documents] == ["plain"] * 3
    assert 0.5 < corpus.entropy_floor < 1.5
    assert corpus.n_bytes == sum(len(document.text) for document in corpus.documents)
    with pytest.raises(CorpusError, match="plain"):
        check_spec("synthetic:aurelian/novel")


def test_debian_docs_are_checked_without_a_download():
    check_spec("debian-docs:fr/manpages")
    for wrong in ("xx", "fr/novels"):
        with pytest.raises(CorpusError, match=f"debian-docs:{wrong}"):
            check_spec(f"debian-docs:{wrong}")


def test_debian_docs_are_handed_on(monkeypatch):
    calls = []
    documents = [Document("ls.1", "manpages", "text", "GPL")]
    recipes = types.ModuleType("nrlib.corpora.debian_docs")
    recipes.load_debian_docs = lambda rest, progress: (
        calls.append((rest, progress)) or (documents, {"manpages": "6.03"})
    )
    recipes._parse = lambda rest: calls.append(rest)
    monkeypatch.setitem(sys.modules, "nrlib.corpora.debian_docs", recipes)
    corpus = load_corpus("debian-docs:fr/manpages+gnome", progress=False)
    check_spec("debian-docs:fr/manpages")
    assert calls == [("fr/manpages+gnome", False), "fr/manpages"]
    assert corpus.documents == tuple(documents) and corpus.versions == {"manpages": "6.03"}
    assert corpus.entropy_floor is None


def test_fingerprint_covers_ids_and_texts_and_nothing_else(tmp_path):
    def fingerprint(folder, *records):
        write_jsonl(tmp_path / folder / "x.jsonl", *records)
        return load_corpus(f"file:{tmp_path}/{folder}/x.jsonl").fingerprint

    first = fingerprint("a", {"id": "1", "text": "é"}, {"id": "2", "text": "two"})
    assert first == hashlib.sha256('["1","é"]["2","two"]'.encode()).hexdigest()
    assert first == fingerprint("b", {"id": 1, "text": "é", "other": 0}, {"id": "2", "text": "two\r\n"})
    assert first != fingerprint("c", {"id": "1", "text": "é"}, {"id": "2", "text": "Two"})
    assert first != fingerprint("d", {"id": "1", "text": "é"}, {"id": "3", "text": "two"})


# --- file: ------------------------------------------------------------------------------------------------------------


def test_text_files_are_one_document_each_named_the_same_in_every_folder(tmp_path):
    for language in ("en", "fr"):
        write(tmp_path / language / "sub" / "b.txt", f"\ufeffb {language}\r\n\r\nnext\r\n")
        write(tmp_path / language / "a.txt", f"a {language}")
        expected = {"a.txt": f"a {language}", "sub/b.txt": f"b {language}\n\nnext"}
        assert texts(f"file:{tmp_path}/{language}/**/*.txt") == expected
        assert list(expected) == list(texts(f"file:{tmp_path}/{language}/**/*.txt"))
    assert texts(f"file:{tmp_path}/*/a.txt") == {"en/a.txt": "a en", "fr/a.txt": "a fr"}
    assert texts(f"file:{tmp_path}/fr/a.txt") == {"a.txt": "a fr"}
    sources = [document.source for document in load_corpus(f"file:{tmp_path}/fr/**/*.txt").documents]
    assert sources == ["fr", "sub"]


def test_json_lines_keep_their_ids_or_are_named_by_their_text(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", {"id": "one", "text": "1"}, {"id": 2, "text": "2"}, {"text": "3"}, {"text": " "})
    write(tmp_path / "y.jsonl", '\n{"text": "3"}\n\n{"text": null}')
    corpus = load_corpus(f"file:{tmp_path}/*.jsonl")
    by_text = "text-" + hashlib.sha256(b"3").hexdigest()[:16]
    assert [(d.id, d.text, d.source) for d in corpus.documents] == [
        ("one", "1", "x"),
        ("2", "2", "x"),
        (by_text, "3", "x"),
    ]
    assert corpus.versions == {"n_files": "2", "empty_rows_left_out": "2", "repeated_rows_left_out": "1"}


def test_parquet(tmp_path):
    write_parquet(tmp_path / "x.parquet", {"text": ["one", "zwei\n\ndrei", None], "id": [7, 8, 9], "other": [0, 0, 0]})
    assert texts(f"file:{tmp_path}/x.parquet") == {"7": "one", "8": "zwei\n\ndrei"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\n", "no text"),
        ("a.txt", b"caf\xc3\xa9 caf\xe9", r"a\.txt is not valid UTF-8: byte 0xe9 at offset 9\b"),
        ("a.txt", "utf-16".encode("utf-16-le") + b"\xff", "offset 12"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', "0xff at offset 26"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": ', r"a\.jsonl, line 3 is not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "one"}\n{"body": "two", "x": 1}\n',
            r"line 2 has no field 'text'; found \['body', 'x'\]",
        ),
        ("a.jsonl", b'["text"]\n', "line 1 has no field 'text'; found a list"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: 'text' is int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1.*surrogate"),
        ("a.jsonl", b'{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n', "line 2: the id '1' stands for two"),
        ("a.parquet", b"PAR1 not", r"a\.parquet is not a Parquet file"),
        ("a.csv", b"text\n", r"a\.csv, which nrlib cannot read.*\.txt"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(CorpusError, match=message) as caught:
        load_corpus(f"file:{tmp_path}/a.*")
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"body": ["x"], "title": ["y"]})
    with pytest.raises(CorpusError, match="no column 'text'; it has body, title"):
        load_corpus(f"file:{tmp_path}/a.parquet")


def test_globs_that_match_nothing_are_found_before_anything_is_read(tmp_path):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "empty" / "b.txt", "")
    check_spec(f"file:{tmp_path}/*.txt")
    for pattern, message in (("*.text", "matches no file"), ("", "It is a folder: write"), ("empty/*", "is empty")):
        with pytest.raises(CorpusError, match=message):
            check_spec(f"file:{tmp_path}/{pattern}")


# --- hub: -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stand-ins for the packages behind the hub: `hub.rows` is the dataset, `hub.error` what asking for it raises."""
    state = types.SimpleNamespace(rows=[], error=None, calls=[])

    class HfApi:
        def dataset_info(self, name, revision, timeout):
            if state.error:
                raise state.error
            return types.SimpleNamespace(sha=f"commit-of-{revision}")

    def load_dataset(name, config, **options):
        state.calls.append((name, config, options))
        return iter(state.rows)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __version__="stand-in")
    )
    monkeypatch.setattr(hub_datasets, "is_reachable", lambda: True)
    return state


def test_a_local_folder_through_the_real_package_and_from_the_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "train.parquet", {"id": ["a", "b", "c"], "text": ["one", "two", "three"]})
    first = load_corpus(f"hub:{folder}#2", progress=False)
    assert [(d.id, d.text) for d in first.documents] == [("a", "one"), ("b", "two")]
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import would fail: the second time is offline
    assert load_corpus(f"hub:{folder}#2", progress=False) == first
    with pytest.raises(CorpusError, match="pip install datasets"):
        load_corpus(f"hub:{folder}#3", progress=False)


def test_the_revision_is_pinned_and_recorded(hub):
    hub.rows = [{"text": "one", "url": ""}, {"text": "two", "url": ""}]
    corpus = load_corpus("hub:owner/name:fra_Latn@v2", progress=False)
    options = {"split": "train", "streaming": True, "revision": "commit-of-v2"}
    assert hub.calls == [("owner/name", "fra_Latn", options)]
    assert corpus.versions == {"datasets": "stand-in", "hub:owner/name": "commit-of-v2"}
    assert {document.source for document in corpus.documents} == {"fra_Latn"}


def test_a_second_run_needs_no_network_and_other_specs_share_nothing(hub):
    hub.rows = [{"text": "one"}]
    first = load_corpus("hub:owner/name", progress=False)
    hub.error = ConnectionError("no network")
    assert load_corpus("hub:owner/name", progress=False) == first
    for other in ("hub:owner/name:config", "hub:owner/name@v1", "hub:owner/name#5", "hub:other/name"):
        with pytest.raises(CorpusError, match="cannot be reached"):
            load_corpus(other, progress=False)


@pytest.mark.parametrize(("limit", "n_documents"), [("#3", 3), ("#1MB", 4), ("#2MB", 7), ("", 10)])
def test_the_stream_is_left_at_the_limit(hub, limit, n_documents):
    def rows():
        for number in range(10):
            yield {"text": f"{number}" + 150_000 * "é"}
        if limit:
            raise AssertionError("read past the limit")

    hub.rows = rows()
    assert len(load_corpus(f"hub:owner/name{limit}", progress=False).documents) == n_documents


def test_a_stream_that_breaks_leaves_nothing_in_the_cache(hub, cache):
    def rows():
        yield {"text": "one"}
        raise TimeoutError("gone")

    hub.rows = rows()
    with pytest.raises(CorpusError, match="cannot be reached"):
        load_corpus("hub:owner/name", progress=False)
    assert list((cache / "hub").iterdir()) == []
    hub.rows = [{"text": "one"}]
    assert len(load_corpus("hub:owner/name", progress=False).documents) == 1


def test_a_local_folder_that_changed_is_read_again(hub, tmp_path):
    write(tmp_path / "data" / "a.jsonl", "1")
    hub.rows = [{"text": "old"}]
    assert list(texts(f"hub:{tmp_path}/data").values()) == ["old"]
    write(tmp_path / "data" / "a.jsonl", "22")
    hub.rows = [{"text": "new"}]
    assert list(texts(f"hub:{tmp_path}/data").values()) == ["new"]


class GatedRepoError(Exception):
    """Named like the class the hub raises, which differs from version to version."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("403"), "gated: accept its conditions at https://huggingface.co/datasets/owner/name.*login"),
        (ValueError("Dataset is a gated dataset on the Hub."), "gated"),
        (ConnectionError("no network"), "cannot be reached.*debian-docs"),
        (ValueError("BuilderConfig 'x' not found.\nsecond line"), r"Check the dataset's name.*'x' not found\.\]$"),
    ],
)
def test_why_the_hub_gave_nothing(hub, error, message):
    hub.error = error
    with pytest.raises(CorpusError, match=message):
        load_corpus("hub:owner/name", progress=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "x", "url": "y"}], "no column 'text'; it has body, url"),
        ([{"text": " "}], "no text"),
        ([], "no text"),
    ],
)
def test_datasets_without_text(hub, rows, message):
    hub.rows = rows
    with pytest.raises(CorpusError, match=message):
        load_corpus("hub:owner/name", progress=False)


def test_hub_specs():
    spec = hub_datasets.parse_hub("owner/name:2023.fr@abc#20000")
    assert (spec.dataset, spec.config, spec.revision, spec.limit) == ("owner/name", "2023.fr", "abc", "20000")
    assert hub_datasets.parse_hub("name").limit == "200MB"
    for wrong in ("a/b/c", "a b", "a/b#0", "a/b#5GB", "a/b:", "a/b@", "a/b#5@v1", "./nowhere"):
        with pytest.raises(CorpusError, match="hub:"):
            check_spec(f"hub:{wrong}")
