"""What training changes: how it is built, stored in a checkpoint, and taken up again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from fastinvdpo.config import TrainConfig
from fastinvdpo.methods import Method
from fastinvdpo.models.adapters import perturb
from fastinvdpo.models.quantization import quantize_network
from fastinvdpo.trainer.checkpoint import Checkpoint
from fastinvdpo.trainer.ema import EMA
from fastinvdpo.trainer.metrics import MetricSums
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.nonfinite import FiniteGuard
from fastinvdpo.trainer.opening import DTYPES
from fastinvdpo.trainer.performance import Performance, arrange, match_layout
from fastinvdpo.trainer.random_state import random_state, set_random_state
from fastinvdpo.trainer.reference import MovingReference
from fastinvdpo.trainer.sharding import like, sharded_state, whole
from fastinvdpo.trainer.step import TrainingState, build_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.models import DiffusionModel


def build_state(
    config: TrainConfig,
    model: DiffusionModel,
    accelerator: Accelerator,
    performance: Performance,
    *,
    effective_batch: int,
    reference_is_cached: bool,
) -> TrainingState:
    """Networks, optimizer, averages and sums before the first step; the model's network is taken, not copied."""
    training, dtype, follows = config.training, config.model.reference_dtype, config.method.reference_follows
    if config.model.quantization is not None and model.unquantized is None:
        quantize_network(model, config.model.quantization)
    networks = Networks(
        model,
        lora=config.model.lora,
        gradient_checkpointing=training.gradient_checkpointing,
        reference=_reference(config.method, reference_is_cached),
        reference_dtype=None if dtype is None else DTYPES[dtype],
        reference_quantization=config.model.reference_quantization,
    )
    networks.policy_module.to(accelerator.device)
    if config.model.init_perturbation > 0:
        perturb(networks.policy_module, config.model.init_perturbation, training.seed)
    arrange(networks, performance)
    parameters = list(networks.trainable().values())
    # The schedule watches the optimizer's step method, which accelerate replaces afterwards.
    optimizer, scheduler = build_optimizer(config.optimizer, parameters, effective_batch, training.steps)
    prepared = networks.prepare(accelerator, optimizer)
    named = networks.trainable()
    ema = None if training.ema_decay is None else EMA(named, training.ema_decay)
    metrics, guard = MetricSums(accelerator.device), FiniteGuard(accelerator.device)
    moving = None if follows is None else MovingReference(networks, follows)
    return TrainingState(networks, prepared, scheduler, list(named.values()), ema, metrics, guard, moving)


def _reference(method: Method, cached: bool) -> Literal["copy", "moving", "none"]:
    if not method.needs_reference or (cached and method.reference_chain is not None):
        return "none"
    return "copy" if method.reference_follows is None else "moving"


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
    generators = [random_state()]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        generators = gather_object(generators)
    main = accelerator.is_main_process
    if state.networks.shards is not None:
        state.networks.shards.release()
    trained = whole({name: p.data for name, p in state.networks.trainable().items()}, here=main)
    averages = None if state.ema is None else whole(state.ema.averages, here=main)
    optimizer = whole(state.optimizer.state_dict(), here=main)
    if not main:
        return None
    others = {
        "optimizer": optimizer,
        "ema_steps": None if state.ema is None else state.ema.steps,
        "reference_steps": None if state.moving_reference is None else state.moving_reference.steps,
        "auto_beta": None if state.auto_beta is None else state.auto_beta.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        "metrics": state.metrics.state_dict(),
        "random": generators,
    }
    reference = None if state.moving_reference is None else state.moving_reference.averages
    return Checkpoint(trained, averages, others, meta, reference)
