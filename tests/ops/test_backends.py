"""Every backend through the public ops, forward and backward, against the reference in float64 by the bounds of
tests/kernels/cases.py: what a backend's kernels do not take, such as strides, is what matters here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops.preference_loss import UTILITIES
from tests.cases import pairwise
from tests.kernels.cases import Problem, check_public, check_step, problem
from tests.places import EVERYWHERE, Place

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32,) * 3, (BF16,) * 3, (F16,) * 3, (BF16, BF16, F32), (F32, F16, BF16)]
pytestmark = pytest.mark.usefixtures("poisoned")
everywhere = pytest.mark.parametrize("place", EVERYWHERE)


def latents(
    place: Place, shape: tuple[int, ...] = (4, 5, 6), steps: int | None = None, pairs: int = 3, **options: Any
) -> Problem:
    """A problem of images: ``(2B, *shape)`` or ``(2B, K, *shape)``."""
    n = torch.Size(shape).numel()
    p = problem(n, pairs=pairs, steps=steps, device=place.device, **options)
    tensors = [None if tensor is None else tensor.unflatten(-1, shape) for tensor in p[:3]]
    return p._replace(policy=tensors[0], reference=tensors[1], target=tensors[2])  # type: ignore[arg-type]


def check(place: Place, p: Problem, weight: Tensor | None = None, mask: Tensor | None = None) -> None:
    check_public(place.backend, p, weight, mask)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


def every_other(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.full_like(tensor, torch.nan)], -1).unflatten(-1, (2, -1)).mT.flatten(-2)[..., ::2]


def samples_inside(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def same(tensor: Tensor) -> Tensor:
    return tensor


def first_everywhere(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def laid_out(p: Problem, *changes: Callable[[Tensor], Tensor]) -> Problem:
    policy, reference, target = changes
    changed = p._replace(policy=policy(p.policy), reference=reference(p.reference))
    return changed if p.target is None else changed._replace(target=target(p.target))


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "contiguous": (same,) * 3,
    "channels last": (channels_last,) * 3,
    "policy channels last": (channels_last, same, same),
    "policy contiguous": (same, channels_last, every_other),
    "policy strided": (every_other, same, same),
    "all strided": (every_other,) * 3,
    "samples inside": (samples_inside,) * 3,
    "target expanded": (same, same, first_everywhere),
}


@everywhere
@pytest.mark.parametrize(
    ("layout", "dtypes", "with_target", "utility"), pairwise(LAYOUTS, DTYPES, [True, False], UTILITIES)
)
def test_preference_loss(
    place: Place, layout: str, dtypes: tuple[torch.dtype, ...], with_target: bool, utility: str
) -> None:
    p = latents(place, dtypes=dtypes, with_target=with_target, utility=utility)
    check(place, laid_out(p, *LAYOUTS[layout]))


# The dimensions from the outermost to the innermost.
ORDERS = {"contiguous": (0, 1, 2, 3, 4), "channels last": (0, 1, 3, 4, 2), "timesteps inside": (0, 2, 3, 1, 4)}


@everywhere
@pytest.mark.parametrize(("layout", "with_target"), pairwise(ORDERS, [True, False]))
def test_timesteps(place: Place, layout: str, with_target: bool) -> None:
    p, order = latents(place, steps=3, with_target=with_target), ORDERS[layout]
    back = sorted(range(5), key=lambda dimension: order[dimension])
    p = laid_out(p, *[lambda tensor: tensor.permute(order).contiguous().permute(back)] * 3)
    check(place, p)
    shared = torch.tensor([0.2, 0.5, 0.3], device=place.device)
    check(place, p._replace(timestep_weight=shared.expand(3, 3)), shared)


def both_ways(place: Place, p: Problem, weight: Tensor) -> tuple[Tensor, ...]:
    """All outputs, and the gradient."""
    policy = p.policy.detach().requires_grad_()
    with fastinvdpo.use_backend(place.backend):
        result = fastinvdpo.preference_loss(policy, p.reference, p.target, beta=20.0, timestep_weight=weight)
        (gradient,) = torch.autograd.grad(result.loss + result.policy_mse.sum(), policy)
    return result.loss, result.margin, result.policy_mse, result.reference_mse, gradient


@everywhere
def test_timestep_weights_for_all_pairs_and_rows_apart(place: Place) -> None:
    """The bits of a dense table."""
    p = latents(place, steps=3)
    shared = torch.tensor([0.2, 0.5, 0.3], device=place.device)
    apart = torch.rand(3, 4, device=place.device)[:, 1:]
    for weight, dense in ((shared, shared.repeat(3, 1)), (apart, apart.contiguous())):
        assert all(map(torch.equal, both_ways(place, p, weight), both_ways(place, p, dense)))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_weights_of_other_dtypes_and_strides(place: Place, dtype: torch.dtype) -> None:
    rho = torch.tensor([[0.5, 9.0], [-1.0, 9.0], [2.0, 9.0]], device=place.device).to(dtype)[:, 0]
    weight = torch.tensor([[0.5, 0.25, 1.0], [1.0, 0.75, 0.125]], device=place.device).to(dtype).T
    check(place, latents(place, steps=2, pair_weight=rho, timestep_weight=weight))


@everywhere
@pytest.mark.parametrize("shape", [(1,), (4, 64, 64)], ids=str)
def test_small_and_real_sizes(place: Place, shape: tuple[int, ...]) -> None:
    check(place, latents(place, shape, pairs=1))


@everywhere
@pytest.mark.parametrize(
    ("dtypes", "steps", "samples", "channels", "with_target"),
    pairwise([(F32,) * 3, (BF16,) * 3, (F32, F16, BF16)], [None, 3], [1, 3, 6], [1, 4], [True, False]),
)
def test_masks(
    place: Place, dtypes: tuple[torch.dtype, ...], steps: int | None, samples: int, channels: int, with_target: bool
) -> None:
    p = latents(place, steps=steps, dtypes=dtypes, with_target=with_target)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(samples, *([] if steps is None else [steps]), channels, 5, 6, generator=generator) > 0.4
    check(place, p, p.timestep_weight, mask.to(place.device))


# affine_step


def check_affine(
    place: Place, sample: Tensor, outputs: list[Tensor], *, table: Tensor | None = None, **options: Any
) -> None:
    """Forward, and the gradients of the sample and all outputs."""
    n = sample.shape[0]
    table = torch.randn(n, 1 + len(outputs), device=place.device) if table is None else table
    leaves = [tensor.detach().requires_grad_() for tensor in (sample, *outputs)]
    with fastinvdpo.use_backend(place.backend):
        result = fastinvdpo.affine_step(leaves[0], leaves[1:], table, **options)
        cotangent = torch.randn_like(result)
        gradients = torch.autograd.grad(result, leaves, cotangent)
    assert (result.shape, result.dtype, result.stride()) == (
        sample.shape,
        sample.dtype,
        torch.empty_like(sample).stride(),
    )
    names = ("active", "noise_scale", "noise_index")
    settings = (table.float(), *(options.get(name) for name in names), options.get("seed", 0), options.get("offset", 0))
    check_step(sample, outputs, settings, result.detach())
    active = options.get("active")
    for column, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        factor = table[:, column].float().double()
        if active is not None:
            factor = torch.where(active, factor, float(column == 0))
        expected = factor.view(-1, *[1] * (sample.ndim - 1)) * cotangent.double()
        assert gradient.dtype == leaf.dtype
        # Rounded to the sample's dtype and then to the output's; float16 has numbers below its normal ones.
        rounding = sum(torch.finfo(dtype).eps / 2 for dtype in {F32, sample.dtype, leaf.dtype}) * 1.01
        torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=2.0**-24)


NOISE = {"noise_scale": [0.5, 1.0, 0.0, 2.0], "noise_index": [5, 2**40 + 3, 5, 0], "seed": 2**61 + 3, "offset": 7}


def options_of(place: Place, active: bool, noise: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"active": torch.tensor([True, False, True, True], device=place.device)} if active else {}
    for name, value in (NOISE if noise else {}).items():
        options[name] = torch.tensor(value, device=place.device) if isinstance(value, list) else value
    return options


def images(place: Place, count: int, dtypes: tuple[torch.dtype, ...] = (F32,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    tensors = torch.randn(1 + count, 4, 4, 5, 6, generator=generator)
    return [tensor.to(place.device, dtypes[index % len(dtypes)]) for index, tensor in enumerate(tensors)]


@everywhere
@pytest.mark.parametrize(
    ("layout", "dtypes", "count", "active", "noise"),
    pairwise(LAYOUTS, [(F32,), (BF16,), (F16,), (F32, BF16, F16)], [0, 1, 2, 4], [False, True], [False, True]),
)
def test_affine_step(
    place: Place, layout: str, dtypes: tuple[torch.dtype, ...], count: int, active: bool, noise: bool
) -> None:
    tensors = images(place, count, dtypes)
    sample, *outputs = (LAYOUTS[layout][min(index, 2)](tensor) for index, tensor in enumerate(tensors))
    check_affine(place, sample, outputs, **options_of(place, active, noise))


@everywhere
def test_affine_step_tables_of_other_dtypes_and_strides(place: Place) -> None:
    sample, output = images(place, 1)
    options = options_of(place, True, True)
    for name in ("active", "noise_scale", "noise_index"):
        options[name] = torch.stack([options[name]] * 2, 1)[:, 0]
    options["noise_scale"] = options["noise_scale"].double()
    table = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.25, 3.0, 0.0, 1.5]], device=place.device).double().T
    check_affine(place, sample, [output], table=table, **options)


@everywhere
def test_affine_step_of_nothing(place: Place) -> None:
    for shape in ((0, 4, 5), (3, 0, 5)):
        empty = torch.empty(shape, device=place.device)
        with fastinvdpo.use_backend(place.backend):
            result = fastinvdpo.affine_step(empty, [empty], torch.ones(shape[0], 2, device=place.device))
        assert result.shape == shape
