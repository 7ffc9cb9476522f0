"""Which timestep a pair is scored at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.diffusion.schedule import FLOW, NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.ops import philox

DENSITIES = ("uniform", "logit-normal")


@dataclass(frozen=True)
class TimestepSampling:
    """How a pair's level is drawn.

    Attributes:
        range: first and last level, both included; all of the schedule when None. An SDXL refiner sees 0 to 199.
        values: the levels to draw from instead; SDXL-Turbo's are 249, 499, 749, 999.
        density: ``"uniform"``, or ``"logit-normal"`` (arXiv 2403.03206, section 3.1): the place in the range or list is
            ``1/(1 + exp(−z))`` with ``z ~ N(logit_mean, logit_std²)``, counted towards noise. None: logit-normal for
            flow matching, uniform else. The shift of a flow schedule is in its levels, so it acts on either.
    """

    range: Sequence[int] | None = None
    values: Sequence[int] | None = None
    density: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0

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
        """Raise ``InvalidInput`` unless there is something to draw, within the schedule."""
        last = schedule.num_train_timesteps - 1
        if self.range is not None and self.values is not None:
            raise invalid("timesteps.values", self.values, "cannot be had with timesteps.range", "drop one of them")
        if self.range is not None and not (len(self.range) == 2 and 0 <= self.range[0] <= self.range[1] <= last):
            remedy = f"give the first and the last level, from 0 to {last}"
            raise invalid("timesteps.range", list(self.range), "is not a range of levels", remedy)
        if self.values is not None and not (self.values and all(0 <= level <= last for level in self.values)):
            raise invalid("timesteps.values", list(self.values), "are not levels", f"list levels from 0 to {last}")
        if self.density not in (None, *DENSITIES):
            raise invalid("timesteps.density", self.density, "is not known", f"use one of {DENSITIES}, or null")
        if not self.logit_std > 0:
            raise invalid("timesteps.logit_std", self.logit_std, "must be positive", "the published value is 1")

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

    def probabilities(self, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """What :meth:`draw` draws from: levels int64 ``(n,)``, ascending, and how likely each is, float64 ``(n,)``."""
        levels = self._levels(schedule)
        count = len(levels)
        if self._is_uniform(schedule):
            return levels, torch.full((count,), 1 / count, dtype=torch.float64)
        edges = torch.arange(count + 1, dtype=torch.float64) / count
        below = torch.special.ndtr((torch.logit(edges) - self.logit_mean) / self.logit_std)  # ±∞ at both ends
        return levels, below.diff()

    def _levels(self, schedule: NoiseSchedule) -> Tensor:
        """All levels there are to draw, int64 on the host, ascending."""
        if self.values is not None:
            return torch.tensor(sorted(self.values))
        low, high = self.range or (0, schedule.num_train_timesteps - 1)
        return torch.arange(low, high + 1)

    def _is_uniform(self, schedule: NoiseSchedule) -> bool:
        return (self.density or ("logit-normal" if schedule.prediction_type == FLOW else "uniform")) == "uniform"
