"""Neutral residues together with new tokens for the new language.

The extended tokenizer encodes the original domain's text as before, so new tokens never enter it. They could still be
predicted on it: whatever probability they take there is lost to the backbone's own tokens. A gate with a memory on their
logits, and a loss on what they take, keep that small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture import count_weights
from ..backbone import get_backbone
from ..companions.vocabulary_extension import OldVocabulary, add_rows
from ..companions.vocabulary_material import prepare_material, profile_text
from ..companions.vocabulary_tokens import initial_rows
from ..errors import ConfigError
from ..evaluation import bits_per_byte, forgetting
from ..experiments import arm
from ..gate_memory import BlockGate
from ..losses import ORIGINAL
from ..methods import apply_method
from ..penalties import Penalty
from ..profiles import PRESETS
from ..runs import make_batches
from ..training import train

METHODS = ("neutral_residues", "lora", "fine_tuning")
CLOSED = -3.0  # score of a new gate: new tokens begin with a twentieth of what they would get without it


class NewTokenGate(nn.Module):
    """An output layer whose logits of new tokens are lowered by log σ(score), with one score for each position.

    Parameters
    ----------
    head : maps hidden states (B, T, D) to logits (B, T, V).
    d_model : D.
    n_old : the first tokens, which are the backbone's own and are left as they are.
    memory : tokens whose hidden states the score weighs together (see `nrlib.gate_memory`).
    """

    def __init__(self, head: nn.Module, d_model: int, n_old: int, memory: int) -> None:
        super().__init__()
        self.head, self.n_old = head, n_old
        self.block_gate = BlockGate(d_model, memory)
        nn.init.zeros_(self.block_gate.weight)
        nn.init.constant_(self.block_gate.bias, CLOSED)

    def forward(self, hidden: Tensor) -> Tensor:
        old, new = self.head(hidden).tensor_split([self.n_old], dim=-1)
        return torch.cat([old, new + F.logsigmoid(self.block_gate(hidden))], dim=-1)


def taken_by_new_tokens(logits: Tensor, n_old: int) -> Tensor:
    """−log of the probability of the first `n_old` tokens: what the others add to the loss of a text (…) that holds none
    of them, in nats a token, from logits (…, V)."""
    return logits.float().logsumexp(dim=-1) - logits[..., :n_old].float().logsumexp(dim=-1)


def penalty_on_new_tokens(n_old: int, weight: float) -> Penalty:
    """`weight` times the mean of `taken_by_new_tokens` over original-domain tokens: the local loss of the new tokens."""

    def penalty(inputs: Tensor, domain: Tensor, logits: Tensor, n_original: int, share: float) -> Tensor:
        return weight * taken_by_new_tokens(logits[domain == ORIGINAL], n_old).sum() / max(1, n_original)

    return penalty


def new_tokens(
    profile: str,
    method: str,
    n_new_tokens: int,
    new_token_weight: float,
    extra_ratio: float,
    n_tokens: int,
    mix_ratio: float,
    seed: int,
) -> dict[str, Any]:
    """Study: extend the backbone by a method and by new tokens of the new language.

    Parameters
    ----------
    method : 'neutral_residues' as recommended, with gated new tokens; 'lora' and 'fine_tuning' with ungated ones.
    n_new_tokens : rows of the embedding matrix, which is the output matrix as well. Each begins as its static vector
        mapped to the backbone's rows, see the chapter on bridging vocabularies.
    new_token_weight : of the loss on what the new tokens take on original-domain text; 0 but for neutral residues.
    extra_ratio : budget of the adapters alone; the rows come on top, and `extra_weights` counts both.

    Returns
    -------
    bits_per_byte, backbone_bits_per_byte : by held-out text.
    forgetting : outside the proxy; `forgetting_own_tokens` the same with the backbone's own tokens alone to choose from.
    extra_weights : over the backbone's.
    bytes_per_token, backbone_bytes_per_token : of held-out text of the new language.
    n_changed : tokens of held-out original-domain text that are encoded otherwise than before, of `n_held_out`.

    Raises
    ------
    ConfigError
        For another method, or a weight of a loss that the method does not have.
    """
    is_ours = method == "neutral_residues"
    if method not in METHODS or (new_token_weight > 0 and not is_ours):
        raise ConfigError(
            f"method = {method!r} with new_token_weight = {new_token_weight:g} is not possible. Methods: "
            f"{', '.join(METHODS)}; a weight above 0 only with neutral_residues, whose new tokens have a gate."
        )
    config = arm(
        profile, method, seed=seed, n_tokens=n_tokens, extra_ratio=extra_ratio, mix_ratio=mix_ratio,
        **(PRESETS["recommended"] if is_ours else {}),
    )  # fmt: skip
    own_text, material = profile_text(profile), prepare_material(profile, n_new_tokens)
    text, context_length = material.text, config.training.context_length
    names = ("unseen_original", "proxy", "new")
    backbone = get_backbone(config, own_text, progress=False)
    before = {name: bits_per_byte(backbone, own_text.held_out[name], context_length) for name in names}
    n_backbone = count_weights(backbone)
    own_rows = backbone.get_input_embeddings().weight.detach().cpu().double().numpy()
    n_old = len(own_rows)
    rows = torch.from_numpy(
        initial_rows(
            "mapped", own_rows, material.tokens, seed=seed, source=material.source, target=material.target,
            pairs=material.pairs,
        )
    ).float()  # fmt: skip
    model: Any = apply_method(backbone, config.method, seed)
    if method == "fine_tuning":
        model.resize_token_embeddings(n_old + len(rows), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[n_old:] = rows
    else:
        add_rows(model, rows)
    if is_ours:
        inner = model.get_base_model()
        gate = NewTokenGate(inner.get_output_embeddings(), own_rows.shape[1], n_old, config.method.gate_memory)
        inner.set_output_embeddings(gate)
        gate.block_gate.requires_grad_(True)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train(
        model, make_batches(config, text), config.training, local_loss=config.method.local_loss,
        local_loss_weight=config.method.local_loss_weight,
        penalty=penalty_on_new_tokens(n_old, new_token_weight) if new_token_weight > 0 else None, progress=False,
    )  # fmt: skip
    after = {name: bits_per_byte(model, text.held_out[name], context_length) for name in names}
    own = bits_per_byte(OldVocabulary(model, n_old), text.held_out["unseen_original"], context_length)
    lengths = [t.held_out["new"].n_bytes / (len(t.held_out["new"].tokens) - 1) for t in (text, own_text)]
    return {
        "bits_per_byte": {name: round(value, 5) for name, value in after.items()},
        "backbone_bits_per_byte": {name: round(value, 5) for name, value in before.items()},
        "forgetting": round(forgetting(after["unseen_original"], before["unseen_original"]), 5),
        "forgetting_own_tokens": round(forgetting(own, before["unseen_original"]), 5),
        "extra_weights": round(
            (len(rows) * own_rows.shape[1] if method == "fine_tuning" else n_trained) / n_backbone, 5
        ),
        "bytes_per_token": round(lengths[0], 3),
        "backbone_bytes_per_token": round(lengths[1], 3),
        "n_changed": material.n_changed,
        "n_held_out": material.n_held_out,
    }
