"""Short vectors: the formulas by hand, what is refused, the thresholds, paired paragraphs and hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score

from nrlib.companions.joint_reduction import (
    JointReduction,
    count_words,
    learn_vocabulary,
    mean_average_precision,
    power_normalise,
    same_object_precision,
    similarities,
)
from nrlib.companions.joint_reduction_images import SOURCES, image_search, image_searches, image_table
from nrlib.companions.joint_reduction_search import ParagraphIndex, paragraph_search, reciprocal_ranks, search_table
from nrlib.companions.joint_reduction_text import (
    aligned_pairs,
    encode,
    hidden_states,
    mean_states,
    parallel_paragraphs,
    token_histogram,
)
from nrlib.corpora.documents import Document
from nrlib.errors import ConfigError, CorpusError
from nrlib.study import published_studies


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# --- the parts --------------------------------------------------------------------------------------------------------


def test_words_are_counted_object_by_object():
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vocabulary = learn_vocabulary(np.repeat(centres, 50, axis=0) + 0.1 * draw(150, 2), 3, seed=3)
    found = [int(vocabulary.predict(centre[None])[0]) for centre in centres]
    assert sorted(found) == [0, 1, 2]
    histograms = count_words(vocabulary, [centres[[0, 0, 1]], centres[[2]]])
    assert histograms[0, found].tolist() == [2, 1, 0] and histograms[1, found].tolist() == [0, 0, 1]


def test_seeds_give_other_partitions_of_the_same_space_and_one_seed_the_same():
    descriptors = draw(500, 4)
    words = [learn_vocabulary(descriptors, 8, seed).predict(descriptors) for seed in (0, 0, 1)]
    assert (words[0] == words[1]).all()
    together = [w[:, None] == w for w in words]  # whether two descriptors share a word, whatever the word's number
    assert (together[0] != together[2]).any()


def test_roots_keep_their_sign_and_rows_get_length_one():
    by_hand = np.array([[2.0, -1.0, 0.0], [0.0, 0.0, 0.0]]) / np.array([[5**0.5], [1.0]])
    assert power_normalise(np.array([[4.0, -1.0, 0.0], [0.0, 0.0, 0.0]])) == pytest.approx(by_hand)


def test_whitening_by_hand():
    """U from the eigenvectors of the covariance, then Λ^-1/2 Uᵀ (v − m), then length 1."""
    measurements = [draw(200, 3), draw(200, 2, seed=1) @ np.array([[3.0, 0.0], [1.0, 0.2]])]
    joined = np.hstack(measurements)
    values, vectors = np.linalg.eigh(np.cov(joined.T))
    order = np.argsort(values)[::-1][:4]
    for is_whitened in (True, False):
        by_hand = (joined - joined.mean(axis=0)) @ vectors[:, order] / (np.sqrt(values[order]) if is_whitened else 1.0)
        by_hand /= np.linalg.norm(by_hand, axis=1, keepdims=True)
        short = JointReduction(4, is_whitened).fit(measurements).transform(measurements)
        assert short.shape == (200, 4)
        assert short @ short.T == pytest.approx(by_hand @ by_hand.T, abs=1e-6)  # directions may change their sign


def test_whitening_makes_a_measurement_that_is_given_twice_count_once():
    one, other = draw(300, 4), draw(300, 4, seed=1)
    once = JointReduction(8).fit([one, other])
    twice = JointReduction(8).fit([one, one, other])
    similarity = [
        (v := reduction.transform(m)) @ v.T for reduction, m in ((once, [one, other]), (twice, [one, one, other]))
    ]
    assert similarity[0] == pytest.approx(similarity[1], abs=1e-6)


def test_average_precision_by_hand():
    query, database = np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    relevant = np.array([[False, True, False, True]])
    assert mean_average_precision(query, database, relevant) == pytest.approx((1 / 2 + 2 / 4) / 2)
    left_out = np.array([[True, False, False, False]])  # the query itself
    assert mean_average_precision(query, database, relevant, left_out) == pytest.approx((1 / 1 + 2 / 3) / 2)
    labels = np.array([0, 0, 1, 1])
    assert same_object_precision(database, labels) == pytest.approx((1 / 1 + 1 / 2 + 1 / 2 + 1 / 1) / 4)
    scores, is_relevant = draw(5, 40), draw(5, 40, seed=1) > 1
    is_relevant[:, 0] = True
    expected = label_ranking_average_precision_score(is_relevant, scores)
    assert mean_average_precision(scores, np.eye(40), is_relevant) == pytest.approx(expected)
    assert reciprocal_ranks(database[[1, 2]], database[[0, 2]]).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: JointReduction(2).fit([draw(9, 4), draw(8, 4)]), r"describe \[9, 8\] objects"),
        (lambda: JointReduction(8).fit([draw(8, 9)]), "8 directions cannot be learnt from 8 objects"),
        (lambda: JointReduction(9).fit([draw(20, 8)]), "have 8 entries between them"),
        (lambda: JointReduction(0).fit([draw(20, 8)]), "keeps between 1 and 8"),
        (lambda: JointReduction(2).fit([]), "no measurement to reduce"),
        (lambda: JointReduction(2).fit([draw(9, 4), draw(9, 1)]), "Measurement 1 has one entry.*vocabulary of one word"),
        (lambda: JointReduction(3).fit([np.repeat(draw(9, 1), 4, axis=1)]), "vary in 1 directions only"),
        (lambda: JointReduction(2).fit([np.where(np.arange(9)[:, None] == 5, np.nan, draw(9, 4))]), "Row 5 of measurement 0 .*NaN"),
        (lambda: JointReduction(2).fit([draw(9)]), r"The shape \(9,\)"),
        (lambda: JointReduction(2).fit([draw(9, 4)]).transform([draw(9, 5)]), r"sizes \[5\].*fitted to \[4\]"),
        (lambda: JointReduction(2).transform([draw(9, 4)]), "fitted to none yet"),
        (lambda: count_words(learn_vocabulary(draw(9, 4), 2, 0), []), r"no objects \(0\) to count words in"),
        (lambda: learn_vocabulary(draw(9, 4), 1, 0), "n_words = 1 tells nothing apart"),
        (lambda: learn_vocabulary(draw(9, 4), 10, 0), "n_words = 10 cannot be learnt from 9 descriptors"),
        (lambda: learn_vocabulary(draw(9, 4) / 0.0, 2, 0), "Row 0 of the descriptors"),
        (lambda: similarities(draw(2, 3), draw(2, 4)), "Queries have 3 entries and the database's vectors 4"),
        (lambda: mean_average_precision(draw(2, 3), draw(2, 3), np.eye(2, dtype=bool) & [True, False]), "Query 1 has no relevant"),
        (lambda: image_search(seed=0, source="holidays", n_dimensions=[8]), "Allowed: synthetic, photographs, digits"),
        (lambda: paragraph_search(seed=0, method="retrain"), "method = 'retrain' is unknown. Allowed: backbone, fine_tuning"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_what_cannot_be_compared_is_refused_in_words(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_joined_vocabularies_beat_one_and_whitening_beats_pca(seed):
    """The calibrated set of the method sheet at its full size: the difference comes with the reduction."""
    rows = image_search(seed=seed, n_dimensions=[64])["rows"]
    at = {(row["vocabularies"], row["reduction"]): row["mean_average_precision"] for row in rows}
    assert at["4 × 256, seeds", "whitened"] >= at["1 × 256", "whitened"] + 0.03
    assert at["4 × 256, seeds", "whitened"] >= at["1 × 1024", "whitened"] + 0.1
    assert at["4 × 256, seeds", "whitened"] >= at["4 × 256, seeds", "pca"] + 0.005
    assert abs(at["1 × 256", "none"] - at["1 × 1024", "none"]) < 0.04


def test_the_small_form_shows_the_same():
    for seed in (0, 1, 2):
        (setting,) = (s for s in image_searches("smoke", [seed, 9]) if s["source"] == "synthetic")
        rows = image_search(**setting)["rows"]
        at = {row["vocabularies"]: row["mean_average_precision"] for row in rows if row["reduction"] == "whitened"}
        assert at["4 × 32, seeds"] > at["1 × 32"] + 0.03 and at["4 × 32, seeds"] > at["1 × 128"] + 0.03


@pytest.mark.parametrize(
    ("source", "n_searched", "n_kinds"), [("photographs", 480, 4), ("digits", 797, 4), ("synthetic", 600, 1)]
)
def test_an_image_set_has_views_of_the_same_objects_and_others_to_learn_from(source, n_searched, n_kinds):
    images = SOURCES[source](0, 50)
    again = SOURCES[source](0, 50)
    assert len(images.searched) == len(images.held_out) == n_kinds and len(images.labels) == n_searched
    for kind, descriptors in images.searched.items():
        assert descriptors.shape[0] == n_searched and descriptors.shape[1:] == images.held_out[kind].shape[1:]
        assert np.isfinite(descriptors).all()
        assert (descriptors == again.searched[kind]).all()
    if source == "photographs":  # a piece and its distorted copies: alike, and not equal
        pixels = images.searched["patches"].reshape(n_searched, -1)
        assert not (pixels[0] == pixels[1]).all()
        assert (np.bincount(images.labels) == 5).all()


# --- paragraphs -------------------------------------------------------------------------------------------------------


def page(identity, *lengths):
    return Document(
        identity, "test", "\n\n".join(f"{identity}{n} {'x' * length}" for n, length in enumerate(lengths)), "CC0"
    )


def test_paragraphs_are_paired_by_length_and_changed_pages_left_out():
    lengths = [40, 90, 300, 60, 150, 45, 500, 80, 220, 120, 70, 200]
    source = [page("a", *lengths), page("b", 100), page("c", *lengths), page("d", 200, 60)]
    target = [page("a", *lengths[:3], *lengths[4:]), page("c", *lengths[:6]), page("d", 210, 300), page("e", 100)]
    pairs = aligned_pairs(source, target)
    first = [(int(a.split()[0][1:]), int(b.split()[0][1:])) for a, b in pairs if a.startswith("a")]
    assert first == [(n, n) for n in range(3)] + [(n, n - 1) for n in range(4, 12)]
    assert [a for a, _ in pairs if a.startswith("c")] == []  # half of it is gone
    assert [a[:2] for a, _ in pairs if a.startswith("d")] == ["d0"]  # 60 characters are no translation of 300
    with pytest.raises(CorpusError, match="None of 1 documents has the id"):
        aligned_pairs([page("a", 50)], [page("b", 50)])


def test_a_translation_of_an_artificial_language_keeps_names_and_nothing_else():
    specs = ("synthetic:aurelian?n_documents=200", "synthetic:borealic?n_documents=200")
    splits = parallel_paragraphs(*specs)
    assert set(splits) == {"validation", "test"} and min(map(len, splits.values())) >= 20
    assert not {source for source, _ in splits["test"]} & {source for source, _ in splits["validation"]}
    source, translation = splits["test"][0]
    words = list(zip(source.replace(".", "").split(), translation.replace(".", "").split(), strict=True))
    assert 0.1 < np.mean([a == b for a, b in words]) < 0.5


class CharacterTokenizer:
    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) % 64 for c in text]}


def test_a_text_without_a_token_is_refused():
    assert encode(["abc"], CharacterTokenizer(), 2) == [[97 % 64, 98 % 64]]
    with pytest.raises(CorpusError, match="Text 1 has no token"):
        encode(["abc", ""], CharacterTokenizer(), 8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_states_do_not_depend_on_the_batch(tiny_model, family):
    model = tiny_model(family)
    sequences = [[5, 6, 7, 8, 9], [3], [4, 4, 2]]
    states = dict(hidden_states(model, sequences))
    for index, sequence in enumerate(sequences):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states
        assert states[index].shape == (4, len(sequence), 16)
        assert states[index] == pytest.approx(torch.cat(alone).numpy(), abs=1e-5)
    means = mean_states(model, sequences)
    assert len(means) == 4 and means[2][0] == pytest.approx(states[0][2].mean(axis=0))
    assert token_histogram(sequences, 10)[2].tolist() == [0, 0, 1, 0, 2, 0, 0, 0, 0, 0]


def test_hidden_states_see_the_adapters(tiny_model):
    from peft import get_peft_model

    from nrlib import NeutralResiduesConfig

    model = get_peft_model(tiny_model(), NeutralResiduesConfig(extra_ratio=0.5, gate="none", local_loss="none"))
    sequences = [[5, 6, 7, 8]]
    before = mean_states(model, sequences)
    for name, weights in model.named_parameters():
        if "neutral_residues_" in name:
            torch.nn.init.normal_(weights, generator=torch.Generator().manual_seed(0))
    after = mean_states(model, sequences)
    assert (after[0] == before[0]).all() and not np.allclose(after[-1], before[-1])
    with model.disable_adapter():
        assert mean_states(model, sequences)[-1] == pytest.approx(before[-1])


def test_taking_off_each_languages_mean_undoes_a_shift_between_them():
    shared, shift = draw(60, 6), 20 * draw(6, seed=1)
    measured = {
        "original": [shared[:30]], "new": [shared[:30] + shift],
        "original, held out": [shared[30:]], "new, held out": [shared[30:] + shift],
    }  # fmt: skip

    def found(reduction, is_centred, exponent=1.0):
        index = ParagraphIndex.learn(measured, 4, reduction, is_centred, exponent)
        original, new = (index.vectors(measured[name], name) for name in ("original", "new"))
        return reciprocal_ranks(new, original).mean()

    assert found("none", True) == found("whitened", True) == 1.0
    assert found("none", False) < 0.5


def test_the_mean_that_is_taken_off_is_of_what_it_is_taken_off():
    """Roots of histograms: their own mean, not that of the counts."""
    counts = np.random.default_rng(0).poisson(3.0, size=(80, 6)).astype(float)
    names = ("original", "new", "original, held out", "new, held out")
    index = ParagraphIndex.learn({name: [counts] for name in names}, 4, "none", exponent=0.5)
    roots = power_normalise(counts)
    assert index.vectors([counts], "new") == pytest.approx(power_normalise(roots - roots.mean(axis=0), 1.0))


def test_one_search_of_paragraphs_end_to_end():
    """An extension that nothing has trained yet would give the backbone's vectors; a trained one gives others."""
    results = {m: paragraph_search(seed=0, method=m, profile="smoke") for m in ("backbone", "neutral_residues")}
    backbone, extended = results["backbone"], results["neutral_residues"]
    assert backbone["n_pairs"] > 100 and set(backbone["cosine_to_backbone"].values()) == {1.0}
    assert extended["cosine_to_backbone"]["original, whitened"] < 0.99

    def precision(result, vector, search, reduction="whitened", is_centred=True):
        (row,) = (
            r
            for r in result["rows"]
            if (r["vector"], r["search"], r["reduction"], r["is_centred"]) == (vector, search, reduction, is_centred)
        )
        return row["mean_average_precision"]

    assert precision(backbone, "tokens", "translation") > 0.4  # names alone
    assert precision(backbone, "all layers", "translation") > 5 * precision(
        backbone, "all layers", "translation", "none", False
    )
    assert precision(backbone, "all layers", "old_index") == precision(backbone, "all layers", "original")
    # nothing below the first adapter moves
    assert precision(backbone, "embeddings", "original") == precision(extended, "embeddings", "original")


