"""Inputs for the compiled kernels, and how exact their results must be: compared with the reference in float64 on the
same inputs, by bounds that follow from float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastinvdpo
from fastinvdpo.ops.affine_step import reference as step_reference
from fastinvdpo.ops.preference_loss import UTILITIES
from fastinvdpo.ops.preference_loss import reference as loss_reference
from tests.cases import predictions

ROUNDING = 2.0**-24
UTILITY = {name: number for number, name in enumerate(UTILITIES)}  # as csrc/utilities.h counts them


class Problem(NamedTuple):
    """Arguments of preference_loss."""

    policy: Tensor
    reference: Tensor
    target: Tensor | None
    beta: float = 50.0
    pair_weight: Tensor | None = None
    timestep_weight: Tensor | None = None
    utility: str = "sigmoid"
    label_smoothing: float = 0.0

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of the errors: ``(2B,)`` or ``(2B, K)``."""
        return tuple(self.policy.shape[: 1 if self.timestep_weight is None else 2])


def at_offset(tensor: Tensor, elements: int, device: str = "cpu") -> Tensor:
    """The same values, so many elements after an aligned address."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=device)
    assert room.data_ptr() % 16 == 0
    return room[elements:].view(tensor.shape).copy_(tensor)


def problem(
    n: int,
    *,
    pairs: int = 2,
    steps: int | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,) * 3,
    with_target: bool = True,
    offsets: Sequence[int] = (0, 0, 0),
    gap: float = 0.1,
    device: str = "cpu",
    **options: Any,
) -> Problem:
    """``pairs`` pairs of ``n`` elements a row, weighted; ``dtypes`` and ``offsets`` of policy, reference and target."""
    shape = (n,) if steps is None else (steps, n)
    policy, reference, target = (
        at_offset(tensor.to(dtype), offset, device)
        for tensor, dtype, offset in zip(predictions(pairs, shape, gap=gap), dtypes, offsets, strict=True)
    )
    options.setdefault("pair_weight", torch.linspace(0.5, 2, pairs, device=device))
    if steps is not None:
        options.setdefault("timestep_weight", torch.linspace(0.2, 1, pairs * steps, device=device).view(pairs, steps))
    utility = options.get("utility", "sigmoid")
    options.setdefault("label_smoothing", 0.1 if UTILITIES[utility].smoothed else 0.0)
    return Problem(policy, reference, target if with_target else None, **options)


def apart(tensor: Tensor, gap: int, offset: int = 0) -> Tensor:
    """These values, ``offset`` elements after an aligned address, samples ``gap`` elements apart; NaN between them."""
    samples, n = len(tensor), tensor[0].numel()
    room = torch.full((offset + samples * (n + gap),), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return room[offset:].view(samples, n + gap)[:, :n].view(tensor.shape).copy_(tensor)


def between(tensor: Tensor, gap: int) -> Tensor:
    """What lies between the samples of a tensor of :func:`apart`."""
    after = tensor.storage_offset() + tensor[0].numel()
    return tensor.as_strided((len(tensor), gap), (tensor.stride(0), 1), after)


def check_public(backend: str, p: Problem, weight: Tensor | None = None, mask: Tensor | None = None) -> None:
    """``preference_loss`` forward, and backward of its loss, of its other outputs and of all. ``weight``: what to pass
    for p's ``timestep_weight``; ``mask``: of zeros and ones, where it is 0 both predictions might as well be right.
    """
    policy = p.policy.detach().requires_grad_()
    names = ("beta", "pair_weight", "timestep_weight", "utility", "label_smoothing")
    options = {name: getattr(p, name) for name in names} | ({} if weight is None else {"timestep_weight": weight})
    options |= {} if mask is None else {"mask": mask}
    with fastinvdpo.use_backend(backend):
        result = fastinvdpo.preference_loss(policy, p.reference, p.target, **options)
        outputs = (result.loss, result.margin, result.policy_mse)
        grads = (torch.full_like(result.loss, 0.7), torch.randn_like(result.margin), torch.rand_like(result.policy_mse))
        (of_loss,) = torch.autograd.grad(result.loss, policy, grads[0], retain_graph=True)
        (of_rest,) = torch.autograd.grad(outputs[1:], policy, grads[1:], retain_graph=True)
        (of_all,) = torch.autograd.grad(outputs, policy, grads)
    outputs = (*outputs, result.reference_mse)
    if mask is not None:
        tau = p.reference if p.target is None else p.target
        kept = mask.bool().repeat(len(policy) // len(mask), *[1] * (mask.ndim - 1))
        predictions = [torch.where(kept, pred, tau).to(pred.dtype) for pred in (p.policy, p.reference)]
        exact_tau = all(torch.equal(tau.to(pred.dtype).to(tau.dtype), tau) for pred in (p.policy, p.reference))
        assert exact_tau, "the target can be had in the predictions' types"
        p = p._replace(policy=predictions[0], reference=predictions[1])
    check_loss(p, [tensor.detach() for tensor in outputs])
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in outputs)
    given = ((grads[0], None, None), (None, *grads[1:]), grads)
    for incoming, gradient in zip(given, (of_loss, of_rest, of_all), strict=True):
        check_gradient(p, incoming, result.margin.detach(), gradient)
        assert gradient.stride() == torch.empty_like(p.policy).stride()


def exact(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    policy, reference, target, pair_weight, timestep_weight = map(_wide, (*p[:3], p.pair_weight, p.timestep_weight))
    assert policy is not None and reference is not None
    settings = (p.beta, p.utility, p.label_smoothing)
    return loss_reference.forward(policy, reference, target, pair_weight, timestep_weight, *settings)


def check_loss(p: Problem, results: Sequence[Tensor]) -> None:
    loss, margin, policy_mse, reference_mse = results
    assert torch.isfinite(torch.cat([result.flatten() for result in results])).all()
    _, exact_margin, exact_policy_mse, exact_reference_mse = exact(p)
    # A thread adds at most 16 terms in float32, each of a few roundings. A margin cancels: it is as exact as its terms.
    policy, reference, target = p.policy.double(), p.reference.double(), _wide(p.target)
    tau = reference if target is None else target
    terms = ((policy - reference) * ((policy - tau) + (reference - tau))).abs().flatten(len(p.rows)).mean(-1)
    winner, loser = terms.chunk(2)
    scale = loss_reference.pair_scale(p.beta, p.pair_weight, p.timestep_weight, winner).abs()
    allowed = (scale * (winner + loser)).reshape(len(margin), -1).sum(1)
    assert ((margin - exact_margin).abs() <= 24 * ROUNDING * allowed).all()
    for found, expected in ((policy_mse, exact_policy_mse), (reference_mse, exact_reference_mse)):
        torch.testing.assert_close(found.double(), expected, rtol=24 * ROUNDING, atol=0)
    # The loss follows from the margins.
    value = UTILITIES[p.utility].value(margin.double(), p.beta, p.label_smoothing).mean()
    torch.testing.assert_close(loss.double(), value, rtol=24 * ROUNDING, atol=24 * ROUNDING)


def check_gradient(p: Problem, gradients: Sequence[Tensor | None], margin: Tensor, found: Tensor) -> None:
    """``gradients``: those of loss, margin and policy_mse."""
    target = p.reference if p.target is None else p.target
    tensors = (*gradients, p.policy, target, margin, p.pair_weight, p.timestep_weight)
    expected = loss_reference.backward(*map(_wide, tensors), p.beta, p.utility, p.label_smoothing)  # type: ignore[arg-type]
    assert found.dtype == p.policy.dtype and found.shape == p.policy.shape
    # Half a unit of the storage type, and float32's rounding in front of it; float16 has numbers below its normal ones.
    eps = torch.finfo(found.dtype).eps
    least = torch.finfo(found.dtype).tiny * eps if found.dtype == torch.float16 else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=0.5 * eps + 64 * ROUNDING, atol=least)


def check_step(sample: Tensor, outputs: Sequence[Tensor], settings: Sequence[Any], found: Tensor) -> None:
    """``settings``: the arguments of affine_step from ``coefficients`` on; ``found``: the result, or the trajectory."""
    coefficients, active, noise_scale, *key = settings
    wide = [output.double() for output in outputs]
    expected = step_reference.forward(sample.double(), wide, *settings)
    sizes = [output.abs() for output in wide]
    terms = step_reference.forward(sample.double().abs(), sizes, coefficients.abs(), active, None, *key)
    if noise_scale is not None:
        terms += 6 * step_reference.per_sample(noise_scale.unsqueeze(1), sample)[0].abs()  # 23-bit uniforms: |z| < 6
    allowed = 8 * ROUNDING * terms + 0.5 * torch.finfo(found.dtype).eps * expected.abs()
    assert ((found.double() - expected).abs() <= allowed + torch.finfo(torch.float16).tiny).all()
    if active is not None:
        assert torch.equal(found[~active], sample[~active].to(found.dtype))


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()
