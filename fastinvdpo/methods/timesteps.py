"""Which timestep a pair is scored at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastinvdpo.diffusion.schedule import FLOW, NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import STRICT
from fastinvdpo.ops import philox

Density = Literal["uniform", "logit-normal"]


@dataclass(frozen=True)
class TimestepSampling:
    """How a pair's level is drawn.

    Attributes:
        range: first and last level, both included; all of the schedule when None. An SDXL refiner sees 0 to 199.
        values: the levels to draw from instead; SDXL-Turbo's are 249, 499, 749, 999.
        density: ``"uniform"``, or ``"logit-normal"`` (arXiv 2403.03206, section 3.1): the place in the range or list is
            ``1/(1 + exp(−z))`` with ``z ~ N(logit_mean, logit_std²)``, counted towards noise. None: logit-normal for
            flow matching, uniform else. The shift of a flow schedule is in its levels, so it acts on either.

    Raises:
        InvalidInput: a value is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    range: Sequence[int] | None = None
    values: Sequence[int] | None = None
    density: Density | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.range is not None and self.values is not None:
            raise invalid("timesteps.values", self.values, "cannot be had with timesteps.range", "drop one of them")
        for name in ("range", "values"):
            levels = getattr(self, name)
            if levels is None:
                continue
            # A list, as a configuration file gives it.
            object.__setattr__(self, name, list(levels))
            if not levels or not all(isinstance(level, int) and level >= 0 for level in levels):
                raise invalid(f"timesteps.{name}", list(levels), "are not levels", "list whole numbers from 0")
        if self.range is not None and not (len(self.range) == 2 and self.range[0] <= self.range[1]):
            remedy = "give the first and the last level"
            raise invalid("timesteps.range", self.range, "is not a range of levels", remedy)
        if self.density not in (None, *get_args(Density)):
            raise invalid("timesteps.density", self.density, "is not known", f"use one of {get_args(Density)}, or null")
        if not math.isfinite(self.logit_mean):
            raise invalid("timesteps.logit_mean", self.logit_mean, "must be finite", "the published value is 0")
        if not 0 < self.logit_std < math.inf:
            raise invalid("timesteps.logit_std", self.logit_std, "must be positive", "the published value is 1")

    @classmethod
    def of(cls, given: TimestepSampling | Mapping[str, Any] | None) -> TimestepSampling:
        """From itself, from a mapping of its attributes, or the default. Raises ``InvalidInput`` for other keys."""
        if isinstance(given, TimestepSampling):
            return given
        known = cls.__dataclass_fields__
        for name in given or {}:
            if name not in known:
                raise invalid("timesteps", name, "is not an option of timesteps", f"use some of {', '.join(known)}")
        return cls(**(given or {}))

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise ``InvalidInput`` unless all levels are those of the schedule."""
        last = schedule.num_train_timesteps - 1
        for name, levels in (("range", self.range), ("values", self.values)):
            if levels is not None and max(levels) > last:
                raise invalid(f"timesteps.{name}", levels, "exceeds the schedule", f"use levels from 0 to {last}")

    def draw(self, schedule: NoiseSchedule, seed: int, offset: int, index: Tensor) -> Tensor:
        """Levels int64 ``(B,)``, one for each stream ``index`` int64 ``(B,)``."""
        levels = self._levels(schedule)
        if self._is_uniform(schedule):
            places = philox.integers(seed, offset, index, len(levels))
        else:
            normal = torch.special.ndtri(philox.uniform(seed, offset, index))  # a uniform 0 is −∞, and place 0
            share = torch.sigmoid(self.logit_mean + self.logit_std * normal)
            places = (share * len(levels)).long().clamp(max=len(levels) - 1)
        return int(levels[0]) + places if self.values is None else levels[places.cpu()]

    def _levels(self, schedule: NoiseSchedule) -> Tensor:
        """All levels there are to draw, int64 on the host, ascending."""
        if self.values is not None:
            return torch.tensor(sorted(self.values))
        low, high = self.range or (0, schedule.num_train_timesteps - 1)
        return torch.arange(low, high + 1)

    def _is_uniform(self, schedule: NoiseSchedule) -> bool:
        return (self.density or ("logit-normal" if schedule.prediction_type == FLOW else "uniform")) == "uniform"
