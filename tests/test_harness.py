"""Evaluation on the tasks of lm-evaluation-harness: what the tasks are made of, what the numbers are, what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from nrlib import harness_tasks, local_tasks
from nrlib.cli import app
from nrlib.commands import evaluate as command
from nrlib.commands import extend
from nrlib.config import flat_values, make_config
from nrlib.corpora import load_corpus
from nrlib.corpora.documents import Document
from nrlib.errors import ConfigError, CorpusError
from nrlib.evaluation import bits_per_byte
from nrlib.harness import compare_on_tasks, run_tasks, standard_error
from nrlib.harness_tasks import PAPER_TASKS, check_hub, load_tasks, paper_tasks
from nrlib.local_tasks import CONTEXT_BYTES, CONTINUATION_BYTES, cloze_items, make_local_tasks
from nrlib.peft_method import NeutralResiduesConfig
from nrlib.splits import split_corpus
from nrlib.texts import held_out_documents, tokenise
from nrlib.tokenization import train_tokenizer

T = 64  # context length
SPEC, NEW_SPEC = "synthetic:aurelian?n_documents=300", "synthetic:borealic?n_documents=300"
N_BYTES = 4_000


@pytest.fixture(scope="module")
def documents():
    return held_out_documents(load_corpus(SPEC).documents, N_BYTES)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(split_corpus(load_corpus(SPEC).documents).train, 300, progress=False)


def build_model(d_model=16, vocabulary_size=300):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": d_model, "intermediate_size": 2 * d_model, "num_hidden_layers": 2}
        sizes["vocab_size"] = vocabulary_size
        config = LlamaConfig(num_attention_heads=2, initializer_range=0.3, eos_token_id=0, **sizes)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def extended():
    """An adapter whose residue is not zero."""
    model = get_peft_model(build_model(), NeutralResiduesConfig(gate="sigmoid"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def tasks():
    return load_tasks([], make_local_tasks("original", SPEC, N_BYTES))


# --- what the local tasks are made of ---------------------------------------------------------------------------------


def test_items_come_from_test_documents_only():
    corpus = load_corpus(SPEC)
    test = {document.id for document in split_corpus(corpus.documents).test}
    for task in make_local_tasks("original", SPEC, N_BYTES):
        path = Path(task["dataset_kwargs"]["data_files"]["test"])
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert rows and {row["id"] for row in rows} <= test


def test_a_cloze_item_is_the_beginning_of_a_paragraph_and_three_continuations_from_elsewhere(documents):
    paragraphs = {d.id: [" ".join(p.split()) for p in d.text.split("\n\n")] for d in documents}
    items = cloze_items(documents)
    assert len(items) > 10
    for item in items:
        truth = item["choices"][item["answer"]]
        assert any(p.startswith(item["context"] + truth) for p in paragraphs[item["id"]])
        assert len(set(item["choices"])) == 4
        for distractor in set(item["choices"]) - {truth}:
            homes = {name for name, texts in paragraphs.items() if any(distractor in text for text in texts)}
            assert homes - {item["id"]}
        lengths = [len(choice.encode()) for choice in item["choices"]]
        assert min(lengths) >= CONTINUATION_BYTES * 3 // 4 and max(lengths) <= CONTINUATION_BYTES
        assert len(item["context"].encode()) <= CONTEXT_BYTES and not item["context"].endswith(" ")
    assert {item["answer"] for item in items} == {0, 1, 2, 3}


def test_distractors_come_from_other_documents_even_where_those_are_short():
    generator = np.random.default_rng(0)
    paragraphs = [" ".join(generator.choice(["mel", "car", "dyr", "lah"], 60)) for _ in range(33)]
    long, short = (Document(str(i), "s", "\n\n".join(p), "") for i, p in enumerate((paragraphs[:30], paragraphs[30:])))
    items = cloze_items([long, short])
    true = {name: {item["choices"][item["answer"]] for item in items if item["id"] == name} for name in "01"}
    assert len(true["0"]) == 30 and len(true["1"]) == 3
    for item in items:
        assert set(item["choices"]) - {item["choices"][item["answer"]]} <= true["01".replace(item["id"], "")]


def test_the_same_text_gives_the_same_items(documents):
    assert cloze_items(documents) == cloze_items(list(documents))


def test_scripts_without_spaces_are_cut_between_characters():
    alphabet = [chr(0x3041 + index) for index in range(80)]
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(alphabet, 120)) for _ in range(6)]
    items = cloze_items([Document(str(index), "s", text, "") for index, text in enumerate(texts)])
    assert len(items) == 6
    for item in items:
        assert item["context"] + item["choices"][item["answer"]] in texts[int(item["id"])]
        assert all(len(choice) == CONTINUATION_BYTES // 3 for choice in item["choices"])


def test_items_are_made_once(monkeypatch):
    first = make_local_tasks("original", SPEC, N_BYTES)

    def again(*_arguments):
        pytest.fail("made again")

    monkeypatch.setattr(local_tasks, "cloze_items", again)
    assert make_local_tasks("original", SPEC, N_BYTES) == first
    with pytest.raises(pytest.fail.Exception, match="made again"):
        make_local_tasks("original", SPEC, N_BYTES + 1)


def test_too_little_text_is_refused():
    with pytest.raises(CorpusError, match=r"too small for a cloze.*more documents"):
        cloze_items([Document("a", "s", "word " * 100, ""), Document("b", "s", "short", "")], "file:x")
    with pytest.raises(CorpusError, match="none of them is a test document"):
        make_local_tasks("original", "synthetic:aurelian?n_documents=2", N_BYTES)


# --- what the numbers are ---------------------------------------------------------------------------------------------


def one(rows, task, metric="bits_per_byte"):
    (row,) = [row for row in rows if (row.task, row.metric) == (task, metric)]
    return row


def test_bits_per_byte_are_those_of_the_package_but_for_windows_and_ends(model, tokenizer, documents, tasks):
    ours = bits_per_byte(model, tokenise(documents, tokenizer, "text", progress=False), T)
    theirs = one(compare_on_tasks(model, tokenizer, tasks, context_length=T), "original_bits_per_byte").backbone
    assert theirs == pytest.approx(ours, rel=0.02)  # the tolerance that book/use_evaluate.md states


def test_bits_per_byte_of_a_text_in_one_window_differ_by_its_end_only(model, tokenizer, tmp_path):
    document = Document("a", "s", "mel car dyr [cydy] {{ car }}\nlah", "")
    stream = tokenise([document], tokenizer, "text", progress=False)
    assert len(stream.tokens) < T
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([stream.tokens[:-1].tolist()])).logits[0, -1]
    bits_of_end = -logits.log_softmax(-1)[stream.tokens[-1]].item() / math.log(2)
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"id": "a", "text": document.text}))
    loaded = load_tasks([], [local_tasks._task_config("text", "bits_per_byte", path, "x")])
    theirs = one(compare_on_tasks(model, tokenizer, loaded, context_length=T), "text").backbone
    assert theirs + bits_of_end / stream.n_bytes == pytest.approx(bits_per_byte(model, stream, T), rel=1e-5)


def test_a_special_token_at_the_beginning_is_not_predicted(model, tokenizer, tasks):
    """Tokenizers such as Gemma's put one before every text."""
    import copy

    from tokenizers.processors import TemplateProcessing

    prefixed = copy.deepcopy(tokenizer)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    prefixed.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end[0]} $A", special_tokens=[end])
    assert prefixed("a")["input_ids"] == [end[1], *tokenizer("a")["input_ids"]]
    plain = run_tasks(model, tokenizer, tasks, context_length=T)
    key = ("original_bits_per_byte", "bits_per_byte")
    assert run_tasks(model, prefixed, tasks, context_length=T)[key].value == plain[key].value


