"""The ops in autograd, on every backend: PyTorch's own check, graphs used again, gradients of any strides, second
derivatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops.preference_loss import UTILITIES
from tests.cases import pairwise, predictions
from tests.ops.steps import PAIRS, SHAPE, Loss, assert_near, loss_on
from tests.places import EVERYWHERE, Place

everywhere = pytest.mark.parametrize("place", EVERYWHERE)


# As ops


@everywhere
@pytest.mark.parametrize(
    ("given", "steps"), list(zip(list(itertools.product((True, False), repeat=3))[:-1], itertools.cycle([None, 3])))
)
def test_opcheck_of_the_backward_of_preference_loss(
    place: Place, steps: int | None, given: tuple[bool, bool, bool]
) -> None:
    policy, _, target = (tensor.to(place.device) for tensor in predictions(2, (3, 2, 2), dtype=torch.float32))
    rows = (4,) if steps is None else (4, 3)
    gradients = [torch.randn(shape) if wanted else None for shape, wanted in zip(((), (2,), rows), given, strict=True)]
    tables = [torch.randn(2), torch.rand(2), None if steps is None else torch.rand(2, 3)]
    gradients, (margin, *weights) = (
        [None if t is None else t.to(place.device) for t in ts] for ts in (gradients, tables)
    )
    op = torch.ops.fastinvdpo.preference_loss_backward.default
    with fastinvdpo.use_backend(place.backend):
        torch.library.opcheck(op, (*gradients, policy, target, margin, *weights, 100.0, "cdpo", 0.1))


@everywhere
@pytest.mark.parametrize("active", [True, False])
def test_opcheck_of_the_backward_of_affine_step(place: Place, active: bool) -> None:
    grad, table = torch.randn(3, 4, 5, device=place.device), torch.randn(3, 3, device=place.device)
    mask = torch.tensor([True, False, True], device=place.device) if active else None
    with fastinvdpo.use_backend(place.backend):
        for given in (grad, grad[:1].expand_as(grad), grad[:1, :1, :1].expand_as(grad)):
            arguments = (given, table, mask, [0, 2], ["float32", "bfloat16"])
            torch.library.opcheck(torch.ops.fastinvdpo.affine_step_backward.default, arguments)


@everywhere
@pytest.mark.parametrize("in_place", [True, False])
def test_opcheck_of_affine_step_into_given_memory(place: Place, in_place: bool) -> None:
    sample, output = torch.randn(2, 3, 4, 5, device=place.device)
    table, mask = torch.randn(3, 2, device=place.device), torch.tensor([True, False, True], device=place.device)
    trajectory = torch.zeros(3, 2, 4, 5, dtype=torch.bfloat16, device=place.device)[:, 1]
    into = (sample, None) if in_place else (torch.zeros_like(sample), trajectory)
    with fastinvdpo.use_backend(place.backend):
        arguments = (sample, [output], table, mask, None, None, 0, 0, *into)
        torch.library.opcheck(torch.ops.fastinvdpo.affine_step_out.default, arguments)


@everywhere
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("target_free", [False, True])
def test_opcheck_of_preference_loss(place: Place, target_free: bool, layout: torch.memory_format) -> None:
    tensors = loss_on(place.device)
    policy, reference, target = (tensor.detach().to(memory_format=layout) for tensor in tensors)
    rho = torch.rand(PAIRS, device=place.device)
    arguments = (policy.requires_grad_(), reference, None if target_free else target, rho, None, 20.0, "sigmoid", 0.0)
    with fastinvdpo.use_backend(place.backend):
        torch.library.opcheck(torch.ops.fastinvdpo.preference_loss.default, arguments)


@everywhere
@pytest.mark.parametrize("noise", [False, True])
def test_opcheck_of_affine_step(place: Place, noise: bool) -> None:
    sample, first, second = torch.randn(3, 4, 3, 5, device=place.device).unbind()
    table, scale = torch.randn(4, 3, device=place.device), torch.rand(4, device=place.device) if noise else None
    outputs = [first.requires_grad_(), second.bfloat16().requires_grad_()]
    active, index = (torch.tensor([1, 0, 1, 5], device=place.device) for _ in range(2)) if noise else (None, None)
    active = None if active is None else active.bool()
    arguments = (sample.requires_grad_(), outputs, table, active, scale, index, 3, 4)
    with fastinvdpo.use_backend(place.backend):
        torch.library.opcheck(torch.ops.fastinvdpo.affine_step.default, arguments)


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
        loss = tensors._replace(policy=prediction)().loss
        prediction.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@everywhere
def test_gradients_accumulate(place: Place) -> None:
    tensors = loss_on(place.device)
    with fastinvdpo.use_backend(place.backend):
        tensors().loss.backward()
        once = tensors.policy.grad.clone()  # type: ignore[union-attr]
        tensors().loss.backward()
        assert torch.equal(tensors.policy.grad, 2 * once)  # type: ignore[arg-type]
        # Micro-batches of one pair each, their losses weighted by their share, make the gradient of the batch.
        tensors.policy.grad = None
        for pair in range(PAIRS):
            rows = [pair, pair + PAIRS]
            part = Loss(tensors.policy[rows], tensors.reference[rows], tensors.target[rows])
            (part().loss / PAIRS).backward()
    assert_near([tensors.policy.grad], [once])


# Gradients that come in


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


@everywhere
@pytest.mark.parametrize("strides", STRIDES)
def test_gradients_of_any_strides_of_affine_step(place: Place, strides: str) -> None:
    sample, output = (torch.randn(3, 4, 5, device=place.device).requires_grad_() for _ in range(2))
    table = torch.randn(3, 2, device=place.device)
    active = torch.tensor([True, False, True], device=place.device)
    with fastinvdpo.use_backend(place.backend):
        found = fastinvdpo.affine_step(sample, [output], table, active=active)
        gradient = STRIDES[strides](torch.randn_like(found))
        ours, dense = (
            torch.autograd.grad(found, (sample, output), grad, retain_graph=True)
            for grad in (gradient, gradient.contiguous())
        )
    for one, other in zip(ours, dense, strict=True):
        assert torch.equal(one, other) and other.abs().max() > 0


# Second derivatives: fused backwards have none of their own, and must not pass for constants.


SMOOTHING = {name: 0.1 if item.smoothed else 0.0 for name, item in UTILITIES.items()}


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("target_free", [False, True])
def test_gradgradcheck(utility: str, target_free: bool) -> None:
    policy, reference, target = predictions(PAIRS, (3, 2, 2), gap=0.3)
    weight, rho = torch.rand(PAIRS, 3, dtype=torch.float64), torch.tensor([0.7, -1.2], dtype=torch.float64)
    options = {"utility": utility, "label_smoothing": SMOOTHING[utility], "beta": 2.0}

    def outputs(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tau = None if target_free else target
        result = fastinvdpo.preference_loss(p, reference, tau, pair_weight=rho, timestep_weight=weight, **options)
        return result.loss, result.margin, result.policy_mse

    assert torch.autograd.gradgradcheck(outputs, policy.requires_grad_())


def test_gradgradcheck_of_affine_step() -> None:
    sample, output = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    table, active = torch.randn(3, 2, dtype=torch.float64), torch.tensor([True, False, True])
    leaves = (sample.requires_grad_(), output.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x, o: fastinvdpo.affine_step(x, [o], table, active=active) ** 2, leaves)


@everywhere
def test_second_derivatives_on_every_backend(place: Place) -> None:
    """Through both ops, in float32, against float64 on the reference."""

    def second(backend: str, dtype: torch.dtype) -> Tensor:
        tensors = loss_on(place.device)
        leaf = tensors.policy.detach().to(dtype).requires_grad_()
        table = torch.tensor([[0.5, 2.0]] * (2 * PAIRS), device=place.device, dtype=dtype)
        with fastinvdpo.use_backend(backend):
            prediction = fastinvdpo.affine_step(leaf, [leaf.tanh()], table)
            loss = Loss(prediction, tensors.reference.to(dtype), tensors.target.to(dtype))().loss
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (result,) = torch.autograd.grad(gradient.square().sum(), leaf)
        return result

    found, exact = second(place.backend, torch.float32), second("reference", torch.float64)
    assert exact.norm() > 0
    assert_near([found], [exact])