# --- what the page says, held against the published records -------------------------------------------------------------


@pytest.fixture
def published(published_results):
    return published_studies


def test_published_thresholds_of_the_artificial_images(published):
    table = image_table(published(image_search))
    for seed in (0, 1, 2):
        chosen = table[(table["source"] == "synthetic") & (table["seed"] == seed)]
        at = chosen[chosen["n_dimensions"].isin([64, 256, 1024])].set_index(["size", "reduction"])[
            "mean_average_precision"
        ]
        assert at["four", "whitened"] >= at["one", "whitened"] + 0.03
        assert at["four", "whitened"] >= at["large", "whitened"] + 0.1
        assert at["four", "whitened"] >= at["four", "pca"] + 0.005
        assert abs(at["one", "none"] - at["large", "none"]) < 0.04


def test_on_pictures_joining_helps_and_whitening_does_not(published):
    table = image_table(published(image_search))
    at_64 = table[(table["n_dimensions"] == 64) & (table["reduction"] != "none")]
    for source in ("photographs", "digits"):
        chosen = at_64[at_64["source"] == source]
        assert chosen["seed"].nunique() == 3
        at = chosen.groupby(["size", "reduction"])["mean_average_precision"].agg(["min", "max"])
        assert at["min"]["four", "pca"] > at["max"]["one", "pca"] + 0.01
        assert at["min"]["kinds", "pca"] > at["max"]["four", "pca"] - 0.005
        for size in ("one", "four", "kinds"):
            assert at["max"][size, "whitened"] < at["min"][size, "pca"]


