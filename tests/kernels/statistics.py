"""Inputs for ``pair_statistics``, and how exact its results must be: an error of at most twice that of plain PyTorch on
the same inputs, which by luck can be less than a rounding of the largest result and of the terms that it adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops.pair_statistics import reference as plain
from tests.cases import predictions
from tests.kernels.cases import at_offset

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MIXES = [(F32,) * 3, (BF16,) * 3, (F16,) * 3, (BF16, BF16, F32), (F32, F16, BF16), (F16, F32, F16)]

# The samples and the dimensions of a mask: of each sample, of each pair, of all; of each element or of all channels.
MASKS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]] | None] = {
    "no mask": None,
    "elements": lambda shape: shape,
    "channels": lambda shape: (shape[0], 1, *shape[2:]),
    "pairs": lambda shape: (shape[0] // 2, 1, *shape[2:]),
    "one": lambda shape: (1, 1, *shape[2:]),
    "columns": lambda shape: (1, *[1] * (len(shape) - 2), shape[-1]),
}
UNPAIRED_MASKS = [name for name in MASKS if name != "pairs"]


class Problem(NamedTuple):
    """Arguments of the op."""

    policy: Tensor
    reference: Tensor | None
    target: Tensor
    mask: Tensor | None = None
    paired: bool = True

    def to(self, *arguments: Any) -> Problem:
        return Problem(*(value.to(*arguments) if isinstance(value, Tensor) else value for value in self))


def problem(
    shape: tuple[int, ...] = (4, 6, 5),
    *,
    pairs: int = 3,
    dtypes: Sequence[torch.dtype] = (F64,) * 3,
    mask: str = "no mask",
    with_reference: bool = True,
    paired: bool = True,
    offsets: Sequence[int] = (0, 0, 0),
) -> Problem:
    """``2·pairs`` samples, one fewer where they are not paired; ``offsets``: elements after an aligned address."""
    tensors = predictions(pairs, shape, gap=0.1)
    policy, reference, target = (
        at_offset(tensor[int(not paired) :].to(dtype), offset)
        for tensor, dtype, offset in zip(tensors, dtypes, offsets, strict=True)
    )
    kind, weights = MASKS[mask], None
    if kind is not None:
        generator = torch.Generator().manual_seed(1)
        weights = torch.rand(kind(tuple(policy.shape)), generator=generator, dtype=F64)
        weights = (weights * (weights > 0.3)).to(torch.promote_types(F32, dtypes[0]))
    return Problem(policy, reference if with_reference else None, target, weights, paired)


def by_definition(p: Problem) -> list[Tensor]:
    """E, X, Q, C and m(k), sample by sample and pair by pair; ``(0,)`` for what there is not."""
    sums: list[list[Tensor]] = [[], [], [], [], []]
    samples = len(p.policy)

    def weight(sample: int) -> Tensor:
        if p.mask is None:
            return torch.ones_like(p.policy[0])
        return p.mask[sample % len(p.mask)].expand_as(p.policy[0])

    for i in range(samples):
        k, error = weight(i), p.policy[i] - p.target[i]
        sums[0].append((k * error**2).mean())
        if p.reference is not None:
            shift = p.policy[i] - p.reference[i]
            sums[1].append((k * error * shift).mean())
            sums[2].append((k * shift**2).mean())
        if p.paired and i < samples // 2:
            j = i + samples // 2
            shared = k if p.mask is None or len(p.mask) < samples else (k * weight(j)).sqrt()
            sums[3].append((shared * error * (p.policy[j] - p.target[j])).mean())
        if p.mask is not None:
            sums[4].append(k.mean())
    return [torch.stack(values) if values else p.policy.new_empty(0) for values in sums]


def magnitudes(exact: Problem) -> Problem:
    """|e| and |d| in the place of e and d: what a sum or a gradient of these is, roundings are relative to."""
    error = (exact.policy - exact.target).abs()
    reference = None if exact.reference is None else error - (exact.policy - exact.reference).abs()
    return Problem(error, reference, 0 * error, exact.mask, exact.paired)


def check_sums(p: Problem, found: Sequence[Tensor]) -> None:
    exact = p.to(F64)
    expected = (plain.forward(*p), plain.forward(*exact), plain.forward(*magnitudes(exact)))
    for ours, model, right, size in zip(found, *expected, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (model.shape, F32, model.stride())
        if len(right):
            mistake, allowed = ((value.double() - right).abs().max() for value in (ours, model))
            assert mistake <= 2 * max(allowed, 2 * 2**-24 * size.max())


def gradients_of(p: Problem, given: str = "EXQC") -> list[Tensor | None]:
    """Incoming gradients of the sums that ``given`` names and that there are."""
    there = given if p.reference is not None else given.replace("X", "").replace("Q", "")
    there = there if p.paired else there.replace("C", "")
    samples, device = len(p.policy), p.policy.device
    lengths = {"E": samples, "X": samples, "Q": samples, "C": samples // 2}
    return [
        torch.linspace(-1, 2, length, device=device) + place if name in there else None
        for place, (name, length) in enumerate(lengths.items())
    ]


def check_gradient(p: Problem, grads: Sequence[Tensor | None], found: Tensor) -> None:
    exact = p.to(F64)
    wide, large = ([None if g is None else f(g) for g in grads] for f in (Tensor.double, lambda g: g.double().abs()))
    model, right = plain.backward(*grads, *p[:4]), plain.backward(*wide, *exact[:4])
    size = plain.backward(*large, *magnitudes(exact)[:4])
    assert (found.dtype, found.shape, found.stride()) == (model.dtype, model.shape, model.stride())
    mistake, allowed = ((value.double() - right).abs().max() for value in (found, model))
    stored = torch.finfo(found.dtype).eps / 2 * right.abs().max()
    assert mistake <= 2 * max(allowed, stored, 2 * 2**-24 * size.max())


def both_ways(backend: str, p: Problem, given: str = "EXQC") -> tuple[list[Tensor], list[Tensor | None], Tensor]:
    """All sums of the op, the gradients of those that ``given`` names, and the gradient that follows."""
    leaf, grads = p.policy.detach().requires_grad_(), gradients_of(p, given)
    with fastinvdpo.use_backend(backend):
        sums = torch.ops.fastinvdpo.pair_statistics(leaf, *p[1:])
        weighted = [(value, grad) for value, grad in zip(sums, (*grads, None), strict=True) if grad is not None]
        outputs, slopes = zip(*weighted, strict=True)
        (gradient,) = torch.autograd.grad(outputs, leaf, slopes)
    return [value.detach() for value in sums], grads, gradient


def check_public(backend: str, p: Problem, given: str = "EXQC") -> None:
    sums, grads, gradient = both_ways(backend, p, given)
    check_sums(p, sums)
    check_gradient(p, grads, gradient)
