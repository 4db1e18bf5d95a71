"""Associative memory: the data, the transformer whose memories can be read, and what an extension does to each of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from nrlib.companions import associative_memory_extension as extending
from nrlib.companions import associative_memory_readings as readings
from nrlib.companions.associative_memory import (
    MemoryTransformer,
    behaviour,
    probe,
    stored_table,
    table_divergence,
    table_entropy,
    train,
)
from nrlib.companions.associative_memory_bigrams import (
    BigramLanguage,
    count_language,
    make_language,
    sample,
    with_other_rows,
)
from nrlib.companions.associative_memory_birth import birth, by_variant, findings, first_step
from nrlib.errors import ConfigError
from nrlib.study import published_studies


def seeded_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- languages and sequences ------------------------------------------------------------------------------------------

HALF = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("unigram", "bigram", "triggers", "message"),
    [
        (torch.ones(1), torch.ones(1, 1), (0,), "needs two tokens or more, and this one has 1"),
        (HALF[0], torch.tensor([[0.5, 0.5], [float("nan"), 1.0]]), (0,), "bigram holds 1 values that are no prob"),
        (HALF[0], torch.tensor([[1.5, -0.5], [0.5, 0.5]]), (0,), "bigram holds 1 values that are no prob"),
        (HALF[0], torch.tensor([[0.5, 0.4], [0.5, 0.5]]), (0,), r"adds up to 0\.9"),
        (HALF[0], torch.full((3, 3), 1 / 3), (0,), r"bigram has shape \(3, 3\).*must have shape \(2, 2\)"),
        (HALF[0], HALF, (2,), "different tokens from 0 to 1"),
        (HALF[0], HALF, (0, 0), "different tokens"),
        (HALF[0], HALF, (), "one or more"),
    ],
)
def test_a_table_that_is_no_language_is_refused(unigram, bigram, triggers, message):
    with pytest.raises(ConfigError, match=message):
        BigramLanguage(unigram, bigram, triggers)


def test_a_language_is_counted_from_a_text():
    language = count_language([0, 1, 0, 2, 0, 1], n_triggers=1)
    assert language.unigram.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert language.bigram[0].tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert language.bigram[2].tolist() == [1, 0, 0]
    assert language.triggers == (0,)
    assert count_language([0, 1, 2]).bigram[2].tolist() == pytest.approx([1 / 3] * 3)  # nothing follows: the unigram
    for text in ([], [0, 0, 0]):
        with pytest.raises(ConfigError, match="two tokens or more"):
            count_language(text)
    with pytest.raises(ConfigError, match="the token -1; allowed are whole numbers from 0"):
        count_language([0, -1, 2])


def test_a_language_keeps_to_its_tokens_and_leads_with_its_triggers():
    language = make_language(12, 3, used=range(2, 8), triggers=(5, 2))
    assert language.tokens.tolist() == list(range(2, 8))
    assert language.unigram.argsort(descending=True)[:2].tolist() == [5, 2]
    assert language.outputs[2:8].tolist() == pytest.approx([1 / 6] * 6)
    assert set(sample(language, 20, 30, seeded_generator()).targets.unique().tolist()) <= set(range(2, 8))
    with pytest.raises(ConfigError, match="outside 0 to 11"):
        make_language(12, 0, used=[3, 12])
    for n_tokens in (0, 1):
        with pytest.raises(ConfigError, match="two tokens or more"):
            make_language(n_tokens, 0)


@pytest.mark.parametrize("has_fixed_triggers", [True, False])
def test_after_a_trigger_comes_the_same_output_and_after_all_else_the_table(has_fixed_triggers):
    language = make_language(8, 1, n_triggers=2)
    drawn = sample(language, 400, 40, seeded_generator(), has_fixed_triggers=has_fixed_triggers)
    assert torch.equal(drawn.inputs[:, 1:], drawn.targets[:, :-1])
    if has_fixed_triggers:
        assert torch.equal(drawn.occurrence > 0, torch.isin(drawn.inputs, torch.tensor(language.triggers)))
    counts = torch.zeros(8, 8)
    outputs = []
    for row, (inputs, targets, occurrence) in enumerate(
        zip(drawn.inputs.tolist(), drawn.targets.tolist(), drawn.occurrence.tolist(), strict=True)
    ):
        seen, output = {}, {}
        for current, following, number in zip(inputs, targets, occurrence, strict=True):
            if number:
                seen[current] = seen.get(current, 0) + 1
                assert number == seen[current]
                assert output.setdefault(current, following) == following
            else:
                counts[current, following] += 1
        assert len(output) <= 2 and (not has_fixed_triggers or set(output) <= set(language.triggers)), row
        outputs += output.values()
    plain = [v for v in range(8) if counts[v].sum() > 500]
    assert len(plain) >= 3
    frequencies = counts[plain] / counts[plain].sum(1, keepdim=True)
    assert (frequencies - language.bigram[plain]).abs().max() < 0.05
    assert torch.bincount(torch.tensor(outputs), minlength=8).min() > 0.05 * len(outputs)  # uniform over the vocabulary
    assert drawn.is_in_context.any() and (drawn.occurrence[drawn.is_in_context] >= 2).all()


def test_a_proxy_has_the_given_share_of_other_rows():
    language, other = make_language(20, 0), make_language(20, 1)
    is_kept = (with_other_rows(language, other, 0.25, seed=4).bigram == language.bigram).all(1)
    assert int(is_kept.sum()) == 15


# --- the model and its memories ---------------------------------------------------------------------------------------


def test_the_forward_pass_by_hand():
    model = MemoryTransformer(6, 8, 5, has_feed_forward=True, seed=2)
    tokens = torch.tensor([[3, 1, 3, 0]])
    x = model.embedding[tokens[0]] + model.position[:4]
    for layer in range(2):
        mixed = []
        for t in range(4):
            scores = torch.stack([x[t] @ model.keys[layer] @ x[s] / 8**0.5 for s in range(t + 1)])
            mixed.append((scores.softmax(0)[:, None] * x[: t + 1]).sum(0))
        x = x + torch.stack([model.outputs[layer] @ (model.values[layer] @ m) for m in mixed])
    x = x + torch.stack([model.feed_forward @ row for row in x])
    torch.testing.assert_close(model(tokens)[0], x @ model.unembedding.T)
    later = torch.tensor([[3, 1, 3, 5]])
    assert torch.equal(model(tokens)[0, :3], model(later)[0, :3])  # nothing looks ahead


def test_the_gradient_is_a_sum_of_outer_products():
    """Of W_F, after one token x: (p - 1{y}) taken through the output embeddings, times x."""
    model = MemoryTransformer(6, 8, 5, n_layers=1, has_feed_forward=True)
    model.requires_grad_(False)
    model.outputs[0].zero_()  # so that the feed-forward matrix reads E[z] + P[0] itself
    model.feed_forward.requires_grad_(True)
    logits = model(torch.tensor([[4]]))[0]
    F.cross_entropy(logits, torch.tensor([2])).backward()
    error = logits.softmax(-1)[0] - F.one_hot(torch.tensor(2), 6)
    expected = torch.outer(error @ model.unembedding, model.embedding[4] + model.position[0])
    torch.testing.assert_close(model.feed_forward.grad, expected)


@pytest.fixture(scope="module")
def by_hand():
    """A model whose memories are written as the sums of outer products of the paper, none of it trained."""
    language = make_language(24, 0, n_triggers=3)
    model = MemoryTransformer(24, 256, 32, has_feed_forward=True)
    with torch.no_grad():
        E, P, U = model.embedding, model.position, model.unembedding
        model.keys[0].copy_(0.02 * P[1:].T @ P[:-1])
        triggers = list(language.triggers)
        model.keys[1].copy_(0.1 * E[triggers].T @ model.remap(E, 0)[triggers])
        model.outputs[1].copy_(2 * U.T @ (E @ model.values[1].T))
        model.feed_forward.zero_()
    return model, language


def test_memories_written_by_hand_are_read_and_solve_the_task(by_hand):
    model, language = by_hand
    found = probe(model, language)
    assert found["output"] == found["key_1"] == found["key_2"] == 1.0
    assert min(found[f"{name}_strength"] for name in ("output", "key_1", "key_2")) > 3
    seen = behaviour(model, sample(language, 100, 32, seeded_generator()))
    assert seen["in_context_accuracy"] > 0.9
    assert seen["previous_attention"] > 0.9 and seen["induction_attention"] > 0.9


@pytest.mark.parametrize("name", ["keys.0", "keys.1", "outputs.1"])
def test_each_probe_reads_its_own_matrix(by_hand, name):
    model, language = copy.deepcopy(by_hand[0]), by_hand[1]
    with torch.no_grad():
        dict(model.named_parameters())[name].normal_(generator=seeded_generator())
    found = probe(model, language)
    part = next(part for part, matrix in readings.PARTS.items() if matrix == name)
    assert found[part] <= 0.34
    assert all(found[other] == 1.0 for other in ("output", "key_1", "key_2") if other != part)


def test_the_table_in_the_feed_forward_matrix(by_hand):
    model, language = copy.deepcopy(by_hand[0]), by_hand[1]
    uniform = torch.full((24, 24), 1 / 24)
    torch.testing.assert_close(stored_table(model).exp(), uniform)  # an empty W_F
    empty = probe(model, language)["feed_forward"]
    expected = (language.bigram * (language.bigram * 24).log()).sum(1).mean()
    assert empty == pytest.approx(float(expected), abs=1e-4)
    log_table = language.bigram.clamp(min=1e-6).log().float()
    with torch.no_grad():  # U W_F E = log table, solved
        model.feed_forward.copy_(
            torch.linalg.pinv(model.unembedding) @ log_table.T @ torch.linalg.pinv(model.embedding).T
        )
    assert probe(model, language)["feed_forward"] < 1e-3
    with pytest.raises(ConfigError, match="no feed-forward matrix"):
        stored_table(MemoryTransformer(4, 8, 5))


def test_zeros_of_a_table_count_nothing():
    table = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert table_divergence(torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]])), table).tolist() == pytest.approx(
        [0.6931, 0.1438], abs=1e-4
    )


def test_training_changes_only_the_memories_and_refuses_what_it_does_not_know():
    language, model = make_language(10, 0, n_triggers=2), MemoryTransformer(10, 16, 12, has_feed_forward=True)
    before = copy.deepcopy(model.state_dict())
    generator = seeded_generator()
    found = train(
        model, lambda: sample(language, 8, 12, generator), 3, 0.1, loss_on="all", measure_at=(0, 3), measure=dict
    )
    assert [point["step"] for point in found] == [0, 3]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"keys.0", "keys.1", "outputs.1", "feed_forward"}
    with pytest.raises(ConfigError, match="loss_on = 'bigrams'"):
        train(model, lambda: sample(language, 8, 12, generator), 1, 0.1, loss_on="bigrams")
    with pytest.raises(FloatingPointError, match="smaller learning_rate"):
        train(model, lambda: sample(language, 8, 12, generator), 20, 1e6, loss_on="all")


# --- the extension ----------------------------------------------------------------------------------------------------

SMALL = {key: value for key, value in extending.SMOKE.items() if key != "n_evaluation"}


@pytest.fixture(scope="module")
def backbone():
    return extending.make_backbone(0, SMALL["n_pretraining_steps"], SMALL["d_model"], SMALL["context_length"])


def test_methods_start_at_the_backbone_and_train_what_they_should(backbone):
    tokens = sample(extending.languages(0)[1], 4, SMALL["context_length"], seeded_generator()).inputs
    n_backbone = sum(t.numel() for t in backbone.state_dict().values())
    for method in extending.METHODS:
        model = extending.apply_method(backbone, method, seed=0)
        assert torch.equal(model(tokens), backbone(tokens))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if method in ("backbone", "fine_tuning"):
            assert trained == set(readings.PARTS.values())
        else:
            assert trained and all(name.startswith("adapters.") for name in trained)
            n_extra = sum(t.numel() for t in model.state_dict().values()) - n_backbone
            assert 0.18 * n_backbone < n_extra <= 0.2 * n_backbone + 2 * SMALL["d_model"] + 2  # the gates come on top
    with pytest.raises(ConfigError, match="method = 'lora' is not allowed"):
        extending.apply_method(backbone, "lora", seed=0)
    with pytest.raises(ConfigError, match="does not pay"):
        extending.apply_method(backbone, "vanilla_adapter", seed=0, extra_ratio=1e-4)


@pytest.fixture(scope="module")
def extended():
    """Results of the smallest profile, one seed and rate, by method."""
    settings = extending.search_settings("smoke", [0.01], 5.0, 0.1, seed=0)
    settings = extending.best_settings(settings, [{**s, "loss_new_validation": 0.0} for s in settings], [0])
    return {s["method"]: {**s, **extending.extension(**s), "seconds": 0.0, "device": "cpu"} for s in settings}


def test_only_fine_tuning_changes_matrices(extended):
    for method, row in extended.items():
        assert set(row["change"]) == set(readings.PARTS)
        assert all((value > 0.1) == (method == "fine_tuning") for value in row["change"].values())
        assert method == "fine_tuning" or set(row["change"].values()) == {0.0}
        assert method == "fine_tuning" or row["stored"] == extended["backbone"]["stored"]
    assert set(extended["fine_tuning"]["restored"]) == set(readings.PARTS)
    assert set(extended["neutral_residues"]["restored"]) == {"adapter_1", "adapter_2"}
    assert extended["backbone"]["restored"] == extended["backbone"]["match"] == {}
    assert extended["backbone"]["drift"] == 0.0


def test_neutral_residues_leave_the_old_table_alone_in_seconds(extended):
    table = extending.results_table(list(extended.values())).set_index("method")
    assert table.loc["fine_tuning", "learning"] == 1.0
    forgetting = table["forgetting"]
    assert forgetting["neutral_residues"] < 0.2 * min(forgetting["fine_tuning"], forgetting["vanilla_adapter"])
    assert table.loc["neutral_residues", "learning"] > 0.4
    assert (
        extended["neutral_residues"]["residue"]["old"]["adapter_2_shared"]
        < 0.6 * (extended["neutral_residues"]["residue"]["new"]["adapter_2_shared"])
    )


def test_putting_everything_back_is_the_backbone(backbone):
    _, new, proxy = extending.languages(0)
    batch = sample(new, 16, SMALL["context_length"], seeded_generator(1))
    for method, n_parts in (("fine_tuning", 4), ("neutral_residues", 2)):
        model = extending.apply_method(backbone, method, seed=0)
        extending.extend(
            model, new, proxy, seeded_generator(), learning_rate=0.01, local_loss_weight=float(n_parts == 2),
            mix_ratio=0.1, n_steps=3, batch_size=8,
        )  # fmt: skip
        assert readings.drift(model, backbone, batch) > 0
        for _ in range(n_parts):  # one after the other; a part that is back is not yielded again, an adapter is empty
            parts = dict(readings.restored(model, backbone))
            model = next(m for m in parts.values() if readings.drift(m, model, batch) > 0)
        assert readings.drift(model, backbone, batch) == pytest.approx(0, abs=1e-6)


def test_scores_of_a_match_add_up(backbone):
    """With an adapter that doubles the stream of layer 1, scores are fourfold: the residue's part is thrice the stream's."""

    class Copy(torch.nn.Module):
        def forward(self, x):
            return x

    model = copy.deepcopy(backbone)
    model.adapters = torch.nn.ModuleList([Copy(), Copy()])
    batch = sample(extending.languages(0)[1], 32, SMALL["context_length"], seeded_generator(3))
    found = readings.match_scores(model, batch)
    for name in ("old", "new"):
        assert found[f"{name}_trigger_residue"] == pytest.approx(3 * found[f"{name}_trigger_stream"], rel=1e-3)
    assert found["old_trigger_stream"] > found["new_trigger_stream"]  # the head knows the old triggers
    sizes = readings.residues(model, batch)
    assert set(sizes) == {f"adapter_{layer}_{group}" for layer in (1, 2) for group in ("shared", "new")}


def test_the_best_rate_is_that_of_the_lowest_validation_loss():
    settings = extending.search_settings("smoke", [0.1, 0.2], 7.0, 0.3, seed=4)
    losses = {"fine_tuning": (2.0, 1.0), "vanilla_adapter": (1.0, 2.0), "neutral_residues": (3.0, 1.0)}
    rows = [{**s, "loss_new_validation": losses[s["method"]][s["learning_rate"] == 0.2]} for s in settings]
    chosen = extending.best_settings(settings, rows, [4, 5])
    rates = {(s["seed"], s["method"]): s["learning_rate"] for s in chosen}
    assert len(chosen) == 8 and rates[5, "fine_tuning"] == rates[4, "neutral_residues"] == 0.2
    assert rates[5, "vanilla_adapter"] == 0.1
    assert {s["local_loss_weight"] for s in chosen if s["method"] == "neutral_residues"} == {7.0}
    assert {s["local_loss_weight"] for s in chosen if s["method"] != "neutral_residues"} == {0.0}


# --- the thresholds ---------------------------------------------------------------------------------------------------


IN_SMALL = {"n_tokens": 32, "d_model": 64, "context_length": 32}


def check_birth(row, accuracy_one_layer=0.45, accuracy_at_50=0.35):
    assert row["accuracy"] > 0.95 and row["accuracy_one_layer"] < accuracy_one_layer
    assert row["previous_attention"] > 0.5
    assert row["output_from"] < row["key_2_from"] < row["key_1_from"] < float("inf")
    assert row["excess_at_50"] < 0.6 and row["accuracy_at_50"] < accuracy_at_50


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_memories_come_in_order_in_a_small_model(seed):
    found = birth(seed=seed, n_steps=80, **IN_SMALL)
    curve = found["curve"]
    output, key_2, key_1 = (first_step(curve, f"{name}_strength", 1) for name in ("output", "key_2", "key_1"))
    assert output < key_2 < key_1 < float("inf")
    assert first_step(curve, "output", 2) == float("inf")
    assert curve["step"] == list(range(0, 81, 5)) and len(found["attentions"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_birth_of_the_memories_trained_here_in_small(seed):
    """All claims but the order in right answers, which is not the same at this size."""
    settings: list[dict[str, object]] = [{}, {"n_layers": 1}, {"loss_on": "all", "n_steps": 50}]  # about step 50
    rows = [
        {"seed": seed, "n_layers": 2, "loss_on": "in_context", **s, **birth(seed=seed, **IN_SMALL, **s)}
        for s in settings
    ]
    check_birth(findings(rows).iloc[0], accuracy_one_layer=0.5, accuracy_at_50=0.45)


@pytest.fixture(scope="module")
def published(published_results):
    return published_studies(birth), published_studies(extending.extension)


def test_birth_of_the_memories_published(published):
    births, _ = published
    found = findings(births)
    assert len(found) >= 3
    for _, row in found.iterrows():
        check_birth(row)
        assert row["key_2_right_from"] < row["output_right_from"] < float("inf")  # the other order, in right answers
    for row in by_variant(births)["two_layers"]:
        assert first_step(row["curve"], "key_1", 0.75) > found["output_right_from"].max()  # last in both
        assert row["curve"]["output"][-1] == row["curve"]["key_2"][-1] == 1.0
        assert row["curve"]["key_1"][-1] > 0.5 and row["curve"]["previous_attention"][0] < 0.1


def test_the_entropy_is_the_floor(published):
    language = make_language(16, 0, n_triggers=2)
    batch = sample(language, 2000, 20, seeded_generator())
    rows = batch.inputs[batch.occurrence == 0]
    drawn = -language.bigram[rows, batch.targets[batch.occurrence == 0]].log().mean().item()
    assert table_entropy(language, batch) == pytest.approx(drawn, abs=0.03)
    for row in by_variant(published[0])["all_tokens"]:
        assert row["curve"]["bigram_loss"][-1] > row["entropy"]


@pytest.fixture(scope="module")
def extensions(published):
    """By seed and method the published runs at each method's best rate."""
    _, rows = published
    best: dict[str, float] = {}
    for method in extending.METHODS:
        searched = [row for row in rows if row["method"] == method and row["seed"] == 0]
        best[method] = min(searched, key=lambda row: row["loss_new_validation"])["learning_rate"]
    return {(row["seed"], row["method"]): row for row in rows if row["learning_rate"] == best[row["method"]]}


