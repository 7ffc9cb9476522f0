"""One optimizer step, the same for every method: accumulate, clip, update, average; nothing waits for the device.

A run whose loss or gradient is not finite is stopped without asking the device at every step. A flag on the device is
raised by the first bad pair and stays up. While it is up no update is applied, so the weights remain those that met the
bad pair; when the host looks (before logging, before a checkpoint, at the end), it computes that pair again and reports
what it finds. Checkpoints are written only after such a look, hence hold good weights.

How an update is held back: torch's fused optimizers leave everything untouched where ``found_inf`` is one (also on
CPU); under fp16 the loss is made NaN, so that the gradient scaler skips the step; for other optimizers the host looks
at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastinvdpo.methods import (
    KTOOutput,
    Objective,
    ObjectiveOutput,
    PairBatch,
    TokenMethod,
    TokenObjective,
    TokenOutput,
    TrainingMethod,
)
from fastinvdpo.methods.statistics import AutoBeta
from fastinvdpo.methods.streaming import LossTerms
from fastinvdpo.ops import PreferenceLoss
from fastinvdpo.trainer.networks import EMA, MovingReference, Networks
from fastinvdpo.trainer.sharding import full

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOSS, _GRADIENT = 1, 2
SIDES, LABELS = ("winner", "loser"), ("liked", "disliked")
METRICS = ("loss", "margin", "implicit_accuracy")
_ERRORS = ("policy_mse", "reference_mse")


class MetricSums:
    """Means since the last :meth:`take`: of the objective's metrics per micro-batch, of the gradient norm per step.

    Kept on the device, so that a step never waits for a number to arrive on the host. Of single images that were judged
    the errors are those of liked and disliked ones, left out where there were none, and ``kappa`` and the share of
    liked ones are logged beside. Methods for models of image tokens name their own.
    """

    def __init__(self, device: torch.device, method: TrainingMethod) -> None:
        by_side = [f"{error}_{side}" for error in _ERRORS for side in (LABELS if method.unpaired else SIDES)]
        self._names: tuple[str, ...] = (*METRICS, *by_side, *(("kappa", "liked") if method.unpaired else ()))
        self._shares: dict[str, str] = {}
        if isinstance(method, TokenMethod):
            self._names, self._shares = method.metrics, method.shares
        self.sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self.gradient_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.micro_batches = self.steps = 0

    @torch.no_grad()
    def add(self, out: PreferenceLoss | TokenOutput) -> None:
        """Add one micro-batch."""
        self.sums += self._scalars(out)
        self.micro_batches += 1

    def _scalars(self, out: PreferenceLoss | TokenOutput) -> Tensor:
        if isinstance(out, TokenOutput):
            return torch.stack([out.metrics[name] for name in self._names])
        scalars = torch.stack([out.loss.detach(), out.margin.detach().mean(), out.implicit_accuracy])
        errors = torch.stack([out.policy_mse.detach(), out.reference_mse])
        if isinstance(out, KTOOutput):
            labels = torch.stack([out.liked, ~out.liked]).to(errors.dtype)
            per_side = (errors.unsqueeze(1) * labels).mean(2)
            return torch.cat([scalars, per_side.flatten(), torch.stack([out.kappa, labels[0].mean()])])
        per_side = errors.unflatten(1, (2, -1)).flatten(2).mean(2)  # policy, reference by winner, loser
        return torch.cat([scalars, per_side.flatten()])

    def add_step(self, gradient_norm: Tensor) -> None:
        """Add one optimizer step. One that fp16's gradient scaler skips, for an overflow, counts as zero."""
        norm = gradient_norm.detach()
        self.gradient_norm += torch.where(torch.isfinite(norm), norm, 0.0)
        self.steps += 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes; the next interval starts."""
        norm = self.gradient_norm.view(1) / max(self.steps, 1)
        means = accelerator.reduce(torch.cat([self.sums / max(self.micro_batches, 1), norm]), "mean")
        self.sums.zero_()
        self.gradient_norm.zero_()
        self.micro_batches = self.steps = 0
        found = dict(zip((*self._names, "gradient_norm"), means.tolist(), strict=True))
        shares = {name: found[share] for name, share in self._shares.items()}
        if "liked" in found:
            by_label = {"liked": found["liked"], "disliked": 1 - found["liked"]}
            shares = {f"{error}_{label}": by_label[label] for error in _ERRORS for label in by_label}
        for name, share in shares.items():
            value = found.pop(name)
            found |= {name: value / share} if share > 0 else {}
        return found

    def state_dict(self) -> dict[str, Tensor | int]:
        """Everything, so that the averages of a resumed run are those of an uninterrupted one."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in own.items()}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.sums.device) if isinstance(value, Tensor) else value)


