"""``pair_statistics``: the sums behind losses other than Diffusion-DPO's, in plain PyTorch and from the op. All four
are differentiated, each with weights of its own: most losses need less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastinvdpo import pair_statistics

from .bench_preference_loss import GAP
from .problem import Case, Problem, finite, normal, relative, rounding, squares


def plain_statistics(policy: Tensor, reference: Tensor, target: Tensor) -> tuple[Tensor]:
    """``(E, X, Q, C)``, one after the other, in the dtype of the predictions: the errors of the released codes of DSPO
    and Diffusion-SDPO and their inner products, for each sample and pair.
    """
    error, shift = policy - target, policy - reference
    winner, loser = error.chunk(2)
    products = (error * error, error * shift, shift * shift, winner * loser)
    sums = torch.cat([product.flatten(1).mean(1) for product in products])
    return (sums.to(torch.promote_types(sums.dtype, torch.float32)),)


class PairStatisticsProblem(Problem):
    """Predictions that miss the target by about 1 and differ by about :data:`GAP`."""

    released = staticmethod(plain_statistics)
    inputs = 3
    temporaries = 12

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case)
        target, error, shift = (normal(case, (2 * case.pairs,), seed, device) for seed in range(3))
        reference = error.add_(target)
        policy = shift.mul_(GAP).add_(reference)
        self.policy, self.reference, self.target = (tensor.to(case.dtype) for tensor in (policy, reference, target))
        self.policy.requires_grad_()
        self.leaves = [self.policy]
        self.arguments = (self.policy, self.reference, self.target)
        self.cotangent = torch.linspace(-1, 2, 7 * case.pairs, device=device)

    def fused(self) -> tuple[Tensor, ...]:
        sums = pair_statistics(self.policy, self.reference, self.target)
        assert sums.cross is not None and sums.shift_mse is not None and sums.pair_cross is not None
        return (torch.cat([sums.policy_mse, sums.cross, sums.shift_mse, sums.pair_cross]),)

    def output_errors(self, outputs: tuple[Tensor, ...]) -> dict[str, float]:
        """The largest, relative to the magnitudes of the terms of a sum."""
        found = outputs[0].detach().double()
        sums: list[list[Tensor]] = [[], [], [], []]
        for row in range(2 * self.case.pairs):
            error, shift = self._row(row)
            terms = [error * error, error * shift, shift * shift]
            if row < self.case.pairs:
                terms.append(error * self._row(row + self.case.pairs)[0])
            for kind, term in zip(sums, terms, strict=False):
                kind.append(torch.stack([term.mean(), term.abs().mean()]))
        expected, magnitude = torch.cat([torch.stack(kind) for kind in sums]).T
        return {"output": finite(((found - expected).abs() / magnitude).max())}

    def gradient_error(self, gradients: Sequence[Tensor]) -> float:
        assert self.cotangent is not None
        of_mse, of_cross, of_shift, of_pair = self.cotangent.double().split(
            [2 * self.case.pairs] * 3 + [self.case.pairs]
        )
        parts = []
        for row in range(2 * self.case.pairs):
            error, shift = self._row(row)
            partner = self._row((row + self.case.pairs) % (2 * self.case.pairs))[0]
            expected = (2 * of_mse[row] + of_cross[row]) * error + (of_cross[row] + 2 * of_shift[row]) * shift
            expected += of_pair[row % self.case.pairs] * partner
            parts.append(squares(gradients[0][row], expected / error.numel()))
        return relative(parts)

    def chance(self, released: bool) -> dict[str, float]:
        stored = rounding(self.case.dtype)
        return {"output": 4 * (stored if released else rounding(torch.float32)), "gradient": 4 * stored}

    @classmethod
    def moved(cls, mode: str) -> int:
        return {"forward": 3, "backward": 4, "full": 7}[mode]

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        """Error and shift of a sample in float64."""
        p, r, t = (tensor[row].detach().double() for tensor in (self.policy, self.reference, self.target))
        return p - t, p - r
