"""What ``fastinvdpo train --dry-run`` tells of a run beside its configuration: how often networks will be evaluated.

The objective itself counts, on a network that only counts and latents of one element, with the draws of the run's first
steps: nothing is loaded or measured, and there is no second copy of a method's arithmetic to keep true.
"""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastinvdpo.config import TrainConfig
from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.io import read_object
from fastinvdpo.methods import PairBatch, TrainingMethod
from fastinvdpo.models.loading import FLOW_FAMILIES
from fastinvdpo.trainer.accounting import gradient_passes
from fastinvdpo.trainer.order import DrawOrder

_PAIRS = 256  # counted at least, in whole micro-batches
_USUAL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Evaluations(NamedTuple):
    """Network evaluations (one sample through one network) a pair, mean over the ``pairs`` pairs counted."""

    with_gradient: float
    without_gradient: float
    pairs: int


def count_evaluations(config: TrainConfig, processes: int = 1) -> Evaluations:
    """Count the network evaluations of the first pairs of a run on the first of ``processes`` processes. Raises
    ``InvalidInput`` where method and schedule do not fit.
    """
    training, method = config.training, config.method
    if method.awaits_score_range:
        method = method.with_score_range(1.0)  # a weight, and no forward pass, follows from it
    objective = method.objective(None if method.of_tokens else _schedule(config))
    order = DrawOrder(1, training.seed, training.batch_size, training.gradient_accumulation_steps, processes)
    micro_batches = math.ceil(_PAIRS / training.batch_size)
    weight, counts = nn.Parameter(torch.zeros(1)), {True: 0, False: 0}
    stored = config.cache.path is not None and config.reference_options is not None  # by precompute, before the run

    def network(latents: Tensor, *others: Any, of_reference: bool = False) -> Tensor:
        if not (of_reference and stored):
            counts[torch.is_grad_enabled()] += len(latents)
        return latents * weight

    for number in range(micro_batches):
        objective.backward(
            network,
            torch.no_grad()(partial(network, of_reference=True)),
            _batch(order.micro_batch(*divmod(number, training.gradient_accumulation_steps)), method),
            seed=training.seed,
            max_batch=training.max_batch,
            passes=gradient_passes(config, "NO"),
            parameters=[weight],
        )
    pairs = micro_batches * training.batch_size
    return Evaluations(counts[True] / pairs, counts[False] / pairs, pairs)


def described(config: TrainConfig) -> str:
    """The counts as comment lines that may follow the configuration in YAML."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found, pairs, draws = count_evaluations(config, processes), config.effective_batch(processes), config.cache.draws
    stored = "" if draws is None else f"# Draws stored a pair: {draws}, of which a visit takes one.\n"
    return stored + (
        f"# Network evaluations a pair: {found.with_gradient:.6g} with gradient, {found.without_gradient:.6g} without"
        f" (mean of the first {found.pairs} pairs).\n"
        f"# Pairs a step: {pairs:,}, processes: {processes}; the run: "
        f"{pairs * config.training.steps * (found.with_gradient + found.without_gradient):,.0f} evaluations."
    )


def _schedule(config: TrainConfig) -> NoiseSchedule:
    """That of a checkpoint in a directory, else one of as many levels as published models have."""
    stored = Path(config.model.config or config.model.path, "scheduler", "scheduler_config.json")
    settings = read_object(stored, "model.path") if stored.is_file() else _USUAL
    flow = config.model.family in FLOW_FAMILIES or (config.method.flow_only and not stored.is_file())
    if flow or str(settings.get("_class_name", "")).startswith("FlowMatch"):
        return NoiseSchedule.flow(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    return NoiseSchedule.from_config(settings)


def _batch(draws: range, method: TrainingMethod) -> PairBatch:
    """A batch of latents of one element, or images of one token, two a pair or one a single image."""
    count = len(draws) if method.unpaired else 2 * len(draws)
    latents, prompts = torch.zeros(count, 1, 1, 1), {"prompt": torch.zeros(count, 1)}
    liked, index = torch.ones(count).bool() if method.unpaired else None, torch.arange(draws.start, draws.stop)
    if method.of_tokens:
        ones = torch.ones(count, dtype=torch.int64)
        return PairBatch(ones.unsqueeze(1), {"length": ones, "spoken": ones}, index)
    return PairBatch(latents, prompts, index, prompts, scores=torch.zeros(count), liked=liked, noise=latents)
