"""Flow-DPO with masks, an anchor, fine-tuning and an automatic β."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, softplus

from fastinvdpo.errors import invalid
from fastinvdpo.methods.statistics import AutoBeta, pair_margin, reference_mse
from fastinvdpo.ops.pair_statistics import pair_statistics
from fastinvdpo.ops.preference_loss import check_beta

Norm = Literal["sum", "mean", "masked_mean"]
MaskKind = Literal["mask", "segmentation"]


class FlowDPOLoss(NamedTuple):
    """What SimpleTuner's Flow-DPO computes and logs; scalars, but ``inside_term``, z per pair ``(B,)``. ``win_adv`` and
    ``lose_adv`` are ``−Δ_w`` and ``Δ_l``, ``margin`` their sum, in the chosen norm, as are the errors.
    """

    loss: Tensor
    dpo_loss: Tensor
    beta: Tensor
    margin: Tensor
    win_adv: Tensor
    lose_adv: Tensor
    policy_win_err: Tensor
    policy_lose_err: Tensor
    ref_win_err: Tensor
    ref_lose_err: Tensor
    negative_margin_pct: Tensor
    gradient_factor: Tensor
    anchor_loss: Tensor
    inside_term: Tensor


def flow_dpo(
    policy_pred: Tensor,
    reference_pred: Tensor,
    target: Tensor,
    *,
    beta: float | AutoBeta = 5.0,
    mask: Tensor | None = None,
    norm: Norm = "sum",
    loss_weight: float = 1.0,
    anchor: float = 0.0,
    sft_weight: float = 0.0,
) -> FlowDPOLoss:
    """The loss of SimpleTuner's Flow-DPO: ``Δ = Σ k·d·(2e − d)/D`` over a mask k.

    Args:
        policy_pred, reference_pred, target: as of :func:`fastinvdpo.preference_loss`, ``(2B, …)``; the target is
            ``noise − x_0`` of each side.
        beta: β > 0, or what chooses it.
        mask: k, ``(B, 1, H, W)`` or ``(B, …)`` as the predictions, of both sides of a pair; see :func:`latent_mask`.
        norm: D is 1 (``"sum"``), the number of elements (``"mean"``), or the mask's sum, at least 1.
        loss_weight: of the preference term.
        anchor: A, adds ``A/2·(mean m(d_w²) + mean m(d_l²))``, unmasked.
        sft_weight: adds so much of the winners' mean squared error, unmasked.

    Raises:
        InvalidInput: an argument is out of range or does not fit the predictions.
    """
    if not isinstance(beta, AutoBeta):
        check_beta(beta)
    if norm not in get_args(Norm):
        raise invalid("norm", norm, "is not known", f"use one of {get_args(Norm)}")
    for name, weight in (("loss_weight", loss_weight), ("anchor", anchor), ("sft_weight", sft_weight)):
        if not 0 <= weight < math.inf:
            raise invalid(name, weight, "must be finite and not negative", "use 0 for none")
    s = pair_statistics(policy_pred, reference_pred, target, mask)
    whole = s if mask is None else pair_statistics(policy_pred, reference_pred, target)
    n = policy_pred[0].numel()
    if norm == "sum":
        scale = torch.full_like(s.policy_mse, float(n))
    elif norm == "mean" or s.mask_mean is None:
        scale = torch.ones_like(s.policy_mse)
    else:
        scale = n / (n * s.mask_mean).clamp(min=1)
    gap = scale.chunk(2)[0] * pair_margin(s, 2.0)
    used = beta.update(gap) if isinstance(beta, AutoBeta) else torch.full_like(gap[0], beta)
    z = 0.5 * used * gap
    dpo_loss = softplus(-z).mean()
    assert whole.shift_mse is not None
    anchor_loss = anchor * whole.shift_mse.mean()
    loss = loss_weight * dpo_loss + anchor_loss + sft_weight * whole.policy_mse.chunk(2)[0].mean()
    (win, lose), (policy_win, policy_lose), (ref_win, ref_lose) = (
        (scale * value.detach()).unflatten(0, (2, -1)).mean(1).unbind()
        for value in (s.difference, s.policy_mse, reference_mse(s))
    )
    return FlowDPOLoss(
        loss,
        dpo_loss,
        used,
        gap.detach().mean(),
        -win,
        lose,
        policy_win,
        policy_lose,
        ref_win,
        ref_lose,
        100 * (gap.detach() < 0).to(gap.dtype).mean(),
        torch.sigmoid(-z.detach()).mean(),
        anchor_loss,
        z,
    )


def latent_mask(image: Tensor, size: tuple[int, int], *, kind: MaskKind = "mask", dilate: int = 0) -> Tensor:
    """The mask of latents ``(B, 1, *size)`` from images ``(B, C, H, W)`` in [−1, 1], as SimpleTuner makes it.

    Args:
        kind: ``"mask"``: the first channel, from black 0 to white 1. ``"segmentation"``: 1 where any of
            it is not black.
        dilate: q, widens it by a maximum over ``(2q + 1)²`` latent pixels.
    """
    if kind not in get_args(MaskKind):
        raise invalid("kind", kind, "is not known", f"use one of {get_args(MaskKind)}")
    if isinstance(dilate, bool) or not isinstance(dilate, int) or dilate < 0:
        raise invalid("dilate", dilate, "must be a whole number", "use 0 or more")
    if image.ndim != 4 or not image.is_floating_point():
        given = f"{tuple(image.shape)}, {image.dtype}"
        raise invalid("image", given, "is no batch of images", "pass floating point (B, C, H, W) in [-1, 1]")
    channel = image[:, :1] if kind == "mask" else image.mean(1, keepdim=True)
    mask = (interpolate(channel, size=size, mode="area") / 2 + 0.5).clamp(0, 1)
    if kind == "segmentation":
        mask = (mask > 0).to(mask.dtype)
    return max_pool2d(mask, 2 * dilate + 1, stride=1, padding=dilate) if dilate else mask
