"""The studies of gates and of several languages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from sklearn.metrics import roc_auc_score

import nrlib
from nrlib.batches import TokenStream
from nrlib.config import make_config
from nrlib.errors import ConfigError
from nrlib.peft_method import active_adapters
from nrlib.profiles import ALL_METHODS
from nrlib.studies import several_languages as languages_module
from nrlib.studies.gates import (
    area_under_curve,
    gate_activity,
    gates_by_document,
    read_documents,
    read_gates,
)
from nrlib.studies.inference_cost import WITHOUT_COST, inference_cost
from nrlib.studies.language_identifier import count_log_odds, language_identifier, switched
from nrlib.studies.several_languages import WAYS, _stack_adapter, _with_earlier, several_languages
from nrlib.studies.training_cost import LivingTensors, training_cost
from nrlib.texts import PreparedText
from nrlib.training import train

LANGUAGES = ["synthetic:borealic", "synthetic:cinnabar"]


@pytest.mark.parametrize("seed", range(3))
def test_the_area_under_the_curve_is_scikit_learns_ties_included(seed):
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.randint(-3, 3, (40,), generator=generator), torch.randint(-5, 5, (30,), generator=generator)
    truth = [0] * 40 + [1] * 30
    assert area_under_curve(old.float(), new.float()) == pytest.approx(
        roc_auc_score(truth, torch.cat([old, new]).abs())
    )


def test_reading_gates_sees_every_token_once_and_leaves_no_hook(tiny_model):
    options = nrlib.NeutralResiduesConfig(extra_ratio=0.2, gate="relu", gate_memory=1)
    model = get_peft_model(tiny_model(), options).eval()
    stream = TokenStream(torch.randint(0, 60, (101,)).numpy().astype("int32"), 300)
    read = read_gates(model, stream, 20)
    assert sorted(read) == [0, 1, 2]
    assert all(gates.shape == (100,) and (gates >= 0).all() for gates, _ in read.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_documents_are_read_one_by_one_and_cut_at_a_context(tiny_model):
    options = nrlib.NeutralResiduesConfig(extra_ratio=0.2, gate="relu", gate_memory=4)
    model = get_peft_model(tiny_model(), options).eval()
    documents = [torch.randint(1, 60, (length,)).numpy().astype("int32") for length in (7, 30, 5, 0, 12)]
    parts = [part for document in documents for part in (np.zeros(1, dtype="int32"), document)]
    stream = TokenStream(np.concatenate([*parts, np.zeros(1, dtype="int32")]), 300)
    with torch.no_grad():
        read = read_documents(model, stream, 20)
        alone = read_documents(model, TokenStream(np.concatenate([[0], documents[2], [0]]), 300), 20)
        begun = read_documents(model, replace(stream, bos_token_id=63), 20)
        from_63 = read_documents(model, TokenStream(np.concatenate([[63], documents[2], [63]]), 300), 20)
    assert [gates.shape for gates in read] == [(3, 7), (3, 19), (3, 5), (3, 12)]  # the empty one has nothing to read
    assert torch.equal(read[2], alone[0])
    assert torch.equal(begun[2], from_63[0]) and not torch.equal(begun[2], read[2])
    assert len(read_documents(model, stream, 20, n_documents=2)) == 2
    assert not any(module._forward_hooks for module in model.base_model.model.model.layers.modules())


@pytest.mark.slow
def test_gates_tell_documents_apart_the_better_the_more_they_read():
    study = gates_by_document("smoke", "relu", 1, "l1", 5.0, 0)
    by_token = {int(n): areas["mean"] for n, areas in study["auc_by_token"].items()}
    assert list(by_token)[:3] == [1, 2, 4] and set(study["auc_by_token"]["1"]) == {"0", "1", "mean"}
    assert by_token[max(by_token)] > 0.95 and by_token[max(by_token)] >= by_token[1]
    assert study["auc"] > 0.95 and all(0 < len(values) <= 200 for values in study["documents"].values())


@pytest.mark.slow
def test_gates_of_a_trained_model_tell_the_languages_apart():
    study = gate_activity("smoke", "relu", 1, "l1", 5.0, 0)
    assert [row["layer"] for row in study["rows"]] == [0, 1]
    assert all(row["auc"] > 0.8 and row["zero_old"] > row["zero_new"] for row in study["rows"])
    switched = study["switched"]
    assert len(switched["tokens"]) == len(switched["language"]) == len(switched["gates"]["0"]) == 96


@pytest.mark.slow
def test_ways_of_learning_two_languages_agree_on_their_first_step():
    """One adapter and an adapter each are the same thing as long as there is one language."""
    after, each = (several_languages("smoke", LANGUAGES, way, "neutral_residues", 0)["stages"] for way in WAYS[:3:2])
    assert [stage["stage"] for stage in after] == [stage["stage"] for stage in each] == ["backbone", *LANGUAGES]
    assert after[:2] == each[:2] and after[2] != each[2]
    # the second language is learned in both, the first is not lost, the original hardly moves
    for stages in (after, each):
        backbone, first, second = stages
        assert second[LANGUAGES[1]] < 0.9 * backbone[LANGUAGES[1]]
        assert second[LANGUAGES[0]] < 0.9 * backbone[LANGUAGES[0]]
        assert second["original"] < 1.05 * backbone["original"] < 1.05 * first["original"] * 1.05


@pytest.mark.slow
def test_replay_in_turn_keeps_the_first_language_in_a_fine_tuned_model():
    without, replayed = (several_languages("smoke", LANGUAGES, way, "fine_tuning", 0)["stages"] for way in WAYS[::3])
    assert without[:2] == replayed[:2]
    assert replayed[2][LANGUAGES[0]] < 0.8 * without[2][LANGUAGES[0]]


@pytest.mark.slow
def test_the_first_adapters_stay_as_they_are_and_the_new_ones_get_the_whole_local_loss(monkeypatch):
    seen = []

    def watch(model, batches, config, *, local_loss_weight, **options):
        train(model, batches, config, local_loss_weight=local_loss_weight, **options)
        seen.append((local_loss_weight, {n: p.clone() for n, p in model.named_parameters() if ".default." in n}))

    monkeypatch.setattr(languages_module, "train", watch)
    several_languages("smoke", LANGUAGES, WAYS[3], "neutral_residues", 0)
    (first, before), (second, after) = seen
    assert second == 2 * first > 0  # the local loss is a mean over the adapters, and one of two is trained
    assert before and all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_for_one_more_language_change_nothing_at_first_and_are_alone_trained(tiny_model):
    model = get_peft_model(tiny_model(), nrlib.NeutralResiduesConfig(extra_ratio=0.2)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        before = model(tokens).logits
        _stack_adapter(model, make_config("smoke", new_domain="synthetic:cinnabar"))
        torch.testing.assert_close(model(tokens).logits, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".synthetic_cinnabar." in name for name in trained)
    assert len(active_adapters(model)) == 2 * 3


def test_replay_gives_each_earlier_language_the_share_of_the_old_one():
    streams = [TokenStream(torch.full((700,), i).numpy().astype("int32"), 2100) for i in range(3)]
    new, first, second = (PreparedText(None, stream, stream, stream, {}, {}) for stream in streams)
    mixed = _with_earlier(new, [first, second], 0.1).new
    shares = torch.bincount(torch.from_numpy(mixed.tokens)) / len(mixed.tokens) * 0.9  # a tenth is the old language's
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.1, 0.1], dtype=shares.dtype))
    assert mixed.n_bytes == round(2100 * 9 / 7)
    assert _with_earlier(new, [], 0.1) is new
    begun = [PreparedText(None, s, s, s, {}, {}) for s in (replace(s, bos_token_id=5) for s in streams)]
    assert _with_earlier(begun[0], begun[1:], 0.1).new.bos_token_id == 5
    short = PreparedText(None, streams[1], streams[1], TokenStream(streams[1].tokens[:30], 90), {}, {})
    assert (_with_earlier(new, [short], 0.2).new.tokens == 1).mean() == pytest.approx(0.25, abs=1e-3)  # read again
    with pytest.raises(ConfigError, match="leaves nothing for the new one"):
        _with_earlier(new, [first], 0.5)


@pytest.mark.parametrize(("way", "method"), [("at random", "neutral_residues"), ("an adapter each", "fine_tuning")])
def test_a_way_that_is_not_possible_is_said_before_anything_is_trained(way, method):
    with pytest.raises(ConfigError, match="is not possible"):
        several_languages("smoke", LANGUAGES, way, method, 0)


def test_the_cost_of_every_method_is_a_ratio_to_the_backbone():
    ratios = inference_cost("smoke", 0.2, n_rounds=2)["ratios"]
    assert list(ratios) == list(ALL_METHODS) and all(ratio > 0 for ratio in ratios.values())
    assert all(ratios[method] == 1 for method in WITHOUT_COST)


def test_the_memory_of_a_method_is_what_it_trains_and_what_it_remembers():
    cost = training_cost("smoke", 0.2, n_rounds=2)
    assert all(list(cost[name]) == list(ALL_METHODS) for name in ("ratios", "memory", "kept"))
    assert cost["ratios"]["fine_tuning"] == cost["memory"]["fine_tuning"] == 1
    kept = cost["kept"]  # weights, two moments of Adam, and a copy of the backbone or two
    assert kept["fine_tuning"] == pytest.approx(3, abs=0.1) == kept["weight_interpolation"]
    assert kept["distillation"] - kept["fine_tuning"] == pytest.approx(1, abs=0.05)
    assert kept["elastic_weight_consolidation"] - kept["fine_tuning"] == pytest.approx(2, abs=0.05)
    assert all(1.4 < kept[method] < 1.8 for method in ("lora", "vanilla_adapter", "neutral_residues", "gated_lora"))


def test_living_tensors_are_counted_until_they_are_freed():
    with LivingTensors() as tensors:
        first = torch.ones(100)
        view = first[:50]
        assert tensors.alive == 400
        second = first + 1
        del second
        assert (tensors.alive, tensors.peak) == (400, 800)
        del first
        assert tensors.alive == 400 and view.numel() == 50  # the view keeps the memory
        del view
        assert (tensors.alive, tensors.peak) == (0, 800)


def test_the_identifier_counts_tokens():
    new, original = (TokenStream(np.array(tokens, dtype="int32"), 9) for tokens in ([1, 1, 2], [0, 1]))
    expected = np.log(np.array([1 / 6, 3 / 6, 2 / 6]) / np.array([2 / 5, 2 / 5, 1 / 5]))
    np.testing.assert_allclose(count_log_odds(new, original, 3), expected, rtol=1e-6)


@pytest.mark.parametrize("has_adapters", [True, False])
def test_the_extension_is_on_only_where_the_last_tokens_look_new(tiny_model, has_adapters):
    backbone = tiny_model().eval()
    if has_adapters:
        options = nrlib.NeutralResiduesConfig(extra_ratio=0.2, gate="none", local_loss="none")
        model = get_peft_model(tiny_model(), options).eval()
        for adapter in active_adapters(model):
            torch.nn.init.normal_(adapter.output_projection.weight, std=0.1)
    else:
        torch.manual_seed(1)
        model = tiny_model().eval()
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    log_odds = torch.where(torch.arange(60) < 30, -1.0, 1.0)
    old, new = torch.arange(8)[None], torch.arange(40, 48)[None]
    tokens = torch.cat([old, new], dim=1)
    with torch.no_grad():
        alone, before = model(input_ids=tokens).logits, backbone(input_ids=tokens).logits
        with switched(model, backbone, log_odds, memory=2) as (reader, shares):
            logits = reader(input_ids=tokens, use_cache=False).logits
            whole = reader(input_ids=new, use_cache=False).logits
        assert shares[0].tolist() == [False] * 9 + [True] * 7  # the first new token leaves a doubt
        torch.testing.assert_close(logits[:, :9], before[:, :9])
        assert not torch.allclose(logits[:, 9:], before[:, 9:], atol=1e-3)
        torch.testing.assert_close(whole, model(input_ids=new).logits)
        if not has_adapters:
            torch.testing.assert_close(logits[:, 9:], alone[:, 9:])
        torch.testing.assert_close(model(input_ids=tokens).logits, alone)  # no hook is left


def test_without_a_memory_nothing_is_switched(tiny_model):
    model = tiny_model()
    with switched(model, tiny_model(), torch.zeros(60), memory=0) as (reader, _):
        assert reader is model


def test_the_identifier_takes_methods_that_are_the_same_on_every_token():
    with pytest.raises(ConfigError, match="vanilla_adapter, fine_tuning"):
        language_identifier("smoke", LANGUAGES[0], "neutral_residues", [1], 0)