@pytest.mark.parametrize("n_windows", [1, 3])
def test_every_window_begins_with_the_token_that_the_tokenizer_puts_before_a_text(
    tokenizer, documents, with_bos, tmp_path, n_windows
):
    begun, model = with_bos(tokenizer), build_model(vocabulary_size=301)
    n_tokens = {d.id: len(begun(d.text, add_special_tokens=False)["input_ids"]) for d in documents}
    document = next(d for d in documents if n_tokens[d.id] % n_windows == 0)
    length = n_tokens[document.id] // n_windows
    stream = tokenise([document], begun, "text", progress=False)
    assert stream.bos_token_id == 300 == begun.bos_token_id and 300 not in stream.tokens
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"id": document.id, "text": document.text}))
    loaded = load_tasks([], [local_tasks._task_config("text", "bits_per_byte", path, "x")])
    theirs = one(compare_on_tasks(model, begun, loaded, context_length=length), "text").backbone
    with torch.no_grad():  # of the end of the text, which falls into a window of its own
        logits = model(input_ids=torch.tensor([[300]])).logits[0, -1]
    bits_of_end = -logits.log_softmax(-1)[begun.eos_token_id].item() / math.log(2)
    ours = bits_per_byte(model, stream, length)
    assert theirs + bits_of_end / stream.n_bytes == pytest.approx(ours, rel=1e-5)
    assert ours != pytest.approx(bits_per_byte(model, replace(stream, bos_token_id=None), length), rel=1e-3)


