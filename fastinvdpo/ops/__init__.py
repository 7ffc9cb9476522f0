"""The fused operations, each registered as a ``torch.library`` op: one folder per op."""

from fastinvdpo.ops.affine_step import affine_step
from fastinvdpo.ops.preference_loss import PreferenceLoss, preference_loss

__all__ = ["PreferenceLoss", "affine_step", "preference_loss"]
