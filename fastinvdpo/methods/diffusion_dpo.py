"""Diffusion-DPO: forward noising, one noise for winner and loser; and the loss blocks of its scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.diffusion.schedule import NoiseSchedule, add_noise
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import STREAM_NOISE, Draws, PairBatch
from fastinvdpo.methods.single_timestep import SingleTimestepMethod
from fastinvdpo.methods.statistics import implicit_accuracy
from fastinvdpo.ops import philox
from fastinvdpo.ops.checks import check_predictions
from fastinvdpo.ops.preference_loss import check_beta
from fastinvdpo.ops.preference_loss.schema import preference_loss_op


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO(SingleTimestepMethod):
    """Diffusion-DPO (arXiv 2311.12908). On a flow schedule it is Flow-DPO (arXiv 2501.13918) with a constant β: the
    target is the velocity ``ε − x_0``.
    """

    name = "diffusion-dpo"
    draw_options: ClassVar[tuple[str, ...]] = ("compat",)

    beta: float = 5000.0

    def trajectory(
        self, schedule: NoiseSchedule, network: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        noise = draws.noise
        if noise is None:
            index = batch.sample_index.to(batch.latents.device)
            noise = philox.normal(seed, STREAM_NOISE, index, tuple(batch.latents.shape[1:]), batch.latents.dtype)
        noise = torch.cat([noise, noise])
        return add_noise(schedule, batch.latents, noise, timesteps), noise


class _Convention(NamedTuple):
    """``z = −scale·beta_dpo·(Δ_winner − Δ_loser)``, what a tie counts, and the script's ``--loss_type``."""

    scale: float
    tie: float
    loss_types: tuple[str, ...] = ("sigmoid",)


_CONVENTIONS = {
    "research": _Convention(scale=0.5, tie=0.0),
    "diffusers-sd15": _Convention(scale=1.0, tie=0.5, loss_types=("sigmoid", "hinge", "ipo")),
    "diffusers-sdxl": _Convention(scale=0.5, tie=0.5),
}


class DiffusionDPOLoss(NamedTuple):
    """What the Diffusion-DPO scripts compute and log, under the names and in the order that they have there; scalars,
    float32 (float64 for float64 inputs).

    Attributes:
        loss: ``mean_i −log σ(z_i)``, or what ``loss_type`` says.
        raw_model_loss: the model's mean squared error over winners and losers. It carries a gradient, as there.
        raw_ref_loss: the reference's; carries no gradient.
        implicit_acc: the share of pairs with ``z > 0``, no gradient. Ties count nothing under ``"research"`` and half
            in the two scripts of diffusers, so that at the first step, where all pairs tie, it is 0 or 0.5.
    """

    loss: Tensor
    raw_model_loss: Tensor
    raw_ref_loss: Tensor
    implicit_acc: Tensor


def diffusion_dpo_loss(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    beta_dpo: float,
    *,
    convention: str = "research",
    loss_type: str = "sigmoid",
) -> DiffusionDPOLoss:
    """The loss block of a Diffusion-DPO training script, forward and backward each in one op::

        loss, raw_model_loss, raw_ref_loss, implicit_acc = diffusion_dpo_loss(model_pred, ref_pred, target, beta_dpo)

    With ``Δ = m((p − τ)²) − m((r − τ)²)`` per sample, as in :func:`preference_loss`, ``convention`` says whose
    ``beta_dpo`` is passed, for the scripts do not agree on what the number means:

    - ``research``: ``z = −(β/2)(Δ_winner − Δ_loser)``. ``train.py`` of SalesforceAIResearch/DiffusionDPO (5000 by
      default), and InPO's, which descends from it.
    - ``diffusers-sdxl``: the same. ``train_diffusion_dpo_sdxl.py`` of diffusers (5000).
    - ``diffusers-sd15``: ``z = −β(Δ_winner − Δ_loser)``, so that a number ties the policy twice as strongly to the
      reference. ``train_diffusion_dpo.py`` of diffusers (2500), the one script that has a ``--loss_type``: with
      ``logits = Δ_loser − Δ_winner`` its ``hinge`` is ``max(0, 1 − β·logits)`` and its ``ipo``
      ``(logits − 1/(2β))²``, where it reads an argument that it does not define; β is meant.

    What other scripts need, SmPO's pair weights or another utility, :func:`preference_loss` has, and further methods
    :mod:`fastinvdpo.losses`.

    Args:
        model_pred: the trained network's prediction, stacked [winners; losers], ``(2B, …)``. float64, float32, bfloat16
            or float16; no cast is needed, sums are made in float32.
        ref_pred: the reference's, same shape, no gradient; its dtype may differ.
        target: the noise or velocity, same shape.
        beta_dpo: ``β > 0``.
        convention: one of the above.
        loss_type: the script's ``--loss_type``.

    Raises:
        InvalidInput: an argument has the wrong type, shape, dtype, device or value, or ``ref_pred`` or ``target``
            requires a gradient.
    """
    if convention not in _CONVENTIONS:
        raise invalid("convention", convention, "is not known", f"use one of {', '.join(_CONVENTIONS)}")
    if target is None:
        raise invalid("target", None, "must be a tensor", "pass the noise or the velocity that was to be predicted")
    check_predictions({"model_pred": model_pred, "ref_pred": ref_pred, "target": target})
    check_beta(beta_dpo, "beta_dpo")
    scale, tie, loss_types = _CONVENTIONS[convention]
    if loss_type not in loss_types:
        problem = f"is not a loss of the script {convention!r}"
        remedy = f"use {' or '.join(loss_types)}, or preference_loss(…, utility={loss_type!r})"
        raise invalid("loss_type", loss_type, problem, remedy)
    # The op scales by −β/2.
    settings = (None, None, 2 * scale * beta_dpo, loss_type, 0.0)
    loss, margin, policy_mse, reference_mse = preference_loss_op(model_pred, ref_pred, target, *settings)
    if loss_type == "ipo":  # the op's is of z/(2β) = logits/2
        loss = 4 * loss
    return DiffusionDPOLoss(loss, policy_mse.mean(), reference_mse.mean(), implicit_accuracy(margin, tie))
