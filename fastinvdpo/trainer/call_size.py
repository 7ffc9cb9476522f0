"""How many samples a network is asked about at once when a whole trajectory is scored: as many as memory has room for.

On a GPU a probe doubles the size of a call, forward and backward, until its memory would not fit. Elsewhere the bytes
are counted that one sample leaves for the backward pass, and calls are as large as :data:`HOST_BUDGET` allows: that
depends on the model and its settings alone, so a run makes the same calls, with the same last bits, on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastinvdpo.errors import invalid
from fastinvdpo.methods import Objective, PairBatch
from fastinvdpo.trainer.networks import Networks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.trainer.config import TrainConfig

HOST_BUDGET = 96 * 2**20
"""Bytes that the graph of one call may keep on a CPU. Larger calls are hardly faster there."""

GPU_SHARE = 0.8
"""Share of the free GPU memory that a call may take, beside what the optimiser will take."""

LARGEST = 512


def choose_max_batch(
    networks: Networks, objective: Objective, batch: PairBatch, accelerator: Accelerator, *, passes: int
) -> int:
    """The largest call that fits, in samples; the same in all processes.

    Args:
        batch: of any size; its samples are repeated.
        passes: of the gradient. One takes a second gradient.
    """
    parameters = list(networks.trainable().values())
    device = accelerator.device

    def predict(samples: int) -> Tensor:
        rows = torch.arange(samples, device=batch.latents.device) % batch.latents.shape[0]
        told = {name: tensor[rows] for name, tensor in batch.conditioning.items()}
        times = torch.full((samples,), objective.schedule.num_train_timesteps // 2, device=device)
        with torch.enable_grad():
            return networks.probe(batch.latents[rows], times, told)

    if device.type != "cuda":
        return size_for_budget(saved_bytes(lambda: predict(1), networks.policy_module), HOST_BUDGET)
    # Adam's two moments, which the first step allocates, and the gradient that one pass keeps aside.
    later = sum(parameter.nbytes for parameter in parameters) * (2 if passes == 2 else 3)
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    size = size_by_doubling(lambda n: _peak_bytes(predict, n, parameters, device), int(GPU_SHARE * (free - later)))
    torch.cuda.empty_cache()
    sizes: Tensor = accelerator.gather(torch.tensor([size], device=device))
    return int(sizes.min())


def size_for_budget(bytes_per_sample: int, budget: int) -> int:
    """Samples whose graphs fit into ``budget`` bytes; at least 1, at most ``LARGEST``."""
    return max(1, min(LARGEST, budget // max(1, bytes_per_sample)))


def size_by_doubling(peak_bytes: Callable[[int], int | None], budget: int) -> int:
    """The largest power of two up to ``LARGEST`` whose call needs at most ``budget`` bytes; 1 if none does.

    ``peak_bytes(n)`` makes a call of ``n`` samples; None: there was not enough memory. A call that would not fit if it
    took twice the memory of the last one is not tried.
    """
    size = 1
    used = peak_bytes(1)
    while used is not None and 2 * used <= budget and size < LARGEST:
        used = peak_bytes(2 * size)
        if used is None or used > budget:
            break
        size *= 2
    return size


def saved_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that the graph of ``run()`` keeps for its backward pass, beside the module's own weights."""
    saved = SavedStorages(module)
    with saved.counted():
        output = run()  # the graph must live until all is counted, or an address could come twice
    total = sum(saved.found.values())
    del output
    return total


class SavedStorages:
    """Counts the storages that graphs keep for their backward pass, once each, but for those of the module's weights.

    Attributes:
        found: bytes by address of the storage object; tensors without content have one too.
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = {_storage(tensor)[0] for tensor in (*module.parameters(), *module.buffers())}
        self.found: dict[int, int] = {}

    def counted(self, found: dict[int, int] | None = None) -> Any:
        """A context: what is saved inside is counted in ``found``, or in :attr:`found`."""

        def pack(tensor: Tensor) -> Tensor:
            self.add(tensor, found)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed)

    def add(self, tensor: Tensor, found: dict[int, int] | None = None) -> None:
        key, size = _storage(tensor)
        if key not in self._own:
            (self.found if found is None else found)[key] = size


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _peak_bytes(
    predict: Callable[[int], Tensor], samples: int, parameters: list[nn.Parameter], device: torch.device
) -> int | None:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        predict(samples).square().mean().backward()
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in parameters:
            parameter.grad = None
    return torch.cuda.max_memory_allocated(device) - before


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
