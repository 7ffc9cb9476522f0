"""What Diffusion-DPO, InPO and SmPO share: a pair is scored at one timestep."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastinvdpo.diffusion.inversion import (
    InversionSettings,
    ModelTime,
    invert,
    plan_grid,
    plan_inversion,
    plan_released,
)
from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.diffusion.schedule import NoiseSchedule, prediction_target, recover_noise
from fastinvdpo.methods.base import Method, Objective, check_count
from fastinvdpo.methods.pairs import STREAM_TIMESTEP, Draws, ObjectiveOutput, PairBatch, check_batch
from fastinvdpo.methods.timesteps import TimestepSampling
from fastinvdpo.ops import preference_loss


@dataclass(frozen=True, kw_only=True)
class SingleTimestepMethod(Method):
    """A method that scores a pair at one timestep, against the noise that made the noisy latents.

    Attributes:
        timesteps: how timesteps are drawn: a :class:`TimestepSampling`, or a mapping of some of its attributes.
    """

    timesteps: TimestepSampling = TimestepSampling()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "timesteps", TimestepSampling.of(self.timesteps))

    @abstractmethod
    def trajectory(
        self, schedule: NoiseSchedule, policy: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        """``(noisy latents, noise)`` at ``timesteps`` int64 ``(2B,)`` on the host, both ``(2B, …)``."""

    def pair_weight(self, batch: PairBatch) -> Tensor | None:
        """What each pair's margin counts, ``(B,)``; None: 1."""
        return None

    def _objective(self, schedule: NoiseSchedule) -> SingleTimestepObjective:
        self.timesteps.check(schedule)
        return SingleTimestepObjective(schedule, self)


@dataclass(frozen=True, kw_only=True)
class InvertingMethod(SingleTimestepMethod):
    """The policy inverts every latent to its timestep; the noise that this amounts to is recovered.

    Attributes:
        num_inference_steps: N, steps of the inversion's grid over the whole schedule.
        model_time: the level that the network gets in a step: its ``"destination"``, or its ``"source"``.
        static_shapes: all forward passes of an inversion have one shape (``diffusion/inversion.py``).
    """

    policy_inverts = True

    num_inference_steps: int
    model_time: ModelTime = "destination"
    static_shapes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_inference_steps", self.num_inference_steps)
        self.settings()

    @abstractmethod
    def settings(self, seed: int = 0) -> InversionSettings:
        """How the steps of the inversion are made."""

    @property
    def fixed_shapes(self) -> bool:
        return self.static_shapes

    def trajectory(
        self, schedule: NoiseSchedule, policy: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        plan = (plan_released if self.compat else plan_inversion)(schedule, timesteps, self.num_inference_steps)
        noisy = invert(
            policy,
            schedule,
            batch.latents,
            plan,
            batch.prompt(),
            self.settings(seed),
            noise_index=torch.cat([2 * batch.sample_index, 2 * batch.sample_index + 1]).to(batch.latents.device),
            noise=draws.noise,
        )
        levels = timesteps[:1].expand_as(timesteps) if self.compat else timesteps
        return noisy, recover_noise(schedule, noisy, batch.latents, levels)

    def _objective(self, schedule: NoiseSchedule) -> SingleTimestepObjective:
        plan_grid(schedule, 1, self.num_inference_steps)  # fail now, not at the first batch
        return super()._objective(schedule)


@dataclass(frozen=True)
class SingleTimestepObjective(Objective):
    """The loss of a :class:`SingleTimestepMethod`."""

    method: SingleTimestepMethod

    def __call__(
        self, policy: Network, reference: Network, batch: PairBatch, *, seed: int, draws: Draws = Draws()
    ) -> ObjectiveOutput:
        check_batch(batch)
        drawn = draws.timesteps
        if drawn is None:
            drawn = self.method.timesteps.draw(self.schedule, seed, STREAM_TIMESTEP, batch.sample_index)
        timesteps = drawn.repeat(2)
        noisy, noise = self.method.trajectory(self.schedule, policy, batch, timesteps, draws, seed)
        target = prediction_target(self.schedule, batch.latents, noise, timesteps)
        times = timesteps.to(noisy.device)
        policy_pred = policy(noisy, times, batch.conditioning)
        with torch.no_grad():
            reference_pred = reference(noisy, times, batch.conditioning)
        weight = self.method.pair_weight(batch)
        preference = self.method.preference
        result = preference_loss(policy_pred, reference_pred, target, pair_weight=weight, **preference)
        return ObjectiveOutput(**vars(result), timesteps=timesteps, noisy_latents=noisy, target=target,
                               policy_pred=policy_pred, reference_pred=reference_pred)  # fmt: skip
