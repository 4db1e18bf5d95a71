"""A byte-level BPE trained on the original domain only, as in the paper's setting: the new language is seen through the
old one's tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .corpora.documents import Document
from .errors import BackboneError, CorpusError
from .hub import find, why_not_loaded
from .storage import atomic_directory, cache_directory, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_VERSION = 1


def train_tokenizer(
    documents: Sequence[Document], vocabulary_size: int, progress: bool = True
) -> PreTrainedTokenizerBase:
    """Train, or load from the cache, a byte-level BPE of `vocabulary_size` entries.

    Raises
    ------
    CorpusError
        When the text is too small for so many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    key = fingerprint([TOKENIZER_VERSION, vocabulary_size, [d.id for d in documents], [d.text for d in documents]], 16)
    folder = cache_directory() / "tokenizers" / key
    if not folder.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )
        tokenizer.train_from_iterator((d.text for d in documents), trainer)
        if tokenizer.get_vocab_size() < vocabulary_size:
            raise CorpusError(
                f"The original domain's training text ({sum(len(d.text) for d in documents):,} characters) yields only "
                f"{tokenizer.get_vocab_size()} tokenizer entries of the {vocabulary_size} asked for. Give more text or "
                "a smaller vocabulary_size."
            )
        with atomic_directory(folder) as temporary:
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(temporary)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """A tokenizer saved by `train_tokenizer`, or any other from a local folder or the hub.

    Raises
    ------
    BackboneError
        When there is none, or it has no token that ends a text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(find(folder))
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up, where only the model is there
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # a dozen classes, as for models
        message = why_not_loaded("tokenizer", str(folder), error)
        if Path(folder).exists():
            message += " A backbone needs its tokenizer beside it: save it there with tokenizer.save_pretrained()."
        raise BackboneError(message) from error
    if tokenizer.eos_token_id is None:
        raise BackboneError(
            f"The tokenizer of {str(folder)!r} has no end-of-text token, which stands between documents. Set one: "
            "tokenizer.eos_token = '…', then save the tokenizer again."
        )
    tokenizer.model_max_length = int(1e30)  # packed text is long by design; there is no sequence to truncate
    return tokenizer


def beginning_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of its own that a tokenizer puts before every text by itself, as Gemma's and Llama's do; None for one that
    puts none there, or only the end-of-text token that stands between documents anyway."""
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return None
    return bos if tokenizer("x")["input_ids"][:1] == [bos] else None


def encode_documents(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    """Token ids of each document, without special tokens."""
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    for document in documents:
        yield tokenizer(document.text, add_special_tokens=False)["input_ids"]
