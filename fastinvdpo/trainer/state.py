"""What training changes: how it is built, stored in a checkpoint, and taken up again."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastinvdpo._extras import require
from fastinvdpo.config import TrainConfig
from fastinvdpo.errors import invalid
from fastinvdpo.models.adapters import perturb
from fastinvdpo.models.kohya import check_layers
from fastinvdpo.models.quantization import quantize_network
from fastinvdpo.trainer.checkpoint import Checkpoint
from fastinvdpo.trainer.networks import EMA, MovingReference, Networks
from fastinvdpo.trainer.opening import reference_dtype
from fastinvdpo.trainer.performance import arrange, match_layout
from fastinvdpo.trainer.sharding import like, sharded_state, whole
from fastinvdpo.trainer.step import FiniteGuard, MetricSums, TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config.sections import OptimizerSection, PerformanceSection
    from fastinvdpo.models.base import TrainedModel


def build_state(
    config: TrainConfig,
    model: TrainedModel,
    accelerator: Accelerator,
    switches: PerformanceSection,
    *,
    effective_batch: int,
    reference_is_cached: bool,
) -> TrainingState:
    """Networks, optimizer, averages and sums before the first step; the model's network is taken, not copied."""
    training, method, follows = config.training, config.method, config.method.reference_follows
    if config.model.quantization is not None and model.unquantized is None:
        quantize_network(model, config.model.quantization, offload=config.model.offload)
    if "kohya" in config.output.formats and config.model.lora is not None:
        check_layers(model, config.model.lora.target_modules or model.default_lora_targets)
    needed = method.needs_reference and not reference_is_cached
    networks = Networks(
        model,
        lora=config.model.lora,
        gradient_checkpointing=training.gradient_checkpointing,
        reference="none" if not needed else "copy" if follows is None else "moving",
        reference_dtype=reference_dtype(config),
        reference_quantization=config.model.reference_quantization,
        offload=config.model.offload,
    )
    networks.policy_module.to(accelerator.device)
    if config.model.init_perturbation > 0:
        perturb(networks.policy_module, config.model.init_perturbation, training.seed)
    arrange(networks, switches)
    parameters = list(networks.trainable().values())
    # The schedule watches the optimizer's step method, which accelerate replaces afterwards.
    optimizer, scheduler = build_optimizer(config.optimizer, parameters, effective_batch, training.steps)
    prepared = networks.prepare(accelerator, optimizer)
    named = networks.trainable()
    return TrainingState(
        networks=networks,
        optimizer=prepared,
        scheduler=scheduler,
        parameters=list(named.values()),
        ema=None if training.ema_decay is None else EMA(named, training.ema_decay),
        metrics=MetricSums(accelerator.device, method),
        guard=FiniteGuard(accelerator.device),
        moving_reference=None if follows is None else MovingReference(networks, follows),
    )


def restore_state(state: TrainingState, stored: Checkpoint, accelerator: Accelerator) -> None:
    """Take over what a checkpoint holds, this process's random numbers included."""
    with torch.no_grad():
        for name, parameter in state.networks.trainable().items():
            parameter.copy_(like(stored.trainable[name], parameter))
    if state.ema is not None and stored.ema is not None:
        state.ema.load(stored.ema, stored.state["ema_steps"])
    if state.moving_reference is not None and stored.reference is not None:
        state.moving_reference.load(stored.reference, stored.state["reference_steps"])
    if state.auto_beta is not None:
        state.auto_beta.load_state_dict(stored.state["auto_beta"])
    state.optimizer.load_state_dict(sharded_state(stored.state["optimizer"], state.parameters))
    match_layout(state.optimizer.optimizer)
    state.scheduler.load_state_dict(stored.state["scheduler"])
    state.metrics.load_state_dict(stored.state["metrics"])
    if accelerator.scaler is not None and stored.state["scaler"]:
        accelerator.scaler.load_state_dict(stored.state["scaler"])
    generators = stored.state["random"]
    if accelerator.process_index < len(generators):
        set_random_state(generators[accelerator.process_index])


def as_checkpoint(state: TrainingState, accelerator: Accelerator, meta: dict[str, Any]) -> Checkpoint | None:
    """The whole state of all processes, on the first of them; None on the others. All must call it."""
    from accelerate.utils import gather_object

    generators, main, moving = gather_object([random_state()]), accelerator.is_main_process, state.moving_reference
    if state.networks.shards is not None:
        state.networks.shards.release()
    trained = whole({name: p.data for name, p in state.networks.trainable().items()}, here=main)
    averages = None if state.ema is None else whole(state.ema.averages, here=main)
    optimizer = whole(state.optimizer.state_dict(), here=main)
    if not main:
        return None
    parts = {"auto_beta": state.auto_beta, "scheduler": state.scheduler, "scaler": accelerator.scaler}
    others = {
        "optimizer": optimizer,
        "ema_steps": None if state.ema is None else state.ema.steps,
        "reference_steps": None if moving is None else moving.steps,
        **{name: None if part is None else part.state_dict() for name, part in parts.items()},
        "metrics": state.metrics.state_dict(),
        "random": generators,
    }
    return Checkpoint(trained, averages, others, meta, None if moving is None else moving.averages)


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's, torch's and every CUDA device's generator, as plain types. Training draws its own
    random numbers from counters; these belong to code outside, such as a layer that draws by itself.
    """
    name, keys, *others = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    return {
        "python": [version, list(numbers), gauss_next],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *others],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` gave; CUDA states only on a machine with as many devices."""
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    name, keys, *others = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def build_optimizer(
    settings: OptimizerSection, parameters: list[nn.Parameter], effective_batch: int, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer and its learning rate schedule (diffusers'). ``scale_lr`` multiplies the learning rate by
    ``effective_batch``, the pairs per optimizer step over all processes.
    """
    rate = settings.learning_rate * (effective_batch if settings.scale_lr else 1)
    options: dict[str, Any] = {"lr": rate, "weight_decay": settings.weight_decay}
    if settings.name == "adafactor":
        # Not PyTorch's, which always scales by the size of a weight; as the released codes call it for SDXL.
        make = require("transformers.optimization", extra="train", purpose="optimizer.name = adafactor").Adafactor
        options |= {"clip_threshold": 1.0, "scale_parameter": False, "relative_step": False}
    else:
        options |= {"betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
        if settings.name == "adamw8bit":
            make = require("bitsandbytes", extra="bnb", purpose="optimizer.name = adamw8bit").optim.AdamW8bit
            check_8bit(make, parameters[0].device)
        else:
            # One pass over the weights, and it can hold an update back without asking the device (step.py).
            make, options = torch.optim.AdamW, {**options, "fused": True}
    optimizer: torch.optim.Optimizer = make(parameters, **options)
    optimization = require("diffusers.optimization", extra="train", purpose="learning rate schedules")
    scheduler = optimization.get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
    )
    return optimizer, scheduler


def check_8bit(optimizer: type[torch.optim.Optimizer], device: torch.device) -> None:
    """Raise ``InvalidInput`` where bitsandbytes has no kernel for a device, or not one that makes the updates of AdamW.

    Gradients that are one positive number in each block of 256 have moments that 8 bits hold exactly: their block's
    largest. What a kernel may then lose is the rounding of 1 - β2 to float32, 2^-24 / (1 - β2), and of the weights.
    """
    key = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}.get(device.type)
    kernel = "bitsandbytes::optimizer_update_8bit_blockwise"
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(kernel, key):
        problem = f"has no kernels for {device.type} in the installed bitsandbytes"
        raise invalid("optimizer.name", "adamw8bit", problem, "choose adamw, or install a newer bitsandbytes")
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
