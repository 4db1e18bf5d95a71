"""Bad input: one paragraph that names the value, what is allowed and what to do, before any work is done."""

from __future__ import annotations

import errno
import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from nrlib import runs, storage, texts
from nrlib import sweep as sweeping
from nrlib.backbone import check_is_causal, checkpoint_hooks, load_backbone
from nrlib.config import make_config
from nrlib.errors import BackboneError, ConfigError, CorpusError, MemoryShortageError, NrlibError, StorageError
from nrlib.machine import explained_shortage
from nrlib.runs import run_or_load
from nrlib.storage import atomic_directory, atomic_path, cache_directory
from nrlib.sweep import sweep
from nrlib.texts import prepare_text
from nrlib.training import TrainingState


def refuse(*_, **__):
    raise AssertionError("work was done before the mistake was found")


@pytest.fixture
def no_work(monkeypatch):
    """From here on, reading a corpus, training anything or loading a backbone's weights fails the test."""
    for module in (runs, sweeping):
        monkeypatch.setattr(module, "prepare_text", refuse)
        monkeypatch.setattr(module, "get_backbone", refuse)
    monkeypatch.setattr(texts, "load_corpus", refuse)
    monkeypatch.setattr(runs, "train", refuse)


def entrances(config):
    """The two ways to ask for runs."""
    return (lambda: run_or_load(config, progress=False)), (lambda: sweep([config], n_workers=1, progress=False))


def check(error, expected, words):
    message = str(error)
    assert isinstance(error, expected) and isinstance(error, NrlibError)
    assert "\n" not in message and len(message) < 1000
    assert all(word in message for word in words), message


