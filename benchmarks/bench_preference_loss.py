"""``preference_loss``: the loss block of the released Diffusion-DPO and InPO codes against the op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from fastinvdpo import preference_loss

from .problem import Case, Problem, finite, normal, relative, rounding, squares

BETA = 5000.0
GAP = 1e-3  # between policy and reference early in training: where half precision loses the signal


def released_loss(
    policy: Tensor, reference: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two mean squared errors for each sample, and only then their difference, all in the dtype of the predictions.

    With ``weight`` ``(K,)``, tensors are ``(2B, K, …)`` and the differences are summed over timesteps.
    """
    inner = list(range(1 if weight is None else 2, policy.ndim))
    policy_mse = (policy - target).pow(2).mean(dim=inner)
    policy_winner, policy_loser = policy_mse.chunk(2)
    with torch.no_grad():
        reference_mse = (reference - target).pow(2).mean(dim=inner)
        reference_winner, reference_loser = reference_mse.chunk(2)
    difference = (policy_winner - policy_loser) - (reference_winner - reference_loser)
    if weight is not None:
        difference = (difference * weight).sum(1)
    margin = -0.5 * BETA * difference
    return -logsigmoid(margin).mean(), margin, policy_mse, reference_mse


class PreferenceLossProblem(Problem):
    """Predictions that miss the target by about 1 and differ by about :data:`GAP`."""

    released = staticmethod(released_loss)
    inputs = 3
    temporaries = 9

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case)
        many = case.timesteps > 1
        leading = (2 * case.pairs, case.timesteps) if many else (2 * case.pairs,)
        target = normal(case, leading, 0, device)
        reference = normal(case, leading, 1, device).add_(target)
        policy = normal(case, leading, 2, device).mul_(GAP).add_(reference)
        self.policy, self.reference, self.target = (tensor.to(case.dtype) for tensor in (policy, reference, target))
        self.policy.requires_grad_()
        self.weight = torch.full((case.timesteps,), 1 / case.timesteps, device=device) if many else None
        self.leaves = [self.policy]
        self.arguments = (self.policy, self.reference, self.target, self.weight)

    def fused(self) -> tuple[Tensor, ...]:
        result = preference_loss(self.policy, self.reference, self.target, beta=BETA, timestep_weight=self.weight)
        return result.loss, result.margin, result.policy_mse, result.reference_mse

    def output_errors(self, outputs: tuple[Tensor, ...]) -> dict[str, float]:
        """Of the loss, relative; of the margins, the largest, relative to the magnitudes of the terms they sum.

        A margin itself can be near zero by chance, and an error relative to it says nothing.
        """
        loss, margin, *_ = (output.detach().double() for output in outputs)
        expected, magnitude = self._margins
        expected_loss = softplus(-expected).mean()
        return {
            "loss": finite((loss - expected_loss).abs() / expected_loss),
            "margin": finite(((margin - expected).abs() / magnitude).max()),
        }

    def gradient_error(self, gradients: Sequence[Tensor]) -> float:
        (gradient,) = gradients
        slope = -torch.sigmoid(-self._margins[0]) / self.case.pairs
        per_element = -0.5 * BETA * 2 / (self.case.elements / (2 * self.case.pairs))  # the weights are 1/K each
        parts = []
        for pair in range(self.case.pairs):
            for row, sign in ((pair, 1), (pair + self.case.pairs, -1)):
                missed = self.policy[row].detach().double() - self.target[row].double()
                expected = missed * (slope[pair] * per_element * sign)
                parts.append(squares(gradient[row], expected))
        return relative(parts)

    def chance(self, released: bool) -> dict[str, float]:
        single, stored = rounding(torch.float32), rounding(self.case.dtype)
        if not released:
            return {"loss": 4 * single, "margin": 4 * single, "gradient": 4 * stored}
        # Four errors of about 1 are rounded and then subtracted; the terms of the product form are about GAP.
        shift = 0.5 * BETA * 4 * stored
        return {"loss": shift, "margin": shift / (0.5 * BETA * 2.5 * GAP), "gradient": 4 * stored + shift}

    @classmethod
    def moved(cls, mode: str) -> int:
        return {"forward": 3, "backward": 3, "full": 6}[mode]

    @cached_property
    def _margins(self) -> tuple[Tensor, Tensor]:
        """The margins in float64, and the magnitudes of what they add up; row by row, to need little memory."""
        sums, magnitudes = [], []
        for row in range(2 * self.case.pairs):
            p, r, t = (tensor[row].detach().double() for tensor in (self.policy, self.reference, self.target))
            terms = (p - r) * ((p - t) + (r - t))
            sums.append(terms.mean())
            magnitudes.append(terms.abs().mean())
        winner, loser = torch.stack(sums).chunk(2)
        winner_magnitude, loser_magnitude = torch.stack(magnitudes).chunk(2)
        return -0.5 * BETA * (winner - loser), 0.5 * BETA * (winner_magnitude + loser_magnitude)
