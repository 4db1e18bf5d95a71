"""The study of the chapter's first half: a network so small that its true perplexity is known, trained with and without
noise, and compressed in every way.

The text is drawn from a second-order Markov chain over `VOCABULARY` tokens, so a network of three linear layers that reads
two tokens can learn it completely, and its perplexity is summed over all contexts, without sampling.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from pandas.io.formats.style import Styler
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from .quant_noise import add_noise, ipq, refresh_noise, remove_noise
from .quant_noise_schemes import IntegerGrid, ProductQuantiser, Proxy, Scheme, compress

RESULT_VERSION = 1
VOCABULARY, SHARPNESS = 16, 4.0  # standard deviation of the chain's logits: about 2.2 likely successors of a context
D_MODEL, D_HIDDEN, BATCH_SIZE, LEARNING_RATE = 64, 256, 256, 3e-3
IPQ_SHARE, IPQ_RATE_RATIO = 0.5, 1 / 3  # finetuning of the centroids: share of the steps in all, share of the rate

# One scale for a whole weight, as in the paper; 6 bits for a block of 8 weights.
SCHEMES: dict[str, Scheme] = {
    **{f"int{n_bits}": IntegerGrid(n_bits, per_row=False) for n_bits in (8, 4, 3)},
    "pq": ProductQuantiser(8, 64),
}
NOISES: dict[str, Any] = {**SCHEMES, "proxy": Proxy(8)}


# What the chapter compares: its name, and the arguments of `markov_study`.
TRAININGS: dict[str, dict[str, Any]] = {
    "without noise": {},
    "4-bit noise on half": {"noise": "int4", "noise_ratio": 0.5},
    "4-bit noise on all": {"noise": "int4", "noise_ratio": 1.0},
    "3-bit noise on half": {"noise": "int3", "noise_ratio": 0.5},
    "3-bit noise on all": {"noise": "int3", "noise_ratio": 1.0},
    "zeros in a fifth": {"noise": "proxy", "noise_ratio": 0.2},
    "codebook noise on a fifth": {"noise": "pq", "noise_ratio": 0.2},
    "codebook noise on all": {"noise": "pq", "noise_ratio": 1.0},
    "the same, fresh codebooks": {"noise": "pq", "noise_ratio": 1.0, "refresh_every": 100},
}


def markov_settings(profile: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every training in `TRAININGS` with every seed, for `run_study`; on the smoke profile far too short to show much."""
    n_steps = 100 if profile == "smoke" else 1200
    return [{**options, "seed": seed, "n_steps": n_steps} for options in TRAININGS.values() for seed in seeds]


def markov_table(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each result: its training, its seed and every perplexity."""
    names = {_key(options): name for name, options in TRAININGS.items()}
    rows = [
        {
            "training": names[_key(r)],
            "seed": r["seed"],
            **r["perplexity"],
            "seconds": r["seconds"],
            "device": r["device"],
        }
        for r in results
    ]
    return pd.DataFrame(rows)


def readable_perplexities(table: pd.DataFrame) -> Styler:
    """Lowest and highest perplexity over the seeds for each training and compression."""
    columns = ["float", *SCHEMES, "ipq"]
    rows = {name: group[columns].agg(_span) for name, group in table.groupby("training", sort=False)}
    shown = pd.DataFrame(rows).T.rename_axis("training").reset_index()
    return shown.style.hide(axis="index")


def _span(values: pd.Series[float]) -> str:
    low, high = (f"{value:.2f}" if value < 1000 else f"{value:.0e}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _key(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of `markov_study` in which trainings differ."""
    defaults = inspect.signature(markov_study).parameters
    varied = sorted({name for training in TRAININGS.values() for name in training})
    return tuple(options.get(name, defaults[name].default) for name in varied)


def markov_study(
    *, seed: int, noise: str = "none", noise_ratio: float = 0.0, refresh_every: int = 300, n_steps: int = 1200
) -> dict[str, Any]:
    """Train the small network with one kind of noise, then compress it in every way.

    Parameters
    ----------
    seed : of the chain, the weights, the text and the noise.
    noise : 'none', or a name in `NOISES`.
    noise_ratio : share of blocks that are noised at each step; 1 is quantisation-aware training.
    refresh_every : steps between new codebooks.
    n_steps : optimiser steps.

    Returns
    -------
    perplexity by name: `chain` (the least there can be), `float`, each of `SCHEMES`, and `ipq`.
    """
    check_noise(noise, NOISES)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        chain = torch.softmax(SHARPNESS * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY), dim=-1)
        network = build_network()
    linears = linears_of(network)
    if noise != "none":
        add_noise(linears, NOISES[noise], noise_ratio, torch.Generator().manual_seed(seed))
    train_network(
        network, chain, n_steps, LEARNING_RATE, seed,
        after=lambda step: refresh_noise(linears.values()) if step % refresh_every == 0 else None,
    )  # fmt: skip
    remove_noise(linears.values())
    found = {"chain": chain_perplexity(chain), "float": perplexity(network, chain)}
    found |= {name: perplexity(_compressed(network, scheme), chain) for name, scheme in SCHEMES.items()}
    found["ipq"] = perplexity(_after_ipq(network, chain, n_steps, seed), chain)
    return {"perplexity": {name: float(f"{value:.5g}") for name, value in found.items()}}