def test_on_photographs_whitening_helps_joined_vocabularies_at_the_shortest_only(published):
    table = image_table(published(image_search))
    by = ["source", "n_dimensions", "size", "seed"]
    reduced = table[table["reduction"] != "none"].pivot_table(
        index=by, columns="reduction", values="mean_average_precision"
    )
    gain = reduced["whitened"] - reduced["pca"]
    photographs = gain["photographs"]
    for joined in ("two", "four", "kinds"):
        assert (photographs[16, joined] > 0).all()
    for single in ("one", "large"):
        assert (photographs[16, single] < 0).all()
    assert (photographs[32, "four"] < 0).all()
    assert (photographs.drop(index=[16, 32]) < 0).all() and (gain["digits"] < 0).all()


def test_on_pictures_one_large_vocabulary_does_not_replace_four(published):
    table = image_table(published(image_search))
    reduced = table[table["reduction"] != "none"].pivot_table(
        index=["source", "reduction", "n_dimensions", "seed"], columns="size", values="mean_average_precision"
    )
    lead = reduced["four"] - reduced["large"]
    assert (lead["photographs"] > 0.1).all() and (lead["digits", "pca"] > 0.005).all()
    for source in ("photographs", "digits"):
        at = reduced.loc[(source, "pca", 64)]
        assert (at["large"] < at["one"] - 0.01).all()
    assert (lead["digits", "whitened", 64].abs() < 0.004).all()  # the exception


