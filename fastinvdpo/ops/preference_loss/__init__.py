"""The batched winner/loser log-likelihood ratio with its utility."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops.checks import check_predictions, check_tensor
from fastinvdpo.ops.pair_statistics import check_mask, pair_statistics
from fastinvdpo.ops.preference_loss import reference
from fastinvdpo.ops.preference_loss.schema import preference_loss_op
from fastinvdpo.ops.preference_loss.utilities import UTILITIES, check_utility

__all__ = ["UTILITIES", "PreferenceLoss", "preference_loss"]


@dataclass(frozen=True)
class PreferenceLoss:
    """What :func:`preference_loss` returns; float32 (float64 for float64 inputs).

    Attributes:
        loss: ``mean_i u(z_i)``, scalar.
        margin: ``z`` per pair, ``(B,)``: positive where the policy prefers the winner more than the reference does.
        policy_mse: ``m((p − τ)²)``, with a mask ``m(k·(p − τ)²)``, per sample, ``(2B,)`` or ``(2B, K)``.
        reference_mse: ``m((r − τ)²)`` likewise; carries no gradient.
    """

    loss: Tensor
    margin: Tensor
    policy_mse: Tensor
    reference_mse: Tensor

    @property
    def implicit_accuracy(self) -> Tensor:
        """The share of pairs with ``z > 0``, ties counting half; scalar, no gradient."""
        return 0.5 * (1 + torch.sign(self.margin.detach())).mean()


def preference_loss(
    policy_pred: Tensor,
    reference_pred: Tensor,
    target: Tensor | None,
    *,
    beta: float,
    mask: Tensor | None = None,
    pair_weight: Tensor | None = None,
    timestep_weight: Tensor | None = None,
    utility: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """The preference loss of a batch of pairs, from the predictions of the policy and of the reference.

    With ``m`` the mean over a sample's elements, per sample
    ``Δ = m((p − r)·(p + r − 2τ)) = m((p − τ)²) − m((r − τ)²)``, and per pair

        z_i = −(β/2)·ρ_i·Σ_k w_ik·(Δ_winner − Δ_loser)           loss = mean_i u(z_i)

    (Diffusion-DPO, arXiv 2311.12908, equation 14, with its ``βT`` written ``β/2``, as its released code has it.) ``Δ``
    is computed in the product form with float32 accumulation: the difference of the two means would lose the signal in
    half precision.

    Args:
        policy_pred: ``p``, stacked [winners; losers], ``(2B, …)``, or ``(2B, K, …)`` for K timesteps per pair, which
            ``timestep_weight`` announces. float64, float32, bfloat16 or float16.
        reference_pred: ``r``, same shape; its dtype may differ.
        target: ``τ``, same shape, or None: the reference is itself the target, ``Δ = m((p − r)²)`` (Inversion-DPO as
            released).
        beta: ``β > 0``, the strength of the tie to the reference.
        mask: ``k ≥ 0``, what every element counts, 1 when None; floating point or bool, of as many dimensions as the
            predictions: one for each sample (2B), for each pair (B), or one; every other dimension that of the
            predictions or 1, as in ``(2B, 1, H, W)``. ``m`` stays the mean over all elements, as in
            :func:`pair_statistics`, whose kernels run then, one launch forward and one backward, with the utility of
            B margins in plain PyTorch.
        pair_weight: ``ρ``, ``(B,)``, any sign; 1 when None.
        timestep_weight: ``w``, ``(K,)`` or ``(B, K)``. Required for K timesteps per pair: ``1/K`` for their mean.
        utility: ``u``: sigmoid (``−log σ``), cdpo, robust, hinge, ipo or linear.
        label_smoothing: ``ε`` in [0, 0.5) of cdpo and robust.

    Returns:
        A :class:`PreferenceLoss`. Gradients flow from ``loss``, ``margin`` and ``policy_mse`` to ``policy_pred`` alone,
        in reverse mode, any number of times; transforms of ``torch.func`` run the reference.

    Raises:
        InvalidInput: an argument has the wrong type, shape, dtype, layout, device or value, a tensor other than
            ``policy_pred`` requires a gradient, or one carries a tangent.
    """
    predictions = {"policy_pred": policy_pred, "reference_pred": reference_pred}
    check_predictions(predictions if target is None else {**predictions, "target": target})
    check_beta(beta)
    check_utility(utility, label_smoothing)
    pairs = policy_pred.shape[0] // 2
    if pair_weight is not None:
        check_tensor("pair_weight", pair_weight, ((pairs,),), policy_pred)
    if timestep_weight is not None:
        if policy_pred.ndim < 3:
            shape, remedy = tuple(policy_pred.shape), "pass (2B, K, …) with timestep_weight"
            raise invalid("policy_pred.shape", shape, "has no timestep dimension", remedy)
        steps = policy_pred.shape[1]
        check_tensor("timestep_weight", timestep_weight, ((steps,), (pairs, steps)), policy_pred)
        timestep_weight = timestep_weight.expand(pairs, steps)
    settings = (pair_weight, timestep_weight, float(beta), utility, float(label_smoothing))
    if mask is not None:
        check_mask(mask, policy_pred)
        return _masked(policy_pred, reference_pred, target, mask, *settings)
    return PreferenceLoss(*preference_loss_op(policy_pred, reference_pred, target, *settings))


def _masked(
    policy: Tensor, reference_pred: Tensor, target: Tensor | None, mask: Tensor, *settings: Any
) -> PreferenceLoss:
    """From the sums of ``pair_statistics``, whose kernels read a mask: each timestep of a sample is a sample there."""
    errors = policy.shape[: 1 if settings[1] is None else 2]
    tau = reference_pred if target is None else target
    if len(errors) == 2:
        samples = max(len(mask), len(policy) // 2)  # a mask for all becomes one for each pair
        mask = mask.expand(samples, errors[1], *mask.shape[2:]).flatten(0, 1)
        policy, reference_pred, tau = (tensor.flatten(0, 1) for tensor in (policy, reference_pred, tau))
    # No product of winner and loser is wanted, but a mask for both of them is one of pairs.
    paired = len(mask) == len(policy) // 2
    sums = pair_statistics(policy, None if target is None else reference_pred, tau, mask, paired=paired)
    delta = sums.policy_mse if target is None else sums.difference
    loss, margin = reference.of_differences(delta.view(errors), *settings)
    reference_mse = (sums.policy_mse - delta).detach()
    return PreferenceLoss(loss, margin, sums.policy_mse.view(errors), reference_mse.view(errors))


def check_beta(beta: float, name: str = "beta") -> None:
    """Raise unless ``beta``, which the caller calls ``name``, is a positive number."""
    if not isinstance(beta, (int, float)):
        raise invalid(name, beta, "must be a Python number", f"pass {name}=5000.0")
    if not (math.isfinite(beta) and beta > 0):
        raise invalid(name, beta, "must be positive and finite", "published values are 2000 and 5000")
