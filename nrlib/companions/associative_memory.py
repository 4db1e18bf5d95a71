"""Weight matrices as associative memories: "Birth of a Transformer: A Memory Viewpoint", Bietti, Cabannes, Bouchacourt,
Jégou and Bottou, https://arxiv.org/abs/2306.00802.

A transformer whose embeddings are random and frozen, so that what each trained matrix stores can be read off: in high
dimension random vectors are nearly orthogonal, and W = Σ u_i v_iᵀ answers v_i with u_i.

    W_K1  key of layer 1      position t   -> position t - 1       the previous-token head
    W_K2  key of layer 2      trigger      -> "follows that trigger"   with W_K1, the induction head
    W_O2  output of layer 2   token seen   -> same token predicted     copying
    W_F   feed-forward        token        -> its successors           the bigram table

No library is needed beyond torch; `nrlib.companions.associative_memory_bigrams` makes the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .associative_memory_bigrams import BigramLanguage, Sequences


class MemoryTransformer(nn.Module):
    """The paper's simplified transformer: one head a layer, W_Q = I, no normalisation, linear feed-forward at the end.

        x_t      = E[z_t] + P[t]
        x       += W_O W_V attention(x)       scores x_t · W_K x_s / √D, causal
        x       += W_F x                      last layer only, if it has a feed-forward matrix
        x       += residue(x)                 where there is an adapter
        logits   = W_U x

    Trained are the keys of all layers, the output matrix of the last and W_F; all else stays as it was drawn.

    Parameters
    ----------
    n_tokens : N, size of the vocabulary.
    d_model : D, width.
    context_length : T, longest sequence.
    n_layers : attention layers, two for an induction head.
    has_feed_forward : whether the last layer has W_F.
    seed : of all weights.
    """

    embedding: Tensor
    position: Tensor
    unembedding: Tensor

    def __init__(
        self, n_tokens: int, d_model: int, context_length: int, *, n_layers: int = 2, has_feed_forward: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def linear(*shape: int) -> Tensor:  # as in torch's nn.Linear
            return (2 * torch.rand(*shape, generator=generator) - 1) / d_model**0.5

        self.register_buffer("embedding", normal(n_tokens, d_model))  # E (N, D)
        self.register_buffer("position", normal(context_length, d_model))  # P (T, D)
        self.register_buffer("unembedding", linear(n_tokens, d_model))  # W_U (N, D)
        square = (d_model, d_model)
        self.keys = nn.ParameterList([linear(*square) for _ in range(n_layers)])  # W_K
        self.values = nn.ParameterList([nn.Parameter(linear(*square), requires_grad=False) for _ in range(n_layers)])
        self.outputs = nn.ParameterList(
            [nn.Parameter(linear(*square), requires_grad=index == n_layers - 1) for index in range(n_layers)]
        )
        self.feed_forward = nn.Parameter(linear(*square)) if has_feed_forward else None  # W_F
        self.adapters = nn.ModuleList()  # one a layer, in a model that is being extended

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, N) of tokens (B, T)."""
        return self.run(tokens)[0]

    def run(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, T, N), and the attention (B, T, T) of each layer, row t what position t looks at."""
        x = self.embedding[tokens] + self.position[: tokens.shape[1]]  # (B, T, D)
        is_later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=x.device).triu(1)
        attentions = []
        for layer, key in enumerate(self.keys):
            scores = x @ (x @ key.T).transpose(1, 2) / x.shape[-1] ** 0.5
            attention = scores.masked_fill(is_later, -torch.inf).softmax(-1)
            attentions.append(attention)
            x = x + self.remap(attention @ x, layer)
            fed = x @ self.feed_forward.T if self.feed_forward is not None and layer == len(self.keys) - 1 else 0
            x = x + fed + (self.adapters[layer](x) if self.adapters else 0)
        return x @ self.unembedding.T, attentions

    def remap(self, x: Tensor, layer: int) -> Tensor:
        """W_O W_V x: how what a layer looks at arrives where it looks from."""
        return x @ self.values[layer].T @ self.outputs[layer].T


def train(
    model: MemoryTransformer,
    draw: Callable[[], Sequences],
    n_steps: int,
    learning_rate: float,
    *,
    loss_on: str = "in_context",
    measure_at: Sequence[int] = (),
    measure: Callable[[], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Stochastic gradient descent with momentum 0.9 and weight decay 1e-4, a new batch every step.

    Parameters
    ----------
    draw : gives the next batch.
    loss_on : 'in_context', only successors that the context holds, or 'all'.
    measure_at : after how many steps `measure` is called; its results are returned, each with its `step`.

    Raises
    ------
    ConfigError
        For another `loss_on`.
    FloatingPointError
        When the loss is no longer a number.
    """
    if loss_on not in ("in_context", "all"):
        raise ConfigError(f"loss_on = {loss_on!r} is not allowed. Choose in_context or all.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    found: list[dict[str, Any]] = []
    for step in range(n_steps + 1):
        if measure is not None and step in measure_at:
            found.append({"step": step, **measure()})
        if step == n_steps:
            break
        batch = draw()
        counts = batch.is_in_context if loss_on == "in_context" else torch.ones_like(batch.is_in_context)
        loss = F.cross_entropy(model(batch.inputs)[counts], batch.targets[counts])
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss.item()} at step {step}: choose a smaller learning_rate.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


