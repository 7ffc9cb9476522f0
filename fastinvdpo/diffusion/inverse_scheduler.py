"""A drop-in for diffusers' ``DDIMInverseScheduler``, its step one fused op."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
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

DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "clip_sample_range": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}


class _Config(dict[str, Any]):
    """A dictionary whose entries are attributes too, as diffusers' configurations are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DDIMInverseOutput:
    """The result of a step: ``prev_sample`` (diffusers' name for the noisier latent) and ``pred_original_sample``,
    computed when read.
    """

    def __init__(self, scheduler: DDIMInverseScheduler, model_output: Tensor, level: int, sample: Tensor) -> None:
        self._scheduler, self._model_output, self._level, self._sample = scheduler, model_output, level, sample
        self.prev_sample = scheduler._advance(model_output, level, sample)

    @functools.cached_property
    def pred_original_sample(self) -> Tensor:
        return self._scheduler._clean_and_noise(self._model_output, self._level, self._sample)[0]


class DDIMInverseScheduler:
    """DDIM inversion (arXiv 2010.02502, appendix F) with the configuration and calls of diffusers' class of that name.

    Differs from it in precision only: the coefficients of a step are computed in float64 and rounded once, and
    half-precision latents are advanced in float32 arithmetic.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, **config: Any) -> None:
        for name in config:
            if name not in DEFAULTS:
                raise invalid(
                    name, config[name], "is not a setting of this scheduler", f"use some of {', '.join(DEFAULTS)}"
                )
        self.config = _Config({**DEFAULTS, **config})
        if self.config.timestep_spacing not in ("leading", "trailing"):
            raise invalid(
                "timestep_spacing", self.config.timestep_spacing, "is not supported", "use leading or trailing"
            )
        self.schedule = NoiseSchedule.from_config(self.config)
        self.alphas_cumprod = self.schedule.alphas_cumprod.float()
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.schedule.num_train_timesteps)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any, **overrides: Any) -> DDIMInverseScheduler:
        """From the configuration of any diffusers scheduler (``pipe.scheduler.config``); entries of no use here are
        ignored.
        """
        entries = config if isinstance(config, Mapping) else getattr(config, "config", None)
        if not isinstance(entries, Mapping):
            raise invalid("config", type(config).__name__, "must be a scheduler configuration", "pass scheduler.config")
        return cls(**{**{name: value for name, value in entries.items() if name in DEFAULTS}, **overrides})

    @classmethod
    def from_pretrained(cls, path: str | Path, subfolder: str | None = None, **overrides: Any) -> DDIMInverseScheduler:
        """From a directory with ``scheduler_config.json``, or a hub id (through diffusers)."""
        file = Path(path, subfolder or "", "scheduler_config.json")
        if file.is_file():
            return cls.from_config(json.loads(file.read_text()), **overrides)
        if Path(path).exists():
            raise invalid("path", str(path), f"holds no {file.relative_to(path)}", "pass the folder of a scheduler")
        diffusers = require("diffusers", extra="train", purpose="loading a scheduler from the hub")
        return cls.from_config(diffusers.DDIMInverseScheduler.load_config(str(path), subfolder=subfolder), **overrides)

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: DDIM needs no scaling."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the levels of the inversion, ascending, in ``timesteps`` (int64)."""
        levels = inversion_levels(self.schedule, num_inference_steps)
        if self.config.timestep_spacing == "trailing":
            spacing = len(self) / num_inference_steps
            levels = (len(self) - spacing * torch.arange(num_inference_steps).double()).round().long().flip(0) - 1
        self.num_inference_steps = num_inference_steps
        self.timesteps = levels.to(device)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMInverseOutput | tuple[Tensor, Tensor]:
        """Advance ``sample`` ``(n, …)`` from the level below ``timestep`` to ``timestep``.

        ``timestep`` is one of ``timesteps``; a tensor is read on the host. Returns an object with ``prev_sample`` and
        ``pred_original_sample``, or the tuple of the two.
        """
        if self.num_inference_steps is None:
            raise invalid("num_inference_steps", None, "is not set", "call set_timesteps first")
        level = int(timestep)
        if not 0 <= level < len(self):
            raise invalid("timestep", level, "outside of the schedule", "pass an entry of scheduler.timesteps")
        output = DDIMInverseOutput(self, model_output, level, sample)
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def _source(self, level: int, sample: Tensor) -> Tensor:
        assert self.num_inference_steps is not None
        source = max(level - len(self) // self.num_inference_steps, -1)
        return torch.full((sample.shape[0],), source)

    def _clean_and_noise(self, model_output: Tensor, level: int, sample: Tensor) -> tuple[Tensor, Tensor]:
        clean, noise = predicted_clean_and_noise(self.schedule, sample, model_output, self._source(level, sample))
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return clean, noise

    def _advance(self, model_output: Tensor, level: int, sample: Tensor) -> Tensor:
        source = self._source(level, sample)
        target = torch.full_like(source, level)
        if self.config.clip_sample:
            # Clipping breaks the affine form: the two halves of the step, then, with the clipped x_0 between them.
            first, second = self._clean_and_noise(model_output, level, sample)
            scales = self.schedule.rates(target)
        else:
            first, second = sample, model_output
            scales = affine_coefficients(self.schedule, source, target)
        return affine_step(first, [second], stack_coefficients(first, *scales))
