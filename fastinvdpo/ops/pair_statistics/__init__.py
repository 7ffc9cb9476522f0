"""Three sums for each sample and one for each pair: what every pair objective is a function of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops.checks import FLOATING, check_predictions, check_tensor
from fastinvdpo.ops.pair_statistics.schema import pair_statistics_op

__all__ = ["PairStatistics", "pair_statistics"]


@dataclass(frozen=True)
class PairStatistics:
    """What :func:`pair_statistics` returns; float32 (float64 for float64 inputs).

    Attributes:
        policy_mse: ``E = m(k·e²)`` per sample, ``(N,)``.
        cross: ``X = m(k·e·d)`` per sample; None without a reference.
        shift_mse: ``Q = m(k·d²)`` per sample; None without a reference.
        pair_cross: ``C = m(k·e_winner·e_loser)`` per pair, ``(B,)``; None where samples are not paired.
        mask_mean: ``m(k)`` per sample, which carries no gradient; None without a mask.
    """

    policy_mse: Tensor
    cross: Tensor | None
    shift_mse: Tensor | None
    pair_cross: Tensor | None
    mask_mean: Tensor | None

    @property
    def difference(self) -> Tensor:
        """``Δ = 2X − Q = m(k·(p − τ)²) − m(k·(r − τ)²)`` per sample, without subtracting two nearly equal errors.

        Raises:
            InvalidInput: there was no reference.
        """
        if self.cross is None or self.shift_mse is None:
            raise invalid("reference_pred", None, "a difference needs a reference", "pass the reference's prediction")
        return 2 * self.cross - self.shift_mse


def pair_statistics(
    policy_pred: Tensor,
    reference_pred: Tensor | None,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    paired: bool = True,
) -> PairStatistics:
    """The sums of a batch of predictions, in one pass forward and one backward.

    With ``e = p − τ``, ``d = p − r``, a weight ``k`` per element (1 without a mask) and ``m`` the mean over all n
    elements of a sample, whatever the mask: ``E = m(k·e²)``, ``X = m(k·e·d)``, ``Q = m(k·d²)``, and for each pair
    ``C = m(k·e_w·e_l)``. The gradient is ``k·((2g_E + g_X)·e + (g_X + 2g_Q)·d)/n``, and ``k·g_C/n`` times the
    partner's ``e``. A sample's sums do not depend on the others in the batch.

    Args:
        policy_pred: ``p``, ``(N, …)``, stacked [winners; losers] where samples are paired. float64, float32, bfloat16
            or float16.
        reference_pred: ``r``, same shape; its dtype may differ. None: only ``E`` and ``C`` are computed.
        target: ``τ``, same shape; its dtype may differ.
        mask: ``k ≥ 0``, floating point or bool, of as many dimensions: N samples, one for each pair (N/2), or one;
            every other dimension that of a sample or 1, as in ``(N, 1, H, W)``. Where winner and loser have masks of
            their own, ``C`` is weighted with the geometric mean of the two.
        paired: whether sample i and sample i + N/2 are winner and loser. False for unpaired images: N may be odd, and
            ``C`` is not computed.

    Returns:
        A :class:`PairStatistics`. Gradients flow to ``policy_pred`` alone, in reverse mode, any number of times;
        transforms of ``torch.func`` run the reference.

    Raises:
        InvalidInput: an argument has the wrong type, shape, dtype, layout or device, a tensor other than
            ``policy_pred`` requires a gradient, or one carries a tangent.
    """
    predictions = {"policy_pred": policy_pred, "target": target}
    if reference_pred is not None:
        predictions["reference_pred"] = reference_pred
    remedy = "stack [winners; losers] as (2B, …), or pass paired=False for images without partners"
    check_predictions(predictions, paired, remedy if paired else "pass (N, …)")
    if mask is not None:
        check_mask(mask, policy_pred, paired)
    policy_mse, *others = pair_statistics_op(policy_pred, reference_pred, target, mask, paired)
    cross, shift_mse, pair_cross, mask_mean = (other if len(other) else None for other in others)
    return PairStatistics(policy_mse, cross, shift_mse, pair_cross, mask_mean)


def check_mask(mask: Tensor, policy: Tensor, paired: bool = True) -> None:
    """Raise unless ``mask`` is one for the samples of ``policy``, or for its pairs."""
    check_tensor("mask", mask, None, policy, dtypes=(*FLOATING, torch.bool))
    shape = tuple(policy.shape)
    batches = {shape[0], 1} | ({shape[0] // 2} if paired else set())
    fits = mask.ndim == len(shape) and all(a in (b, 1) for a, b in zip(mask.shape[1:], shape[1:], strict=True))
    if not fits or mask.shape[0] not in batches:
        channels = " or ".join(str((batch, 1, *shape[2:])) for batch in sorted(batches, reverse=True))
        raise invalid("mask.shape", tuple(mask.shape), f"does not fit samples {shape}", f"pass {channels}")