@torch.no_grad()
def probe(model: MemoryTransformer, language: BigramLanguage) -> dict[str, float]:
    """What each matrix stores.

    Returns
    -------
    output : share of the language's tokens v for which W_O W_V E[v] points most to the unembedding of v.
    key_1 : share of positions t for which W_K1 answers P[t] with P[t - 1].
    key_2 : share of triggers for which W_K2 answers E[k] with W_O1 W_V1 E[k], against all tokens; two layers only.
    output_strength, key_1_strength, key_2_strength : the same graded: by how many standard deviations of the candidates'
        scores the right one lies above their mean, averaged.
    feed_forward : mean over the language's tokens of KL(bigram row || softmax(W_U W_F E[v])) in nats; with W_F only.
    """
    tokens, triggers = language.tokens, torch.tensor(language.triggers)
    copied = model.remap(model.embedding[tokens], -1) @ model.unembedding.T  # (tokens, N)
    previous = model.position[1:] @ model.keys[0] @ model.position.T  # (T - 1, T)
    associations = {"output": (copied, tokens), "key_1": (previous, torch.arange(len(previous)))}
    if len(model.keys) > 1:
        seen_before = model.remap(model.embedding, 0)  # (N, D), how layer 1 writes each token to the next position
        associations["key_2"] = (model.embedding[triggers] @ model.keys[1] @ seen_before.T, triggers)
    found = {}
    for name, (scores, right) in associations.items():
        found[name] = (scores.argmax(-1) == right).double().mean().item()
        standardised = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)
        found[f"{name}_strength"] = standardised.gather(1, right[:, None]).mean().item()
    if model.feed_forward is not None:
        found["feed_forward"] = table_divergence(stored_table(model)[tokens], language.bigram[tokens]).mean().item()
    return found


def stored_table(model: MemoryTransformer) -> Tensor:
    """The bigram table in W_F: log softmax(W_U W_F E[v]), row v for each token, (N, N) in nats.

    Raises
    ------
    ConfigError
        When the model has no W_F.
    """
    if model.feed_forward is None:
        raise ConfigError("The model has no feed-forward matrix to read. Make it with has_feed_forward=True.")
    return (model.embedding @ model.feed_forward.T @ model.unembedding.T).log_softmax(-1)


def table_divergence(log_table: Tensor, table: Tensor) -> Tensor:
    """KL(table || stored table) of each row in nats; zeros of the table count nothing."""
    return (torch.xlogy(table, table) - table * log_table).sum(-1)


@torch.no_grad()
def behaviour(model: MemoryTransformer, batch: Sequences) -> dict[str, float]:
    """What the model does on sequences.

    Returns
    -------
    in_context_accuracy : share of right predictions where the context holds the successor.
    bigram_loss : cross-entropy in nats where the table gives the successor.
    previous_attention : mean attention of layer 1 to the token before.
    induction_attention : mean attention of the last layer, where the context holds the successor, to all tokens that
        came after the same trigger.
    """
    logits, attentions = model.run(batch.inputs)
    chosen, is_global = batch.is_in_context, batch.occurrence == 0
    previous = attentions[0].diagonal(-1, 1, 2)  # (B, T - 1)
    follows = F.pad(batch.inputs, (1, -1), value=-1)  # the token before each position
    is_copy = batch.inputs[:, :, None] == follows[:, None, :]
    return {
        "in_context_accuracy": (logits.argmax(-1) == batch.targets)[chosen].double().mean().item(),
        "bigram_loss": F.cross_entropy(logits[is_global], batch.targets[is_global]).item(),
        "previous_attention": previous.mean().item(),
        "induction_attention": (attentions[-1] * is_copy).sum(-1)[chosen].mean().item(),
    }


def table_entropy(language: BigramLanguage, batch: Sequences) -> float:
    """The lowest `bigram_loss` there can be on these sequences: the table's own, in nats."""
    rows = batch.inputs[batch.occurrence == 0]
    return -torch.xlogy(language.bigram, language.bigram).sum(-1)[rows].mean().item()