CASES = [
    # in the configuration itself
    ({"mix_ratio": 1.5}, ConfigError, ("mix_ratio = 1.5", "between 0 and 1")),
    ({"mix_ratio": -0.1}, ConfigError, ("mix_ratio = -0.1", "between 0 and 1")),
    ({"mix_ratio": float("nan")}, ConfigError, ("mix_ratio = nan", "between 0 and 1")),
    ({"learning_rate": float("nan")}, ConfigError, ("learning_rate = nan", "between 0 and 10")),
    ({"local_loss_weight": float("inf")}, ConfigError, ("local_loss_weight = inf",)),
    ({"local_loss_weight": -1.0}, ConfigError, ("local_loss_weight = -1.0", "at least 0")),
    ({"gate": "tanh"}, ConfigError, ("gate = 'tanh'", "none, sigmoid, relu, elu")),
    ({"position": "before"}, ConfigError, ("position = 'before'", "parallel, serial")),
    ({"site": "mlp"}, ConfigError, ("site = 'mlp'", "ffn, attention")),
    ({"layers": "some"}, ConfigError, ("layers = 'some'", "all, first_half, last_half, every_other", "0,2,3")),
    ({"layers": "-1"}, ConfigError, ("layers = '-1'", "first_half")),
    ({"layers": ""}, ConfigError, ("layers = ''", "first_half")),
    ({"layers": "²"}, ConfigError, ("layers = '²'", "first_half")),
    ({"method": "finetuning"}, ConfigError, ("finetuning", "fine_tuning, lora, vanilla_adapter, neutral_residues")),
    ({"method": ["lora"]}, ConfigError, ("method = ['lora']",)),
    ({"local_loss": "l2"}, ConfigError, ("local_loss = 'l2'", "none, l1, domain_cross_entropy")),
    ({"precision": "float16"}, ConfigError, ("precision = 'float16'", "auto, float32, bfloat16")),
    ({"mix_ration": 0.1}, ConfigError, ("mix_ration is not a parameter", "Did you mean mix_ratio?")),
    ({"lr": 0.1}, ConfigError, ("lr is not a parameter", "learning_rate")),
    ({"n_tokens": 1e5}, ConfigError, ("n_tokens = 100000.0", "float", "must be int")),
    ({"batch_size": True}, ConfigError, ("batch_size = True", "bool")),
    ({"seed": -1}, ConfigError, ("seed = -1", "at least 0")),
    ({"extra_ratio": -0.2}, ConfigError, ("extra_ratio = -0.2", "between 0 and 10")),
    ({"proxy": ""}, ConfigError, ("mix_ratio = 0.1", "proxy is empty", "set mix_ratio = 0")),
    ({"method": "lora", "gate": "relu"}, ConfigError, ("gate = 'relu'", "'lora'", "Leave gate out")),
    # seen by looking at the corpora's names, and at a model without weights
    ({"new_domain": "wikipedia:fr"}, CorpusError, ("wikipedia:fr", "synthetic", "debian-docs", "file", "hub")),
    ({"original": "debian-docs:xx"}, CorpusError, ("xx", "fr")),
    ({"proxy": "file:/no/such/*.txt"}, CorpusError, ("/no/such/*.txt",)),
    ({"unseen_original": "synthetic:"}, CorpusError, ("synthetic:",)),
    ({"layers": "0,2"}, ConfigError, ("names layer 2", "2 layers", "0 to 1", "every_other")),
    ({"layers": "1,1"}, ConfigError, ("'1,1'", "twice")),
    ({"extra_ratio": 1e-4}, ConfigError, ("extra_ratio = 0.0001", "less than one unit of width", "Give at least")),
    ({"extra_ratio": 0.0}, ConfigError, ("extra_ratio = 0", "Give at least")),
    ({"extra_ratio": 1e-4, "method": "lora"}, ConfigError, ("extra_ratio = 0.0001", "rank 1", "Give at least")),
    ({"gate": "none", "local_loss": "domain_cross_entropy"}, ConfigError, ("gate = 'none'", "'sigmoid'")),
    ({"n_tokens": 100}, ConfigError, ("n_tokens = 100", "one batch", "1024")),
    ({"n_heads": 3}, ConfigError, ("n_heads = 3", "d_model = 32")),
    ({"d_model": 30}, ConfigError, ("n_heads = 2", "d_model = 30")),
    ({"backbone_name": "/no/such/folder"}, BackboneError, ("/no/such/folder", "save_pretrained")),
    ({"backbone_name": "no-such/model"}, BackboneError, ("no-such/model", "cannot be reached", "HF_HUB_OFFLINE", "local folder")),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected", "words"), CASES, ids=[str(case[0]) for case in CASES])
def test_a_mistake_is_found_before_any_work(changes, expected, words, no_work):
    for index in range(2):
        with pytest.raises(NrlibError) as caught:
            entrances(make_config("smoke", **changes))[index]()
        check(caught.value, expected, words)


def test_an_unknown_profile():
    with pytest.raises(ConfigError) as caught:
        make_config("laptpo")
    check(caught.value, ConfigError, ("laptpo", "smoke, laptop, gpu, paper"))


@pytest.fixture(scope="module")
def bidirectional(tmp_path_factory):
    """Folders with models that see the future: a masked one and an encoder-decoder."""
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("models")
    bert = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    BertForMaskedLM(bert).save_pretrained(folder / "bert")
    t5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("name", ["bert", "t5", "empty"])
@pytest.mark.parametrize("changes", [{}, {"site": "attention"}, {"method": "lora"}, {"method": "fine_tuning"}], ids=str)
def test_a_backbone_that_is_not_causal(name, changes, bidirectional, no_work):
    path = str(bidirectional / name)
    with pytest.raises(BackboneError) as caught:
        run_or_load(make_config("smoke", backbone_name=path, **changes), progress=False)
    check(caught.value, BackboneError, (path, "causal"))


def test_causality_is_measured_whatever_a_model_calls_itself(bidirectional, tiny_model):
    from transformers import BertForMaskedLM

    with pytest.raises(BackboneError, match="tokens after it"):
        check_is_causal(BertForMaskedLM.from_pretrained(bidirectional / "bert"), "a model")
    with pytest.raises(BackboneError, match="bert"):
        load_backbone(str(bidirectional / "bert"))
    for family in ("llama", "gpt2", "gemma2", "gpt_neox", "mixtral"):
        check_is_causal(tiny_model(family), family)


def test_a_corpus_too_small_for_one_batch_is_found_before_the_backbone_is_trained(small_config, monkeypatch):
    for module in (runs, sweeping):
        monkeypatch.setattr(module, "get_backbone", refuse)
    monkeypatch.setattr(runs, "train", refuse)
    config = small_config(batch_size=20_000, n_tokens=20_000 * 32)
    for enter in entrances(config):
        with pytest.raises(CorpusError) as caught:
            enter()
        check(caught.value, CorpusError, ("borealic", "too small", "20000", "lower batch_size"))


@pytest.mark.parametrize("n_documents", [100])
def test_a_vocabulary_larger_than_the_text(n_documents, small_config, monkeypatch):
    monkeypatch.setattr(runs, "get_backbone", refuse)
    with pytest.raises(CorpusError) as caught:
        run_or_load(small_config(vocabulary_size=50_000), progress=False)
    check(caught.value, CorpusError, ("50000", "vocabulary_size"))


# --- a backbone's surroundings and texts that must stay apart -----------------------------------------------------------


def test_a_backbone_without_a_tokenizer_or_with_too_few_positions(tiny_model, tmp_path, no_work):
    tiny_model("gpt2").save_pretrained(tmp_path)
    config = make_config("smoke", backbone_name=str(tmp_path))
    with pytest.raises(BackboneError) as caught:
        run_or_load(config, progress=False)
    check(caught.value, BackboneError, (str(tmp_path), "tokenizer", "save_pretrained"))
    with pytest.raises(ConfigError) as caught:
        run_or_load(make_config("smoke", backbone_name=str(tmp_path), context_length=129), progress=False)
    check(caught.value, ConfigError, ("context_length = 129", "128 positions"))


def write_texts(folder, *texts):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return f"file:{folder}/*.txt"


def test_one_id_for_two_texts_of_the_original_domain(small_config, tmp_path):
    old, held_out = write_texts(tmp_path / "old", "one", "two"), write_texts(tmp_path / "held_out", "three", "four")
    with pytest.raises(CorpusError) as caught:
        run_or_load(small_config(proxy=old, unseen_original=held_out), progress=False)
    check(caught.value, CorpusError, ("'0.txt'", old, held_out, "other names"))


def test_a_proxy_that_holds_the_text_forgetting_is_measured_on(small_config):
    with pytest.raises(CorpusError) as caught:
        run_or_load(small_config(proxy="synthetic:aurelian?n_documents=150"), progress=False)
    check(caught.value, CorpusError, ("share", "outside the proxy", "synthetic:aurelian/manual"))


# --- a full disk ------------------------------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_text(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_full_disk_while_renaming(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(StorageError) as caught:
        write_text(tmp_path / "a.json", "new")
    check(caught.value, StorageError, (str(tmp_path / "a.json"), "No space left", "Free some space"))
    with pytest.raises(StorageError), atomic_directory(tmp_path / "c") as folder:
        (folder / "part").write_text("text")
    monkeypatch.undo()
    assert left_in(tmp_path) == ["a.json", "b"] and "old" in (tmp_path / "a.json").read_text()


# What writers of other languages raise instead of an OSError: safetensors and tokenizers (Rust), torch's archive (C++).
FOREIGN = [
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    Exception("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), *FOREIGN], ids=["os", "torch", "rust"]
)
def test_a_full_disk_while_a_library_writes(error, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: storage.shutil._ntuple_diskusage(10**9, 10**9, 0))
    for context in (atomic_path, atomic_directory):
        with pytest.raises(StorageError) as caught, context(tmp_path / "model") as path:
            (path / "part" if path.is_dir() else path).write_text("half")
            raise error
        check(caught.value, StorageError, (str(tmp_path / "model"),))
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("context", [atomic_path, atomic_directory])
def test_another_error_while_writing_stays_what_it_is_and_leaves_nothing(context, tmp_path):
    for error in (
        KeyError("a"),
        KeyboardInterrupt(),
        FileNotFoundError(errno.ENOENT, "no such file"),
        RuntimeError("b"),
    ):
        with pytest.raises(type(error)) as caught, context(tmp_path / "model") as path:
            (path / "part" if path.is_dir() else path).write_text("half")
            raise error
        assert caught.value is error and left_in(tmp_path) == []


@pytest.fixture
def full_device(monkeypatch):
    """Every file that is written atomically goes to a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    def temporary_file(dir, prefix, suffix):
        path = Path(dir) / f"{prefix}full{suffix}"
        path.symlink_to("/dev/full")
        return os.open(os.devnull, os.O_RDONLY), str(path)

    monkeypatch.setattr(storage.tempfile, "mkstemp", temporary_file)


def test_a_checkpoint_a_record_and_tokens_on_a_full_disk(full_device, tmp_path, monkeypatch):
    monkeypatch.setenv("NRLIB_CACHE", str(tmp_path))
    with pytest.raises(StorageError):
        checkpoint_hooks("run").save({"weights": {"w": torch.zeros(100_000)}})
    with pytest.raises(StorageError):
        write_text(tmp_path / "record.json", "b" * 100_000)
    with pytest.raises(StorageError), atomic_path(tmp_path / "tokens.npy") as path, open(path, "wb") as handle:
        np.save(handle, np.zeros(100_000))
    assert left_in(tmp_path) == ["checkpoints"]


def test_a_run_whose_record_cannot_be_written_can_be_made_again(small_config, monkeypatch):
    config = small_config(seed=51)
    runs.prepare_text(config.data, config.backbone, False)
    runs.get_backbone(config, runs.prepare_text(config.data, config.backbone, False), False)
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(StorageError, match="run the same command again"):
        run_or_load(config, progress=False)
    assert not list((cache_directory() / "records").glob(f"*{config.run_id}*"))
    monkeypatch.undo()
    assert run_or_load(config, progress=False).run_config == config


# --- too little memory ------------------------------------------------------------------------------------------------


def ask_for_too_much():
    torch.empty(2**60, dtype=torch.uint8)  # more than any machine has: the allocator itself says so


def raise_on_an_accelerator():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore words.")


def raise_memory_error():
    raise MemoryError


@pytest.mark.parametrize("fill", [ask_for_too_much, raise_on_an_accelerator, raise_memory_error])
def test_out_of_memory_in_training_says_what_to_lower(fill, small_config, monkeypatch):
    held = []

    def train(*_, **__):
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        fill()

    monkeypatch.setattr(runs, "train", train)
    with pytest.raises(MemoryShortageError) as caught:
        run_or_load(small_config(seed=52, accumulation_steps=2), progress=False)
    words = ("batch_size = 4", "accumulation_steps", "context_length = 32", "extra_ratio", "in 2 part(s)")
    check(caught.value, MemoryShortageError, words)
    assert held[0]() is None  # nothing keeps the memory while the error is kept


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("place", ["bits_per_byte", "evaluate", "drift"])
def test_out_of_memory_in_an_evaluation_says_what_helps_there(place, is_trained, small_config, monkeypatch):
    monkeypatch.setattr(runs, "_BACKBONE_METRICS", {})
    monkeypatch.setattr(runs, place, lambda *_, **__: raise_on_an_accelerator())
    if is_trained:  # after the training, not during it
        monkeypatch.setattr(runs, "train", lambda *_, **__: TrainingState(seconds=1.0))
    with pytest.raises(MemoryShortageError) as caught:
        run_or_load(small_config(seed=53), progress=False)
    check(caught.value, MemoryShortageError, ("context_length = 32", "measured", "Tried to allocate"))
    assert "give a larger" not in str(caught.value)  # accumulation is no help, and the training's words are not added


def test_memory_too_small_to_measure_in_is_found_out_before_the_training(small_config, monkeypatch):
    monkeypatch.setattr(runs, "_BACKBONE_METRICS", {})
    monkeypatch.setattr(runs, "bits_per_byte", lambda *_, **__: raise_on_an_accelerator())
    monkeypatch.setattr(runs, "train", refuse)
    with pytest.raises(MemoryShortageError):
        run_or_load(small_config(seed=53), progress=False)


def test_other_errors_in_training_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes") as caught, explained_shortage(4, 32):
        raise RuntimeError("shapes cannot be multiplied")
    assert not isinstance(caught.value, NrlibError)


def test_a_test_text_of_a_few_bytes_is_accepted_with_a_warning(small_config, tmp_path):
    lines = [json.dumps({"id": f"page {n}", "text": f"page {n} says {n * n} and {n**3}, no more"}) for n in range(300)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = small_config(new_domain=f"file:{tmp_path}/few.jsonl", n_evaluation_bytes=5_000)
    with pytest.warns(UserWarning, match=r"test text of new has \d+ bytes in \d+ documents"):
        prepare_text(config.data, config.backbone, progress=False)