def check_noise(noise: str, allowed: Sequence[str] | dict[str, Any]) -> None:
    """Raise ConfigError for a noise that has no such name."""
    if noise != "none" and noise not in allowed:
        raise ConfigError(f"noise = {noise!r} is unknown. Choose one of: none, {', '.join(allowed)}.")


def build_network() -> nn.Module:
    """Two tokens (B, 2) to logits (B, V), from torch's random state."""
    return nn.Sequential(
        nn.Embedding(VOCABULARY, D_MODEL),
        nn.Flatten(),
        nn.Linear(2 * D_MODEL, D_HIDDEN),
        nn.ReLU(),
        nn.Linear(D_HIDDEN, D_HIDDEN),
        nn.ReLU(),
        nn.Linear(D_HIDDEN, VOCABULARY),
    )


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def train_network(
    network: nn.Module,
    chain: Tensor,
    n_steps: int,
    learning_rate: float,
    seed: int,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """Train on text drawn from the chain (V, V, V), calling `after(number of steps done)`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps, pct_start=0.1)
    joint = (stationary(chain)[..., None] * chain).flatten()  # (V·V·V,)
    network.train()
    for step in range(n_steps):
        drawn = torch.multinomial(joint, BATCH_SIZE, replacement=True, generator=generator)
        first, second, target = torch.unravel_index(drawn, chain.shape)
        F.cross_entropy(network(torch.stack([first, second], dim=1)), target).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        after(step + 1)
    network.eval()


def stationary(chain: Tensor) -> Tensor:
    """Probability (V, V) of each pair of neighbouring tokens."""
    pairs = torch.full(chain.shape[:2], 1 / chain.shape[0] ** 2)
    for _ in range(200):
        pairs = torch.einsum("ab,abc->bc", pairs, chain)
    return pairs / pairs.sum()


@torch.no_grad()
def perplexity(network: nn.Module, chain: Tensor) -> float:
    """exp of the expected loss over all contexts; at most 1e30, where a network has diverged."""
    tokens = torch.arange(chain.shape[0])
    logits = network(torch.cartesian_prod(tokens, tokens)).double()
    loss = -(stationary(chain)[..., None] * chain * torch.log_softmax(logits, dim=-1).reshape(chain.shape)).sum()
    return float(loss.nan_to_num(nan=70.0).clamp(max=69.0775).exp())


def chain_perplexity(chain: Tensor) -> float:
    """The perplexity of the chain itself, which no network can beat."""
    return float((-(stationary(chain)[..., None] * chain * chain.log()).sum()).exp())


def _compressed(network: nn.Module, scheme: Scheme) -> nn.Module:
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, linear in linears_of(network).items():
            linear.weight.copy_(compress(linear.weight, scheme, name).weight())
    return network


def _after_ipq(network: nn.Module, chain: Tensor, n_steps: int, seed: int) -> nn.Module:
    """A copy, quantised layer by layer from the first to the last, finetuned after each."""
    network = copy.deepcopy(network)
    groups = [{name: linear} for name, linear in linears_of(network).items()]
    share = max(2, round(IPQ_SHARE * n_steps / len(groups)))
    scheme = SCHEMES["pq"]
    assert isinstance(scheme, ProductQuantiser)
    ipq(
        groups, scheme,
        lambda index: train_network(network, chain, share, IPQ_RATE_RATIO * LEARNING_RATE, seed + 1000 + index),
    )  # fmt: skip
    return network
