"""What a training step costs: network evaluations, model FLOPs and their share of the peak (MFU), memory.

Conventions, for every number that the trainer logs and the benchmarks report:

- A network evaluation is one sample through one network once; a guided prediction is two.
- A forward evaluation's FLOPs are those of its matrix products, convolutions and attention, a multiplication and an
  addition counting as two, as ``torch.utils.flop_counter`` counts them in one real call; elementwise work is free.
- An evaluation with gradient counts as three forward ones (the gradients with respect to activations and to weights
  cost one each), as two with adapters (frozen weights have no gradient), and as one more with gradient checkpointing,
  which runs the forward again: what is reported is then what the network computes, and not what it would have to.
- The peak is that of a square matrix product in the type the network computes in, measured in the same process.
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
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config.sections import TrainingSection
    from fastinvdpo.methods import PairBatch
    from fastinvdpo.trainer.networks import Networks

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What matrix products compute in under ``training.mixed_precision``; nothing changes them where it is "no"."""

PEAK_SIZE = {"cuda": 8192, "cpu": 512}
"""Sides of the matrices whose product is timed: large enough for the peak, and a matter of milliseconds."""


@dataclass(frozen=True)
class Costs:
    """FLOPs of one network evaluation, and the peak rate.

    Attributes:
        with_gradient, without_gradient: of the policy's evaluations that are differentiated, and of all others.
        peak: FLOP/s of one device.
    """

    with_gradient: float
    without_gradient: float
    peak: float

    def model_flops(self, evaluations: Mapping[str, int | float]) -> float:
        """FLOPs of some evaluations, counted by ``"with_gradient"`` and ``"without_gradient"``."""
        counted = evaluations["with_gradient"] * self.with_gradient
        return counted + evaluations["without_gradient"] * self.without_gradient

    def row(
        self, evaluations: Mapping[str, int | float], *, pairs: int, seconds: float, devices: int = 1
    ) -> dict[str, float]:
        """What is logged of an interval in which ``pairs`` pairs took ``seconds``, over all ``devices``."""
        flops = self.model_flops(evaluations)
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
    """Count one evaluation of the policy, on a sample of the batch, and time the peak in the type of its products.

    The reference counts as the policy does: a copy has the same architecture, quantized or not, and what adapters that
    are switched off would add is little.
    """
    device = batch.latents.device
    told = {name: tensor[:1] for name, tensor in batch.conditioning.items()}
    times = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def call() -> object:
        return networks.probe(batch.latents[:1], times, told)

    forward = forward_flops(call)
    factor = gradient_factor(lora=networks.lora, gradient_checkpointing=training.gradient_checkpointing)
    dtype = AUTOCAST.get(training.mixed_precision, torch.float32)
    costs = Costs(factor * forward, forward, peak_flops(device, dtype))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what is logged is the training's own, without the probes
    return costs


def forward_flops(call: Callable[[], object]) -> float:
    """FLOPs of a call. What ``torch.compile`` made of a network cannot be counted, so it runs uncompiled."""
    counter = FlopCounterMode(display=False, custom_mapping=_OTHER_ATTENTION)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), counter:
        warnings.filterwarnings("ignore", ".*global hooks on modules")  # the counter's own
        call()
    return float(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *arguments: Any, out_shape: Any = None, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The counter knows attention on GPUs alone.
_OTHER_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@functools.lru_cache(maxsize=8)
def peak_flops(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the fastest of a few square matrix products; remembered for the process."""
    side = size or PEAK_SIZE.get(device.type, 512)
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    one = torch.randn(side, side, generator=generator, device=device).to(dtype)
    other = torch.randn(side, side, generator=generator, device=device).to(dtype)
    out = torch.empty_like(one)
    fastest = float("inf")
    for _ in range(8):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.mm(one, other, out=out)
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1000
        else:
            start = time.perf_counter()
            torch.mm(one, other, out=out)
            seconds = time.perf_counter() - start
        fastest = min(fastest, seconds)
    return 2 * side**3 / fastest


def peak_memory(accelerator: Accelerator) -> int:
    """Bytes at most so far, of the process or GPU that needed most: allocated on a GPU, resident elsewhere."""
    most = _peak_memory(accelerator.device)
    if accelerator.num_processes > 1:
        most = int(accelerator.gather(torch.tensor([most], device=accelerator.device)).max())
    return most


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows does not tell
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
