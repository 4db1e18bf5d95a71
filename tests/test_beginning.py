"""Backbones whose tokenizer puts a token of its own before every text are trained and measured with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import SMALL

from nrlib import runs
from nrlib.backbone import build_backbone
from nrlib.config import make_config
from nrlib.corpora import load_corpus
from nrlib.records import load_record, save_record
from nrlib.runs import run_or_load
from nrlib.splits import split_corpus
from nrlib.storage import cache_directory
from nrlib.texts import prepare_text, tokenise
from nrlib.tokenization import beginning_token, load_tokenizer, train_tokenizer

OWN_SHAPE = {"d_model", "n_layers", "n_heads", "ffn_width", "vocabulary_size", "pretraining_tokens"}


@pytest.fixture(scope="module")
def documents():
    return split_corpus(load_corpus(SMALL["original"]).documents).train[:20]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(split_corpus(load_corpus(SMALL["original"]).documents).train, 300, progress=False)


@pytest.fixture(scope="module")
def named_config(small_config, tokenizer, with_bos, tmp_path_factory):
    """`named_config(has_bos)`: a run on an untrained backbone loaded by name."""

    def make(has_bos):
        folder = tmp_path_factory.mktemp("backbone")
        chosen = with_bos(tokenizer) if has_bos else tokenizer
        build_backbone(small_config(), len(chosen), chosen.eos_token_id).save_pretrained(folder)
        chosen.save_pretrained(folder)
        settings = {name: value for name, value in SMALL.items() if name not in OWN_SHAPE}
        return make_config("smoke", **settings, backbone_name=str(folder))

    return make


def test_which_tokenizers_begin_a_text(tokenizer, with_bos, tmp_path):
    begun = with_bos(tokenizer)
    assert beginning_token(begun) == begun.bos_token_id == 300 and beginning_token(tokenizer) is None
    begun.save_pretrained(tmp_path)
    assert beginning_token(load_tokenizer(tmp_path)) == 300
    begun.backend_tokenizer.post_processor = (
        tokenizer.backend_tokenizer.post_processor
    )  # it has one and does not use it
    assert beginning_token(begun) is None
    begun = with_bos(tokenizer)
    begun.eos_token = "<bos>"  # GPT-2 and OPT have one token for both: it stands between documents anyway
    assert beginning_token(begun) is None


def test_a_cached_text_is_not_reused_without_its_beginning(documents, tokenizer, with_bos):
    begun = with_bos(tokenizer)
    plain = tokenise(documents, tokenizer, "text", progress=False)
    first = tokenise(documents, begun, "text", progress=False)
    n_files = len(list((cache_directory() / "tokens").glob("*.npy")))
    again = tokenise(documents, begun, "text", progress=False)
    assert len(list((cache_directory() / "tokens").glob("*.npy"))) == n_files
    assert plain.bos_token_id is None and first.bos_token_id == again.bos_token_id == 300
    assert (first.tokens == plain.tokens).all() and first.n_bytes == plain.n_bytes


def test_a_run_on_such_a_backbone_trains_and_measures_with_it(named_config, monkeypatch):
    config, seen = named_config(has_bos=True), []
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, x: seen.append(x) or forward(self, x))
    monkeypatch.setattr("nrlib.backbone.check_is_causal", lambda *_: None)  # it makes up tokens of its own
    record = run_or_load(config, progress=False)
    assert len(seen) > 40 and all((tokens[:, 0] == 300).all() for tokens in seen)
    assert not any((tokens[:, 1:] == 300).any() for tokens in seen)
    assert record.provenance["bos_token_id"] == 300
    monkeypatch.setattr(runs, "run_and_keep", lambda *_, **__: pytest.fail("trained again"))
    assert run_or_load(config, progress=False) == record


@pytest.mark.parametrize("has_bos", [True, False])
def test_a_record_and_a_checkpoint_from_before_are_used_only_where_nothing_changed(named_config, has_bos, monkeypatch):
    config = named_config(has_bos)
    record = run_or_load(config, progress=False)
    old = {key: value for key, value in record.provenance.items() if key != "bos_token_id"}
    save_record(replace(record, provenance=old))
    assert (runs.stored_record(config) is None) == has_bos
    if has_bos:
        assert run_or_load(config, progress=False).provenance["bos_token_id"] == 300
        assert load_record(config).provenance["bos_token_id"] == 300

    made_from = []
    monkeypatch.setattr(runs, "checkpoint_hooks", lambda name, text, **_: made_from.append(text))
    monkeypatch.setattr(runs, "train", lambda *_, **__: None)
    text = prepare_text(config.data, config.backbone, False)
    before = replace(text, new=replace(text.new, bos_token_id=None))
    for prepared in (text, before):
        runs.extend(config, prepared, runs.get_backbone(config, prepared, False), progress=False)
    assert (made_from[0] != made_from[1]) == has_bos
