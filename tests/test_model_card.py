"""The model card: its code runs by copy and paste, its metadata are what the hub reads, and uploads carry it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import build_tiny_model
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import nrlib
from nrlib import upload
from nrlib.errors import ConfigError
from nrlib.model_card import MARK, CardDetails, write_model_card
from nrlib.peft_method import active_adapters

MEASURED = [("new domain", "debian-docs:fr", 4.0, 1.5), ("original domain", "debian-docs:en", 1.5, 1.51)]


@pytest.fixture
def model():
    model = get_peft_model(build_tiny_model(), nrlib.NeutralResiduesConfig(extra_ratio=0.4, local_loss_weight=2.5))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(0.1)
    return model


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """Repositories by name: folders with what would have been uploaded."""
    repositories = tmp_path / "hub"

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, repositories / repo_id)

    def create_repo(self, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    return repositories


def code_of(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return code


def run_code(folder, tokens):
    names: dict = {}
    exec(code_of(folder), names)
    with torch.no_grad():
        return names["model"].eval()(input_ids=tokens).logits


def logits_of(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


TOKENS = torch.tensor([[2, 3, 4, 5]])


@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_code_of_a_saved_card_loads_the_model(model, place, tmp_path, monkeypatch):
    folder = tmp_path / "adapters"
    backbone = folder / "backbone" if place == "beside" else tmp_path / "my model"
    build_tiny_model().save_pretrained(backbone)
    model.peft_config["default"].base_model_name_or_path = str(backbone)
    model.save_pretrained(folder)
    assert str(tmp_path) not in (folder / "README.md").read_text(encoding="utf-8")
    if place == "beside":  # nothing may point to where it was written
        folder = folder.rename(tmp_path / "moved")
    monkeypatch.chdir(folder)
    torch.testing.assert_close(run_code(folder, TOKENS), logits_of(model, TOKENS))


def test_code_of_an_uploaded_card_loads_the_model(model, uploads, monkeypatch, tmp_path):
    build_tiny_model().save_pretrained(uploads / "acme" / "base")
    model.peft_config["default"].base_model_name_or_path = "acme/base"
    details = {"language": ["fr", "en"], "license": "apache-2.0", "forgetting": 0.0042, "bits_per_byte": MEASURED}
    address = nrlib.push_to_hub(model, "me/adapters", **details)
    assert address == "https://huggingface.co/me/adapters"
    folder = uploads / "me" / "adapters"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {p.name for p in folder.iterdir()}
    monkeypatch.chdir(uploads)  # here the names are folders
    torch.testing.assert_close(run_code(folder, TOKENS), logits_of(model, TOKENS))
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.language, data.license) == ("acme/base", ["fr", "en"], "apache-2.0")
    assert data.library_name == "peft" and {"neutral-residues", "nrlib"} <= set(data.tags)
    assert [result.metric_value for result in data.eval_results] == [1.5, 1.51]


def test_an_adapter_of_another_name_is_uploaded_where_its_card_looks(uploads, monkeypatch):
    build_tiny_model().save_pretrained(uploads / "acme" / "base")
    model = get_peft_model(build_tiny_model(), nrlib.NeutralResiduesConfig(extra_ratio=0.2), adapter_name="french")
    model.add_adapter("danish", nrlib.NeutralResiduesConfig(extra_ratio=0.2))
    for adapter in active_adapters(model):
        torch.nn.init.normal_(adapter.output_projection.weight)
    model.peft_config["french"].base_model_name_or_path = "acme/base"
    nrlib.push_to_hub(model, "me/french")
    folder = uploads / "me" / "french"
    assert (folder / "adapter_config.json").is_file() and not [p for p in folder.iterdir() if p.is_dir()]
    monkeypatch.chdir(uploads)
    torch.testing.assert_close(run_code(folder, TOKENS), logits_of(model, TOKENS))
    model.base_model.set_adapter(["french", "danish"])
    with pytest.raises(ConfigError, match="2 adapters are active"):
        nrlib.push_to_hub(model, "me/both")


def test_card_says_what_is_known(model, tmp_path):
    config = model.peft_config["default"]
    details = CardDetails(
        bits_per_byte=MEASURED, forgetting=0.0042, learning=0.905, corpora={"proxy": "debian-docs:en"}
    )
    write_model_card(config, tmp_path, details)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for known in ("| local_loss_weight | 2.5 |", f"| width | {config.width} |", "0.42%", "90.5%", "| 4.000 | 1.500 |"):
        assert known in text
    assert "- proxy: `debian-docs:en`" in text and "extended blocks | 3 |" in text
    write_model_card(config, tmp_path)  # other weights, perhaps: what was measured no longer holds
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "0.42%" not in text and "model-index" not in text and text.count("## Loading") == 1


def test_paths_of_one_machine_do_not_become_metadata(model, tmp_path):
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    model.get_base_model().name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "adapters")
    card = ModelCard.load(tmp_path / "adapters" / "README.md")
    assert card.data.base_model is None and str(tmp_path) not in card.content


def test_a_card_of_ones_own_is_kept(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: fr\n---\n\n# My model\n\nIts story.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "Its story." in card.text and MARK not in card.text and card.text.count("import nrlib") == 1
    assert (card.data.license, card.data.language) == ("mit", "fr")


class LocalLossTrainer(nrlib.LocalLossMixin, Trainer):
    pass


def test_trainer_uploads_the_same_card(model, uploads, tmp_path, monkeypatch):
    build_tiny_model().save_pretrained(uploads / "acme" / "base")
    model.peft_config["default"].base_model_name_or_path = "acme/base"
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, hub_model_id="me/trained", disable_tqdm=True
    )
    sequences = [[2, 3, 4, 5]] * 8
    dataset = Dataset.from_dict({"input_ids": sequences, "labels": sequences, "domain": [nrlib.ORIGINAL] * 8})
    trainer = LocalLossTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    trainer.push_to_hub(language="fr", license="mit", tags=["mine"])
    folder = uploads / "me" / "trained"
    monkeypatch.chdir(uploads)
    torch.testing.assert_close(run_code(folder, TOKENS), logits_of(trainer.model, TOKENS))
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language, data.base_model) == ("mit", "fr", "acme/base") and "mine" in data.tags


def test_uploads_that_nobody_could_load_are_refused(model, uploads, tmp_path):
    for name in (None, str(tmp_path)):
        model.peft_config["default"].base_model_name_or_path = name
        with pytest.raises(nrlib.errors.ConfigError, match="no name on the hub"):
            nrlib.push_to_hub(model, "me/adapters")
    with pytest.raises(nrlib.errors.ConfigError, match="no active neutral residues"):
        upload.push_to_hub(build_tiny_model(), "me/nothing")
    assert not Path(uploads).exists()
