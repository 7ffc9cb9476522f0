"""SmPO-Diffusion: pairs weighted by a smoothed preference, along the policy's ReNoise inversion."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastinvdpo.diffusion.inversion import InversionSettings
from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import PairBatch
from fastinvdpo.methods.inverting import InvertingMethod
from fastinvdpo.methods.single_timestep import SingleTimestepObjective

PICKSCORE_RANGE = 0.16658
"""SmPO's κ: the range of PickScore's cosine, without its scale of 100, over Pick-a-Pic v2."""
PREFERENCE_SCALE = 10.0
"""SmPO's λ, as published."""


def preference_probability(winner_scores: Tensor, loser_scores: Tensor, score_range: float = PICKSCORE_RANGE) -> Tensor:
    """``p = σ((score_w − score_l)/κ)``, that the winner is preferred; all ``(B,)`` (SmPO, arXiv 2506.02698)."""
    if not (math.isfinite(score_range) and score_range > 0):
        raise invalid("score_range", score_range, "must be positive", "use the range of the scores over the data set")
    if winner_scores.shape != loser_scores.shape:
        shapes = f"differs from winner_scores' {tuple(winner_scores.shape)}"
        raise invalid("loser_scores.shape", tuple(loser_scores.shape), shapes, "pass one score per pair and side")
    return torch.sigmoid((winner_scores - loser_scores) / score_range)


def smoothed_pair_weight(probability: Tensor, preference_scale: float = PREFERENCE_SCALE) -> Tensor:
    """``ρ = λ(2p − 1)``: 0 for a tie, ``λ`` for certainty; as ``probability`` (SmPO, arXiv 2506.02698)."""
    if not (math.isfinite(preference_scale) and preference_scale > 0):
        raise invalid("preference_scale", preference_scale, "must be positive", "the published value is 10")
    return preference_scale * (2 * probability - 1)


_OTHER_UNIT = 30.0  # between the cosine and a hundredfold of it; subsets of a data set differ by less


@dataclass(frozen=True, kw_only=True)
class SmPO(InvertingMethod):
    """SmPO-Diffusion (arXiv 2506.02698): a pair weighs ``λ(2p − 1)`` with ``p = σ((score_w − score_l)/κ)``.

    Attributes:
        renoise_iterations: K of ReNoise; each step of the inversion is repeated K times.
        preference_scale: λ, the weight of a certain preference.
        score_range: κ, in the unit of the scores; ``"auto"``: the range that ``fastinvdpo score`` stored with them.
    """

    name = "smpo"
    draw_options = (*InvertingMethod.draw_options, "renoise_iterations")
    needs_scores = True

    beta: float = 2000.0
    num_inference_steps: int = 5
    renoise_iterations: int = 1
    preference_scale: float = PREFERENCE_SCALE
    score_range: float | str = PICKSCORE_RANGE

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothed_pair_weight(torch.zeros(1), self.preference_scale)  # fail now, not at the first batch
        given = self.score_range
        if given != "auto" and (isinstance(given, bool | str) or not (math.isfinite(given) and given > 0)):
            remedy = "use the range of the scores over the data set, or auto"
            raise invalid("score_range", given, "is neither a number above 0 nor auto", remedy)

    def settings(self, seed: int = 0) -> InversionSettings:
        return InversionSettings(
            renoise_iterations=self.renoise_iterations, model_time=self.model_time, static_shapes=self.static_shapes
        )

    def pair_weight(self, batch: PairBatch) -> Tensor:
        if batch.scores is None:
            raise invalid("batch.scores", None, "SmPO weighs pairs by their scores", "give the data score columns")
        assert not isinstance(self.score_range, str)
        winner, loser = batch.scores.chunk(2)
        return smoothed_pair_weight(preference_probability(winner, loser, self.score_range), self.preference_scale)

    def _objective(self, schedule: NoiseSchedule) -> SingleTimestepObjective:
        if self.awaits_score_range:
            raise invalid("score_range", "auto", "is read with the data", "call with_score_range, or give a number")
        return super()._objective(schedule)

    @property
    def awaits_score_range(self) -> bool:
        return isinstance(self.score_range, str)

    def with_score_range(self, measured: float) -> SmPO:
        """``score_range`` as a number. Raises ``InvalidInput`` where scores are all equal, or of another unit."""
        if isinstance(self.score_range, str):
            if measured <= 0:
                raise invalid("score_range", "auto", "all scores of the data are equal", "use another scorer")
            return dataclasses.replace(self, score_range=measured)
        if not 1 / _OTHER_UNIT < measured / self.score_range < _OTHER_UNIT:
            problem = f"is not of the unit of the scores, which range over {measured:.5g}"
            remedy = "give the range of all scores of the data; auto takes what fastinvdpo score stored with them"
            raise invalid("score_range", self.score_range, problem, remedy)
        return self
