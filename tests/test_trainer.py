"""Trainer, SFTTrainer and our loop: the same losses on the same batches; domains that reach the loss; what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import V, build_tiny_model
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

import nrlib
from nrlib.batches import Batch
from nrlib.config import TrainingConfig
from nrlib.errors import ConfigError
from nrlib.losses import IGNORED, NEW, ORIGINAL, LocalLoss
from nrlib.trainer import DomainCollator, token_domains
from nrlib.training import make_optimizer, train

T, B, N_STEPS = 8, 4, 3  # tokens, sequences a step, steps
LEARNING_RATE = 1e-2


class LocalLossTrainer(nrlib.LocalLossMixin, Trainer):
    pass


class LocalLossSFTTrainer(nrlib.LocalLossMixin, SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, V)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def extended(seed=0, **options):
    """A tiny model whose residues are not zero, always with the same weights."""
    options = {"extra_ratio": 0.4, "gate": "elu", "local_loss": "l1", "local_loss_weight": 0.7, **options}
    model = get_peft_model(build_tiny_model(), nrlib.NeutralResiduesConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def windows(n=B * N_STEPS, lengths=None):
    """Token lists of T + 1, or of the given lengths + 1."""
    generator = torch.Generator().manual_seed(3)
    lengths = lengths or [T] * n
    return [torch.randint(2, V, (length + 1,), generator=generator).tolist() for length in lengths]


DOMAINS = [ORIGINAL, NEW, NEW, NEW, NEW, NEW, NEW, NEW, ORIGINAL, NEW, NEW, ORIGINAL]  # 1, 0 and 2 of 4 in the steps


class Batches:
    """The same sequences as `nrlib.training` takes them."""

    n_steps, batch_size, context_length = N_STEPS, B, T

    def __init__(self, sequences, domains):
        self.tokens, self.domains = torch.tensor(sequences), torch.tensor(domains)

    def batch(self, step):
        part = slice(step * B, (step + 1) * B)
        return Batch(self.tokens[part, :-1], self.tokens[part, 1:], self.domains[part])


def our_loop(model, sequences, domains):
    """Losses of every step by our own loop, at a constant learning rate."""
    steps = []
    config = TrainingConfig(
        learning_rate=LEARNING_RATE, warmup_ratio=0.0, final_learning_rate_ratio=1.0, batch_size=B, precision="float32"
    )
    options = model.peft_config["default"]
    hooks = nrlib.training.Hooks(log=lambda step, values: steps.append(values))
    train(
        model, Batches(sequences, domains), config, local_loss=options.local_loss,
        local_loss_weight=options.local_loss_weight, hooks=hooks, progress=False,
    )  # fmt: skip
    return steps


def arguments(folder, kind=TrainingArguments, **options):
    more = {"max_length": None} if kind is SFTConfig else {}
    options = {"per_device_train_batch_size": B, **more, **options}
    return kind(
        output_dir=str(folder), max_steps=N_STEPS, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential", learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        bf16=False, **{"gradient_checkpointing": False, **options},
    )  # fmt: skip


def make_trainer(kind, model, dataset, folder, tokenizer, **options):
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=LEARNING_RATE))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if kind == "sft":
        config = arguments(folder, SFTConfig, shuffle_dataset=False, **options)
        trainer = LocalLossSFTTrainer(
            model, config, train_dataset=dataset, processing_class=tokenizer, optimizers=(optimizer, schedule)
        )
    else:
        collator = transformers_padding(tokenizer)
        trainer = LocalLossTrainer(
            model, arguments(folder, **options), collator, dataset, optimizers=(optimizer, schedule)
        )
    return trainer


def transformers_padding(tokenizer):
    def collate(features):  # refuses what it does not know, as collators may
        assert all(set(feature) <= {"input_ids", "labels"} for feature in features)
        batch = tokenizer.pad({"input_ids": [f["input_ids"] for f in features]}, return_tensors="pt")
        mask = batch["attention_mask"]
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
        batch["labels"][:, 1:][mask[:, :-1] == 0] = -100  # padded on the left: no token predicts the first one
        return batch

    return collate


def dataset_of(sequences, domains, **columns):
    return Dataset.from_dict({"input_ids": sequences, "labels": sequences, "domain": domains, **columns})


def steps_of(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_training(trainer, sequences, domains, **options):
    reference = extended(**options)
    expected = our_loop(reference, sequences, domains)
    trainer.train()
    steps = steps_of(trainer)
    assert len(steps) == len(expected) == N_STEPS
    weight = reference.peft_config["default"].local_loss_weight
    for step, ours in zip(steps, expected, strict=True):
        for name in ("language_loss", "local_loss", "learning_rate"):
            assert step[name] == pytest.approx(ours[name], abs=1e-5, rel=1e-5)
        assert step["loss"] == pytest.approx(step["language_loss"] + weight * step["local_loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(ours["gradient_norm"], rel=1e-4)
    after = trainable(trainer.model)
    for name, weight in trainable(reference).items():
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-5)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trainer", "sft"])
@pytest.mark.parametrize("split", [1, 2, 4], ids=lambda n: f"accumulate_{n}")
def test_same_losses_and_weights_as_our_loop(kind, split, tmp_path, tokenizer):
    sequences = windows()
    options = {"per_device_train_batch_size": B // split, "gradient_accumulation_steps": split}
    dataset = dataset_of(sequences, DOMAINS)
    trainer = make_trainer(kind, extended(), dataset, tmp_path, tokenizer, **options)
    assert_same_training(trainer, sequences, DOMAINS)


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_gates_as_domain_classifiers(kind, tmp_path, tokenizer):
    options = {"gate": "sigmoid", "local_loss": "domain_cross_entropy"}
    trainer = make_trainer(kind, extended(**options), dataset_of(windows(), DOMAINS), tmp_path, tokenizer)
    assert_same_training(trainer, windows(), DOMAINS, **options)


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_activation_checkpointing(kind, tmp_path, tokenizer):
    dataset = dataset_of(windows(), DOMAINS)
    trainer = make_trainer(kind, extended(), dataset, tmp_path, tokenizer, gradient_checkpointing=True)
    assert_same_training(trainer, windows(), DOMAINS)


def test_model_whose_loss_knows_nothing_of_accumulation(tmp_path, tokenizer):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": B}
    trainer = make_trainer("trainer", extended(), dataset_of(windows(), DOMAINS), tmp_path, tokenizer, **options)
    trainer.model_accepts_loss_kwargs = False  # training_step then divides by the number of micro-batches
    assert_same_training(trainer, windows(), DOMAINS)


LENGTHS = [3, 8, 5, 6, 2, 8, 7, 1, 4, 8, 6, 3]
PADDED_DOMAINS = [ORIGINAL, NEW, ORIGINAL, NEW, *DOMAINS[B:]]  # those of the original domain are padded


def losses_by_hand(model, sequences, domains):
    """Both losses of the first step, sequence by sequence."""
    nats, n_targets, local, n_local = 0.0, 0, 0.0, 0
    for tokens, domain in zip(sequences[:B], domains[:B], strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad(), LocalLoss(model.eval(), "l1", torch.tensor([domain])) as collected:
            logits = model(input_ids=ids[:, :-1]).logits[0]
        nats += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        n_targets += len(logits)
        total, count = collected.sum_and_count()
        local, n_local = local + total.item(), n_local + count.item()
    return nats / n_targets, local / n_local


@pytest.mark.parametrize("kind", ["trainer", "sft", "sft_padding_free", "trainer_left", "per_token"])
@pytest.mark.parametrize("split", [1, 2], ids=lambda n: f"accumulate_{n}")
def test_padding_does_not_count(kind, split, tmp_path, tokenizer):
    sequences, domains = windows(lengths=LENGTHS), PADDED_DOMAINS
    expected = losses_by_hand(extended(), sequences, domains)
    options = {"per_device_train_batch_size": B // split, "gradient_accumulation_steps": split}
    if kind == "sft_padding_free":
        options["padding_free"] = True
    given = [[d] * len(s) for s, d in zip(sequences, domains, strict=True)] if kind == "per_token" else domains
    tokenizer.padding_side = "left" if kind == "trainer_left" else "right"
    trainer = make_trainer(kind[:3] if kind[:3] == "sft" else "trainer", extended(), dataset_of(sequences, given), tmp_path, tokenizer, **options)  # fmt: skip
    trainer.train()
    tokenizer.padding_side = "right"
    first = steps_of(trainer)[0]
    assert (first["language_loss"], first["local_loss"]) == pytest.approx(expected, rel=1e-5)


def test_sft_takes_text_and_extends_the_model_itself(tmp_path, tokenizer):
    texts = [" ".join(f"w{i}" for i in sequence) for sequence in windows()]
    dataset = Dataset.from_dict({"text": texts, "domain": DOMAINS})
    config = arguments(tmp_path, SFTConfig)
    options = nrlib.NeutralResiduesConfig(extra_ratio=0.4, local_loss_weight=2.0)
    trainer = LocalLossSFTTrainer(
        build_tiny_model(), config, train_dataset=dataset, processing_class=tokenizer, peft_config=options
    )
    trainer.train()
    assert steps_of(trainer)[0]["local_loss"] == 0  # residues are zero before the first step
    assert steps_of(trainer)[-1]["local_loss"] > 0


def test_without_a_local_loss_no_column_is_needed(tmp_path, tokenizer):
    dataset = Dataset.from_dict({"input_ids": windows(), "labels": windows()})
    model = extended(local_loss="none", local_loss_weight=0.0)
    trainer = make_trainer("trainer", model, dataset, tmp_path, tokenizer)
    trainer.train()
    assert "local_loss" not in steps_of(trainer)[0]


TWO_PROCESSES = """
import json, sys
import test_trainer as t

