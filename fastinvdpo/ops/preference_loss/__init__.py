"""The batched winner/loser log-likelihood ratio with its utility."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops.preference_loss.op import preference_loss_op
from fastinvdpo.ops.preference_loss.utilities import UTILITIES, check_utility

__all__ = ["UTILITIES", "PreferenceLoss", "preference_loss"]


@dataclass(frozen=True)
class PreferenceLoss:
    """What :func:`preference_loss` returns; float32 (float64 for float64 inputs).

    Attributes:
        loss: ``mean_i u(z_i)``, scalar.
        margin: ``z`` per pair, ``(B,)``: positive where the policy prefers the winner more than the reference does.
        policy_mse: ``m((p − τ)²)`` per sample, ``(2B,)`` or ``(2B, K)``.
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
        pair_weight: ``ρ``, ``(B,)``, any sign; 1 when None.
        timestep_weight: ``w``, ``(K,)`` or ``(B, K)``. Required for K timesteps per pair: ``1/K`` for their mean.
        utility: ``u``: sigmoid (``−log σ``), cdpo, robust, hinge, ipo or linear.
        label_smoothing: ``ε`` in [0, 0.5) of cdpo and robust.

    Returns:
        A :class:`PreferenceLoss`. Gradients flow from ``loss``, ``margin`` and ``policy_mse`` to ``policy_pred`` alone.

    Raises:
        InvalidInput: an argument has the wrong type, shape, dtype, device or value, or a tensor other than
            ``policy_pred`` requires a gradient.
    """
    check_predictions(policy_pred, reference_pred, target)
    check_beta(beta)
    check_utility(utility, label_smoothing)
    if pair_weight is not None:
        _check_weight("pair_weight", pair_weight, policy_pred, ((policy_pred.shape[0] // 2,),))
    if timestep_weight is not None:
        if policy_pred.ndim < 3:
            shape = tuple(policy_pred.shape)
            raise invalid(
                "policy_pred.shape", shape, "has no timestep dimension", "pass (2B, K, …) with timestep_weight"
            )
        pairs, steps = policy_pred.shape[0] // 2, policy_pred.shape[1]
        _check_weight("timestep_weight", timestep_weight, policy_pred, ((steps,), (pairs, steps)))
        timestep_weight = timestep_weight.expand(pairs, steps)

    return PreferenceLoss(
        *preference_loss_op(
            policy_pred,
            reference_pred,
            target,
            pair_weight,
            timestep_weight,
            float(beta),
            utility,
            float(label_smoothing),
        )
    )


def check_predictions(
    policy_pred: Tensor,
    reference_pred: Tensor,
    target: Tensor | None,
    names: tuple[str, str] = ("policy_pred", "reference_pred"),
) -> None:
    """Raise unless these are predictions of pairs; ``names``: what the caller calls the first two."""
    first = names[0]
    _floating_tensor(first, policy_pred)
    shape, device = policy_pred.shape, policy_pred.device
    for name, tensor in ((names[1], reference_pred), ("target", target)):
        if tensor is None and name == "target":
            continue
        tensor = _floating_tensor(name, tensor)
        if tensor.shape != shape:
            shapes = f"differs from {first}'s {tuple(shape)}"
            raise invalid(f"{name}.shape", tuple(tensor.shape), shapes, "pass tensors of one shape, [winners; losers]")
        if tensor.device != device:
            where = f"differs from {first}'s {device}"
            raise invalid(f"{name}.device", str(tensor.device), where, f"move it with .to({str(device)!r})")
        if tensor.requires_grad and torch.is_grad_enabled():
            problem = "no gradient flows to it"
            raise invalid(
                f"{name}.requires_grad", True, problem, f"compute it under torch.no_grad() or pass {name}.detach()"
            )
    if len(shape) < 2:
        problem = "must have a batch and at least one more dimension"
        raise invalid(f"{first}.shape", tuple(shape), problem, "pass (2B, …)")
    if shape[0] == 0 or shape[0] % 2:
        remedy = "stack [winners; losers] as (2B, …)"
        raise invalid(f"{first}.shape", tuple(shape), "must hold as many losers as winners", remedy)
    if 0 in shape:
        remedy = "pass predictions of at least one element per sample"
        raise invalid(f"{first}.shape", tuple(shape), "has no elements", remedy)


def _floating_tensor(name: str, tensor: Tensor | None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise invalid(name, type(tensor).__name__, "must be a tensor", "pass the network's prediction")
    if not tensor.is_floating_point():
        raise invalid(f"{name}.dtype", tensor.dtype, "must be floating point", "pass float32, bfloat16 or float16")
    return tensor


def check_beta(beta: float, name: str = "beta") -> None:
    """Raise unless ``beta``, which the caller calls ``name``, is a positive number."""
    if not isinstance(beta, (int, float)):
        raise invalid(name, beta, "must be a Python number", f"pass {name}=5000.0")
    if not (math.isfinite(beta) and beta > 0):
        raise invalid(name, beta, "must be positive and finite", "published values are 2000 and 5000")


def _check_weight(name: str, weight: Tensor, like: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    allowed = " or ".join(str(shape) for shape in shapes)
    if not isinstance(weight, Tensor):
        raise invalid(name, weight, "must be a tensor", f"pass a floating-point tensor of shape {allowed}")
    if tuple(weight.shape) not in shapes:
        raise invalid(f"{name}.shape", tuple(weight.shape), "does not fit the predictions", f"pass shape {allowed}")
    if not weight.is_floating_point():
        raise invalid(f"{name}.dtype", weight.dtype, "must be floating point", f"pass {name}.float()")
    if weight.device != like.device:
        raise invalid(
            f"{name}.device", str(weight.device), f"differs from {like.device}", "move it to the predictions' device"
        )
