"""Stops a run whose loss or gradient is not finite, without asking the device at every step.

A flag on the device is raised by the first bad pair and stays up. While it is up no update is applied, so the weights
remain those that met the bad pair; when the host looks (before logging, before a checkpoint, at the end), it computes
that pair again and reports what it finds. Checkpoints are written only after such a look, hence hold good weights.

How an update is held back: torch's fused optimizers leave everything untouched where ``found_inf`` is one (also on
CPU); under fp16 the loss is made NaN, so that the gradient scaler skips the step; for other optimizers the host looks
at every step.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fastinvdpo.errors import NonFiniteLoss
from fastinvdpo.methods import ObjectiveOutput, PairBatch
from fastinvdpo.ops import PreferenceLoss

_LOSS, _GRADIENT = 1, 2


class FiniteGuard:
    """The flag, and the draw that raised it. All state is on the device."""

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), dtype=torch.float32, device=device)  # as found_inf wants it: 0 or 1
        self._kind = torch.zeros((), dtype=torch.int64, device=device)
        self._draw = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def watch(self, out: PreferenceLoss, first_draw: int) -> None:
        """Raise the flag if the loss of a micro-batch, or anything about one of its pairs, is not finite."""
        errors = torch.stack([out.policy_mse.detach(), out.reference_mse]).unflatten(1, (2, -1))
        finite = torch.isfinite(errors if errors.ndim == 3 else errors.sum(3)).all(0).all(0)
        bad = ~(finite & torch.isfinite(out.margin.detach()))
        self._raise(_LOSS, bad.any() | ~torch.isfinite(out.loss.detach()), first_draw + bad.long().argmax())

    @torch.no_grad()
    def watch_gradient(self, norm: Tensor, first_draw: int) -> None:
        """Raise the flag if the norm of a step's gradient is not finite."""
        self._raise(_GRADIENT, ~torch.isfinite(norm), torch.full_like(self._draw, first_draw))

    def poison(self, loss: Tensor) -> Tensor:
        """The loss; while the flag is up NaN, with a gradient of NaN (a selection would have a gradient of zero)."""
        return loss * torch.where(self.found > 0, torch.nan, 1.0)

    def raised(self) -> tuple[str, int] | None:
        """Ask the device: None, or ("loss" or "gradient", first bad draw)."""
        kind, draw = torch.stack([self._kind, self._draw]).tolist()
        return None if kind == 0 else ("loss" if kind == _LOSS else "gradient", draw)

    def _raise(self, kind: int, condition: Tensor, draw: Tensor) -> None:
        first = condition & (self.found == 0)
        self._kind = torch.where(first, kind, self._kind)
        self._draw = torch.where(first, draw, self._draw)
        self.found = torch.maximum(self.found, condition.float())


def report_loss(batch: PairBatch, out: ObjectiveOutput, *, step: int, row: int, kept: str) -> NoReturn:
    """Raise :class:`NonFiniteLoss` about one pair.

    Args:
        batch: the pair alone; out: the objective's output for it, computed again.
        step: optimizer step, counted from 1; row: row in the data file.
        kept: what remains on disk, for the message.
    """
    raise NonFiniteLoss(
        f"The loss of step {step} is not finite: pair in data row {row} (draw {int(batch.sample_index[0])}), "
        f"{_timestep(out)}, "
        f"{_origin(batch, out)}. {_ending(kept)}"
    )


def report_gradient(*, step: int, rows: list[int], kept: str) -> NoReturn:
    """Raise :class:`NonFiniteLoss` about a step whose loss is finite and whose gradient is not."""
    shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
    raise NonFiniteLoss(
        f"The gradient of step {step} is not finite although its loss is; its pairs are in data rows {shown}. "
        + _ending(kept)
    )


def _ending(kept: str) -> str:
    return (
        f"No update was made with it. {kept} Remedy: look at the images and scores there, lower "
        "optimizer.learning_rate or method.beta, or train with mixed_precision bf16 or no."
    )


def _timestep(out: ObjectiveOutput) -> str:
    """The first timestep of the pair whose errors are not finite."""
    winner = out.timesteps.unflatten(0, (2, -1))[0].flatten()
    errors = torch.stack([out.policy_mse.detach(), out.reference_mse]).cpu()
    bad = (~torch.isfinite(errors)).any(0).any(0).flatten()
    timesteps = winner.tolist()
    if len(timesteps) == bad.numel() and bool(bad.any()):
        return f"timestep {timesteps[int(bad.long().argmax())]}"
    return f"timestep {timesteps[0]}" if len(timesteps) == 1 else f"timesteps {timesteps[0]} to {timesteps[-1]}"


def _origin(batch: PairBatch, out: ObjectiveOutput) -> str:
    """The earliest quantity that is not finite, and its side."""
    stages = {
        "latents": batch.latents,
        "scores": batch.scores,
        **{f"conditioning {name}": tensor for name, tensor in batch.conditioning.items()},
        "cached trajectory": batch.trajectory,
        "noisy latents": out.noisy_latents,
        "target": out.target,
        "reference prediction": out.reference_pred,
        "policy prediction": out.policy_pred,
    }
    for name, tensor in stages.items():
        if tensor is None:
            continue
        sides = (
            torch.isfinite(tensor.detach()).flatten(1).all(1).cpu() if tensor.ndim > 1 else torch.isfinite(tensor).cpu()
        )
        if not bool(sides.all()):
            side = "winner" if not bool(sides[0]) else "loser"
            return f"first in the {name} of the {side}"
    return "although everything the network returned is finite"
