"""The ``performance:`` section, made real: null becomes the device's default, and the networks are arranged so.

Every switch changes how the same numbers are computed, and with that their last bits. On a CPU each gives the same bits
at every attempt, so that a run resumes bit for bit as long as its switches stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.config.sections import PerformanceSection
from fastinvdpo.errors import invalid
from fastinvdpo.trainer.networks import Networks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config import TrainConfig

COMPILER = "inductor"

LARGEST_NUMBER = 16
"""CUDA graphs at most. Each keeps inputs and output, and all of them share the memory of what is in between."""

_WARM_UPS = 2
_RECOMPILES = 128
"""Graphs that dynamo may keep for all blocks: widths × shapes of calls × {with gradient, without, adapters off}. Past
its own limit, 8, it would leave blocks uncompiled with a warning."""


def decide(config: TrainConfig, network: nn.Module, accelerator: Accelerator) -> PerformanceSection:
    """The configured switches, and for those that are null the default on the accelerator's device; on CUDA TF32 is
    allowed or forbidden, for the whole process. Raises ``InvalidInput`` where weights in shards would have to be
    compiled, recorded or laid out.
    """
    given, cuda = config.performance, accelerator.device.type == "cuda"
    stored = next(network.parameters()).dtype
    half = config.training.mixed_precision != "no" or stored in (torch.bfloat16, torch.float16)
    sharded = str(accelerator.distributed_type.value) == "FSDP"
    for key in ("channels_last", "compile", "cuda_graphs"):
        if getattr(given, key) and sharded:
            problem = "is not built for parameters that FSDP keeps in shards"
            raise invalid(f"performance.{key}", True, problem, "set it to false or null")
    # bitsandbytes makes every weight it updates contiguous again, and FSDP2 takes no other.
    channels_last = cuda and half and not sharded and config.optimizer.name != "adamw8bit"
    defaults = {"channels_last": channels_last, "compile": False, "cuda_graphs": False, "tf32": cuda}
    found = given.model_copy(update={key: value for key, value in defaults.items() if getattr(given, key) is None})
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(found.tf32)
    return found


def require_extras(config: TrainConfig) -> None:
    """Raise ``MissingExtra`` for a package that the run needs."""
    for package in ("accelerate", "diffusers"):
        require(package, extra="train", purpose="training")
    if config.performance.attention == "xformers":
        require("xformers.ops", extra="xformers", purpose="performance.attention = xformers")
    if config.optimizer.name == "adamw8bit":
        require("bitsandbytes", extra="bnb", purpose="optimizer.name = adamw8bit")


def arrange(networks: Networks, switches: PerformanceSection) -> None:
    """Put weights in their layout and choose the attention, before an optimizer takes the parameters. Raises
    ``InvalidInput`` where the network has no choice of attention.
    """
    for network in _distinct(networks):
        if switches.attention is not None:
            # diffusers' name for "sdpa" is that xformers is off; set_attention_backend misses the UNet's processors.
            verb = "enable" if switches.attention == "xformers" else "disable"
            choose: Any = getattr(network, f"{verb}_xformers_memory_efficient_attention", None)
            if choose is None:
                problem = f"cannot be chosen for {type(network).__name__}"
                raise invalid("performance.attention", switches.attention, problem, "set it to null")
            choose()
        if switches.channels_last:
            for parameter in network.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def speed_up(networks: Networks, switches: PerformanceSection) -> None:
    """Compile the repeated blocks and record calls as CUDA graphs; both happen at the first calls.

    After the size of calls is known: a probe would have each size that it tries compiled. Blocks are compiled in place:
    names of modules and weights stay. Shapes are static: with dynamic ones, which graph serves a shape would depend on
    those seen before it, and a resumed run might not see them in the same order. Raises ``InvalidInput`` where the
    network does not say which of its blocks repeat, or has none of them.
    """
    if switches.cuda_graphs:
        networks.graphs = GraphedCalls()
    if not switches.compile:
        return
    torch._dynamo.config.recompile_limit = max(_RECOMPILES, torch._dynamo.config.recompile_limit)
    for network in _distinct(networks):
        # What a compiler makes of weights that are dequantized in every product is not tested here.
        if networks.reference_quantization is not None and network is networks.reference_module:
            continue
        compile_blocks: Any = getattr(network, "compile_repeated_blocks", None)
        if compile_blocks is None:
            problem = f"{type(network).__name__} does not say which of its blocks repeat"
            raise invalid("performance.compile", True, problem, "set it to false")
        try:
            compile_blocks(backend=COMPILER, dynamic=False)
        except ValueError as error:
            raise invalid("performance.compile", True, f"diffusers refuses it ({error})", "set it to false") from error


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Bring an optimizer's loaded state into the layout of its parameters.

    A checkpoint may have been written with another ``channels_last``, and PyTorch's fused AdamW for the CPU takes
    parameter, gradient and moments as flat arrays without a look at their strides.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            other = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if other and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _distinct(networks: Networks) -> list[nn.Module]:
    policy, reference = networks.policy_module, networks.reference_module
    return [policy] if reference is None or reference is policy else [policy, reference]


class GraphedCalls:
    """Network calls without gradient as CUDA graphs, which the first call of a caller with inputs of such shapes
    records: the kernels of a whole call are launched at once, not one by one.

    An inversion makes the same call many times, and a small network computes faster than Python can launch its kernels.
    A graph reads fixed addresses: inputs are copied to where it was recorded with, and the weights are read where they
    lie, so that a replay sees every update that is made in place, as optimizers make them.

    ``record`` runs a function in a way that can be repeated, and returns its output and the repetition;
    :func:`record_on_gpu` when None.
    """

    def __init__(self, record: Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]] | None = None):
        self._record = record or record_on_gpu(torch.cuda.graph_pool_handle())
        self._recorded: dict[Hashable, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}

    def __call__(
        self,
        caller: str,
        predict: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        """``predict(latents, timesteps, conditioning)``, in memory of the caller's own. ``caller`` names what
        ``predict`` computes: calls of one name must agree in everything but their tensors.
        """
        names = sorted(conditioning)
        given = [latents, timesteps, *(conditioning[name] for name in names)]
        key = (caller, *names, *((tensor.shape, tensor.dtype) for tensor in given))
        if key not in self._recorded:
            if len(self._recorded) == LARGEST_NUMBER:
                message = "switches.cuda_graphs: more than %d shapes; further ones are called without a graph"
                warnings.warn(message % LARGEST_NUMBER, stacklevel=2)
                return predict(latents, timesteps, conditioning)
            own = [torch.empty(tensor.shape, dtype=tensor.dtype, device=latents.device) for tensor in given]
            _fill(own, given)
            own_conditioning = dict(zip(names, own[2:], strict=True))
            self._recorded[key] = (own, *self._record(lambda: predict(own[0], own[1], own_conditioning)))
        inputs, output, replay = self._recorded[key]
        _fill(inputs, given)
        replay()
        return output.clone()  # the next replay writes to the same place


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
