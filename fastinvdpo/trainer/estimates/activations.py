"""What a network call keeps for its backward pass, and its FLOPs, by making that call with tensors without content.

The call is the trainer's, with its autocast, gradient checkpointing and adapters, under PyTorch's fake tensor mode:
shapes, types and lifetimes of all tensors are as in the run, and nothing is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastinvdpo.trainer.accounting import AUTOCAST, forward_flops
from fastinvdpo.trainer.call_size import SavedStorages
from fastinvdpo.trainer.config import TrainConfig
from fastinvdpo.trainer.estimates.architecture import Architecture
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.opening import DTYPES
from fastinvdpo.trajectories import in_calls_of

_FLOAT32_ON_CUDA = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Layers that CUDA's autocast computes in float32 and the CPU's in the type of their input."""

_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers whose weights autocast casts."""


@dataclass(frozen=True)
class Activations:
    """Bytes of a call of the policy with gradient, beside weights and their gradients.

    Attributes:
        samples: of the call.
        graph: what is kept for the backward pass, each storage once.
        block: with gradient checkpointing, what the largest block keeps while it is computed again.
        casts: with gradient checkpointing, copies of trained weights that autocast keeps until the call returns;
            without it the graph has them.
        forward_flops: of one sample, as ``accounting.measure_costs`` counts them.
    """

    samples: int
    graph: int
    block: int
    casts: int
    forward_flops: float

    @property
    def total(self) -> int:
        """Together at most, but for what an op needs while it runs: casts live in the call, a block after it."""
        return self.graph + max(self.block, self.casts)


class FakeNetworks:
    """Policy and reference of a run as the trainer arranges them, without content.

    Attributes:
        networks: on the meta device until the first measurement.
    """

    def __init__(self, config: TrainConfig, architecture: Architecture) -> None:
        self._config, self._architecture = config, architecture
        model, dtype = config.model, config.model.reference_dtype
        reference_is_cached = config.cache.path is not None and config.reference_chain
        with torch.device("meta"):
            self.networks = Networks(
                architecture.model,
                lora=model.lora,
                gradient_checkpointing=config.training.gradient_checkpointing,
                reference="none" if reference_is_cached else "copy",
                reference_dtype=None if dtype is None else DTYPES[dtype],
            )
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._on_meta = True

    def trained_bytes(self) -> int:
        """Bytes of the trained weights, and of anything that has a number for each of them."""
        return sum(parameter.nbytes for parameter in self.networks.trainable().values())

    def activations(self, samples: int, max_batch: int | None, device_type: str) -> Activations:
        """Measure a call of so many samples, made in calls of at most ``max_batch``, as on a ``"cpu"`` or on ``"cuda"``
        in the precision of the run.
        """
        network = self.networks.policy_module
        policy = in_calls_of(max_batch, self.networks.policy)
        checkpointing = self._config.training.gradient_checkpointing
        with self._measuring(device_type):
            saved = SavedStorages(network)
            blocks = _Blocks(saved)
            if checkpointing:
                enable: Any = network.enable_gradient_checkpointing
                enable(blocks.call)
            inputs, kept = self._inputs(samples), []

            def call() -> None:
                with saved.counted():
                    kept.append(policy(*inputs))  # storages are told apart while the graph lives

            flops = forward_flops(call)
        casts = self._casts() if checkpointing else 0
        return Activations(samples, sum(saved.found.values()), blocks.largest, casts, flops / samples)

    def _casts(self) -> int:
        if self._config.training.mixed_precision == "no":
            return 0
        layers = [layer for layer in self.networks.policy_module.modules() if isinstance(layer, _CAST)]
        weights = {id(p): p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad}
        return sum(2 * weight.numel() for weight in weights.values())

    @contextmanager
    def _measuring(self, device_type: str) -> Iterator[None]:
        norms = _norms_in_float32(self.networks.policy_module) if device_type == "cuda" else nullcontext()
        with warnings.catch_warnings(), self._mode, norms:
            warnings.simplefilter("ignore")
            if self._on_meta:
                self._leave_meta()
            yield

    def _leave_meta(self) -> None:
        """Weights on a device that autocast knows, still without content."""
        self.networks.policy_module.to_empty(device="cpu")
        dtype = AUTOCAST.get(self._config.training.mixed_precision)
        accelerator: Any = SimpleNamespace(
            mixed_precision=self._config.training.mixed_precision, autocast=lambda: torch.autocast("cpu", dtype)
        )
        self.networks.use_precision(accelerator)
        self._on_meta = False

    def _inputs(self, samples: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        architecture = self._architecture
        told = {name: torch.zeros(samples, *shape) for name, shape in architecture.told.items()}
        return torch.zeros(samples, *architecture.latents), torch.zeros(samples, dtype=torch.int64), told


class _Blocks:
    """Stands in for gradient checkpointing.

    Attributes:
        largest: bytes of what a checkpointed block alone would keep, at most.
    """

    def __init__(self, saved: SavedStorages) -> None:
        self._saved, self.largest = saved, 0
        self._kept: list[Tensor] = []

    def call(self, block: Any, *inputs: Any) -> Any:
        """In the place of ``torch.utils.checkpoint.checkpoint``, which keeps inputs and nothing of the inside."""
        given = [value for value in inputs if isinstance(value, Tensor)]
        self._kept += given  # nothing else may keep them, and an address could come twice
        for value in given:
            self._saved.add(value)
        inside: dict[int, int] = {}
        with self._saved.counted(inside):
            output = block(*inputs)
        alone = sum(size for key, size in inside.items() if key not in self._saved.found)
        self.largest = max(self.largest, alone)
        return output


@contextmanager
def _norms_in_float32(network: nn.Module) -> Iterator[None]:
    """Inside, norms get their input as CUDA's autocast gives it to them."""
    norms = [each for each in network.modules() if isinstance(each, _FLOAT32_ON_CUDA)]
    handles = [norm.register_forward_pre_hook(_in_float32) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    half = torch.is_autocast_enabled("cpu") and inputs[0].dtype in AUTOCAST.values()
    return (inputs[0].float(), *inputs[1:]) if half else inputs
