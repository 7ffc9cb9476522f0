"""``affine_step``: a guided DDIM inversion step, as schedulers and released codes write it, against the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastinvdpo import affine_step

from .problem import Case, Problem, normal, relative, squares

GUIDANCE = 2.0
SOURCE, TARGET = 0.6, 0.5  # cumulative products of alpha at the two ends of the step


def released_step(
    sample: Tensor, unconditional: Tensor, conditional: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor]:
    """Guidance, the clean latent, its noise added again: every intermediate in the dtype of the latents.

    ``source`` and ``target`` are scalar tensors: the released codes keep a batch at one level.
    """
    noise = unconditional + GUIDANCE * (conditional - unconditional)
    clean = (sample - (1 - source) ** 0.5 * noise) / source**0.5
    return (target**0.5 * clean + (1 - target) ** 0.5 * noise,)


class AffineStepProblem(Problem):
    """A batch of latents and two predictions, all at one level; gradients flow to all three."""

    released = staticmethod(released_step)
    inputs = 4
    temporaries = 9

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case)
        n = 2 * case.pairs
        tensors = [normal(case, (n,), seed, device).to(case.dtype) for seed in range(4)]
        *leaves, self.cotangent = tensors
        self.leaves = [leaf.requires_grad_() for leaf in leaves]
        source, target = torch.tensor([SOURCE, TARGET], dtype=torch.float64)
        a = (target / source).sqrt()
        b = (1 - target).sqrt() - (target * (1 - source) / source).sqrt()
        self.exact = torch.stack([a, b * (1 - GUIDANCE), b * GUIDANCE]).to(device)
        self.table = self.exact.float().expand(n, 3).contiguous()
        self.arguments = (*self.leaves, *(torch.tensor(level, device=device) for level in (SOURCE, TARGET)))

    def fused(self) -> tuple[Tensor, ...]:
        sample, *outputs = self.leaves
        return (affine_step(sample, outputs, self.table),)

    def output_errors(self, outputs: tuple[Tensor, ...]) -> dict[str, float]:
        parts = []
        for row in range(len(self.table)):
            terms = zip(self.exact, (leaf[row].detach().double() for leaf in self.leaves), strict=True)
            expected = torch.stack([factor * term for factor, term in terms]).sum(0)
            parts.append(squares(outputs[0][row], expected))
        return {"output": relative(parts)}

    def gradient_error(self, gradients: Sequence[Tensor]) -> float:
        assert self.cotangent is not None
        return relative(
            [
                squares(gradient[row], factor * self.cotangent[row].double())
                for factor, gradient in zip(self.exact, gradients, strict=True)
                for row in range(len(self.table))
            ]
        )

    @classmethod
    def moved(cls, mode: str) -> int:
        return {"forward": 4, "backward": 4, "full": 8}[mode]
