"""The ops in autograd, on every backend: PyTorch's own check, graphs used again, gradients of any strides, second
derivatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops.preference_loss import UTILITIES
from tests.cases import pairwise, predictions
from tests.kernels import statistics
from tests.ops.steps import PAIRS, SHAPE, Loss, assert_near, loss_on
from tests.places import EVERYWHERE, Place

everywhere = pytest.mark.parametrize("place", EVERYWHERE)


# As ops


def loss(target_free: bool, layout: torch.memory_format) -> tuple[Any, ...]:
    policy, reference, target = torch.randn(3, 2 * PAIRS, 4, 3, 5).unbind()
    policy, reference, target = (tensor.to(memory_format=layout) for tensor in (policy, reference, target))
    leaf = policy.requires_grad_()
    return (leaf, reference, None if target_free else target, torch.rand(PAIRS), None, 20.0, "sigmoid", 0.0)


def loss_backward(steps: int | None, *given: bool) -> tuple[Any, ...]:
    policy, target = torch.randn(2, 4, 3, 2, 2).unbind()
    rows = (4,) if steps is None else (4, 3)
    gradients = [torch.randn(shape) if wanted else None for shape, wanted in zip(((), (2,), rows), given, strict=True)]
    weight = None if steps is None else torch.rand(2, steps)
    return (*gradients, policy, target, torch.randn(2), torch.rand(2), weight, 100.0, "cdpo", 0.1)


def step(noise: bool) -> tuple[Any, ...]:
    sample, first, second = torch.randn(3, 4, 3, 5).unbind()
    outputs = [first.requires_grad_(), second.bfloat16().requires_grad_()]
    tables = (torch.tensor([1, 0, 1, 5]).bool(), torch.rand(4), torch.tensor([1, 0, 1, 5])) if noise else (None,) * 3
    return (sample.requires_grad_(), outputs, torch.randn(4, 3), *tables, 3, 4)


def step_out(in_place: bool) -> tuple[Any, ...]:
    sample, output = torch.randn(2, 3, 4, 5).unbind()
    trajectory = torch.zeros(3, 2, 4, 5, dtype=torch.bfloat16)[:, 1]
    into = (sample, None) if in_place else (torch.zeros_like(sample), trajectory)
    return (sample, [output], torch.randn(3, 2), torch.tensor([True, False, True]), None, None, 0, 0, *into)


def step_backward(masked: bool, form: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    active = torch.tensor([True, False, True]) if masked else None
    return (form(torch.randn(3, 4, 5)), torch.randn(3, 3), active, [0, 2], ["float32", "bfloat16"])


def sums(mask: str, with_reference: bool, paired: bool, backward: bool = False) -> tuple[Any, ...]:
    dtypes, device = (torch.float32,) * 3, torch.get_default_device()
    with torch.device("cpu"):
        p = statistics.problem((3, 5), dtypes=dtypes, mask=mask, with_reference=with_reference, paired=paired)
    p = p.to(device)
    if not backward:
        return (p.policy.requires_grad_(), *p[1:])
    samples = len(p.policy)
    of_reference = [torch.randn(samples) if with_reference else None for _ in range(2)]
    return (torch.randn(samples), *of_reference, torch.randn(samples // 2) if paired else None, *p[:4])


MASKED = pairwise(["no mask", "channels", "elements"], [True, False], [True, False])
OPCHECKS: list[tuple[str, Callable[..., tuple[Any, ...]], tuple[Any, ...]]] = [
    *(("preference_loss", loss, case) for case in [(True, torch.contiguous_format), (False, torch.channels_last)]),
    *(("preference_loss_backward", loss_backward, case) for case in [
        (None, True, True, True), (3, True, False, False), (3, False, True, False), (None, False, False, True)]),
    *(("affine_step", step, (noise,)) for noise in (False, True)),
    *(("affine_step_out", step_out, (in_place,)) for in_place in (False, True)),
    *(("affine_step_backward", step_backward, case) for case in itertools.product((False, True), [
        lambda x: x, lambda x: x[:1].expand_as(x), lambda x: x[:1, :1, :1].expand_as(x)])),
    *(("pair_statistics", sums, case) for case in MASKED),
    *(("pair_statistics_backward", sums, (*case, True)) for case in MASKED),
]  # fmt: skip


@everywhere
@pytest.mark.parametrize(("name", "build", "case"), OPCHECKS)
def test_opcheck(place: Place, name: str, build: Callable[..., tuple[Any, ...]], case: tuple[Any, ...]) -> None:
    with torch.device(place.device):
        arguments = build(*case)
    with fastinvdpo.use_backend(place.backend):
        torch.library.opcheck(getattr(torch.ops.fastinvdpo, name).default, arguments)


# Graphs used again


@everywhere
def test_a_graph_kept_gives_the_same_gradient_and_one_freed_an_error(place: Place) -> None:
    tensors = loss_on(place.device)
    sample, output = (torch.randn(3, 7, device=place.device).requires_grad_() for _ in range(2))
    table = torch.randn(3, 2, device=place.device)
    with fastinvdpo.use_backend(place.backend):
        for scalar, leaf in (
            (tensors().loss, tensors.policy),
            (fastinvdpo.affine_step(sample, [output], table).square().sum(), output),
        ):
            (first,) = torch.autograd.grad(scalar, leaf, retain_graph=True)
            (second,) = torch.autograd.grad(scalar, leaf)
            assert torch.equal(first, second) and first.data_ptr() != second.data_ptr() and first.abs().max() > 0
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                torch.autograd.grad(scalar, leaf)


@everywhere
def test_a_prediction_changed_in_place_is_noticed(place: Place) -> None:
    tensors = loss_on(place.device)
    prediction = tensors.policy * 1
    with fastinvdpo.use_backend(place.backend):
        scalar = tensors._replace(policy=prediction)().loss
        prediction.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            scalar.backward()


# Gradients that come in, of preference_loss; of affine_step: test_affine_step.py


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda tensor: tensor.flatten()[:1].view([1] * tensor.ndim).expand_as(tensor),
    "strided": lambda tensor: torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0],
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor,
}


@everywhere
@pytest.mark.parametrize(("strides", "steps", "output"), pairwise(STRIDES, [None, 3], ["loss", "margin", "policy_mse"]))
def test_gradients_of_any_strides(place: Place, strides: str, steps: int | None, output: str) -> None:
    tensors = loss_on(place.device, SHAPE if steps is None else (steps, *SHAPE))
    weight = None if steps is None else torch.rand(PAIRS, steps, device=place.device)
    with fastinvdpo.use_backend(place.backend):
        found = getattr(tensors(timestep_weight=weight), output)
        gradient = STRIDES[strides](torch.randn_like(found))
        ours, dense = (
            torch.autograd.grad(found, tensors.policy, grad, retain_graph=True)[0]
            for grad in (gradient, gradient.contiguous())
        )
    assert torch.equal(ours, dense) and dense.abs().max() > 0


# First and second derivatives: fused backwards have none of their own, and must not pass for constants.


SMOOTHING = {name: 0.1 if item.smoothed else 0.0 for name, item in UTILITIES.items()}


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize(("target_free", "masked"), [(False, False), (True, False), (False, True)])
def test_derivatives_of_preference_loss(utility: str, target_free: bool, masked: bool) -> None:
    policy, reference, target = predictions(PAIRS, (3, 2, 2), gap=0.3)
    weight, rho = torch.rand(PAIRS, 3, dtype=torch.float64), torch.tensor([0.7, -1.2], dtype=torch.float64)
    options = {"utility": utility, "label_smoothing": SMOOTHING[utility], "beta": 2.0}
    options |= {"mask": torch.rand(2 * PAIRS, 3, 1, 2)} if masked else {}

    def outputs(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tau = None if target_free else target
        result = fastinvdpo.preference_loss(p, reference, tau, pair_weight=rho, timestep_weight=weight, **options)
        return result.loss, result.margin, result.policy_mse

    assert torch.autograd.gradcheck(outputs, policy.requires_grad_())
    assert torch.autograd.gradgradcheck(outputs, policy)


def test_derivatives_of_affine_step() -> None:
    sample, first, second = torch.randn(3, 3, 4, dtype=torch.float64).unbind()
    table, active = torch.randn(3, 3, dtype=torch.float64), torch.tensor([True, False, True])
    leaves = [tensor.requires_grad_() for tensor in (sample, first, second)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, *o: fastinvdpo.affine_step(x, o, table, active=active) ** 2, leaves)


@everywhere
def test_second_derivatives_on_every_backend(place: Place) -> None:
    """Through both ops, in float32, against float64 on the reference."""

    def second(backend: str, dtype: torch.dtype) -> Tensor:
        tensors = loss_on(place.device)
        leaf = tensors.policy.detach().to(dtype).requires_grad_()
        table = torch.tensor([[0.5, 2.0]] * (2 * PAIRS), device=place.device, dtype=dtype)
        with fastinvdpo.use_backend(backend):
            prediction = fastinvdpo.affine_step(leaf, [leaf.tanh()], table)
            scalar = Loss(prediction, tensors.reference.to(dtype), tensors.target.to(dtype))().loss
            (gradient,) = torch.autograd.grad(scalar, leaf, create_graph=True)
            (result,) = torch.autograd.grad(gradient.square().sum(), leaf)
        return result

    found, exact = second(place.backend, torch.float32), second("reference", torch.float64)
    assert exact.norm() > 0
    assert_near([found], [exact])
