"""Diffusion-DPO, InPO and SmPO: methods that score a pair at one timestep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo.diffusion.inversion import InversionSettings, invert, plan_grid, plan_inversion, plan_released
from fastinvdpo.diffusion.prompt import Network, chunked
from fastinvdpo.diffusion.schedule import NoiseSchedule, add_noise, prediction_target, recover_noise
from fastinvdpo.errors import invalid
from fastinvdpo.methods.losses import PICKSCORE_RANGE, preference_loss, preference_probability, smoothed_pair_weight
from fastinvdpo.methods.pairs import (
    STREAM_INVERSION,
    STREAM_NOISE,
    STREAM_TIMESTEP,
    Draws,
    ObjectiveOutput,
    PairBatch,
    Preference,
    check_batch,
    checked_preference,
)
from fastinvdpo.methods.streaming import LossTerms, WholeLoss
from fastinvdpo.methods.timesteps import TimestepSampling
from fastinvdpo.ops import philox

Trajectory = Callable[[Network, PairBatch, Tensor, Draws, int], tuple[Tensor, Tensor]]
"""``trajectory(policy, batch, timesteps (2B,), draws, seed) -> (noisy latents, noise)``, both ``(2B, …)``."""

PairWeight = Callable[[PairBatch], Tensor]

Timesteps = TimestepSampling | Mapping[str, Any] | None
"""How timesteps are drawn: a :class:`TimestepSampling`, a mapping of some of its attributes, or None: the default."""

_DEFAULT_SAMPLING = TimestepSampling()


@dataclass(frozen=True)
class SingleTimestepObjective:
    """Diffusion-DPO, InPO and SmPO: one timestep per pair, scored against the noise that made the noisy latent."""

    schedule: NoiseSchedule
    preference: Preference
    trajectory: Trajectory
    pair_weight: PairWeight | None = None
    sampling: TimestepSampling = _DEFAULT_SAMPLING

    def __post_init__(self) -> None:
        self.sampling.check(self.schedule)

    def __call__(
        self, policy: Network, reference: Network, batch: PairBatch, *, seed: int, draws: Draws = Draws()
    ) -> ObjectiveOutput:
        check_batch(batch)
        drawn = draws.timesteps
        if drawn is None:
            drawn = self.sampling.draw(self.schedule, seed, STREAM_TIMESTEP, batch.draw)
        timesteps = drawn.repeat(2)
        noisy, noise = self.trajectory(policy, batch, timesteps, draws, seed)
        target = prediction_target(self.schedule, batch.latents, noise, timesteps)
        times = timesteps.to(noisy.device)
        policy_pred = policy(noisy, times, batch.conditioning)
        with torch.no_grad():
            reference_pred = reference(noisy, times, batch.conditioning)
        weight = None if self.pair_weight is None else self.pair_weight(batch)
        result = preference_loss(policy_pred, reference_pred, target, pair_weight=weight, **vars(self.preference))
        return ObjectiveOutput(**vars(result), timesteps=timesteps, noisy_latents=noisy, target=target,
                               policy_pred=policy_pred, reference_pred=reference_pred)  # fmt: skip

    def stream(
        self,
        policy: Network,
        reference: Network,
        batch: PairBatch,
        *,
        seed: int,
        max_batch: int | None = None,
        passes: int = 2,
        parameters: Sequence[nn.Parameter] = (),
    ) -> LossTerms:
        """As :meth:`InversionDPO.stream`. One timestep a pair makes one part; ``max_batch`` limits the calls."""
        limited = chunked(policy, max_batch), chunked(reference, max_batch)
        return WholeLoss(lambda: self(*limited, batch, seed=seed))


def diffusion_dpo(
    schedule: NoiseSchedule, *, timesteps: Timesteps = None, compat: str | None = None, **preference: Any
) -> SingleTimestepObjective:
    """Diffusion-DPO (arXiv 2311.12908): one forward noising, its noise shared by winner and loser. On a flow schedule
    it is Flow-DPO (arXiv 2501.13918) with a constant β: the target is the velocity ``ε − x_0``.
    """
    sampling = TimestepSampling.of(timesteps)

    def trajectory(
        policy: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        noise = draws.noise
        if noise is None:
            index = batch.draw.to(batch.latents.device)
            noise = philox.normal(seed, STREAM_NOISE, index, tuple(batch.latents.shape[1:]), batch.latents.dtype)
        noise = torch.cat([noise, noise])
        return add_noise(schedule, batch.latents, noise, timesteps), noise

    return SingleTimestepObjective(schedule, checked_preference(5000.0, preference), trajectory, sampling=sampling)


def inpo(
    schedule: NoiseSchedule,
    *,
    num_inference_steps: int = 10,
    eta: float = 0.1,
    model_time: str = "destination",
    static_shapes: bool = False,
    timesteps: Timesteps = None,
    compat: str | None = None,
    **preference: Any,
) -> SingleTimestepObjective:
    """DDIM-InPO (arXiv 2503.18454): the policy inverts each latent to the pair's timestep, with a little noise per
    step. ``static_shapes``: see :class:`~fastinvdpo.diffusion.inversion.InversionSettings`.
    """
    settings = InversionSettings(
        eta=eta, model_time=model_time, noise_offset=STREAM_INVERSION, static_shapes=static_shapes
    )
    trajectory = _inversion(schedule, num_inference_steps, settings, compat)
    sampling = TimestepSampling.of(timesteps)
    return SingleTimestepObjective(schedule, checked_preference(2000.0, preference), trajectory, sampling=sampling)


def smpo(
    schedule: NoiseSchedule,
    *,
    num_inference_steps: int = 5,
    renoise_iterations: int = 1,
    preference_scale: float = 10.0,
    score_range: float = PICKSCORE_RANGE,
    model_time: str = "destination",
    static_shapes: bool = False,
    timesteps: Timesteps = None,
    compat: str | None = None,
    **preference: Any,
) -> SingleTimestepObjective:
    """SmPO-Diffusion (arXiv 2506.02698): the policy inverts with ReNoise; pairs weigh by the strength of their
    preference. ``static_shapes``: see :class:`~fastinvdpo.diffusion.inversion.InversionSettings`.
    """
    settings = InversionSettings(
        renoise_iterations=renoise_iterations, model_time=model_time, static_shapes=static_shapes
    )
    trajectory = _inversion(schedule, num_inference_steps, settings, compat)

    def pair_weight(batch: PairBatch) -> Tensor:
        if batch.scores is None:
            raise invalid("batch.scores", None, "SmPO weighs pairs by their scores", "give the data score columns")
        winner, loser = batch.scores.chunk(2)
        probability = preference_probability(winner, loser, score_range)
        return smoothed_pair_weight(probability, preference_scale)

    # Fail now, not at the first batch.
    smoothed_pair_weight(preference_probability(torch.zeros(1), torch.zeros(1), score_range), preference_scale)
    chosen = checked_preference(2000.0, preference)
    return SingleTimestepObjective(schedule, chosen, trajectory, pair_weight, TimestepSampling.of(timesteps))


def _inversion(
    schedule: NoiseSchedule, num_inference_steps: int, settings: InversionSettings, compat: str | None
) -> Trajectory:
    """Invert every latent to its timestep, or in the released manner, and recover the noise that this amounts to."""
    plan_grid(schedule, 1, num_inference_steps)  # fail now, not at the first batch

    def trajectory(
        policy: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        plan = (plan_released if compat else plan_inversion)(schedule, timesteps, num_inference_steps)
        index = torch.cat([2 * batch.draw, 2 * batch.draw + 1]).to(batch.latents.device)
        noisy = invert(
            policy,
            schedule,
            batch.latents,
            plan,
            batch.prompt(),
            dataclasses.replace(settings, seed=seed),
            noise_index=index,
            noise=draws.noise,
        )
        levels = timesteps[:1].expand_as(timesteps) if compat else timesteps
        return noisy, recover_noise(schedule, noisy, batch.latents, levels)

    return trajectory
