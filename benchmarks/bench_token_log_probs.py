"""``token_log_probs``: from all logits, as language models compute them, and from the op. A case's latents are the
hidden states of an image's tokens, (tokens, width); its name says how many columns the head has and whether it is
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastinvdpo import token_log_probs

from .problem import Case, Problem, finite, normal, relative, rounding, squares


class Head(NamedTuple):
    """Its columns, and whether gradients flow to it."""

    vocabulary: int
    trained: bool


HEADS = {
    "codes8k": Head(8192, True),
    "vocab32k": Head(32000, False),
    "vocab152k": Head(151936, False),
    "vocab32k-trained": Head(32000, True),
    "vocab152k-trained": Head(151936, True),
}
SHAPES = dict.fromkeys(HEADS, (256, 1024))
_ROWS = 64  # at a time in float64


def plain_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    """Logits in the dtype of the hidden states, their log-softmax in float32."""
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1),)


class TokenLogProbsProblem(Problem):
    """Hidden states and a head whose logits are of about 1."""

    released = staticmethod(plain_log_probs)
    inputs = 1
    temporaries = 2

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case)
        vocabulary, trained = HEADS.get(case.model, Head(50, True))
        hidden = normal(case, (2 * case.pairs,), 0, device).flatten(0, -2)
        generator = torch.Generator(device).manual_seed(1)
        weight = torch.randn(vocabulary, hidden.shape[1], generator=generator, device=device) / hidden.shape[1] ** 0.5
        self.hidden, self.weight = hidden.to(case.dtype).requires_grad_(), weight.to(case.dtype).requires_grad_(trained)
        self.targets = torch.randint(vocabulary, (len(hidden),), generator=generator, device=device)
        self.leaves = [self.hidden, self.weight] if trained else [self.hidden]
        self.arguments = (self.hidden, self.weight, self.targets)
        self.cotangent = torch.linspace(-1, 2, len(hidden), device=device)

    def fused(self) -> tuple[Tensor, ...]:
        return (token_log_probs(self.hidden, self.weight, self.targets),)

    @cached_property
    def exact(self) -> list[Tensor]:
        """The values and the gradients in float64."""
        assert self.cotangent is not None
        weight, values, to_hidden = self.weight.detach().double(), [], []
        to_weight = torch.zeros_like(weight)
        rows = zip(self.hidden.detach().double().split(_ROWS), self.targets.split(_ROWS), strict=True)
        for (hidden, targets), grad in zip(rows, self.cotangent.double().split(_ROWS), strict=True):
            log_probs = (hidden @ weight.T).log_softmax(-1)
            at = targets.unsqueeze(1)
            values.append(log_probs.gather(1, at).squeeze(1))
            slopes = (-grad.unsqueeze(1) * log_probs.exp()).scatter_add(1, at, grad.unsqueeze(1))
            to_hidden.append(slopes @ weight)
            to_weight.addmm_(slopes.T, hidden)
        return [torch.cat(values), torch.cat(to_hidden), to_weight]

    def output_errors(self, outputs: tuple[Tensor, ...]) -> dict[str, float]:
        found = outputs[0].detach().double()
        return {"output": finite((found - self.exact[0]).norm() / self.exact[0].norm())}

    def gradient_error(self, gradients: Sequence[Tensor]) -> float:
        return max(relative([squares(one, exact)]) for one, exact in zip(gradients, self.exact[1:], strict=False))

    def chance(self, released: bool) -> dict[str, float]:
        stored = rounding(self.case.dtype)
        return {"output": 4 * (stored if released else rounding(torch.float32)), "gradient": 4 * stored}

    @classmethod
    def moved(cls, mode: str) -> int:
        """Of the hidden states alone: the products are what takes the time."""
        return {"forward": 1, "backward": 2, "full": 3}[mode]

    @classmethod
    def needs(cls, case: Case) -> int:
        """Four times the logits in float32, the head and its gradients in float64."""
        vocabulary, width = HEADS.get(case.model, Head(50, True)).vocabulary, case.shape[-1]
        return super().needs(case) + 4 * 4 * case.elements // width * vocabulary + 40 * vocabulary * width