def test_the_cloze_chooses_by_log_likelihood_per_byte(model, tokenizer, documents, tasks):
    is_right = []
    for item in cloze_items(documents):
        scores = []
        for choice in item["choices"]:
            n_context = len(tokenizer(item["context"])["input_ids"])
            ids = torch.tensor([tokenizer(item["context"] + choice)["input_ids"]])
            first = max(0, ids.shape[1] - T - 1)  # what the window holds
            with torch.no_grad():
                logits = model(input_ids=ids[:, first:-1]).logits[0].log_softmax(-1)
            chosen = logits.gather(1, ids[0, first + 1 :, None])[:, 0]
            scores.append(chosen[max(0, n_context - 1 - first) :].sum().item() / len(choice.encode()))
        is_right.append(int(np.argmax(scores)) == item["answer"])
    row = one(compare_on_tasks(model, tokenizer, tasks, context_length=T), "original_cloze", "acc_bytes")
    asked = [request.arguments for request in tasks["tasks"]["original_cloze"].instances]
    assert asked == [(item["context"], choice) for item in cloze_items(documents) for choice in item["choices"]]
    assert row.n_items == len(is_right) and row.is_higher_better
    assert row.backbone == pytest.approx(np.mean(is_right))
    assert row.backbone_standard_error == pytest.approx(np.std(is_right, ddof=1) / math.sqrt(len(is_right)))


def test_the_backbone_is_the_model_with_its_adapter_off_and_differences_are_paired(model, extended, tokenizer, tasks):
    rows = compare_on_tasks(extended, tokenizer, tasks, context_length=T)
    alone = compare_on_tasks(model, tokenizer, tasks, context_length=T)
    assert [(row.task, row.metric, row.backbone) for row in rows] == [(r.task, r.metric, r.backbone) for r in alone]
    assert all(row.extended is None and row.difference_standard_error is None for row in alone)
    row = one(rows, "original_bits_per_byte")
    assert row.extended != row.backbone and not row.is_higher_better
    assert row.difference == row.extended - row.backbone
    key = ("original_bits_per_byte", "bits_per_byte")
    after = run_tasks(extended, tokenizer, tasks, context_length=T)[key]
    before = run_tasks(model, tokenizer, tasks, context_length=T)[key]
    assert row.difference_standard_error == pytest.approx(
        standard_error(after.numerators - before.numerators, before.weights)
    )
    against_itself = compare_on_tasks(model, tokenizer, tasks, context_length=T, backbone=model)
    assert one(against_itself, "original_bits_per_byte").difference_standard_error == 0


def test_the_standard_error_of_a_ratio_is_what_resampling_gives():
    generator = np.random.default_rng(0)
    weights = generator.integers(50, 500, 200).astype(float)
    numerators = weights * generator.normal(2, 0.3, 200)
    picks = generator.integers(0, 200, (4000, 200))
    resampled = (numerators[picks].sum(1) / weights[picks].sum(1)).std()
    assert standard_error(numerators, weights) == pytest.approx(resampled, rel=0.05)
    assert standard_error(numerators[:1], weights[:1]) is None


