"""FSDP2: policy, gradients and optimizer state in shards, one on each process.

Calls with gradient gather the weights block by block, as accelerate set it up, and all processes make the same number
of them. Calls without gradient they do not: every process inverts its own pairs to their own levels. So these keep the
weights whole from the first of them to the next call with gradient. Then an inversion exchanges no weights but in its
first call, and no process waits for another's calls.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class Shards:
    """The network whose weights are shared out.

    Args:
        network: prepared in place. optimizer: of its trained weights; follows them into the shards.

    Attributes:
        module, optimizer: as accelerate prepared them.
        trained: the shards of the trained weights by name.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

        plugin: Any = accelerator.state.fsdp_plugin
        # Autocast decides about precision, as without shards: rounding all weights, norms and inputs as well would
        # take policy and reference apart. It costs gathering float32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        # A copy whose weights have shapes and no memory.
        memo: dict[int, Any] = {}
        for p in network.parameters():
            memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        self._hollow = copy.deepcopy(network, memo)
        self.module: Any
        with _buffers_aside(network):
            self.module, self.optimizer = accelerator.prepare(network, optimizer)
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._blocks: list[Any] = [module for module in self.module.modules() if isinstance(module, FSDPModule)]
        self._reshard_after_forward = bool(plugin.reshard_after_forward)
        self._keeping = False

    def keep(self) -> None:
        """From here on, what a call gathers stays."""
        if not self._keeping:
            self._keeping = True
            self.module.set_reshard_after_forward(False)

    def gather(self) -> None:
        """Make the weights whole, in all processes at once, until :meth:`release`."""
        self.keep()
        for block in self._blocks:
            block.unshard()

    def release(self) -> None:
        """Back to shards."""
        if not self._keeping:
            return
        self._keeping = False
        for block in self._blocks:
            block.reshard()
        self.module.set_reshard_after_forward(self._reshard_after_forward)
        # torch's own choice for the outermost block: the backward pass begins with it.
        self.module.set_reshard_after_forward(False, recurse=False)

    def whole_module(self, *, here: bool) -> nn.Module | None:
        """A plain network with the weights of now, on the host; None where not wanted. All processes must call it."""
        self.release()
        weights = whole(self.module.state_dict(), here=here)
        if not here:
            return None
        plain = copy.deepcopy(self._hollow)
        plain.load_state_dict(weights, assign=True)
        return plain


@contextmanager
def _buffers_aside(network: nn.Module) -> Iterator[None]:
    """Inside, no buffer is in the network's state dict: accelerate takes all there for shards, and a buffer (SD3's
    table of positions) has none.
    """
    kept = []
    for module in network.modules():
        aside: set[str] = module._non_persistent_buffers_set
        kept += [(aside, name) for name in module._buffers if name not in aside]
        aside.update(module._buffers)
    try:
        yield
    finally:
        for aside, name in kept:
            aside.discard(name)


def full(tensor: Tensor) -> Tensor:
    """``tensor``, whole if it is in shards; then all processes must call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(value: Any, *, here: bool = True) -> Any:
    """``value`` with every sharded tensor in it made whole, on the host; other values as they are.

    All processes must call it, with the same tensors in the same order; where not ``here``, nothing is kept.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.to("cpu") if here else None
    if isinstance(value, Mapping):
        return {key: whole(entry, here=here) for key, entry in value.items()}
    return [whole(entry, here=here) for entry in value] if isinstance(value, list) else value


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor``, which all processes have, sharded as ``other`` is, if it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return tensor
    placed = tensor.to(other.device_mesh.device_type)
    return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None)


def sharded_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The state of an optimizer, read whole from a checkpoint, sharded as its parameters are."""

    def sharded(value: Any, parameter: Tensor) -> Any:
        own = isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape
        return like(value, parameter) if own else value

    entries = state["state"].items()
    own = {index: {name: sharded(v, parameters[index]) for name, v in entry.items()} for index, entry in entries}
    return {**state, "state": own}
