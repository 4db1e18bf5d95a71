"""Neutral residues on the Hugging Face hub: the saved adapters with a model card that loads them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .model_card import CardDetails, hub_name, write_model_card
from .peft_method import active_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def push_to_hub(
    model: PeftModel,
    repository: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    private: bool | None = None,
    token: str | None = None,
    **details: Any,
) -> str:
    """Upload the active adapters of `model` and their model card to `repository`, 'owner/name'; returns the address.

    PEFT's own `model.push_to_hub` uploads the same adapters under an empty card.

    Raises
    ------
    ConfigError
        When the backbone is no model of the hub, so that nobody else could load the adapters, or several are active.

    Parameters
    ----------
    tokenizer : uploaded too, if given.
    details : fields of `nrlib.model_card.CardDetails`: language, license, datasets, forgetting …
    """
    from huggingface_hub import HfApi

    config = active_config(model)
    name, *others = model.active_adapters
    if others:
        raise ConfigError(
            f"{1 + len(others)} adapters are active: {', '.join([name, *others])}. A repository holds one: set_adapter."
        )
    if hub_name(config.base_model_name_or_path) is None:
        raise ConfigError(
            f"The backbone of these adapters is {config.base_model_name_or_path!r}, which is no name on the hub, so nobody else "
            "could load them. Upload the backbone first (backbone.push_to_hub), and say where it is: "
            f"model.peft_config[{name!r}].base_model_name_or_path = 'owner/backbone'."
        )
    card = CardDetails(repository=repository, **details)
    api = HfApi(token=token)
    address = api.create_repo(repository, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[name])
        if (own := Path(folder, name)).is_dir():  # PEFT's place for every adapter but `default`
            for path in own.iterdir():
                path.replace(Path(folder, path.name))
            own.rmdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_model_card(config, folder, card)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload neutral residues")
    return str(address)