def test_a_group_with_an_average_is_one_row(model, extended, tokenizer, tmp_path):
    from lm_eval.tasks import TaskManager

    local = [*make_local_tasks("original", SPEC, N_BYTES), *make_local_tasks("new_domain", NEW_SPEC, 2 * N_BYTES)]
    clozes = [task for task in local if task["task"].endswith("cloze")]
    average = [{"metric": "acc_bytes", "weight_by_size": True}]
    path = tmp_path / "both.yaml"
    path.write_text(json.dumps({"group": "both", "task": clozes, "aggregate_metric_list": average}))
    single = compare_on_tasks(extended, tokenizer, load_tasks([], clozes), context_length=T)
    grouped = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["both"])
    (row,) = compare_on_tasks(extended, tokenizer, grouped, context_length=T)
    assert row.task == "both" and row.is_higher_better
    assert row.n_items == sum(r.n_items for r in single)
    assert row.extended == pytest.approx(sum(r.extended * r.n_items for r in single) / row.n_items)
    assert 0 < row.difference_standard_error < max(r.difference_standard_error for r in single)


def test_limit_takes_the_first_items(model, tokenizer, tasks):
    assert {row.n_items for row in compare_on_tasks(model, tokenizer, tasks, context_length=T, limit=3)} == {3}


def test_an_answer_that_is_longer_than_the_context_is_refused(model, tokenizer, tasks):
    with pytest.raises(ConfigError, match="context_length = 16 is too small: an answer of the tasks has"):
        compare_on_tasks(model, tokenizer, tasks, context_length=16)


# --- tasks by name ----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # the index of all tasks takes ten seconds and more
def test_every_task_of_the_paper_is_one_of_the_harness():
    names = paper_tasks(list(PAPER_TASKS))
    assert len(names) == len(set(names)) == 6 + 4 * (len(PAPER_TASKS) - 1)
    harness_tasks.check_task_names(names)


def test_the_papers_tasks_by_language():
    assert paper_tasks(["fr", "fr"]) == ["arc_fr", "hellaswag_fr", "m_mmlu_fr", "belebele_fra_Latn"]
    assert "commonsense_qa" in paper_tasks(["da", "en"])


