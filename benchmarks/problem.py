"""What a benchmark measures: a case (op, shapes, dtype), and its problem (the inputs, and every way to compute it)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("forward", "backward", "full")
"""The op without gradients; the backward alone; forward and backward through autograd."""


@dataclass(frozen=True)
class Case:
    """One configuration. ``pairs`` pairs of latents of ``shape`` at ``timesteps`` timesteps each."""

    op: str
    model: str
    shape: tuple[int, ...]
    pairs: int
    timesteps: int
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Of one tensor that holds all winners and losers."""
        return 2 * self.pairs * self.timesteps * math.prod(self.shape)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def words(self) -> tuple[str, ...]:
        """What ``--filter`` is matched with, besides the mode."""
        return (self.op, self.model, f"pairs={self.pairs}", f"K={self.timesteps}", self.dtype_name)

    def __str__(self) -> str:
        return " ".join(self.words)


class Problem(ABC):
    """The inputs of one case on one device, with the released formula, the op, and the errors of a result.

    Attributes:
        released: the released codes' order of operations in plain PyTorch, a function of ``arguments``.
        leaves: the inputs that the backward differentiates.
        cotangent: the gradient of the first output; None for a scalar.
    """

    inputs: int
    """Tensors of the case's size and dtype that are held."""
    temporaries: int
    """float32 tensors of the case's size that the hungriest provider holds besides; for skipping what cannot fit."""

    released: Callable[..., tuple[Tensor, ...]]
    arguments: tuple[Tensor | None, ...]
    leaves: Sequence[Tensor]
    cotangent: Tensor | None = None

    def __init__(self, case: Case) -> None:
        self.case = case

    @abstractmethod
    def fused(self) -> tuple[Tensor, ...]:
        """The same outputs from the public op, on whichever backend is chosen outside."""

    @abstractmethod
    def output_errors(self, outputs: tuple[Tensor, ...]) -> dict[str, float]:
        """The error of every output that counts, against float64, relative."""

    @abstractmethod
    def gradient_error(self, gradients: Sequence[Tensor]) -> float:
        """``‖g − g₆₄‖ / ‖g₆₄‖`` over all leaves."""

    def chance(self, released: bool) -> dict[str, float]:
        """Errors that a few roundings make, of the released order or of the op: so small a difference says nothing."""
        names = ("output", "gradient")
        return dict.fromkeys(names, 4 * rounding(self.case.dtype))

    @classmethod
    @abstractmethod
    def moved(cls, mode: str) -> int:
        """How many tensors of the case's size ``mode`` has to read or write at least."""

    @classmethod
    def needs(cls, case: Case) -> int:
        """Bytes that measuring the case takes."""
        return case.elements * (cls.inputs * case.dtype.itemsize + cls.temporaries * 4)


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of rounding once to the dtype."""
    return torch.finfo(dtype).eps / 2


def squares(found: Tensor, expected: Tensor) -> Tensor:
    """``(‖found − expected‖², ‖expected‖²)`` in float64: a part of :func:`relative`."""
    return torch.stack([(found.detach().double() - expected).square().sum(), expected.square().sum()])


def relative(parts: Sequence[Tensor]) -> float:
    """``‖found − expected‖ / ‖expected‖`` of a tensor compared piece by piece with :func:`squares`."""
    difference, size = torch.stack(list(parts)).sum(0)
    return finite((difference / size).sqrt())


def finite(error: Tensor) -> float:
    """The number, NaN turned into infinity: whatever is compared with it, a NaN must not pass."""
    return torch.nan_to_num(error.double(), nan=math.inf, posinf=math.inf).item()


def normal(case: Case, leading: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal float32 numbers of shape ``(*leading, *case.shape)``."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*leading, *case.shape, generator=generator, device=device)
