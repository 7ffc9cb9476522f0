"""``preference_loss``: against the definition in float64, as an op, and its symmetries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

import fastinvdpo
from fastinvdpo.ops.preference_loss import UTILITIES
from tests.cases import predictions

SMOOTHING = {name: 0.1 if item.smoothed else 0.0 for name, item in UTILITIES.items()}


def by_definition(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    beta: float,
    rho: Tensor | float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | float = 1.0,
) -> Tensor:
    """z, from the two squared errors and not from the product form; ``mask`` broadcasts against a prediction."""
    policy_error, reference_error = (mask * (prediction - target) ** 2 for prediction in (policy, reference))
    if weight is None:
        policy_error, reference_error = policy_error.unsqueeze(1), reference_error.unsqueeze(1)
        weight = torch.ones(1, dtype=policy.dtype)
    difference = policy_error.flatten(2).mean(-1) - reference_error.flatten(2).mean(-1)
    winner, loser = difference.chunk(2)
    return -beta / 2 * rho * (weight * (winner - loser)).sum(-1)


@pytest.mark.parametrize(("shape", "pairs"), [((7,), 1), ((4, 8, 8), 2), ((3, 2, 5, 3), 5)])
def test_margin_and_errors_by_definition(pairs: int, shape: tuple[int, ...]) -> None:
    policy, reference, target = predictions(pairs, shape, gap=0.1)
    rho = torch.linspace(-1, 2, pairs, dtype=torch.float64)
    result = fastinvdpo.preference_loss(policy, reference, target, beta=50.0, pair_weight=rho)
    z = by_definition(policy, reference, target, 50.0, rho)
    torch.testing.assert_close(result.margin, z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result.loss, -logsigmoid(z).mean(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result.policy_mse, (policy - target).square().flatten(1).mean(1))
    torch.testing.assert_close(result.reference_mse, (reference - target).square().flatten(1).mean(1))
    won = (z > 0).double().mean() + 0.5 * (z == 0).double().mean()
    assert float(result.implicit_accuracy) == pytest.approx(float(won))


@pytest.mark.parametrize("shared", [True, False])
def test_timesteps(shared: bool) -> None:
    policy, reference, target = predictions(3, (5, 4, 2, 2), gap=0.1)
    weight = torch.rand(5, dtype=torch.float64) if shared else torch.rand(3, 5, dtype=torch.float64)
    result = fastinvdpo.preference_loss(policy, reference, target, beta=20.0, timestep_weight=weight)
    z = by_definition(policy, reference, target, 20.0, weight=weight)
    torch.testing.assert_close(result.margin, z, rtol=1e-11, atol=1e-11)
    assert result.policy_mse.shape == result.reference_mse.shape == (6, 5)


# The samples and timesteps of a mask, as factors of 2B = 6 samples and K = 5 timesteps, and whether channels share it.
MASKS = {"samples": (6, 5, False), "pairs, channels": (3, 5, True), "one": (1, 5, True), "shared": (6, 1, True),
         "a pair's": (3, 1, False), "one for all": (1, 1, True)}  # fmt: skip


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("utility", ["sigmoid", "robust"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_weighs_every_element(name: str, utility: str, steps: int | None) -> None:
    """Forward and backward, of every output that has a gradient; the mean is over all elements, masked or not."""
    samples, timesteps, channels = MASKS[name]
    image = (4, 3, 2)
    policy, reference, target = predictions(3, image if steps is None else (5, *image), gap=0.1)
    kept = torch.rand(samples, timesteps, 1 if channels else 4, 3, 2, dtype=torch.float64)
    kept = (kept * (kept > 0.4))[:, 0] if steps is None else kept * (kept > 0.4)
    rho, weight = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    weight = None if steps is None else weight
    wide, inner = kept.repeat(6 // samples, *[1] * (kept.ndim - 1)), 1 if steps is None else 2
    cotangents = torch.randn(3, dtype=torch.float64), torch.randn(policy.shape[:inner], dtype=torch.float64)
    leaf, twin = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    options = {"beta": 50.0, "utility": utility, "label_smoothing": SMOOTHING[utility]}
    found = fastinvdpo.preference_loss(
        leaf, reference, target, mask=kept, pair_weight=rho, timestep_weight=weight, **options
    )
    z = by_definition(twin, reference, target, 50.0, rho, weight, wide)
    errors = [(wide * (p - target) ** 2).flatten(inner).mean(-1) for p in (twin, reference)]
    expected = (UTILITIES[utility].value(z, 50.0, SMOOTHING[utility]).mean(), z, *errors)
    for one, other in zip((found.loss, found.margin, found.policy_mse, found.reference_mse), expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-11, atol=1e-12)
    assert not found.reference_mse.requires_grad
    gradients = [
        torch.autograd.grad(3 * loss + (margin * cotangents[0]).sum() + (mse * cotangents[1]).sum(), p)[0]
        for p, (loss, margin, mse) in ((leaf, (found.loss, found.margin, found.policy_mse)), (twin, expected[:3]))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)
    assert not gradients[0][(wide == 0).expand_as(policy)].any()


def test_a_mask_of_the_distance_to_the_reference() -> None:
    policy, reference, _ = predictions(3, gap=0.1)
    kept = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    result = fastinvdpo.preference_loss(policy, reference, None, beta=20.0, mask=kept)
    torch.testing.assert_close(result.margin, by_definition(policy, reference, reference, 20.0, mask=kept))
    assert not result.reference_mse.any()


def test_a_masked_loss_compiles_without_graph_break() -> None:
    policy, reference, target = predictions(3, (2, 4, 5), gap=0.1, dtype=torch.float32)
    kept = torch.rand(6, 1, 4, 5) > 0.5

    def loss(p: Tensor) -> Tensor:
        return fastinvdpo.preference_loss(p * 1.5, reference, target, beta=20.0, mask=kept).loss

    leaves = [policy.clone().requires_grad_() for _ in range(2)]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves[0]).backward()
    loss(leaves[1]).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_a_mask_of_ones_changes_nothing() -> None:
    """To float32's rounding, on whatever backend is the default."""
    policy, reference, target = predictions(8, (4, 64, 64), gap=1e-3, dtype=torch.float32)
    outcomes = []
    for kept in (None, torch.ones(8, 1, 64, 64, dtype=torch.bool)):
        leaf = policy.clone().requires_grad_()
        result = fastinvdpo.preference_loss(leaf, reference, target, beta=5000.0, mask=kept)
        outcomes.append([result.loss, result.policy_mse, *torch.autograd.grad(result.loss, leaf)])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=0)


