"""What can be seen to be wrong with a run before any work: its corpora, its backbone, its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import RunConfig
from .corpora import check_spec
from .errors import BackboneError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_run(config: RunConfig) -> None:
    """Check a run without reading its text: corpus specs, backbone, layers, extra ratio, length.

    Raises
    ------
    CorpusError, BackboneError, ConfigError
        One paragraph that names the value, what is allowed and what to do.
    """
    for spec in (config.data.original, config.data.proxy, config.data.unseen_original, config.data.new_domain):
        if spec:
            check_spec(spec)
    c = config.training
    n_tokens_per_step = c.batch_size * c.context_length
    if c.n_tokens < n_tokens_per_step:
        raise ConfigError(
            f"n_tokens = {c.n_tokens} is less than one batch of batch_size = {c.batch_size} sequences of "
            f"context_length = {c.context_length}: it must be at least {n_tokens_per_step}."
        )
    from .methods import apply_method

    apply_method(_untrained(config), config.method, config.seed)


def _untrained(config: RunConfig) -> PreTrainedModel:
    """A model of the backbone's shape: the budget and the layers depend on nothing else."""
    from .backbone import build_backbone, load_backbone

    if config.backbone.backbone_name:
        return load_backbone(config.backbone.backbone_name)
    b = config.backbone
    if b.d_model % b.n_heads:
        raise BackboneError(
            f"d_model = {b.d_model} cannot be split over n_heads = {b.n_heads}. Choose a divisor as n_heads."
        )
    return build_backbone(config, b.vocabulary_size, eos_token_id=0)
