"""The tutorial's live experiments, on fewer tokens than in the book."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from nrlib import lessons
from nrlib.errors import ConfigError
from nrlib.guide import guide_tables
from nrlib.storage import project_directory
from nrlib.tables import curves_table


@pytest.fixture(autouse=True, scope="module")
def short_lessons():
    with pytest.MonkeyPatch.context() as patch:
        short = {
            "pretraining_tokens": 20_000,
            "n_tokens": 8_192,
            "d_model": 32,
            "ffn_width": 64,
            "vocabulary_size": 400,
        }
        patch.setattr(lessons, "_SETTINGS", lessons._SETTINGS | short)
        lessons.extend.cache_clear()
        yield
        lessons.extend.cache_clear()


def test_all_lessons_share_the_backbone_of_the_quickstart():
    changes = {
        **lessons._SETTINGS,
        "pretraining_tokens": 400_000,
        "d_model": 64,
        "ffn_width": 176,
        "vocabulary_size": 512,
    }
    assert changes["original"] == "synthetic:aurelian" and changes["new_domain"] == "synthetic:borealic"
    assert len({lessons.lesson(method).backbone for method in ("fine_tuning", "lora", "neutral_residues")}) == 1


def test_a_backbone_is_a_new_copy_and_an_extension_is_trained_once():
    first, second = lessons.backbone(), lessons.backbone()
    assert first.model is not second.model and first.record is None
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert lessons.extend(seed=1) is lessons.extend(seed=1) is not lessons.extend(seed=2)


def test_before_the_first_step_an_extension_reads_like_its_backbone():
    assert lessons.untrained().bits_per_byte("new") == lessons.backbone().bits_per_byte("new")


def test_the_table_of_weights_tells_who_changes_and_who_adds():
    students = {
        method: lessons.extend(method) for method in ("fine_tuning", "lora", "vanilla_adapter", "neutral_residues")
    }
    table = lessons.weight_changes(students)
    changed, added, merged = (table[column] for column in table)
    assert changed["fine_tuning"] > 0.9 and 0.5 < changed["lora"] < 0.95
    assert changed["vanilla_adapter"] == changed["neutral_residues"] == 0
    assert added["fine_tuning"] == 0 and added.drop("fine_tuning").between(0.1, 0.2).all()
    assert merged["lora"] == 0 and merged["neutral_residues"] == added["neutral_residues"]
    # merging is done on a copy
    assert hasattr(students["lora"].model, "disable_adapter")


def test_hidden_states_of_the_backbone_itself_do_not_change():
    changes = lessons.hidden_state_changes(
        {"backbone": lessons.backbone(), "fine_tuning": lessons.extend("fine_tuning")}
    )
    by_method = changes.groupby("method")["change"].max()
    assert by_method["backbone"] == 0 and by_method["fine_tuning"] > 0.01
    assert sorted(changes["layer"].unique()) == [0, 1]


def test_gates_have_one_value_for_each_token_and_layer():
    student, text = lessons.extend(gate="relu"), lessons.prompt("Aurelian", 5)
    gates = lessons.gates_over(student, text)
    first = gates[gates["layer"] == 0].sort_values("position")
    assert "".join(first["token"]) == text
    assert (gates["gate"] >= 0).all() and len(gates) == 2 * len(first)


def test_reading_and_writing_tables():
    students = {"backbone": lessons.backbone()}
    reading = lessons.reading_table(students)
    assert (reading.loc["entropy floor"] < reading.loc["backbone"]).all()
    writing = lessons.writing_table(students, lessons.prompt("Borealic"), n_samples=2)
    assert list(writing.columns) == ["writes", "Aurelian words", "Borealic words"]
    assert lessons.continue_text(students["backbone"], "lal", seed=3) == lessons.continue_text(
        students["backbone"], "lal", seed=3
    )


def test_words_are_told_apart_by_the_lexicons():
    text = lessons.prompt("Aurelian", 12)
    assert lessons.word_shares(text)["Aurelian"] == 1.0 and lessons.word_shares(text)["Borealic"] < 0.5
    with pytest.raises(ConfigError, match="Choose one of: Aurelian, Borealic"):
        lessons.prompt("Latin")


def test_curves_may_begin_with_the_backbone():
    record = lessons.extend("fine_tuning").record
    curve = curves_table([record], from_backbone=True)
    assert curve["n_tokens"].iloc[0] == 0 and len(curve) == len(curves_table([record])) + 1
    assert curve["bits_per_byte_new_validation"].iloc[0] == record.results["backbone_bits_per_byte"]["new_validation"]


def test_the_guide_reads_the_published_records(monkeypatch):
    assert all("no published run" in text for text in guide_tables("paper").values())
    monkeypatch.setenv("NRLIB_RESULTS", str(project_directory() / "data" / "results"))
    tables = guide_tables()
    assert list(tables) == ["guide-weights", "guide-mixes", "guide-budgets", "guide-methods"]
    rows = [line.split("|") for line in tables["guide-weights"].splitlines()[2:]]
    forgotten = pd.Series({float(row[1]): float(row[2].rstrip(" %")) for row in rows})
    assert forgotten.is_monotonic_decreasing and {0.0, 5.0} <= set(forgotten.index)
    reached = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in tables["guide-methods"].splitlines()[2:]}
    assert 1 < float(reached["neutral residues"].rstrip("%")) < 1.5  # three seeds: one setting, not several pooled
    assert float(reached["neutral residues, a memory of 64"].rstrip("%")) < 0.3
