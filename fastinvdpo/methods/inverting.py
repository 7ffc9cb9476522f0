"""Methods that invert every latent to its pair's timestep."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

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
from fastinvdpo.diffusion.schedule import NoiseSchedule, recover_noise
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import Draws, PairBatch, check_count
from fastinvdpo.methods.single_timestep import SingleTimestepMethod, SingleTimestepObjective

Inverter = Literal["policy", "reference"]


@dataclass(frozen=True, kw_only=True)
class InvertingMethod(SingleTimestepMethod):
    """The policy inverts every latent to its timestep; the noise that this amounts to is recovered.

    Attributes:
        inverter: ``"policy"``, as published, or ``"reference"``, from which the policy should not go far: noisy latents
            then do not depend on what is trained.
        num_inference_steps: N, steps of the inversion's grid over the whole schedule.
        model_time: the level that the network gets in a step: its ``"destination"``, or its ``"source"``.
        static_shapes: all forward passes of an inversion have one shape (``diffusion/inversion.py``).
    """

    policy_inverts = True
    draw_options: ClassVar[tuple[str, ...]] = ("name", "compat", "num_inference_steps", "model_time")
    compats = ("released", "released-diffusers-0.20")

    num_inference_steps: int
    inverter: Inverter = "policy"
    model_time: ModelTime = "destination"
    static_shapes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_inference_steps", self.num_inference_steps)
        if self.inverter not in get_args(Inverter):
            raise invalid("inverter", self.inverter, "is not known", f"use one of {get_args(Inverter)}")
        if self.inverter == "reference" and self.compat is not None:
            raise invalid(
                "inverter", self.inverter, "is not what was released", "set compat to null, or inverter to policy"
            )
        self.settings()

    @abstractmethod
    def settings(self, seed: int = 0) -> InversionSettings:
        """How the steps of the inversion are made."""

    def inverting_network(self, policy: Network, reference: Network) -> Network:
        return reference if self.inverter == "reference" else policy

    @property
    def reference_draws(self) -> dict[str, Any] | None:
        return super().reference_draws if self.inverter == "reference" else None

    @property
    def fixed_shapes(self) -> bool:
        return self.static_shapes

    def trajectory(
        self, schedule: NoiseSchedule, network: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        if self.compat:
            old = self.compat == "released-diffusers-0.20"
            plan = plan_released(schedule, timesteps, self.num_inference_steps, diffusers_020=old)
        else:
            plan = plan_inversion(schedule, timesteps, self.num_inference_steps)
        noisy = invert(
            network,
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
