"""What the tests of autograd and the compiler run: a small training step, and the loss alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastinvdpo
from tests.cases import predictions

PAIRS, SHAPE = 2, (4, 6, 5)
GUIDANCE = [[0.0, -1.0, 2.0]] * (2 * PAIRS)  # unconditional + 2·(conditional − unconditional)


class Network(nn.Module):
    """A small one, with a guided prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        return self.second(torch.nn.functional.silu(self.first(latents)))


class Step(NamedTuple):
    """A training step on one device: latents in, loss out."""

    network: nn.Module
    latents: Tensor
    reference: Tensor
    target: Tensor
    table: Tensor

    def loss(self, latents: Tensor, table: Tensor, predict: Callable[..., Tensor] | None = None) -> Tensor:
        predict = predict or self.network
        conditional, unconditional = predict(latents), predict(0.5 * latents)
        n = latents.shape[0]
        guided = fastinvdpo.affine_step(latents, [unconditional, conditional], table)
        result = fastinvdpo.preference_loss(guided, self.reference[:n], self.target[:n], beta=20.0)
        return result.loss + 0.1 * result.policy_mse.mean() + 0.01 * result.margin.sum()

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self.network.parameters()]  # type: ignore[union-attr]


def step_on(device: str, pairs: int = PAIRS) -> Step:
    torch.manual_seed(1)
    network = Network()
    reference, target, _ = predictions(pairs, SHAPE, gap=0.2, dtype=torch.float32)
    latents, table = torch.randn(2 * pairs, *SHAPE), torch.tensor(GUIDANCE[:1] * (2 * pairs))
    return Step(network.to(device), *(tensor.to(device) for tensor in (latents, reference, target, table)))


class Loss(NamedTuple):
    """Leaves and the arguments of preference_loss."""

    policy: Tensor
    reference: Tensor
    target: Tensor

    def __call__(self, **options: Any) -> fastinvdpo.PreferenceLoss:
        return fastinvdpo.preference_loss(self.policy, self.reference, self.target, beta=20.0, **options)


def loss_on(device: str, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Loss:
    policy, reference, target = (tensor.to(device) for tensor in predictions(PAIRS, shape, gap=0.2, dtype=dtype))
    return Loss(policy.requires_grad_(), reference, target)


def in_float64(step: Step) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the same step."""
    wide = Step(Network().to(step.latents.device), *(tensor.double() for tensor in step[1:]))
    wide.network.load_state_dict(step.network.state_dict())
    wide.network.double()
    with fastinvdpo.use_backend("reference"):
        loss = wide.loss(wide.latents, wide.table)
        loss.backward()
    return loss.detach(), wide.gradients()


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """As vectors, within 64 roundings of float32: roundings add up like their number's root, the longest sums have 240
    terms (a weight's gradient: two predictions of 4 samples of 30 pixels), and four such sums follow each other.
    """
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).norm() <= 64 * 2.0**-24 * other.double().norm()