folder = sys.argv[1]
optimiser_step = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": t.B // 2}
dataset = t.dataset_of(t.windows(), t.DOMAINS)
trainer = t.make_trainer("trainer", t.extended(), dataset, folder, t.make_tokenizer(), **optimiser_step)
assert trainer.accelerator.num_processes == 2
trainer.train()
metrics = trainer.evaluate(t.dataset_of(t.windows()[: t.B], t.DOMAINS[: t.B]))
if trainer.is_world_process_zero():
    weights = {name: p.flatten().tolist() for name, p in t.trainable(trainer.model).items()}
    with open(folder + "/result.json", "w") as handle:
        json.dump({"steps": t.steps_of(trainer), "weights": weights, "metrics": metrics}, handle)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The sequences of a step are shared out so that one process has no original-domain token in the first step."""
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(nrlib.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    reference = extended()
    expected = losses_by_hand(reference, windows(), DOMAINS)
    assert (result["metrics"].keys()) >= {"eval_loss", "eval_local_loss"}
    ours = our_loop(reference, windows(), DOMAINS)
    for step, values in zip(result["steps"], ours, strict=True):
        for name in ("language_loss", "local_loss"):
            assert step[name] == pytest.approx(values[name], abs=1e-5, rel=1e-5)
    assert result["steps"][0]["local_loss"] == pytest.approx(expected[1], rel=1e-5)
    for name, weight in trainable(reference).items():
        torch.testing.assert_close(
            torch.tensor(result["weights"][name]).reshape(weight.shape), weight, rtol=1e-4, atol=1e-5
        )


# --- evaluation and prediction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_evaluation_and_prediction(kind, tmp_path, tokenizer):
    sequences = windows()
    trainer = make_trainer(kind, extended(), dataset_of(sequences, DOMAINS), tmp_path, tokenizer)
    dataset = dataset_of(sequences[:B], DOMAINS[:B])
    language_loss, local_loss = losses_by_hand(extended(), sequences, DOMAINS)
    metrics = trainer.evaluate(dataset)
    assert metrics["eval_loss"] == pytest.approx(language_loss, rel=1e-5)
    assert metrics["eval_local_loss"] == pytest.approx(local_loss, rel=1e-5)
    metrics = trainer.evaluate(dataset.remove_columns("domain"))
    assert metrics["eval_loss"] == pytest.approx(language_loss, rel=1e-5)
    assert "eval_local_loss" not in metrics
    predicted = trainer.predict(dataset.remove_columns("domain") if kind == "sft" else dataset)
    with torch.no_grad():
        expected = extended()(input_ids=torch.tensor(sequences[:B])).logits
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), expected, rtol=1e-4, atol=1e-5)


def test_prediction_without_labels(tmp_path, tokenizer):
    model = extended()
    trainer = LocalLossTrainer(
        model, arguments(tmp_path), default_data_collator, train_dataset=dataset_of(windows(), DOMAINS)
    )
    predicted = trainer.predict(Dataset.from_dict({"input_ids": windows()[:B], "domain": DOMAINS[:B]}))
    assert predicted.predictions.shape == (B, T + 1, V)


# --- domains ----------------------------------------------------------------------------------------------------------


def test_last_tokens_and_padding_are_ignored():
    inputs = {
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
        "domain": torch.tensor([ORIGINAL, NEW]),
    }
    assert token_domains(inputs).tolist() == [[0, 0, -1, -1], [-1, 1, 1, -1]]
    joined = {
        "input_ids": torch.zeros(1, 5, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "domain": torch.tensor([[0, 0, 0, 1, 1]]),
    }
    assert token_domains(joined).tolist() == [[0, 0, -1, 1, -1]]
    shifted = {"input_ids": torch.zeros(1, 2), "shift_labels": torch.zeros(1, 2), "domain": torch.tensor([NEW])}
    assert token_domains(shifted).tolist() == [[1, 1]]


def test_collator_places_domains_of_tokens(tokenizer):
    collator = DomainCollator(transformers_padding(tokenizer))
    features = [{"input_ids": [2, 3, 4], "domain": [0, 0, 1]}, {"input_ids": [5], "domain": 1}]
    assert collator(features)["domain"].tolist() == [[0, 0, 1], [1, IGNORED, IGNORED]]
    assert "domain" not in collator([{"input_ids": [2]}])


@pytest.mark.parametrize(
    "features, words",
    [
        ([{"input_ids": [2, 3], "domain": [0]}], "another length"),
        ([{"input_ids": [2, 3], "domain": 0}, {"input_ids": [2, 3]}], "no value"),
    ],
)
def test_domains_that_do_not_fit(features, words, tokenizer):
    with pytest.raises(ConfigError, match=words):
        DomainCollator(transformers_padding(tokenizer))(features)


def test_collator_that_cuts_is_refused():
    def cut(features):
        return {"input_ids": torch.tensor([f["input_ids"][:2] for f in features])}

    with pytest.raises(ConfigError, match="cannot be placed"):
        DomainCollator(cut)([{"input_ids": [2, 3, 4], "domain": [0, 0, 1]}, {"input_ids": [2, 3, 4], "domain": 0}])


def test_what_is_refused_before_training(tmp_path, tokenizer):
    dataset = dataset_of(windows(), DOMAINS)
    with pytest.raises(ConfigError, match="column 'domain'"):
        make_trainer("trainer", extended(), dataset.remove_columns("domain"), tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="packing"):
        make_trainer("sft", extended(), dataset, tmp_path, tokenizer, packing=True, max_length=16)
    with pytest.raises(ConfigError, match="no active neutral residues"):
        LocalLossTrainer(build_tiny_model(), arguments(tmp_path), train_dataset=dataset)
    model = extended()
    model.add_adapter("other", nrlib.NeutralResiduesConfig(extra_ratio=0.4, local_loss_weight=9.0))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="different local losses"):
        LocalLossTrainer(model, arguments(tmp_path), train_dataset=dataset)


def test_batch_without_domains_is_refused_in_training(tmp_path, tokenizer):
    trainer = make_trainer("trainer", extended(), dataset_of(windows(), DOMAINS), tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="column 'domain'"):
        trainer.training_step(trainer.model, {"input_ids": torch.tensor(windows()[:1])})


# --- the page ---------------------------------------------------------------------------------------------------------


def test_examples_of_the_page_run(small_config, tmp_path, monkeypatch):
    page = Path(nrlib.__file__).parents[1] / "book" / "use_trainer.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nrlib, "make_config", lambda profile: small_config())
    names: dict = {}
    exec(code.replace("max_steps=20", "max_steps=2").replace("logging_steps=5", "logging_steps=1"), names)
    steps = steps_of(names["trainer"])
    assert len(steps) == 2 and steps[0]["local_loss"] == 0 < steps[1]["local_loss"]
    assert "import nrlib" in (tmp_path / "build" / "trainer" / "README.md").read_text(encoding="utf-8")
