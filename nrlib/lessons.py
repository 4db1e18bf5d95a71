"""The live experiments of the tutorial: two artificial languages, one small backbone, a few seconds a student.

Aurelian is the original domain, Borealic the new one. The texts and shapes are those of the notebook `quickstart`, so
that all lessons share one backbone.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from .architecture import decoder_layers, n_weights
from .backbone import delete_checkpoint, get_backbone
from .batches import evaluation_batches
from .config import RunConfig, make_config
from .corpora import load_corpus
from .corpora.synthetic import load_language
from .errors import ConfigError
from .evaluation import bits_per_byte
from .losses import adapters_with_layers
from .machine import one_thread, seeded
from .methods import apply_method
from .records import Record, write_counts
from .runs import run_and_keep
from .texts import PreparedText, prepare_text

LANGUAGES = {"Aurelian": "aurelian", "Borealic": "borealic"}
_SETTINGS: dict[str, Any] = {
    "original": "synthetic:aurelian", "proxy": "synthetic:aurelian/plain",
    "unseen_original": "synthetic:aurelian/manual", "new_domain": "synthetic:borealic",
    "d_model": 64, "ffn_width": 176, "pretraining_tokens": 400_000, "n_tokens": 153_600,
}  # fmt: skip
_LEARNING_RATES = {"fine_tuning": 0.01, "lora": 0.01}
_ADAPTER_RATE = 0.02


@dataclass(frozen=True)
class Student:
    """A model of the tutorial: the backbone (`record` is None), or the backbone after a training."""

    model: Any
    config: RunConfig
    record: Record | None = None

    @property
    def text(self) -> PreparedText:
        """The texts and the tokenizer it was trained and measured with."""
        return prepare_text(self.config.data, self.config.backbone, progress=False)

    def bits_per_byte(self, name: str) -> float:
        """Of the held-out text `name`: 'unseen_original', 'proxy' or 'new'."""
        return bits_per_byte(self.model, self.text.held_out[name], self.config.training.context_length)


def lesson(method: str = "neutral_residues", **changes: Any) -> RunConfig:
    """The configuration of one training of the tutorial, at a rate that suits the method."""
    rate = {"learning_rate": _LEARNING_RATES.get(method, _ADAPTER_RATE)}
    weight = {"local_loss_weight": 1.0} if method == "neutral_residues" else {}
    return make_config("smoke", method=method, **{**_SETTINGS, **rate, **weight, **changes})


@one_thread()
def backbone() -> Student:
    """The model that reads Aurelian only; trained in seconds, then kept in the cache. A new copy at each call."""
    config = lesson()
    text = prepare_text(config.data, config.backbone, progress=False)
    return Student(get_backbone(config, text, progress=False).eval(), config)


def untrained(method: str = "neutral_residues", **changes: Any) -> Student:
    """The backbone with a method's new weights, before the first step."""
    config, start = lesson(method, **changes), backbone()
    return Student(apply_method(start.model, config.method, config.seed).eval(), config)


@functools.lru_cache(maxsize=64)
@one_thread()
def extend(method: str = "neutral_residues", **changes: Any) -> Student:
    """The backbone after learning Borealic by a method; `changes` are parameters of the run."""
    config = lesson(method, **changes)
    record, model = run_and_keep(config, notebook="lesson", progress=False)
    delete_checkpoint(config.run_id)
    write_counts(trained=[config.run_id])
    return Student(model.eval(), config, record)


def prompt(language: str, n_words: int = 12, document: int = 3) -> str:
    """The first words of a document in one of the two languages."""
    if language not in LANGUAGES:
        raise ConfigError(f"The tutorial has no language {language!r}. Choose one of: {', '.join(LANGUAGES)}.")
    documents = load_corpus(f"synthetic:{LANGUAGES[language]}", progress=False).documents
    return " ".join(documents[document].text.split()[:n_words])


@one_thread()
def continue_text(student: Student, start: str, n_tokens: int = 48, seed: int = 0) -> str:
    """What the model writes after `start`, drawn at random from its predictions."""
    tokenizer = student.text.tokenizer
    tokens = tokenizer(start, return_tensors="pt").input_ids
    with seeded(seed), torch.no_grad():
        written = student.model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_tokens, do_sample=True,
            temperature=0.7, top_k=0, pad_token_id=tokenizer.eos_token_id, suppress_tokens=[tokenizer.eos_token_id],
        )  # fmt: skip
    return str(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)).strip()


