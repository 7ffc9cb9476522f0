"""DDIM inversion of a batch whose samples end at levels of their own.

An inversion follows an :class:`InversionPlan`, the levels each sample visits. Plans live on the host, so walking one
never waits for the device. The samples with the longest way go first in the batch, so those still on their way are its
front: samples that have arrived leave it by slicing, and each costs exactly its own number of network evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network, Prompt, evaluate, weighted_sum
from fastinvdpo.diffusion.schedule import (
    NoiseSchedule,
    affine_coefficients,
    ancestral_variance,
    check_levels,
    inversion_levels,
    stack_coefficients,
)
from fastinvdpo.errors import invalid
from fastinvdpo.ops import affine_step
from fastinvdpo.ops.affine_step import MAX_OUTPUTS

ModelTime = Literal["destination", "source"]
"""The level whose timestep the network gets in a step."""


@dataclass(frozen=True)
class InversionPlan:
    """The levels that every sample of a batch visits. All tensors are int64 on the host.

    Attributes:
        source, target: ``(n, S)``: step ``j`` takes sample ``i`` from level ``source[i, j]`` to ``target[i, j]``.
        steps: ``(n,)``: the number of steps of each sample, at most S; entries beyond it are not used.
        noise_lower, noise_upper: ``(n, S)``: the interval whose ancestral variance scales the noise added after the
            step.
        model_times: ``(n, S)``: the timesteps that the network gets, where the settings do not say it.
    """

    source: Tensor
    target: Tensor
    steps: Tensor
    noise_lower: Tensor
    noise_upper: Tensor
    model_times: Tensor | None = None

    def select(self, rows: Tensor) -> InversionPlan:
        """The plan of some samples: ``rows`` is an int64 index into the batch, on the host."""
        return InversionPlan(**{name: table[rows] for name, table in vars(self).items() if table is not None})


def plan_inversion(schedule: NoiseSchedule, levels: Tensor, num_inference_steps: int) -> InversionPlan:
    """Every sample climbs the N-step grid and ends exactly at its own level: the last step is shortened.

    ``levels`` is int64 ``(n,)`` on the host, in ``[0, T_train)``. A sample at level ``t`` makes one step to every grid
    level below ``t`` and one to ``t``.
    """
    check_levels(schedule, levels)
    grid = inversion_levels(schedule, num_inference_steps)
    steps = torch.searchsorted(grid, levels.contiguous()) + 1
    highest = grid.new_full((1,), schedule.num_train_timesteps - 1)
    target = torch.minimum(torch.cat([grid, highest]), levels.unsqueeze(1))
    source = torch.cat([grid.new_full((1,), -1), grid]).expand(levels.numel(), -1)
    width = int(steps.max()) if levels.numel() else 0
    source, target = source[:, :width], target[:, :width]
    return InversionPlan(source, target, steps, source, target)


def plan_grid(schedule: NoiseSchedule, samples: int, num_inference_steps: int) -> InversionPlan:
    """Every sample climbs the whole N-step grid, to its last level."""
    return plan_levels(inversion_levels(schedule, num_inference_steps), samples)


def plan_levels(grid: Tensor, samples: int) -> InversionPlan:
    """Every sample climbs the whole of a grid of ascending levels."""
    target = grid.expand(samples, -1)
    source = torch.cat([grid.new_full((1,), -1), grid])[: len(grid)].expand(samples, -1)
    return InversionPlan(source, target, torch.full((samples,), len(grid)), source, target)


def plan_released(
    schedule: NoiseSchedule, levels: Tensor, num_inference_steps: int, *, diffusers_020: bool = False
) -> InversionPlan:
    """The grid of the released InPO and SmPO codes: the whole batch stops at the last grid level below the *first*
    sample's level, as they do under current versions of diffusers.

    There the noise takes its variance from the interval above the one just crossed (the last interval, which lies
    partly above the schedule, is cut at the highest level). Under diffusers 0.20, which they pin, the grid holds the
    source levels of the steps: the batch stops at the first grid level from there *on*, the noise is that of the
    interval just crossed, and the network gets the source, in the first step one spacing below the grid, which is
    negative.
    """
    check_levels(schedule, levels)
    grid, samples = inversion_levels(schedule, num_inference_steps), levels.numel()
    spacing = schedule.num_train_timesteps // num_inference_steps
    if diffusers_020:
        times = torch.cat([grid[:1] - spacing, grid[:-1]])
        steps = int((times < levels[0]).sum())
        plan, times = plan_levels(grid[:steps], samples), times[:steps].expand(samples, -1)
        source = times.clamp(min=-1)
        return replace(plan, source=source, noise_lower=source, model_times=times)
    plan = plan_levels(grid[grid < levels[0]], samples)
    upper = (plan.target + spacing).clamp(max=schedule.num_train_timesteps - 1)
    return replace(plan, noise_lower=plan.target, noise_upper=upper)


class InversionStep(NamedTuple):
    """One step of an inversion.

    Attributes:
        latents: ``(n, …)``, the whole batch after the step; samples that had arrived before are unchanged.
        rows: int64 ``(m,)`` on the host, the samples of the forward pass: those that made the step, longest way first,
            or all of them with ``static_shapes``.
        source: ``(m, …)``, their latents before it.
        outputs, weights: the step used the prediction ``Σ_j weights_j·outputs_j`` ``(m, …)``.
    """

    latents: Tensor
    rows: Tensor
    source: Tensor
    outputs: list[Tensor]
    weights: list[float]


@dataclass(frozen=True)
class InversionSettings:
    """How the steps of an inversion are made.

    Attributes:
        eta: after each step ``x += η·√V·z`` (DDIM-InPO, arXiv 2503.18454); no term is removed to compensate, as
            released.
        renoise_iterations: K of ReNoise (arXiv 2403.14602): each step is repeated K times with a forward pass at the
            tentative destination, and uses the mean of all K + 1 predictions.
        model_time: the timestep that the network gets: the "destination" level of the step (diffusers today), or its
            "source".
        seed, noise_offset: the key of the noise; step ``j`` draws with offset ``noise_offset + j``.
        static_shapes: put the whole batch through every forward pass and discard the outputs of samples that have
            arrived, so that all forward passes have one shape, as CUDA graphs and ``torch.compile`` want it. The
            results are the same; a batch costs its size times the longest way, not the sum of the ways.
    """

    eta: float = 0.0
    renoise_iterations: int = 0
    model_time: str = "destination"
    seed: int = 0
    noise_offset: int = 0
    static_shapes: bool = False

    def __post_init__(self) -> None:
        if self.model_time not in get_args(ModelTime):
            raise invalid("model_time", self.model_time, "is not known", f"use one of {get_args(ModelTime)}")
        if not 0 <= self.eta <= 1:
            raise invalid("eta", self.eta, "out of range", "use a number from 0 (deterministic) to 1")
        renoise = self.renoise_iterations
        if isinstance(renoise, bool) or not isinstance(renoise, int) or renoise < 0:
            raise invalid("renoise_iterations", renoise, "must be a whole number of at least 0", "use 0 or 1")


@torch.no_grad()
def inversion_steps(
    network: Network,
    schedule: NoiseSchedule,
    clean: Tensor,
    plan: InversionPlan,
    prompt: Prompt,
    settings: InversionSettings = InversionSettings(),
    *,
    noise_index: Tensor | None = None,
    noise: Tensor | None = None,
    trajectory: Tensor | None = None,
) -> Iterator[InversionStep]:
    """Walk ``clean`` latents ``(n, …)`` along ``plan``, one :class:`InversionStep` at a time, without gradient.

    Args:
        noise_index: int64 ``(n,)``, the noise stream of each sample when ``eta > 0`` (position in the batch when None).
        noise: ``(S, n, …)``, the normal numbers to use instead of the counter-based ones.
        trajectory: ``(n, S, …)`` in the dtype of ``clean``, receives the latents of the whole batch after every step.
    """
    if noise_index is None:
        noise_index = torch.arange(clean.shape[0], device=clean.device)
    if settings.static_shapes or bool((plan.steps.diff() <= 0).all()):
        yield from _walk(network, schedule, clean, plan, prompt, settings, noise_index, noise, trajectory)
        return
    # Samples with the longest way first: those that are still on their way are then always the front of the batch.
    order = torch.argsort(plan.steps, descending=True, stable=True)
    rows, back = order.to(clean.device), torch.argsort(order).to(clean.device)
    noise_index = noise_index[order.to(noise_index.device)]
    noise = None if noise is None else noise[:, order.to(noise.device)]
    ordered = (clean[rows], plan.select(order), prompt.select(order), settings, noise_index, noise)
    for number, step in enumerate(_walk(network, schedule, *ordered)):
        latents = step.latents[back]
        if trajectory is not None:
            trajectory[:, number] = latents
        yield step._replace(latents=latents, rows=order[step.rows])


def _walk(
    network: Network,
    schedule: NoiseSchedule,
    latents: Tensor,
    plan: InversionPlan,
    prompt: Prompt,
    settings: InversionSettings,
    noise_index: Tensor,
    noise: Tensor | None,
    trajectory: Tensor | None = None,
) -> Iterator[InversionStep]:
    """The steps of a batch in which nobody's way is longer than their predecessor's, or with ``static_shapes``."""
    device, samples = latents.device, latents.shape[0]
    # All tables reach the device before the first step, and no step needs the host.
    tables = _step_tables(schedule, plan, prompt, settings, latents)
    noise_scale = settings.eta * ancestral_variance(schedule, plan.noise_lower, plan.noise_upper).sqrt()
    noise_table = stack_coefficients(latents, noise_scale.T.flatten()).view(noise_scale.T.shape)
    times = plan.target if settings.model_time == "destination" else plan.source.clamp(min=0)
    times = (times if plan.model_times is None else plan.model_times).T.contiguous().to(device)
    moving = plan.steps > torch.arange(plan.target.shape[1]).unsqueeze(1)
    counts, mask = moving.sum(1).tolist(), moving.to(device) if settings.static_shapes else None
    for step, count in enumerate(counts):
        m = samples if settings.static_shapes else count
        active = None if mask is None or count == samples else mask[step]
        moving_prompt = prompt.first(m)
        source = target = latents[:m]
        # The step stores what it computes, where that is the latents of the whole batch.
        stored = trajectory[:, step] if trajectory is not None and m == samples and not settings.eta else None
        outputs: list[Tensor] = []
        for iteration, table in enumerate(tables, start=1):
            predictions, guidance = evaluate(network, target, times[step, :m], moving_prompt)
            outputs = outputs + predictions
            weights = [weight / iteration for weight in guidance] * iteration
            used = outputs if len(outputs) <= MAX_OUTPUTS else [weighted_sum(outputs, weights)]
            last = iteration == len(tables)
            target = affine_step(source, used, table[step, :m], active=active, trajectory=stored if last else None)
        if settings.eta:  # where the latents are: nobody has seen them yet
            one, scale = torch.ones_like(noise_table[step, :m]), noise_table[step, :m]
            if noise is not None:
                table, given = torch.stack([one, scale], dim=1), noise[step, :m].to(device)
                affine_step(target, [given], table, active=active, out=target)
            else:
                key: dict[str, Any] = {"seed": settings.seed, "offset": settings.noise_offset + step}
                key |= {"noise_scale": scale, "noise_index": noise_index[:m]}
                affine_step(target, [], one.unsqueeze(1), active=active, out=target, **key)
        latents = target if m == samples else torch.cat([target, latents[m:]])
        if trajectory is not None and stored is None:
            trajectory[:, step] = latents
        yield InversionStep(latents, torch.arange(m), source, outputs, weights)


def _step_tables(
    schedule: NoiseSchedule, plan: InversionPlan, prompt: Prompt, settings: InversionSettings, like: Tensor
) -> list[Tensor]:
    """The coefficients of ``affine_step``, ``(S, n, ·)`` for every ReNoise iteration, on the device of ``like``."""
    scale_out, scale_in = (table.T for table in affine_coefficients(schedule, plan.source, plan.target))
    tables = []
    for iteration in range(1, settings.renoise_iterations + 2):
        weights = [weight / iteration for weight in prompt.weights] * iteration
        if len(weights) > MAX_OUTPUTS:
            weights = [1.0]
        columns = [scale_out, *(scale_in * weight for weight in weights)]
        flat = stack_coefficients(like, *(column.flatten() for column in columns))
        tables.append(flat.unflatten(0, scale_out.shape))
    return tables


def invert(
    network: Network,
    schedule: NoiseSchedule,
    clean: Tensor,
    plan: InversionPlan,
    prompt: Prompt,
    settings: InversionSettings = InversionSettings(),
    *,
    noise_index: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The latents ``(n, …)`` at the end of ``plan``; arguments as :func:`inversion_steps`."""
    latents, given = clean, {"noise_index": noise_index, "noise": noise}
    for step in inversion_steps(network, schedule, clean, plan, prompt, settings, **given):
        latents = step.latents
    return latents
