"""What a training step costs, and how large a forward pass may be: network evaluations, FLOPs, MFU, memory.

Conventions, for every number that the trainer logs and the benchmarks report:

- A network evaluation is one sample through one network once; a guided prediction is two.
- A forward evaluation's FLOPs are those of its matrix products, convolutions and attention, a multiplication and an
  addition counting as two, as ``torch.utils.flop_counter`` counts them in one real call; elementwise work is free.
- An evaluation with gradient counts as three forward ones (the gradients with respect to activations and to weights
  cost one each), as two with adapters (frozen weights have no gradient), and as one more with gradient checkpointing,
  which runs the forward again: what is reported is then what the network computes, and not what it would have to.
- The peak is that of a square matrix product in the type the network computes in, measured in the same process.

Where a whole trajectory is scored, the largest forward batch is chosen. On a GPU accelerate finds the largest one that
fits. On a CPU nothing stops a call that is too large, so :data:`HOST_BUDGET` is divided by the bytes that one sample
leaves for the backward pass: a run makes the same calls, with the same last bits, on every machine.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.methods import Objective, PairBatch
from fastinvdpo.trainer.networks import Networks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config import TrainConfig
    from fastinvdpo.config.sections import TrainingSection

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What matrix products compute in under ``training.mixed_precision``; nothing changes them where it is "no"."""

PEAK_SIZE = {"cuda": 8192, "cpu": 512}
"""Sides of the matrices whose product is timed: large enough for the peak, and a matter of milliseconds."""

HOST_BUDGET = 96 * 2**20
"""Bytes that the graph of one call may keep on a CPU. Larger calls are hardly faster there."""

LARGEST = 512
_GPU_SPARE = 0.1  # share of its memory that stays free, beside what the optimizer will take


@dataclass(frozen=True)
class Costs:
    """FLOPs of one network evaluation, differentiated (of the policy) or not, and the peak FLOP/s of one device."""

    with_gradient: float
    without_gradient: float
    peak: float

    def row(
        self, evaluations: Mapping[str, int | float], *, pairs: int, seconds: float, devices: int = 1
    ) -> dict[str, float]:
        """What is logged of an interval in which ``pairs`` pairs took ``seconds``, over all ``devices``."""
        counts = evaluations["with_gradient"], evaluations["without_gradient"]
        flops = counts[0] * self.with_gradient + counts[1] * self.without_gradient
        return {
            **{f"evaluations_per_pair_{kind}": count / pairs for kind, count in evaluations.items()},
            "model_flops_per_pair": flops / pairs,
            "pairs_per_second": pairs / seconds,
            "flops_per_second": flops / seconds,
            "mfu": flops / seconds / (devices * self.peak),
        }


def gradient_factor(*, lora: bool, gradient_checkpointing: bool) -> int:
    """How many forward evaluations one with gradient counts as."""
    return (2 if lora else 3) + int(gradient_checkpointing)


def measure_costs(networks: Networks, batch: PairBatch, training: TrainingSection) -> Costs:
    """Count one evaluation of the policy, on a sample of the batch, and time the peak in the type of its products. The
    reference counts as the policy does: what adapters that are switched off would add is little.
    """
    device = batch.latents.device
    with torch.no_grad():
        forward = forward_flops(lambda: _probe(networks, batch, 1, timestep=0))
    factor = gradient_factor(lora=networks.lora, gradient_checkpointing=training.gradient_checkpointing)
    dtype = AUTOCAST.get(training.mixed_precision, torch.float32)
    costs = Costs(factor * forward, forward, peak_flops(device, dtype))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what is logged is the training's own, without the probes
    return costs


def forward_flops(call: Callable[[], object]) -> float:
    """FLOPs of a call. What ``torch.compile`` made of a network cannot be counted, so it runs uncompiled."""

    def attention(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # The counter knows attention on GPUs alone, and none of our ops.
    def log_probs(hidden: Any, weight: Any, targets: Any, start: int, stop: int, mean: bool, **options: Any) -> int:
        return int((4 if mean else 2) * hidden[0] * hidden[1] * (stop - start))

    ops = torch.ops
    known = {ops.aten._scaled_dot_product_flash_attention_for_cpu: attention, ops.fastinvdpo.token_log_probs: log_probs}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), counter:
        warnings.filterwarnings("ignore", ".*global hooks on modules")  # the counter's own
        call()
    return float(counter.get_total_flops())


@functools.lru_cache(maxsize=8)
def peak_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the fastest of a few square matrix products; remembered for the process."""
    side = size or PEAK_SIZE.get(device.type, 512)
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    one, other = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out, seconds = torch.empty_like(one), []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(one, other, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def peak_memory(accelerator: Accelerator) -> int:
    """Bytes at most so far, of the process or GPU that needed most: allocated on a GPU, resident elsewhere."""
    if accelerator.device.type == "cuda":
        most = torch.cuda.max_memory_allocated(accelerator.device)
    elif sys.platform == "win32":  # it does not tell
        most = 0
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        most = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if accelerator.num_processes > 1:
        most = int(accelerator.gather(torch.tensor([most], device=accelerator.device)).max())
    return most


def choose_max_batch(
    networks: Networks, objective: Objective, batch: PairBatch, accelerator: Accelerator, *, passes: int
) -> int:
    """The largest call that fits, in samples of the batch, repeated; the same in all processes. A gradient in one pass
    takes a second one.
    """
    device, parameters = accelerator.device, list(networks.trainable().values())

    @torch.enable_grad()
    def predict(samples: int) -> Tensor:
        return _probe(networks, batch, samples, timestep=objective.schedule.num_train_timesteps // 2)

    if device.type != "cuda":
        return max(1, min(LARGEST, HOST_BUDGET // max(1, saved_bytes(lambda: predict(1), networks.policy_module))))
    # Adam's two moments, which the first step allocates, and the gradient that one pass keeps aside.
    later = sum(parameter.nbytes for parameter in parameters) * (2 if passes == 2 else 3)
    spare = int(_GPU_SPARE * torch.cuda.get_device_properties(device).total_memory)

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


def _probe(networks: Networks, batch: PairBatch, samples: int, timestep: int) -> Tensor:
    """Predictions of so many samples of the batch, repeated, at one timestep."""
    rows = torch.arange(samples, device=batch.latents.device) % batch.latents.shape[0]
    conditioning = {name: tensor[rows] for name, tensor in batch.conditioning.items()}
    return networks.probe(batch.latents[rows], torch.full_like(rows, timestep), conditioning)


def largest_that_fits(attempt: Callable[[int], None]) -> int:
    """The largest power of two up to :data:`LARGEST` that ``attempt`` runs with; 1 if it runs out of memory with 2."""
    memory = require("accelerate.utils.memory", extra="train", purpose="finding training.max_batch")
    sizes = [LARGEST >> k for k in range(1, LARGEST.bit_length())]

    def run(size: int) -> int:
        if size > 1:
            attempt(size)
        return size

    return int(memory.find_executable_batch_size(run, LARGEST, lambda: sizes.pop(0))())


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
    Raises ``InvalidInput`` for one pass where the parameters, and with them the gradients, are sharded.
    """
    training = config.training
    if training.gradient_passes == 1 and distributed_type == "FSDP":
        problem = f"cannot scale the gradients that {distributed_type} keeps"
        raise invalid("training.gradient_passes", 1, problem, "set it to 2 or null")
    if training.gradient_passes is not None:
        return training.gradient_passes
    one_pair = training.batch_size * training.gradient_accumulation_steps == 1
    return 1 if distributed_type != "FSDP" and (config.model.lora is not None or one_pair) else 2
