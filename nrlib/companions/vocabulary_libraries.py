"""The rows of new tokens as two libraries begin them, to compare `vocabulary_tokens.initial_rows` with.

wechsel (Minixhofer, Paischer and Rekabsaz, NAACL 2022, https://arxiv.org/abs/2112.06598) aligns word vectors by Procrustes
and mixes the rows of the nearest old tokens; it gets this project's word vectors and lexicon. focus (Dobler and de Melo,
EMNLP 2023, https://arxiv.org/abs/2305.14481), the package `deepfocus`, needs no lexicon: fastText vectors of the extended
tokenizer's tokens, trained on the new language alone, say which old tokens a new one resembles there. Both stand on the
package fasttext, which is compiled when it is installed: `pip install 'nrlib[initialisation]'` needs a C++ compiler.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..corpora.documents import Document
from ..errors import ConfigError
from .vocabulary_tokens import NewTokens
from .vocabulary_words import GAP, Lexicon, Vectors, co_occurrences, static_embeddings, word_sequences

PACKAGES = {"wechsel": "wechsel", "focus": "deepfocus"}  # the package behind each name
N_WORDS = 8000


def is_installed(name: str) -> bool:
    """Whether the package behind `name` can be imported."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def library_rows(
    name: str,
    rows: Vectors,
    tokens: NewTokens,
    old_tokenizer: Any,
    new_texts: Sequence[str],
    original_texts: Sequence[str],
    lexicon: Lexicon,
    dimension: int = 64,
) -> Vectors:
    """First values (n_new, D) of the new tokens' rows by the library called `name`, from the backbone's `rows` (V, D).

    Raises
    ------
    ConfigError
        When the library is not installed.
    """
    if not is_installed(name):
        raise ConfigError(
            f"initialisation = {name!r} needs the package {PACKAGES[name]}, which is not installed: pip install "
            "'nrlib[initialisation]' (it compiles fasttext, so a C++ compiler must be there), or choose another one."
        )
    if name == "wechsel":
        return _wechsel_rows(rows, tokens, old_tokenizer, new_texts, original_texts, lexicon, dimension)
    return _focus_rows(rows, tokens, old_tokenizer, new_texts)


def _wechsel_rows(
    rows: Vectors,
    tokens: NewTokens,
    old_tokenizer: Any,
    new_texts: Sequence[str],
    original_texts: Sequence[str],
    lexicon: Lexicon,
    dimension: int,
) -> Vectors:
    from wechsel import WECHSEL

    pairs = [(word, other) for word, others in sorted(lexicon.items()) for other in sorted(others)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lexicon.txt"
        path.write_text("".join(f"{word}\t{other}\n" for word, other in pairs), encoding="utf-8")
        method = WECHSEL(
            _word_model(original_texts, dimension), _word_model(new_texts, dimension), bilingual_dictionary=str(path)
        )
    matrix, _ = method.apply(old_tokenizer, tokens.tokenizer, rows, use_subword_info=False)
    return np.asarray(matrix[tokens.n_old :])


def _word_model(texts: Sequence[str], dimension: int) -> Any:
    """Our static word vectors as the object that wechsel reads."""
    from gensim.models import KeyedVectors, Word2Vec

    documents = [Document(str(number), "", text, "") for number, text in enumerate(texts)]
    words, sequences = word_sequences(documents, N_WORDS)
    vectors = static_embeddings(co_occurrences(sequences, len(words)), dimension)
    stream = np.concatenate(sequences)
    counts = np.bincount(stream[stream != GAP], minlength=len(words))
    model = Word2Vec(vector_size=dimension)
    model.wv = KeyedVectors(dimension)
    model.wv.add_vectors(words, vectors.astype(np.float32))
    for word, count in zip(words, counts.tolist(), strict=True):
        model.wv.set_vecattr(word, "count", count)
    return model


def _focus_rows(rows: Vectors, tokens: NewTokens, old_tokenizer: Any, new_texts: Sequence[str]) -> Vectors:
    """The library would tokenise and train with several threads and keep the result by the file's name; trained here
    with its settings and one thread, the vectors are the same every time."""
    import fasttext
    from deepfocus import FOCUS

    with tempfile.TemporaryDirectory() as folder:
        text, trained = Path(folder) / "tokens.txt", Path(folder) / "tokens.bin"
        with open(text, "w", encoding="utf-8") as handle:
            handle.writelines(" ".join(tokens.tokenizer.tokenize(document)) + "\n" for document in new_texts)
        model = fasttext.train_unsupervised(
            str(text), model="cbow", dim=100, neg=10, epoch=3, minCount=10, thread=1, verbose=0
        )
        model.save_model(str(trained))
        matrix = FOCUS(
            target_tokenizer=tokens.tokenizer,
            source_tokenizer=old_tokenizer,
            source_embeddings=torch.from_numpy(rows).float(),
            fasttext_model_path=str(trained),
            verbosity="silent",
        )
    return matrix[tokens.n_old :].double().numpy()