def word_shares(text: str) -> dict[str, float]:
    """The share of the words of a text that belong to each language; the first and the last, which may be cut, left out."""
    words = text.replace(".", " ").split()[1:-1]
    return {
        name: sum(word in load_language(language).words for word in words) / max(1, len(words))
        for name, language in LANGUAGES.items()
    }


def writing_table(students: Mapping[str, Student], start: str, n_samples: int = 8) -> pd.DataFrame:
    """What every model writes after `start`: one sample, and the mean share of words of each language over several."""
    rows = {}
    for name, student in students.items():
        samples = [continue_text(student, start, seed=seed) for seed in range(n_samples)]
        shares = pd.DataFrame([word_shares(sample) for sample in samples]).mean()
        rows[name] = {
            "writes": samples[0][:60] + " …", **{f"{lang} words": f"{share:.0%}" for lang, share in shares.items()}
        }  # fmt: skip
    return pd.DataFrame(rows).T


def reading_table(students: Mapping[str, Student]) -> pd.DataFrame:
    """Bits per byte of both languages for every model, over the entropy floors of the languages: no model reads them in
    fewer."""
    columns = {"Aurelian": "unseen_original", "Borealic": "new"}
    rows = {name: {lang: s.bits_per_byte(text) for lang, text in columns.items()} for name, s in students.items()}
    specs = {"Aurelian": _SETTINGS["unseen_original"], "Borealic": _SETTINGS["new_domain"]}
    rows["entropy floor"] = {
        language: load_corpus(spec, progress=False).entropy_floor or math.nan for language, spec in specs.items()
    }
    return pd.DataFrame(rows).T


def weight_changes(students: Mapping[str, Student]) -> pd.DataFrame:
    """For every model the share of the backbone's weights it changed and the weights it added, before and after a merge.

    LoRA's matrices are merged into the backbone's; adapters with a gate cannot be."""
    original = dict(backbone().model.named_parameters())
    n_backbone = sum(map(n_weights, original.values()))
    rows = {}
    for name, student in students.items():
        model = student.model
        n_added = sum(map(n_weights, model.parameters())) - n_backbone
        n_added_merged = n_added
        if student.config.method.method == "lora":
            model, n_added_merged = copy.deepcopy(model).merge_and_unload(), 0
        n_changed = sum(
            int((parameter.detach() != original[key]).sum())
            for key, parameter in _backbone_parameters(model, original).items()
        )
        rows[name] = {
            "backbone weights changed": n_changed / n_backbone, "weights added": n_added / n_backbone,
            "added, after a merge": n_added_merged / n_backbone,
        }  # fmt: skip
    return pd.DataFrame(rows).T


def _backbone_parameters(model: nn.Module, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's parameters inside a model, under their names in the backbone."""
    names = {
        name: name.removeprefix("base_model.model.").replace("base_layer.", "") for name, _ in model.named_parameters()
    }
    return {names[name]: parameter for name, parameter in model.named_parameters() if names[name] in original}


@torch.no_grad()
def hidden_state_changes(students: Mapping[str, Student], text: str = "unseen_original") -> pd.DataFrame:
    """How far each layer's output has moved from the backbone's on a held-out text, ‖h' − h‖ / ‖h‖, mean over tokens."""
    reference = backbone()
    inputs = next(evaluation_batches(reference.text.held_out[text], reference.config.training.context_length))[0]
    before = _layer_outputs(reference.model, inputs)
    rows = []
    for name, student in students.items():
        after = _layer_outputs(student.model, inputs)
        for layer, (h, moved) in enumerate(zip(before, after, strict=True)):
            change = (moved - h).norm(dim=-1) / h.norm(dim=-1)
            rows.append({"method": name, "layer": layer, "change": change.mean().item()})
    return pd.DataFrame(rows)


def _layer_outputs(model: Any, inputs: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    try:
        model(input_ids=inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.no_grad()
def gates_over(student: Student, text: str) -> pd.DataFrame:
    """The gate of every layer at every token of a text: columns `token`, `layer`, `gate`."""
    tokens = student.text.tokenizer(text, return_tensors="pt").input_ids
    pieces = [student.text.tokenizer.decode([token]) for token in tokens[0]]
    values: dict[int, Tensor] = {}
    handles = [
        adapter.register_forward_hook(
            lambda module, x, _, layer=layer: values.update({layer: module.gate_values(x[0])})
        )
        for layer, adapter in adapters_with_layers(student.model)
    ]
    try:
        student.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return pd.DataFrame(
        {"position": position, "token": piece, "layer": layer, "gate": values[layer].flatten()[position].item()}
        for layer in values
        for position, piece in enumerate(pieces)
    )
