"""A reference that follows the policy (``Method.reference_follows``), averaged in float32 whatever it computes in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastinvdpo.methods import Follows
from fastinvdpo.trainer.networks import Networks


class MovingReference:
    """``r ← δ·r + (1 − δ)·p`` after every so many optimizer steps, of all weights, or of those of the adapters.

    Args:
        networks: with ``reference="moving"``.

    Attributes:
        averages: r by name; the reference's own weights, unless those are in half precision.
        steps: optimizer steps so far.
    """

    def __init__(self, networks: Networks, follows: Follows) -> None:
        self._networks, self._follows, self.steps = networks, follows, 0
        module = networks.reference_module
        self._weights: dict[str, Tensor] = networks.reference_adapters or dict(module.named_parameters())  # type: ignore[union-attr]
        self.averages = {name: wide(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count an optimizer step, and move if it is time."""
        self.steps += 1
        if self.steps % self._follows.every:
            return
        policy, module = self._networks.policy_module, self._networks.reference_module
        trained = self._networks.trainable()
        for name, average in self.averages.items():
            average.lerp_(trained[name].to(average.dtype), 1 - self._follows.decay)
        self._write()
        if module is not None:
            buffers = dict(policy.named_buffers())
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Take over stored averages, bit for bit."""
        self.steps = steps
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self._write()

    def _write(self) -> None:
        for name, weight in self._weights.items():
            if weight is not self.averages[name]:
                weight.copy_(self.averages[name])


def wide(weight: Tensor) -> Tensor:
    """The tensor itself, or what it holds in float32."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.detach().float()