@pytest.fixture
def small_index(tmp_path, monkeypatch):
    """Two tasks that stand for all of the harness's."""
    from lm_eval.tasks import TaskManager

    for name in ("hellaswag", "arc_fr"):
        task = {"task": name, "dataset_path": f"nobody/{name}", "output_type": "multiple_choice", "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(harness_tasks, "_task_manager", lambda _has_defaults: manager)


def test_an_unknown_task_is_refused_with_names_that_are_close(small_index):
    with pytest.raises(ConfigError, match=r"'helaswag' is not a task.*Did you mean hellaswag"):
        harness_tasks.check_task_names(["arc_fr", "helaswag"])


def test_data_that_cannot_be_had_is_reported_with_the_task(small_index):
    with pytest.raises(CorpusError, match=r"'arc_fr' could not be loaded.*network"):
        load_tasks(["arc_fr"])  # the hub is switched off in these tests


@pytest.fixture
def endpoint(monkeypatch):
    """Makes the hub's address one on this machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return lambda port: monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


def test_the_hub_is_asked_for_before_its_tasks_are(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        endpoint(port)
        check_hub()
    endpoint(port)  # closed now: refused at once
    start = time.monotonic()
    with pytest.raises(CorpusError, match=r"cannot be reached.*HF_HUB_OFFLINE=1.*need no network"):
        check_hub()
    assert time.monotonic() - start < 5


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["neutral_residues", "fine_tuning"])
def saved(request, small_config, tmp_path_factory):
    """What `nrlib extend --save` writes."""
    folder = tmp_path_factory.mktemp(request.param) / "extended"
    config = small_config(method=request.param, n_tokens=1024, pretraining_tokens=2048, context_length=T)
    defaults = flat_values(make_config("smoke", method=request.param))
    changes = {name: value for name, value in flat_values(config).items() if value != defaults[name]}
    extend.extend_and_report("smoke", {"method": request.param, **changes}, folder)
    return folder, config


def call(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], prog_name="nrlib")


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    return result.stderr


def test_evaluate_works_on_what_extend_saves_and_agrees_with_its_report(saved):
    folder, config = saved
    specs = ("--original", config.data.unseen_original, "--new-domain", config.data.new_domain)
    options = (*specs, "--n-evaluation-bytes", config.data.n_evaluation_bytes, "--format", "json")
    result = call("--extension", folder, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    rows = {row["task"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert set(rows) == {f"{name}_{kind}" for name in ("original", "new_domain") for kind in ("bits_per_byte", "cloze")}
    from nrlib.runs import run_or_load

    record = run_or_load(config)
    for task, name in (("original_bits_per_byte", "unseen_original"), ("new_domain_bits_per_byte", "new")):
        assert rows[task]["backbone"] == pytest.approx(record.results["backbone_bits_per_byte"][name], rel=0.02)
        assert rows[task]["extended"] == pytest.approx(record.results["bits_per_byte"][name], rel=0.02)
        assert rows[task]["difference"] != 0

    alone = call("--backbone", folder / "backbone", *options)  # with the tokenizer and the context length beside it
    assert alone.exit_code == 0, (alone.output, alone.exception)
    for row in map(json.loads, alone.stdout.splitlines()):
        assert row["backbone"] == rows[row["task"]]["backbone"] and row["extended"] is None


def test_the_table_has_a_line_for_each_task(saved):
    folder, config = saved
    result = call("--extension", folder, "--new-domain", config.data.new_domain, "--limit", 2)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["task", "metric", "items", "backbone", "extended", "difference"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["new_domain_bits_per_byte", "bits_per_byte", "↓", "2"],
        ["new_domain_cloze", "acc_bytes", "↑", "2"],
    ]
    assert all(line.count("±") == 3 for line in lines[1:])


def test_an_extension_that_does_not_fit_is_refused(saved, tokenizer, tmp_path):
    folder, config = saved
    other = tmp_path / "other"
    build_model(d_model=24).save_pretrained(other)
    tokenizer.save_pretrained(other)
    message = refused("--backbone", other, "--extension", folder, "--new-domain", config.data.new_domain)
    assert str(other) in message and str(folder) in message and "Name the backbone that was extended" in message


def test_weights_that_are_missing_are_not_replaced_by_random_ones(saved, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder, config = saved
    if not (folder / "adapter_config.json").exists():
        return  # a whole model: not PEFT's matter
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, broken / "adapter_model.safetensors")
    message = refused("--extension", broken, "--new-domain", config.data.new_domain)
    assert "does not fit the backbone" in message and "missing" in message


def test_the_context_length_is_the_users_or_that_of_training_or_the_models(saved, model, tokenizer, tmp_path):
    folder, _ = saved
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    assert command.load_subject(str(plain), None).context_length == min(2048, model.config.max_position_embeddings)
    assert command.load_subject(str(folder / "backbone"), folder).context_length == T
    assert command.load_subject(str(folder / "backbone"), folder, 32).context_length == 32
    with pytest.raises(ConfigError, match="context_length = 99999 is more than the"):
        command.load_subject(str(plain), None, 99_999)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new-domain", NEW_SPEC], "No model is named"),
        (["--backbone", "x"], "nothing to evaluate on"),
        (["--backbone", "x", "--tasks", "arc_easy", "--paper-tasks"], "Give one of the two"),
        (["--backbone", "x", "--languages", "fr"], "Add --paper-tasks"),
        (["--backbone", "x", "--paper-tasks", "--languages", "fr,xx"], "'xx' has no tasks of the paper"),
        (["--backbone", "x", "--new-domain", "nowhere:x"], "does not start with one of"),
        (["--extension", "no-such-folder", "--new-domain", NEW_SPEC], "not a folder with an adapter"),
    ],
)
def test_bad_options_are_refused_before_any_work(arguments, message, monkeypatch):
    monkeypatch.setattr(local_tasks, "load_corpus", lambda *_a, **_o: pytest.fail("work began"))
    assert message in refused(*arguments)


def test_without_the_library_the_command_says_how_to_install_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    message = refused("--backbone", "x", "--new-domain", NEW_SPEC)
    assert "pip install" in message and "evaluation" in message