def test_what_each_method_leaves_of_the_old_language(extensions):
    table = extending.results_table(list(extensions.values())).set_index(["seed", "method"])
    seeds = {seed for seed, _ in extensions}
    assert len(seeds) >= 3
    for seed in seeds:
        forgetting, learning = table.loc[seed, "forgetting"], table.loc[seed, "learning"]
        assert forgetting["fine_tuning"] > 0.1 and forgetting["vanilla_adapter"] > 0.05
        assert forgetting["neutral_residues"] < 0.02 and learning["neutral_residues"] > 0.85
        backbone, ours = extensions[seed, "backbone"], extensions[seed, "neutral_residues"]
        assert ours["divergence_old"] < backbone["divergence_old"] + 0.05
        for method in ("fine_tuning", "vanilla_adapter"):  # the table goes, the induction head stays
            row = extensions[seed, method]
            assert row["divergence_old"] > 2.5 * backbone["divergence_old"]
            assert row["in_context_accuracy_old"] > backbone["in_context_accuracy_old"] - 0.03
        residue = ours["residue"]
        assert residue["old"]["adapter_2_shared"] < 0.1 * residue["new"]["adapter_2_shared"]  # after the same tokens


def test_which_matrices_fine_tuning_needs(extensions):
    for row in (row for (_, method), row in extensions.items() if method == "fine_tuning"):
        change = {
            part: {text: losses[text] - row[f"loss_{text}"] for text in ("old", "new")}
            for part, losses in row["restored"].items()
        }
        assert max(abs(v) for v in change["key_1"].values()) < 0.1  # moved far, to no effect
        assert 0.8 < min(row["change"].values()) <= max(row["change"].values()) < 1.3
        forgotten = row["loss_old"] - row["loss_old_backbone"]
        assert all(change[part]["old"] > -0.5 * forgotten for part in change)  # no single matrix brings it back
        assert all(change[part]["new"] > 0.5 for part in ("key_2", "output", "feed_forward"))
        assert change["output"]["old"] > 0.2


def test_the_induction_head_is_reused(extensions):
    for (_, method), row in extensions.items():
        reuse = row["reuse"]
        cases = [value for name, value in reuse.items() if "_trigger_" in name]
        if method == "backbone":
            assert reuse["old_trigger_old_output"] > 0.9 and sorted(cases)[-2] < 0.2
            continue
        assert min(cases) > (0.6 if method == "neutral_residues" else 0.9)
        assert reuse["old_trigger_old_output"] > 0.99 and reuse["old_trigger_new_output"] > 0.98
        assert max(reuse["without_key_1"], reuse["without_key_2"], reuse["without_output"]) < 0.5
        if method != "fine_tuning":
            match = row["match"]
            assert match["old_trigger_stream"] > 2 and abs(match["new_trigger_stream"]) < 1
            assert match["new_trigger_residue"] > 4 * abs(match["old_trigger_residue"])
