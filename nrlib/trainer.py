"""Neutral residues with Hugging Face's `Trainer`, and with TRL's `SFTTrainer`: a mixin that adds the local loss.

    class MyTrainer(nrlib.LocalLossMixin, Trainer): ...

    MyTrainer(model, arguments, train_dataset=dataset).train()  # dataset: input_ids, labels and the column domain

The same batches give the same losses as in `nrlib.training`. Kind and weight of the local loss are those of the model's
`NeutralResiduesConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ConfigError
from .losses import IGNORED, LocalLoss, is_counted
from .model_card import CardDetails, write_model_card
from .peft_method import active_config

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

DOMAIN = "domain"  # name of the column


class LocalLossMixin(_Trainer):
    """Adds the local loss to the loss of a trainer of causal language models; stands before it among the base classes.

    The dataset has a column `domain`: nrlib.ORIGINAL, NEW or IGNORED for each sequence, or a list with one for each of its
    tokens. As in `nrlib.training`, a token counts where there is a next one to predict: padding does not, nor does the last
    token of a sequence.

    The trainer's `loss` is the whole training loss; it is logged with its parts, `language_loss` and `local_loss`. In
    evaluation `eval_loss` is the language-model loss alone, and `eval_local_loss` stands beside it where the dataset has
    the column.

    Raises
    ------
    ConfigError
        Without active neutral residues or the column; for packing, which joins sequences of several domains; and for ways
        to share a batch out that would lose the domains (nn.DataParallel, context or sequence parallelism).
    """

    def __init__(
        self, model: Any = None, args: Any = None, data_collator: Any = None, train_dataset: Any = None, *more: Any,
        **options: Any,
    ) -> None:  # fmt: skip
        _check_arguments(args, train_dataset)
        super().__init__(model, args, data_collator, train_dataset, *more, **options)
        _check_parallelism(self)
        if active_config(self.model).local_loss != "none":
            _check_column(self.train_dataset)
        self.data_collator: Any = DomainCollator(self.data_collator)
        self._collected: LocalLoss | None = None  # of the training step that is under way
        self._n_counted: Tensor | None = None  # tokens of this optimiser step that count, over all processes
        self._start_logging()
        self._evaluated = torch.zeros(2)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if DOMAIN not in self._signature_columns:
            self._signature_columns.append(DOMAIN)  # remove_unused_columns must not remove it

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step. Counts their tokens, so that accumulation does not change the result."""
        samples, n_items = super().get_batch_samples(*args, **kwargs)
        kind = active_config(self.model).local_loss
        self._n_counted = None
        if kind != "none" and samples and all(DOMAIN in inputs for inputs in samples):
            counted = [is_counted(kind, token_domains(inputs)).sum() for inputs in samples]
            n_counted = torch.stack(counted).sum().to(self.args.device)
            self._n_counted = self.accelerator.gather(n_counted[None]).sum()
        self._n_logged_steps += 1
        return samples, n_items

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward, both inside `LocalLoss`: activation checkpointing repeats the one during the other."""
        config = active_config(self.model)
        domain = _pop_domain(inputs, self.args.device)
        if config.local_loss == "none":
            return super().training_step(model, inputs, *args, **kwargs)
        if domain is None:
            raise ConfigError(_NO_COLUMN.format(given="the batch holds: " + ", ".join(inputs)))
        try:
            with LocalLoss(model, config.local_loss, domain) as self._collected:
                return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._collected = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss plus, in training, local_loss_weight · local loss."""
        inputs.pop(DOMAIN, None)
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if self._collected is None:
            return result
        language_loss, *outputs = result if return_outputs else (result,)
        local_loss = self._local_loss(self._collected)
        n_divisor = self._n_divisor(num_items_in_batch)
        self._logged += torch.stack([language_loss.detach() / n_divisor, local_loss.detach()]).to(self._logged)
        loss = language_loss + active_config(self.model).local_loss_weight * local_loss * n_divisor
        return (loss, *outputs) if return_outputs else loss

    def _local_loss(self, collected: LocalLoss) -> Tensor:
        if self._n_counted is None:  # training_step was called by itself
            return collected.mean()
        total, _ = collected.sum_and_count()
        # Gradients are averaged over the processes: the factor makes that a mean over the tokens of all of them.
        n_summands = (self._n_counted * len(collected.adapters)).clamp(min=1)
        return total * self.accelerator.num_processes / n_summands

    def _n_divisor(self, num_items_in_batch: Any) -> int:
        """By what training_step divides what compute_loss returns: the number of micro-batches, or 1."""
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.19
        if is_scaled is None:
            is_scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = is_scaled or self.compute_loss_func is not None
        return 1 if is_scaled else self.current_gradient_accumulation_steps

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, with the local loss collected on the way."""
        kind = active_config(self.model).local_loss
        domain = _pop_domain(inputs, self.args.device)
        if domain is None or kind == "none":
            return super().prediction_step(model, inputs, *args, **kwargs)
        with LocalLoss(model, kind, domain) as collected:
            result = super().prediction_step(model, inputs, *args, **kwargs)
        self._evaluated = self._evaluated + torch.stack(collected.sum_and_count()).detach().cpu()
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The trainer's own, with the local loss among the metrics."""
        self._evaluated = torch.zeros(2)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.gather(self._evaluated[None].to(self.args.device)).sum(dim=0).tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_local_loss"] = total / count
        return output

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with the parts of the training loss."""
        if "loss" in logs and self._n_logged_steps and active_config(self.model).local_loss != "none":
            parts = self.accelerator.gather(self._logged[None].to(self.args.device)).mean(dim=0)
            language_loss, local_loss = (parts / self._n_logged_steps).tolist()
            logs |= {"language_loss": language_loss, "local_loss": local_loss}
            self._start_logging()
        super().log(logs, *args, **kwargs)

    def _start_logging(self) -> None:
        self._logged = torch.zeros(2, device=self.args.device)  # language-model loss and local loss since the last log
        self._n_logged_steps = 0

    def create_model_card(self, **options: Any) -> None:
        """The card of the adapters (`nrlib.model_card`) in place of the trainer's, which could not be loaded from.

        Takes language, license, tags and dataset (or dataset_name); other options of the trainers are not used.
        """
        if not self.is_world_process_zero():
            return
        details = CardDetails(
            repository=self.hub_model_id,
            datasets=options.get("dataset") or options.get("dataset_name"),
            language=options.get("language"),
            license=options.get("license"),
            tags=options.get("tags"),
        )
        write_model_card(active_config(self.model), self.args.output_dir, details)


class DomainCollator:
    """A collator that keeps the column `domain`, whatever the collator it wraps makes of unknown columns."""

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[Any]) -> Any:
        """The wrapped collator's batch, with domain (B,), or in the shape of input_ids where it is given per token."""
        if not any(isinstance(feature, Mapping) and DOMAIN in feature for feature in features):
            return self.collator(list(features))
        if not all(feature.get(DOMAIN) is not None for feature in features):
            raise ConfigError(_NO_COLUMN.format(given="some sequences have no value in it"))
        batch = self.collator([{k: v for k, v in feature.items() if k != DOMAIN} for feature in features])
        batch[DOMAIN] = _place([torch.as_tensor(feature[DOMAIN]) for feature in features], features, batch)
        return batch


