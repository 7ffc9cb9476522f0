"""Moving averages of the trained weights, by name and through checkpoints: the model that is written (EMA), and a
reference that follows the policy (``Method.reference_follows``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.methods import Follows
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.sharding import like


class EMA:
    """``average ← δ·average + (1 − δ)·weights`` after every optimizer step s, with ``δ = min(decay, s/(9 + s))``, and
    0 at the first: it grows, so that the average of a short run is not what it started from. diffusers' ``EMAModel``.

    ``parameters``: the trained weights by name; their storage is followed, not copied.
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
        _copy(self.averages, self._parameters)
        try:
            yield
        finally:
            _copy(own, self._parameters)


class MovingReference:
    """``r ← δ·r + (1 − δ)·p`` after every so many optimizer steps, of all weights, or of those of the adapters, in
    networks with ``reference="moving"``.

    Attributes:
        averages: r by name, in float32 at least; the reference's own weights, unless those are in half precision.
        steps: optimizer steps so far.
    """

    def __init__(self, networks: Networks, follows: Follows) -> None:
        self._networks, self._follows, self.steps = networks, follows, 0
        module = networks.reference_module
        self._weights: dict[str, Tensor] = networks.reference_adapters or dict(module.named_parameters())  # type: ignore[union-attr]
        exact = (torch.float32, torch.float64)
        self.averages = {name: p if p.dtype in exact else p.detach().float() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count an optimizer step, and move if it is time."""
        self.steps += 1
        if self.steps % self._follows.every:
            return
        trained, module = self._networks.trainable(), self._networks.reference_module
        for name, average in self.averages.items():
            average.lerp_(trained[name].to(average.dtype), 1 - self._follows.decay)
        _copy(self.averages, self._weights)
        if module is not None:
            _copy(dict(self._networks.policy_module.named_buffers()), dict(module.named_buffers()))

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Take over stored averages, bit for bit."""
        self.steps = steps
        _copy(averages, self.averages)
        _copy(self.averages, self._weights)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        if tensor is not values[name]:
            tensor.copy_(values[name])
