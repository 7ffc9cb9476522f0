"""Network calls without gradient as CUDA graphs: the kernels of a whole call are launched at once, not one by one.

An inversion asks the network the same question many times, and a small network answers faster than Python can launch
its kernels. A graph reads fixed addresses: inputs are copied to where it was recorded with, and the weights are read
where they lie, so that a replay sees every update that is made in place, as optimizers make them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Predict: TypeAlias = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]

LARGEST_NUMBER = 16
"""Graphs at most. Each keeps inputs and output, and all of them share the memory of what is in between."""

_WARM_UPS = 2


class Recorded(NamedTuple):
    """``replay()`` computes ``output`` anew from what ``inputs`` hold then."""

    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], None]


class GraphedCalls:
    """Answers calls by replaying a graph, which the first call of a caller with inputs of such shapes records.

    Args:
        record: runs a function of no arguments in a way that can be repeated; returns its output and the repetition.
            :func:`record_on_gpu` when None.
    """

    def __init__(self, record: Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]] | None = None):
        self._record = record or record_on_gpu(torch.cuda.graph_pool_handle())
        self._recorded: dict[Hashable, Recorded] = {}

    def __call__(
        self,
        caller: str,
        predict: Predict,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        """``predict(latents, timesteps, conditioning)``, in memory of the caller's own.

        Args:
            caller: names what ``predict`` computes: calls of one name must agree in everything but their tensors.
        """
        names = sorted(conditioning)
        given = [latents, timesteps, *(conditioning[name] for name in names)]
        key = (caller, *names, *((tensor.shape, tensor.dtype) for tensor in given))
        if key not in self._recorded:
            if len(self._recorded) == LARGEST_NUMBER:
                message = "performance.cuda_graphs: more than %d shapes; further ones are called without a graph"
                warnings.warn(message % LARGEST_NUMBER, stacklevel=2)
                return predict(latents, timesteps, conditioning)
            own = [torch.empty(tensor.shape, dtype=tensor.dtype, device=latents.device) for tensor in given]
            _fill(own, given)
            told = dict(zip(names, own[2:], strict=True))
            self._recorded[key] = Recorded(own, *self._record(lambda: predict(own[0], own[1], told)))
        recorded = self._recorded[key]
        _fill(recorded.inputs, given)
        recorded.replay()
        return recorded.output.clone()  # the next replay writes to the same place


def record_on_gpu(pool: Any) -> Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]:
    """A recorder whose CUDA graphs share the memory pool ``pool``: no two of them are replayed at once."""

    def record(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        # The first calls allocate workspaces, choose algorithms and compile, none of which may be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that prepare the next batch may go on using the GPU.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function()
        return output, graph.replay

    return record


def _fill(own: list[Tensor], given: list[Tensor]) -> None:
    for target, source in zip(own, given, strict=True):
        target.copy_(source, non_blocking=True)