def _place(domains: list[Tensor], features: Sequence[Any], batch: Mapping[str, Any]) -> Tensor:
    """Domains where the collator has put their tokens: padded on either side, or all in one row (padding-free)."""
    tokens = batch["input_ids"]
    if len(tokens) == len(features) and all(domain.dim() == 0 for domain in domains):
        return torch.stack(domains)
    lengths = [len(feature["input_ids"]) for feature in features]
    if wrong := [n for n, domain in zip(lengths, domains, strict=True) if domain.dim() and len(domain) != n]:
        raise ConfigError(
            f"A sequence of {wrong[0]} tokens has a list of another length in its column domain. Give one number for the "
            "sequence, or one for each of its tokens; SFTTrainer cuts input_ids to max_length, but not this column: cut "
            "both before."
        )
    joined = torch.cat([domain.expand(n) for n, domain in zip(lengths, domains, strict=True)])
    placed = torch.full_like(tokens, IGNORED)
    mask = batch.get("attention_mask")
    if len(tokens) == len(features) and all(n == tokens.shape[1] for n in lengths):
        return joined.reshape(tokens.shape)
    if len(tokens) == 1 and len(joined) <= tokens.shape[1]:  # anything after the sequences is padding
        placed[0, : len(joined)] = joined
    elif mask is not None and mask.shape == tokens.shape and mask.sum(dim=1).tolist() == lengths:
        placed[mask.bool()] = joined
    else:
        raise ConfigError(
            f"The data collator makes input_ids of shape {tuple(tokens.shape)} from {len(features)} sequences with "
            f"{sum(lengths)} tokens, and its attention_mask does not say where they are: the domains of the tokens cannot "
            "be placed. Use a collator that pads with an attention_mask, or give sequences of one length."
        )
    return placed