class FiniteGuard:
    """The flag, and the draw that raised it. All state is on the device."""

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)  # as found_inf wants it: float32, 0 or 1
        self._kind, self._draw = torch.zeros(2, dtype=torch.int64, device=device)

    @torch.no_grad()
    def watch(self, out: PreferenceLoss | TokenOutput, first_draw: int) -> None:
        """Look at the loss of a micro-batch and at everything about its pairs."""
        if isinstance(out, TokenOutput):
            bad = ~torch.isfinite(out.entries.detach())
        else:
            errors = torch.stack([out.policy_mse.detach(), out.reference_mse]).unflatten(1, (-1, out.margin.numel()))
            finite = torch.isfinite(errors if errors.ndim == 3 else errors.sum(3)).all(0).all(0)
            bad = ~(finite & torch.isfinite(out.margin.detach()))
        self._raise(_LOSS, bad.any() | ~torch.isfinite(out.loss.detach()), first_draw + bad.long().argmax())

    @torch.no_grad()
    def watch_gradient(self, norm: Tensor, first_draw: int) -> None:
        """Look at the norm of a step's gradient."""
        self._raise(_GRADIENT, ~torch.isfinite(norm), first_draw)

    def poison(self, loss: Tensor) -> Tensor:
        """The loss; while the flag is up NaN, with a gradient of NaN (a selection would have a gradient of zero)."""
        return loss * torch.where(self.found > 0, torch.nan, 1.0)

    def raised(self) -> tuple[str, int] | None:
        """Ask the device: None, or ("loss" or "gradient", first bad draw)."""
        kind, draw = torch.stack([self._kind, self._draw]).tolist()
        return None if kind == 0 else ("loss" if kind == _LOSS else "gradient", draw)

    def _raise(self, kind: int, condition: Tensor, draw: Tensor | int) -> None:
        first = condition & (self.found == 0)
        self._kind = torch.where(first, kind, self._kind)
        self._draw = torch.where(first, draw, self._draw)
        self.found = torch.maximum(self.found, condition.float())


@dataclass
class TrainingState:
    """What an optimizer step changes, and what it needs.

    Attributes:
        optimizer: the optimizer as accelerate wrapped it.
        learning_rate: of the step made last.
        max_batch: network evaluations in one call at most; None: no limit.
        gradient_passes: how the gradient of a whole trajectory is streamed (:mod:`fastinvdpo.methods.streaming`).
    """

    networks: Networks
    optimizer: Any
    scheduler: Any
    parameters: list[nn.Parameter]
    ema: EMA | None
    metrics: MetricSums
    guard: FiniteGuard
    moving_reference: MovingReference | None = None
    auto_beta: AutoBeta | None = None
    learning_rate: float = 0.0
    max_batch: int | None = None
    gradient_passes: int = 2


def training_step(
    state: TrainingState,
    objective: Objective | TokenObjective,
    batches: Iterable[PairBatch],
    accelerator: Accelerator,
    *,
    accumulation: int,
    max_grad_norm: float | None,
    seed: int,
) -> None:
    """Take one optimizer step on ``accumulation`` micro-batches of equal size. Their mean losses are averaged, so the
    step is that of one batch with all their pairs.
    """
    guard, wrapped = state.guard, state.networks.wrapped
    # Here alone all processes call the objective together.
    objective = replace(objective, gather=accelerator.gather if accelerator.num_processes > 1 else None)
    first_draws: list[int] = []
    for micro, batch in enumerate(batches):
        first_draws.append(int(batch.sample_index[0]))
        terms: LossTerms = objective.stream(
            state.networks.policy,
            state.networks.reference,
            batch,
            seed=seed,
            max_batch=state.max_batch,
            passes=state.gradient_passes,
            parameters=state.parameters,
        )
        for call in range(terms.calls):
            last_call = call == terms.calls - 1
            # Processes exchange gradients once per optimizer step.
            exchange = micro == accumulation - 1 and last_call
            with nullcontext() if exchange else accelerator.no_sync(wrapped):
                loss = terms.term(call) / accumulation
                if last_call:
                    guard.watch(terms.result, first_draws[-1])
                    state.metrics.add(terms.result)
                accelerator.backward(guard.poison(loss) if accelerator.scaler is not None else loss)
    limit = torch.inf if max_grad_norm is None else max_grad_norm
    norm = full(accelerator.clip_grad_norm_(state.parameters, limit))
    state.metrics.add_step(norm)
    inner, held_back = state.optimizer.optimizer, False
    if accelerator.scaler is None:  # where there is one, it skips a step that overflows, and lowers its scale
        guard.watch_gradient(norm, first_draws[0])
        if inner.defaults.get("fused"):
            inner.found_inf = guard.found
        else:
            held_back = guard.raised() is not None
    if not held_back:
        state.optimizer.step()
    state.learning_rate = state.scheduler.get_last_lr()[0]
    state.scheduler.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update()
    if state.moving_reference is not None:
        state.moving_reference.update()


def origin(batch: PairBatch, out: ObjectiveOutput | TokenOutput) -> str:
    """Of one pair, which ``batch`` holds alone: the first timestep whose errors are not finite, the earliest quantity
    that is not, and its side.
    """
    if isinstance(out, TokenOutput):
        return "in the log-probabilities of its tokens"
    timesteps = out.timesteps.unflatten(0, (-1, out.margin.numel()))[0].flatten().tolist()
    bad = ~torch.isfinite(torch.stack([out.policy_mse.detach(), out.reference_mse])).all(0).all(0).flatten()
    if len(timesteps) == bad.numel() and bool(bad.any()):
        timesteps = [timesteps[int(bad.long().argmax())]]
    when = f"timestep {timesteps[0]}" if len(timesteps) == 1 else f"timesteps {timesteps[0]} to {timesteps[-1]}"
    sides = SIDES if batch.liked is None else ("image",)
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
        if tensor is not None:
            finite = torch.isfinite(tensor.detach()).reshape(len(sides), -1).all(1).tolist()
            if not all(finite):
                return f"{when}, first in the {name} of the {sides[finite.index(False)]}"
    return f"{when}, although everything the network returned is finite"
