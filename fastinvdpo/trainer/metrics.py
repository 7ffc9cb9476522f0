"""Sums of the training metrics, kept on the device so that a step never waits for a number to arrive on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from fastinvdpo.ops import PreferenceLoss

NAMES = (
    "loss",
    "margin",
    "implicit_accuracy",
    "policy_mse_winner",
    "policy_mse_loser",
    "reference_mse_winner",
    "reference_mse_loser",
)


class MetricSums:
    """Means since the last :meth:`read`: of the objective's metrics per micro-batch, of the gradient norm per step."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
        self._gradient_norm = torch.zeros((), dtype=torch.float64, device=device)
        self._micro_batches = 0
        self._steps = 0

    @torch.no_grad()
    def add(self, out: PreferenceLoss) -> None:
        """Add one micro-batch."""
        scalars = torch.stack([out.loss.detach(), out.margin.detach().mean(), out.implicit_accuracy])
        errors = torch.stack([out.policy_mse.detach(), out.reference_mse])
        per_side = errors.unflatten(1, (2, -1)).flatten(2).mean(2)  # policy, reference by winner, loser
        self._sums += torch.cat([scalars, per_side.flatten()])
        self._micro_batches += 1

    def add_step(self, gradient_norm: Tensor) -> None:
        """Add one optimizer step. One that fp16's gradient scaler skips, for an overflow, counts as zero."""
        norm = gradient_norm.detach()
        self._gradient_norm += torch.where(torch.isfinite(norm), norm, 0.0)
        self._steps += 1

    def device_means(self) -> Tensor:
        """The means as one device tensor, in the order of ``NAMES`` and then the gradient norm."""
        return torch.cat([self._sums / max(self._micro_batches, 1), self._gradient_norm.view(1) / max(self._steps, 1)])

    def clear(self) -> None:
        """Start the next interval."""
        self._sums.zero_()
        self._gradient_norm.zero_()
        self._micro_batches = self._steps = 0

    def state_dict(self) -> dict[str, Tensor | int]:
        """Everything, so that the averages of a resumed run are those of an uninterrupted one."""
        return {
            "sums": self._sums.cpu(),
            "gradient_norm": self._gradient_norm.cpu(),
            "micro_batches": self._micro_batches,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self._sums.copy_(torch.as_tensor(state["sums"]))
        self._gradient_norm.copy_(torch.as_tensor(state["gradient_norm"]))
        self._micro_batches, self._steps = int(state["micro_batches"]), int(state["steps"])


def names() -> tuple[str, ...]:
    """Names of the entries of :meth:`MetricSums.device_means`."""
    return (*NAMES, "gradient_norm")
