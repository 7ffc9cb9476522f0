"""The fused operations, each registered as a ``torch.library`` op: one folder per op."""

from fastinvdpo.ops.affine_step import affine_step
from fastinvdpo.ops.pair_statistics import PairStatistics, pair_statistics
from fastinvdpo.ops.preference_loss import PreferenceLoss, preference_loss
from fastinvdpo.ops.token_log_probs import token_log_probs

__all__ = ["PairStatistics", "PreferenceLoss", "affine_step", "pair_statistics", "preference_loss", "token_log_probs"]
