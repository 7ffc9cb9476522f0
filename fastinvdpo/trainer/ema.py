"""Exponential moving average of the trained weights: diffusers' ``EMAModel``, by name and through checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.trainer.sharding import like


class EMA:
    """``average ← δ·average + (1 − δ)·weights`` after every optimizer step s, with ``δ = min(decay, s/(9 + s))``, and
    0 at the first: it grows, so that the average of a short run is not what it started from.

    Args:
        parameters: the trained weights by name; their storage is followed, not copied.
        decay: between 0 and 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        training = require("diffusers.training_utils", extra="train", purpose="training.ema_decay")
        self._parameters = dict(parameters)
        self._model = training.EMAModel(list(self._parameters.values()), decay=decay, foreach=True)

    @property
    def averages(self) -> dict[str, Tensor]:
        return dict(zip(self._parameters, self._model.shadow_params, strict=True))

    @property
    def steps(self) -> int:
        """Updates so far."""
        return int(self._model.optimization_step)

    def update(self) -> None:
        """Move the averages towards the weights of now."""
        self._model.step(list(self._parameters.values()))

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Take over stored averages, bit for bit."""
        self._model.optimization_step = steps
        for name, average in self.averages.items():
            average.copy_(like(averages[name], average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the averages; afterwards its own weights again."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