def test_reference_as_target() -> None:
    policy, reference, _ = predictions(3, gap=0.1)
    result = fastinvdpo.preference_loss(policy, reference, None, beta=20.0, pair_weight=-torch.ones(3))
    distance = (policy - reference).square().flatten(1).mean(1)
    torch.testing.assert_close(result.margin, 10.0 * (distance[:3] - distance[3:]))
    torch.testing.assert_close(result.policy_mse, distance)
    assert not result.reference_mse.any()


Z = torch.linspace(-6, 6, 97, dtype=torch.float64)
FORMULAS = {
    "sigmoid": lambda z, e, b: -torch.log(torch.sigmoid(z)),
    "cdpo": lambda z, e, b: -(1 - e) * torch.log(torch.sigmoid(z)) - e * torch.log(torch.sigmoid(-z)),
    "robust": lambda z, e, b: (-(1 - e) * torch.log(torch.sigmoid(z)) + e * torch.log(torch.sigmoid(-z))) / (1 - 2 * e),
    "hinge": lambda z, e, b: torch.maximum(torch.zeros_like(z), 1 - z),
    "ipo": lambda z, e, b: (z / b - 1 / (2 * b)) ** 2,
}


@pytest.mark.parametrize("utility", UTILITIES)
def test_utilities(utility: str) -> None:
    """By formula; the slope is the derivative; far margins stay finite."""
    utilities, smoothing = UTILITIES[utility], SMOOTHING[utility]
    if utility == "linear":
        torch.testing.assert_close(utilities.slope(Z, 1.0, 0.0), -(0.5 - 0.4 * Z).clamp(0.01, 0.99))
        assert float(utilities.value(torch.zeros(1), 1.0, 0.0)) == 0
    else:
        ours = utilities.value(Z, 3.0, smoothing)
        torch.testing.assert_close(ours, FORMULAS[utility](Z, smoothing, 3.0), rtol=1e-12, atol=1e-12)
    z = (Z + 0.01234).requires_grad_()  # away from the kinks
    utilities.value(z, 3.0, smoothing).sum().backward()
    torch.testing.assert_close(utilities.slope(z.detach(), 3.0, smoothing), z.grad, rtol=1e-10, atol=1e-12)
    far = torch.tensor([-1e4, 1e4])
    assert utilities.value(far, 5000.0, smoothing).isfinite().all()
    assert utilities.slope(far, 5000.0, smoothing).isfinite().all()


def test_float32_keeps_the_signal_of_a_small_difference() -> None:
    """Policy − reference of about 1e-3 at β = 5000: z within 1e-4 relative; two means subtracted would lose it."""
    policy, reference, target = (tensor.float() for tensor in predictions(8, (4, 64, 64), gap=1e-3))
    exact = by_definition(policy.double(), reference.double(), target.double(), 5000.0)
    ours = fastinvdpo.preference_loss(policy, reference, target, beta=5000.0).margin
    assert float(((ours - exact).abs() / exact.abs()).max()) < 1e-4


class Recorder(TorchDispatchMode):
    """Which of the package's ops a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastinvdpo":
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("target_free", [False, True])
def test_the_direct_way_is_the_op(target_free: bool) -> None:
    """Nothing watches the public function's call: it goes around the dispatcher, to the same bits."""
    policy, reference, target = predictions(3, dtype=torch.float32)
    others = (reference, None if target_free else target)
    rho, cotangents = torch.rand(3), torch.randn(3)
    outcomes = []
    for direct in (True, False):
        leaf = policy.clone().requires_grad_()
        if direct:
            found = fastinvdpo.preference_loss(leaf, *others, beta=20.0, pair_weight=rho)
            loss, margin, policy_mse, reference_mse = found.loss, found.margin, found.policy_mse, found.reference_mse
        else:
            arguments = (leaf, *others, rho, None, 20.0, "sigmoid", 0.0)
            loss, margin, policy_mse, reference_mse = torch.ops.fastinvdpo.preference_loss(*arguments)
        assert not reference_mse.requires_grad
        total = 2 * loss + (margin * cotangents).sum() + policy_mse.sum()
        outcomes.append((loss, margin, policy_mse, reference_mse, *torch.autograd.grad(total, leaf)))
    assert all(torch.equal(one, two) for one, two in zip(*outcomes, strict=True))


def test_modes_see_the_op_and_its_backward() -> None:
    policy, reference, target = predictions(2, dtype=torch.float32)
    with Recorder() as recorder:
        fastinvdpo.preference_loss(policy.requires_grad_(), reference, target, beta=2.0).loss.backward()
    assert recorder.names == ["preference_loss.default", "preference_loss_backward.default"]
    loss = fastinvdpo.preference_loss(policy, reference, target, beta=2.0).loss
    with Recorder() as recorder:  # for the backward alone
        loss.backward()
    assert recorder.names == ["preference_loss_backward.default"]