def test_neutral_residues_leave_the_old_languages_vectors_and_help_no_search(published):
    results = published(paragraph_search)
    by_method = {m: [r for r in results if r["method"] == m] for m in ("backbone", "neutral_residues", "fine_tuning")}
    assert [len(found) for found in by_method.values()] == [1, 3, 3]
    table = search_table(results)
    joint = table[(table["vector"] == "all layers") & (table["reduction"] == "whitened") & table["is_centred"]]
    at = joint.groupby(["method", "search"])["mean_average_precision"].agg(["min", "max"])
    old = at["min"]["backbone", "original"]
    for search in ("original", "old_index"):
        assert (
            old - 0.006 < at["min"]["neutral_residues", search] <= at["max"]["neutral_residues", search] < old + 0.006
        )
    assert at["max"]["neutral_residues", "translation"] < at["min"]["backbone", "translation"]
    assert at["max"]["neutral_residues", "new"] < at["min"]["backbone", "new"] + 0.006
    # fine-tuning, the contrast: translations a little nearer, the old language's vectors gone from where they were
    assert at["min"]["fine_tuning", "translation"] > at["max"]["backbone", "translation"]
    assert at["max"]["fine_tuning", "original"] < old - 0.015
    assert at["max"]["fine_tuning", "old_index"] < 0.02
    assert max(r["cosine_to_backbone"]["original, whitened"] for r in by_method["fine_tuning"]) < 0.25
    for result in by_method["neutral_residues"]:
        assert (
            result["cosine_to_backbone"]["original, whitened"]
            > 0.99
            > 0.7
            > result["cosine_to_backbone"]["new, whitened"]
        )


def test_between_languages_whitening_makes_the_short_vector_work(published):
    (backbone,) = (result for result in published(paragraph_search) if result["method"] == "backbone")
    found = {
        (row["vector"], row["reduction"], row["is_centred"]): row["mean_average_precision"]
        for row in backbone["rows"]
        if row["search"] == "translation"
    }
    plain, centred = (found["all layers", "whitened", is_centred] for is_centred in (False, True))
    assert found["all layers", "pca", False] < 0.1 < 0.3 < plain < centred
    assert found["layer 4", "whitened", True] < found["all layers", "none", True] + 0.05 < centred
    assert centred < found["embeddings", "whitened", True] < found["tokens", "none", True]
    assert found["tokens", "whitened", True] < centred
