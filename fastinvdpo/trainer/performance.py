"""The ``performance:`` section, made real: null becomes the device's default, and the networks are arranged as asked.

Every switch changes how the same numbers are computed, and with that their last bits. On a CPU each gives the same bits
at every attempt, so that a run resumes bit for bit as long as its switches stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.trainer.graphs import GraphedCalls

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config import TrainConfig
    from fastinvdpo.trainer.networks import Networks

COMPILER = "inductor"

_RECOMPILES = 128
"""Graphs that dynamo may keep for all blocks: widths × shapes of calls × {with gradient, without, adapters off}. Past
its own limit, 8, it would leave blocks uncompiled with a warning."""


@dataclass(frozen=True)
class Performance:
    """The switches of a run, decided. Attributes as in ``config.PerformanceSection``."""

    channels_last: bool
    attention: Literal["sdpa", "xformers"] | None
    compile: bool
    cuda_graphs: bool
    tf32: bool

    def __str__(self) -> str:
        attention = "the family's" if self.attention is None else self.attention
        switches = ("channels_last", "compile", "cuda_graphs", "tf32")
        states = [f"{name} {'on' if getattr(self, name) else 'off'}" for name in switches]
        return f"Performance: attention {attention}, {', '.join(states)}."

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(config: TrainConfig, network: nn.Module, accelerator: Accelerator) -> Performance:
    """The configured switches, and for those that are null the default on the accelerator's device.

    Raises:
        InvalidInput: what is sharded over processes can be neither compiled nor recorded nor laid out here.
    """
    asked, cuda = config.performance, accelerator.device.type == "cuda"
    stored = next(network.parameters()).dtype
    half = config.training.mixed_precision != "no" or stored in (torch.bfloat16, torch.float16)
    distributed_type = str(accelerator.distributed_type.value)
    sharded = distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    for key in ("channels_last", "compile", "cuda_graphs"):
        if getattr(asked, key) and sharded:
            problem = f"is not built for parameters that {distributed_type} keeps in shards"
            raise invalid(f"performance.{key}", True, problem, "set it to false or null")
    return Performance(
        # bitsandbytes makes every weight it updates contiguous again, and FSDP2 takes no other.
        channels_last=_or(asked.channels_last, cuda and half and not sharded and config.optimizer.name != "adamw8bit"),
        attention=asked.attention,
        compile=_or(asked.compile, False),
        cuda_graphs=_or(asked.cuda_graphs, False),
        tf32=_or(asked.tf32, cuda),
    )


def require_extras(config: TrainConfig) -> None:
    """Raise ``MissingExtra`` for packages that only some configurations need."""
    if config.performance.attention == "xformers":
        require("xformers.ops", extra="xformers", purpose="performance.attention = xformers")
    if config.optimizer.name == "adamw8bit":
        require("bitsandbytes", extra="bnb", purpose="optimizer.name = adamw8bit")
    if config.optimizer.name == "adafactor":
        require("transformers.optimization", extra="train", purpose="optimizer.name = adafactor")


def set_tf32(performance: Performance, device: torch.device) -> None:
    """Let matrix products and convolutions of float32 tensors run in TF32, or forbid it; for the whole process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = performance.tf32
        torch.backends.cudnn.allow_tf32 = performance.tf32


def arrange(networks: Networks, performance: Performance) -> None:
    """Put weights in their layout and choose the attention, before an optimizer takes the parameters.

    Raises:
        InvalidInput: the network has no choice of attention.
    """
    for network in _distinct(networks):
        if performance.attention is not None:
            _choose_attention(network, performance.attention)
        if performance.channels_last:
            for parameter in network.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def speed_up(networks: Networks, performance: Performance) -> None:
    """Compile the repeated blocks and record calls as CUDA graphs; both happen at the first calls.

    After the size of calls is known: a probe would have each size that it tries compiled.

    Raises:
        InvalidInput: the network does not say which of its blocks repeat, or has none of them.
    """
    if performance.compile:
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(_RECOMPILES, limit)
        for network in _distinct(networks):
            # What a compiler makes of weights that are dequantized in every product is not tested here.
            if networks.reference_quantization is None or network is not networks.reference_module:
                _compile_blocks(network)
    if performance.cuda_graphs:
        networks.graphs = GraphedCalls()


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


def tell_changes(before: Mapping[str, Any] | None, now: Performance, tell: Callable[[str], None]) -> None:
    """Tell which switches differ from a checkpoint's: the run continues, and its last bits may differ."""
    if before is None:  # written before there were any
        return
    changed = [f"{name} {before.get(name)} → {value}" for name, value in now.as_dict().items() if before[name] != value]
    if changed:
        tell(f"Other performance switches than the checkpoint's: {', '.join(changed)}; last bits may differ.")


def _choose_attention(network: nn.Module, attention: str) -> None:
    # diffusers' name for "sdpa" is that xformers is off; set_attention_backend does not reach the UNet's processors.
    verb = "enable" if attention == "xformers" else "disable"
    choose: Any = getattr(network, f"{verb}_xformers_memory_efficient_attention", None)
    if choose is None:
        problem = f"cannot be chosen for {type(network).__name__}"
        raise invalid("performance.attention", attention, problem, "set it to null")
    choose()


def _compile_blocks(network: nn.Module) -> None:
    """Compile every repeated block in place: names of modules and weights stay.

    Shapes are static: with dynamic ones, which graph serves a shape would depend on those seen before it, and a resumed
    run might not see them in the same order.
    """
    compile_blocks: Any = getattr(network, "compile_repeated_blocks", None)
    remedy = "set performance.compile to false"
    if compile_blocks is None:
        problem = f"{type(network).__name__} does not say which of its blocks repeat"
        raise invalid("performance.compile", True, problem, remedy)
    try:
        compile_blocks(backend=COMPILER, dynamic=False)
    except ValueError as error:
        raise invalid("performance.compile", True, f"diffusers refuses it ({error})", remedy) from error


def _distinct(networks: Networks) -> list[nn.Module]:
    policy, reference = networks.policy_module, networks.reference_module
    return [policy] if reference is None or reference is policy else [policy, reference]


def _or(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked
