"""One optimizer step, the same for every method: accumulate, clip, update, average; nothing waits for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.methods import Objective, PairBatch
from fastinvdpo.methods.statistics import AutoBeta
from fastinvdpo.trainer.ema import EMA
from fastinvdpo.trainer.metrics import MetricSums
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.nonfinite import FiniteGuard
from fastinvdpo.trainer.reference import MovingReference
from fastinvdpo.trainer.sharding import full

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config.sections import OptimizerSection


@dataclass
class TrainingState:
    """What an optimizer step changes.

    Attributes:
        optimizer: the optimizer as accelerate wrapped it.
        scheduler: learning rate schedule, stepped once per optimizer step.
        parameters: the trained weights.
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
    objective: Objective,
    batches: Iterable[PairBatch],
    accelerator: Accelerator,
    *,
    accumulation: int,
    max_grad_norm: float | None,
    seed: int,
) -> None:
    """Take one optimizer step on ``accumulation`` micro-batches of equal size.

    Their mean losses are averaged, so the step is that of one batch with all their pairs.
    """
    guard, wrapped = state.guard, state.networks.wrapped
    # Here alone all processes call the objective together.
    objective = replace(objective, gather=accelerator.gather if accelerator.num_processes > 1 else None)
    first_draw = -1
    for micro, batch in enumerate(batches):
        draw = int(batch.sample_index[0])
        first_draw = draw if micro == 0 else first_draw
        terms = objective.stream(
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
                    guard.watch(terms.result, draw)
                    state.metrics.add(terms.result)
                accelerator.backward(guard.poison(loss) if accelerator.scaler is not None else loss)
    norm = accelerator.clip_grad_norm_(state.parameters, torch.inf if max_grad_norm is None else max_grad_norm)
    norm = full(norm)
    state.metrics.add_step(norm)
    _update(state, accelerator, norm, first_draw)
    state.learning_rate = state.scheduler.get_last_lr()[0]
    state.scheduler.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update()
    if state.moving_reference is not None:
        state.moving_reference.update()


def _update(state: TrainingState, accelerator: Accelerator, norm: torch.Tensor, first_draw: int) -> None:
    """Apply the gradient unless something was not finite."""
    inner = state.optimizer.optimizer
    if accelerator.scaler is not None:
        state.optimizer.step()  # an overflow is the scaler's business: it skips the step and lowers its scale
        return
    state.guard.watch_gradient(norm, first_draw)
    if inner.defaults.get("fused"):
        inner.found_inf = state.guard.found
        state.optimizer.step()
    elif state.guard.raised() is None:
        state.optimizer.step()


def build_optimizer(
    settings: OptimizerSection, parameters: list[nn.Parameter], effective_batch: int, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its learning rate schedule (diffusers').

    ``scale_lr`` multiplies the learning rate by ``effective_batch``, the pairs per optimizer step over all processes.
    """
    rate = settings.learning_rate * (effective_batch if settings.scale_lr else 1)
    options: dict[str, Any] = {"lr": rate, "weight_decay": settings.weight_decay}
    adam: dict[str, Any] = {"betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    optimizer: torch.optim.Optimizer
    if settings.name == "adafactor":
        # Not PyTorch's, which always scales by the size of a weight; as the released codes call it for SDXL.
        transformers = require("transformers.optimization", extra="train", purpose="optimizer.name = adafactor")
        optimizer = transformers.Adafactor(
            parameters, **options, clip_threshold=1.0, scale_parameter=False, relative_step=False
        )
    elif settings.name == "adamw8bit":
        bitsandbytes = require("bitsandbytes", extra="bnb", purpose="optimizer.name = adamw8bit")
        _check_kernel(parameters[0].device.type)
        _check_updates(bitsandbytes.optim.AdamW8bit, parameters[0].device)
        optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options, **adam)
    else:
        # Fused: one pass over the weights, and it can hold an update back without asking the device (nonfinite.py).
        optimizer = torch.optim.AdamW(parameters, fused=True, **options, **adam)
    optimization = require("diffusers.optimization", extra="train", purpose="learning rate schedules")
    scheduler = optimization.get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
    )
    return optimizer, scheduler


def _check_kernel(device_type: str) -> None:
    """Raise ``InvalidInput`` where bitsandbytes, which must have been imported, cannot update weights on a device."""
    name = "bitsandbytes::optimizer_update_8bit_blockwise"
    keys = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}
    key = keys.get(device_type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
        problem = f"has no kernels for {device_type} in the installed bitsandbytes"
        raise invalid("optimizer.name", "adamw8bit", problem, "choose adamw, or install a newer bitsandbytes")


def _check_updates(optimizer: type[torch.optim.Optimizer], device: torch.device) -> None:
    """Raise ``InvalidInput`` where an AdamW with 8-bit moments does not make the updates of AdamW on a device.

    Gradients that are one positive number in each block of 256 have moments that 8 bits hold exactly: their block's
    largest. What a kernel may then lose is the rounding of 1 - β2 to float32, 2^-24 / (1 - β2), and of the weights.
    """
    generator, size, rate, steps = torch.Generator().manual_seed(0), 5000, 0.01, 3
    start = torch.randn(size, generator=generator)
    blocks = 0.1 + torch.rand(steps, math.ceil(size / 256), generator=generator)
    ends = []
    for make in (torch.optim.AdamW, optimizer):
        weight = nn.Parameter(start.to(device, copy=True))
        one = make([weight], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)  # type: ignore[call-arg]
        for block in blocks:
            weight.grad = block.repeat_interleave(256)[:size].to(device)
            one.step()
        ends.append(weight.detach())
    if not bool(((ends[0] - ends[1]).abs() <= 1e-3 * rate * steps + 2**-22 * ends[0].abs()).all()):
        problem = f"makes other updates than AdamW on {device} with the installed bitsandbytes"
        raise invalid("optimizer.name", "adamw8bit", problem, "choose adamw, or install another bitsandbytes")
