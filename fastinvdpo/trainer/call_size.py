"""The largest forward batch when a whole trajectory is scored, and how its gradient is streamed.

On a GPU accelerate finds the largest one that fits. On a CPU nothing stops a call that is too large, so the bytes are
counted that one sample leaves for the backward pass, and :data:`HOST_BUDGET` divided by them: that depends on the model
and its settings alone, so a run makes the same calls, with the same last bits, on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.methods import Objective, PairBatch
from fastinvdpo.trainer.networks import Networks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config import TrainConfig

HOST_BUDGET = 96 * 2**20
"""Bytes that the graph of one call may keep on a CPU. Larger calls are hardly faster there."""

GPU_SPARE = 0.1
"""Share of a GPU's memory that stays free, beside what the optimizer will take."""

LARGEST = 512


def choose_max_batch(
    networks: Networks, objective: Objective, batch: PairBatch, accelerator: Accelerator, *, passes: int
) -> int:
    """The largest call that fits, in samples; the same in all processes.

    Args:
        batch: of any size; its samples are repeated.
        passes: of the gradient. One takes a second gradient.
    """
    device, parameters = accelerator.device, list(networks.trainable().values())

    def predict(samples: int) -> Tensor:
        rows = torch.arange(samples, device=batch.latents.device) % batch.latents.shape[0]
        conditioning = {name: tensor[rows] for name, tensor in batch.conditioning.items()}
        times = torch.full((samples,), objective.schedule.num_train_timesteps // 2, device=device)
        with torch.enable_grad():
            return networks.probe(batch.latents[rows], times, conditioning)

    if device.type != "cuda":
        return max(1, min(LARGEST, HOST_BUDGET // max(1, saved_bytes(lambda: predict(1), networks.policy_module))))
    # Adam's two moments, which the first step allocates, and the gradient that one pass keeps aside.
    later = sum(parameter.nbytes for parameter in parameters) * (2 if passes == 2 else 3)
    spare = int(GPU_SPARE * torch.cuda.get_device_properties(device).total_memory)

    def attempt(samples: int) -> None:
        held = torch.empty(later + spare, dtype=torch.uint8, device=device)
        try:
            predict(samples).square().mean().backward()
        finally:
            del held
            for parameter in parameters:
                parameter.grad = None

    sizes: Tensor = accelerator.gather(torch.tensor([largest_that_fits(attempt)], device=device))
    return int(sizes.min())


def largest_that_fits(attempt: Callable[[int], None]) -> int:
    """The largest power of two up to :data:`LARGEST` that ``attempt`` runs with; 1 if it runs out of memory with 2."""
    memory = require("accelerate.utils.memory", extra="train", purpose="finding training.max_batch")
    sizes = [LARGEST >> k for k in range(1, LARGEST.bit_length())]

    def run(size: int) -> int:
        if size > 1:
            attempt(size)
        return size

    found: int = memory.find_executable_batch_size(run, LARGEST, lambda: sizes.pop(0))()
    return found


def saved_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that the graph of ``run()`` keeps for its backward pass, beside the module's own weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        output = run()  # the graph must live until all is counted, or an address could come twice
    total = sum(kept.values())
    del output
    return total


def gradient_passes(config: TrainConfig, distributed_type: str) -> int:
    """How a streamed gradient learns its factor: as configured, or 1 where its second buffer is small or not needed.

    Raises:
        InvalidInput: one pass is asked for where the parameters are sharded, and their gradients not at hand.
    """
    training, sharded = config.training, distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    if training.gradient_passes == 1 and sharded:
        problem = f"cannot scale the gradients that {distributed_type} keeps"
        raise invalid("training.gradient_passes", 1, problem, "set it to 2 or null")
    if training.gradient_passes is not None:
        return training.gradient_passes
    one_pair = training.batch_size * training.gradient_accumulation_steps == 1
    return 1 if not sharded and (config.model.lora is not None or one_pair) else 2