def token_domains(inputs: Mapping[str, Any]) -> Tensor:
    """The domain of every token of a batch, in the shape of input_ids (B, T); IGNORED where no next token is predicted.

    inputs : input_ids and domain; attention_mask (B, T), position_ids (from 0 in every sequence of a row) and
        shift_labels (then every token has a target) if there are any.
    """
    tokens, domain = inputs["input_ids"], inputs[DOMAIN]
    if not isinstance(domain, Tensor) or domain.is_floating_point() or len(domain) != len(tokens):
        raise ConfigError(
            f"The batch's domain must hold whole numbers for its {len(tokens)} sequences: nrlib.ORIGINAL, NEW or IGNORED "
            f"for each, or for each of its tokens; given is {domain!r:.80}."
        )
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and mask.shape != tokens.shape:
        raise ConfigError(
            f"attention_mask has the shape {tuple(mask.shape)}; to know which tokens are padding, the local loss needs one of "
            f"the shape of input_ids, {tuple(tokens.shape)}."
        )
    counts = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device).bool()
    if "shift_labels" not in inputs:
        is_followed = counts.roll(-1, dims=1)
        if positions is not None:
            is_followed &= positions.roll(-1, dims=1) != 0
        is_followed[:, -1] = False
        counts = counts & is_followed
    domain = domain.to(tokens.device).reshape(len(tokens), -1).expand(tokens.shape)
    return torch.where(counts, domain, IGNORED)


def _pop_domain(inputs: dict[str, Any], device: torch.device) -> Tensor | None:
    if DOMAIN not in inputs:
        return None
    domain = token_domains(inputs).to(device)
    del inputs[DOMAIN]
    return domain


_NO_COLUMN = (
    "The local loss needs to know the domain of every sequence, in a column 'domain' of the dataset: nrlib.ORIGINAL for text "
    "of the original domain, nrlib.NEW for the new one; {given}. Add the column (dataset.add_column), or extend the model "
    "with local_loss = 'none'."
)


def _check_column(dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list) and DOMAIN not in columns:
        raise ConfigError(_NO_COLUMN.format(given="the training set has the columns " + ", ".join(columns)))


def _check_arguments(args: Any, train_dataset: Any) -> None:
    """What can be refused before the trainer prepares its data."""
    if getattr(args, "packing", False) or getattr(args, "eval_packing", False):
        raise ConfigError(
            "packing = True joins sequences of several domains and drops the column domain. Set packing = False and "
            "eval_packing = False, or pack each domain by itself before (trl.pack_dataset with the strategy 'wrapped') and "
            "add the column then."
        )


def _check_parallelism(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"{trainer.args.n_gpu} GPUs in one process would be used through nn.DataParallel, which copies the model where the "
            "local loss cannot follow. Start one process for each GPU with torchrun or accelerate launch, or make one "
            "visible with CUDA_VISIBLE_DEVICES."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (
        getattr(parallelism, "cp_enabled", False) or getattr(parallelism, "sp_enabled", False)
    ):
        raise ConfigError(
            "Context and sequence parallelism cut sequences into parts, and the domains of the tokens would not follow. "
            "Use data parallelism (torchrun with DDP or FSDP)."
        )
