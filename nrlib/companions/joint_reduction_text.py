"""Search by paragraph vectors made of a language model's hidden states: each layer is a measurement.

The parallel paragraphs are made here, from the pages that a documentation has in both languages: paragraphs of a page are
paired by their lengths alone (William Gale and Kenneth Church, "A program for aligning sentences in bilingual corpora",
1993; nltk's implementation), so that the pairing favours no vector over another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from peft import PeftModel

from ..corpora import Corpus, load_corpus
from ..corpora.documents import Document
from ..corpora.synthetic import load_language, parse_synthetic
from ..errors import CorpusError
from ..splits import split_documents
from .joint_reduction import Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_LINKED_RATIO = 0.9  # of the paragraphs of a page; a page with fewer was changed in one language, and is left out
MAX_LENGTH_RATIO = 1.67  # of a paragraph to its translation, the languages' own ratio taken out
BATCH = 64

Pair = tuple[str, str]


def aligned_pairs(source: Sequence[Document], target: Sequence[Document]) -> list[Pair]:
    """Paragraphs of the pages that both languages have, each with its translation.

    Pages are recognised by their ids. Paragraphs are paired one to one, in order, by length; pages that differ by more than
    a tenth of their paragraphs and pairs of very unequal length are left out.

    Raises
    ------
    CorpusError
        When no page has the id of one in the other language.
    """
    from nltk.translate.gale_church import align_blocks

    others = {document.id: document.text.split("\n\n") for document in target}
    pages = [(d.text.split("\n\n"), others[d.id]) for d in source if d.id in others]
    if not pages:
        raise CorpusError(
            f"None of {len(source)} documents has the id of one of the {len(target)} of the other language, so none can be "
            "paired with its translation. Take two languages of one corpus, such as debian-docs:en and debian-docs:fr, or "
            "files of equal names."
        )
    ratio = float(np.median([sum(map(len, other)) / sum(map(len, page)) for page, other in pages]))

    class Moves:
        """Gale and Church's parameters, but paragraphs do not merge: one to one, or left alone."""

        PRIORS: ClassVar = {(1, 1): 0.9, (1, 0): 0.05, (0, 1): 0.05}
        AVERAGE_CHARACTERS = ratio
        VARIANCE_CHARACTERS = 6.8

    pairs = []
    for page, other in pages:
        longest = max(len(page), len(other))
        if min(len(page), len(other)) < MIN_LINKED_RATIO * longest:
            continue
        links = align_blocks([len(text) for text in page], [len(text) for text in other], Moves)
        if len(links) >= MIN_LINKED_RATIO * longest:
            pairs += [(page[i], other[j]) for i, j in links]
    return [pair for pair in pairs if abs(np.log(len(pair[1]) / len(pair[0]) / ratio)) < np.log(MAX_LENGTH_RATIO)]


def parallel_paragraphs(original_spec: str, new_spec: str, progress: bool = True) -> dict[str, list[Pair]]:
    """Pairs of paragraphs of the original and the new domain, by split: `test` and `validation` hold none of the pages that
    a run with these corpora trains on.

    Between two artificial languages a translation is made: word by word, except that the words of a topic stay, as names do.
    """
    original = load_corpus(original_spec, progress=progress)
    if original_spec.startswith("synthetic:") and new_spec.startswith("synthetic:"):
        translated = _translate(original, original_spec, new_spec)
    else:
        translated = list(load_corpus(new_spec, progress=progress).documents)
    splits = split_documents(original.documents)
    return {name: aligned_pairs(splits[name], translated) for name in ("validation", "test")}


def _translate(original: Corpus, original_spec: str, new_spec: str) -> list[Document]:
    spec, other = (parse_synthetic(text.partition(":")[2]) for text in (original_spec, new_spec))
    source = load_language(spec.name, spec.n_words, spec.n_topics)
    words = load_language(other.name, spec.n_words, spec.n_topics).words

    def render(symbols: list[int]) -> str:
        return " ".join(words[s] if s < source.n_common else source.words[s] for s in symbols) + "."

    documents = []
    for document in original.documents:
        paragraphs = [source.parse(paragraph) for paragraph in document.text.split("\n\n")]
        text = "\n\n".join(" ".join(map(render, sentences)) for sentences in paragraphs)
        documents.append(Document(document.id, document.source, text, document.licence))
    return documents


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> list[list[int]]:
    """The first `n_tokens` token ids of each text.

    Raises
    ------
    CorpusError
        For a text without a token.
    """
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"][:n_tokens] for text in texts]
    for index, sequence in enumerate(sequences):
        if not sequence:
            raise CorpusError(f"Text {index} has no token, so no hidden state: {texts[index]!r}. Leave it out.")
    return sequences


@torch.no_grad()
def hidden_states(model: Any, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, Array]]:
    """For each sequence of token ids its index and the hidden states (L + 1, T, D): the embeddings, then every layer.

    The order is the batches' own, by length.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder: Any = inner.base_model  # without the output layer: no logits are needed
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        lengths = [len(sequences[index]) for index in batch]
        tokens, mask = torch.zeros(2, len(batch), max(lengths), dtype=torch.long, device=device)
        for row, index in enumerate(batch):
            tokens[row, : lengths[row]] = torch.tensor(sequences[index])
            mask[row, : lengths[row]] = 1
        found = decoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        stacked = torch.stack(found, dim=1).float().cpu().numpy()  # (B, L + 1, T, D)
        for row, index in enumerate(batch):
            yield index, stacked[row, :, : lengths[row]]
    model.train(was_training)


def mean_states(model: Any, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """One measurement (N, D) for each layer, the embeddings first: the mean hidden state of each sequence."""
    means: list[Any] = [None] * len(sequences)
    for index, states in hidden_states(model, sequences):
        means[index] = states.mean(axis=1)
    return list(np.stack(means, axis=1))


def token_histogram(sequences: Sequence[Sequence[int]], n_tokens: int) -> Array:
    """The measurement (N, V) that needs no model: how often each token of the vocabulary occurs."""
    histogram = np.zeros((len(sequences), n_tokens), dtype=np.float32)
    owners = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    np.add.at(histogram, (owners, np.concatenate([np.asarray(s) for s in sequences])), 1)
    return histogram
