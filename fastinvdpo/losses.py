"""The pair objective for people who bring their own training loop, and the preference strengths that weight it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastinvdpo.errors import invalid
from fastinvdpo.ops.preference_loss import UTILITIES, PreferenceLoss, preference_loss

__all__ = ["UTILITIES", "PreferenceLoss", "preference_loss", "preference_probability", "smoothed_pair_weight"]

PICKSCORE_RANGE = 0.16658
"""The range of PickScore over Pick-a-Pic v2, SmPO's κ."""


def preference_probability(winner_scores: Tensor, loser_scores: Tensor, score_range: float = PICKSCORE_RANGE) -> Tensor:
    """``p = σ((score_w − score_l)/κ)``, the probability that the winner is preferred; ``(B,)`` from two ``(B,)`` (SmPO,
    arXiv 2506.02698).
    """
    if not (math.isfinite(score_range) and score_range > 0):
        raise invalid("score_range", score_range, "must be positive", "use the range of the scores over the data set")
    if winner_scores.shape != loser_scores.shape:
        shapes = f"differs from winner_scores' {tuple(winner_scores.shape)}"
        raise invalid("loser_scores.shape", tuple(loser_scores.shape), shapes, "pass one score per pair and side")
    return torch.sigmoid((winner_scores - loser_scores) / score_range)


def smoothed_pair_weight(probability: Tensor, preference_scale: float = 10.0) -> Tensor:
    """``ρ = λ(2p − 1)``: a tie weighs nothing, a certain preference ``λ``; shape and dtype of ``probability`` (SmPO,
    arXiv 2506.02698).
    """
    if not (math.isfinite(preference_scale) and preference_scale > 0):
        raise invalid("preference_scale", preference_scale, "must be positive", "the published value is 10")
    return preference_scale * (2 * probability - 1)
