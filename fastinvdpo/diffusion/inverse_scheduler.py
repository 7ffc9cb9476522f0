"""A drop-in for diffusers' ``DDIMInverseScheduler`` whose step runs through the fused op: pipelines accept, save and
load it. It needs diffusers, and ``import fastinvdpo`` imports this module when the class is first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.diffusion.schedule import (
    NoiseSchedule,
    affine_coefficients,
    inversion_levels,
    predicted_clean_and_noise,
    stack_coefficients,
)
from fastinvdpo.errors import invalid
from fastinvdpo.ops import affine_step

require("diffusers", extra="train", purpose="DDIMInverseScheduler")

from diffusers.configuration_utils import ConfigMixin, register_to_config  # noqa: E402
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput  # noqa: E402
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: E402


class DDIMInverseScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """DDIM inversion (arXiv 2010.02502, appendix F) with the configuration and calls of diffusers' class of that name.

    It differs in precision only: coefficients are computed in float64 and rounded once, and half-precision latents are
    advanced in float32 arithmetic. Settings that it does not know are ignored, as in diffusers.
    """

    order = 1
    init_noise_sigma = 1.0
    ignore_for_config = ("kwargs",)  # type: ignore[assignment]
    _deprecated_kwargs = ("set_alpha_to_zero",)  # type: ignore[assignment]

    @register_to_config
    def __init__(  # noqa: PLR0913 - diffusers' signature
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        **kwargs: Any,
    ) -> None:
        if timestep_spacing not in ("leading", "trailing"):
            raise invalid("timestep_spacing", timestep_spacing, "is not supported", "use leading or trailing")
        if kwargs.get("set_alpha_to_zero") is not None:
            self.register_to_config(set_alpha_to_one=kwargs["set_alpha_to_zero"])
        self.schedule = NoiseSchedule.from_config(self.config)
        self.alphas_cumprod = self.schedule.alphas_cumprod.float()
        self.alphas = torch.cat([self.alphas_cumprod[:1], self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas
        self.initial_alpha_cumprod = self.schedule.alpha_bar(torch.tensor(-1)).float()
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.schedule.num_train_timesteps)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the configuration of a diffusers scheduler (``pipe.scheduler.config``), or the scheduler itself."""
        entries = config if isinstance(config, Mapping) else getattr(config, "config", None)
        if not isinstance(entries, Mapping):
            raise invalid("config", type(config).__name__, "must be a scheduler configuration", "pass scheduler.config")
        name = str(entries.get("_class_name", ""))
        # A configuration that was not loaded has no class name: these keys are flow matching's and EDM's.
        if name.startswith(("FlowMatch", "EDM")) or {"base_shift", "sigma_data"} & entries.keys():
            remedy = "invert flow matching with fastinvdpo.diffusion.inversion"
            raise invalid("config", name or dict(entries), "has no ᾱ that DDIM could invert along", remedy)
        return super().from_config(dict(entries), return_unused_kwargs=return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return ``sample``: DDIM needs no scaling."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the levels of the inversion, ascending, in ``timesteps`` (int64)."""
        levels = inversion_levels(self.schedule, num_inference_steps)
        if self.config["timestep_spacing"] == "trailing":
            spacing = len(self) / num_inference_steps
            levels = (len(self) - spacing * torch.arange(num_inference_steps).double()).round().long().flip(0) - 1
        self.num_inference_steps = num_inference_steps
        self.timesteps = levels.to(device)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Advance ``sample`` ``(n, …)`` from the level below ``timestep`` to ``timestep``, one of ``timesteps``.

        A tensor ``timestep`` is read on the host. Returns ``prev_sample`` (diffusers' name for the noisier latent) and
        ``pred_original_sample``, as an output of diffusers or as a tuple.
        """
        if self.num_inference_steps is None:
            raise invalid("num_inference_steps", None, "is not set", "call set_timesteps first")
        level = int(timestep)
        if not 0 <= level < len(self):
            raise invalid("timestep", level, "outside of the schedule", "pass an entry of scheduler.timesteps")
        source = torch.full((sample.shape[0],), max(level - len(self) // self.num_inference_steps, -1))
        target = torch.full_like(source, level)
        clean, noise = predicted_clean_and_noise(self.schedule, sample, model_output, source)
        if self.config["clip_sample"]:
            # Clipping breaks the affine form: the second half of the step starts from the clipped x_0.
            clean = clean.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
            first, second, scales = clean, noise, self.schedule.rates(target)
        else:
            first, second, scales = sample, model_output, affine_coefficients(self.schedule, source, target)
        advanced = affine_step(first, [second], stack_coefficients(first, *scales))
        return DDIMSchedulerOutput(advanced, clean) if return_dict else (advanced, clean)
