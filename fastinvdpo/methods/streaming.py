"""The gradient of a loss that sums over a whole trajectory, with the graph of a few samples in memory at a time.

A pair's margin is a sum, ``z_i = Σ_m z_im``, of terms that each need one sample at one timestep; so

    ∇ mean_i u(z_i) = (1/B)·Σ_i u'(z_i)·Σ_m ∇z_im

is a sum of gradients of single terms, each with one factor per pair. The terms can be differentiated in slices of any
size, and the memory for their graphs does not depend on the length of the trajectory. What is left is to know
``u'(z_i)`` in time:

- two passes: all terms are evaluated without gradient first. Costs a forward evaluation of every term more;
- one pass: pair by pair, the terms are differentiated with factor 1 into gradients of their own, which are multiplied
  by ``u'(z_i)`` and added to the others when the pair's last term is known. Costs memory for one more gradient, and
  only from the second pair of an optimizer step on;
- pairs that fit into a slice whole need neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastinvdpo.errors import invalid
from fastinvdpo.ops.preference_loss import PreferenceLoss
from fastinvdpo.ops.preference_loss.utilities import UTILITIES


class ScoredTerms(NamedTuple):
    """``n`` terms, each ``(n,)``: what it adds to its pair's margin (with gradient, where gradients are enabled), and
    the errors of policy and reference; and the reference's predictions ``(n, …)``.
    """

    margin: Tensor
    policy_mse: Tensor
    reference_mse: Tensor
    reference_pred: Tensor | None


Score = Callable[[Tensor, Tensor, Tensor | None], ScoredTerms]
"""``score(rows, columns, reference_pred)``: terms of samples ``rows`` ``(n,)`` of ``[winners; losers]`` at their
timesteps number ``columns`` ``(n,)``, int64 on the host; ``reference_pred``: what an earlier call gave for them."""


class LossTerms(Protocol):
    """A loss whose gradient comes in parts.

    Attributes:
        calls: the number of parts.
        result: the whole loss, its margins and errors, without gradient; known after the last part.
    """

    calls: int

    def term(self, call: int) -> Tensor:
        """A scalar; the gradients of all of them add up to that of the loss, and nothing is said of its value.

        Call it for the parts in order, and differentiate each before the next.
        """
        ...

    @property
    def result(self) -> PreferenceLoss: ...


class WholeLoss:
    """A loss whose gradient comes in one part."""

    calls = 1

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute

    def term(self, call: int) -> Tensor:
        self.result = self._compute()
        return self.result.loss


@dataclass(frozen=True)
class _Slice:
    """Terms ``start`` to ``stop``; with ``first`` (one pass only) the first of its pair, with ``complete`` the last."""

    start: int
    stop: int
    first: bool
    complete: bool


class StreamedLoss:
    """The loss of B pairs at K timesteps each; implements :class:`LossTerms`.

    Args:
        score: evaluates terms.
        pairs, timesteps: B and K.
        utility, beta, label_smoothing: u and its parameters.
        terms_per_call: how many terms are evaluated, and differentiated, at once; None for all of them.
        passes: how ``u'`` is known in time, for pairs that do not fit into a call: 1 or 2, as above.
        parameters: for one pass, all parameters that get a gradient.
    """

    def __init__(
        self,
        score: Score,
        *,
        pairs: int,
        timesteps: int,
        utility: str,
        beta: float,
        label_smoothing: float,
        terms_per_call: int | None = None,
        passes: int = 2,
        parameters: Sequence[nn.Parameter] = (),
    ) -> None:
        self._score, self._pairs, self._timesteps = score, pairs, timesteps
        self._utility, self._settings = UTILITIES[utility], (beta, label_smoothing)
        per_pair = 2 * timesteps
        per_call = pairs * per_pair if terms_per_call is None else terms_per_call
        self._whole_pairs = per_pair <= per_call
        self._one_pass = passes == 1 and not self._whole_pairs
        if self._one_pass and not parameters:
            raise invalid("parameters", parameters, "one pass scales their gradients", "pass them, or passes=2")
        self._parameters = list(parameters)
        self._slices = _slices(pairs, per_pair, per_call, self._one_pass)
        self.calls = len(self._slices)
        self._scored: list[ScoredTerms] = []
        self._kept: list[Tensor | None] = []
        self._known = not (self._whole_pairs or self._one_pass)
        if self._known:
            with torch.no_grad():
                self._scored = [self._evaluate(part) for part in self._slices]
            self._factor = self._slope(self._margins())

    def term(self, call: int) -> Tensor:
        """See :class:`LossTerms`. One pass: replaces the parameters' ``grad`` until the pair's last term is known."""
        part = self._slices[call]
        if self._known:
            margin = self._evaluate(part, self._scored[call].reference_pred).margin
            return (self._factor[self._pair(part).to(margin.device)] * margin).sum()
        if self._one_pass and part.first and not part.complete:
            self._kept = [parameter.grad for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
        scored = self._evaluate(part)
        margin = scored.margin
        self._scored.append(ScoredTerms(margin.detach(), scored.policy_mse.detach(), scored.reference_mse, None))
        if not part.complete:
            return margin.sum()
        first_pair = part.start // (2 * self._timesteps)
        factor = self._slope(self._margins(first_pair))
        if self._one_pass and not part.first:
            self._rescale(factor[0])
        return (factor[(self._pair(part) - first_pair).to(margin.device)] * margin).sum()

    @property
    def result(self) -> PreferenceLoss:
        """See :class:`LossTerms`; ``policy_mse`` and ``reference_mse`` are ``(2B, K)``."""
        margin = self._margins()
        errors = (torch.cat([getattr(scored, name) for scored in self._scored]) for name in ScoredTerms._fields[1:3])
        by_sample = (error.view(self._pairs, self._timesteps, 2).permute(2, 0, 1).flatten(0, 1) for error in errors)
        return PreferenceLoss(self._utility.value(margin, *self._settings).mean(), margin, *by_sample)

    def _pair(self, part: _Slice) -> Tensor:
        return torch.arange(part.start, part.stop) // (2 * self._timesteps)

    def _evaluate(self, part: _Slice, reference_pred: Tensor | None = None) -> ScoredTerms:
        """Terms go pair by pair, then timestep by timestep, the winner before the loser."""
        index = torch.arange(part.start, part.stop)
        rows = self._pair(part) + self._pairs * (index % 2)
        return self._score(rows, index // 2 % self._timesteps, reference_pred)

    def _margins(self, first_pair: int = 0) -> Tensor:
        """The margins of all pairs from one on whose terms have all been evaluated."""
        terms, skip = torch.cat([scored.margin for scored in self._scored]), 2 * self._timesteps * first_pair
        return terms[skip:].view(-1, 2 * self._timesteps).sum(1)

    def _slope(self, margin: Tensor) -> Tensor:
        """``u'(z_i)/B``. NaN where the margin is not finite: a flat utility must not hide that from the gradient."""
        slope = self._utility.slope(margin, *self._settings) / self._pairs
        return torch.where(torch.isfinite(margin), slope, math.nan)

    def _rescale(self, factor: Tensor) -> None:
        """Multiply the gradients of the current pair's terms so far, and put them to those of earlier pairs."""
        with torch.no_grad():
            for parameter, kept in zip(self._parameters, self._kept, strict=True):
                if parameter.grad is not None:
                    parameter.grad *= factor.to(parameter.device, parameter.grad.dtype)
                if kept is not None:
                    parameter.grad = kept if parameter.grad is None else kept.add_(parameter.grad)
        self._kept = []


def _slices(pairs: int, per_pair: int, per_call: int, one_pass: bool) -> list[_Slice]:
    """Slices of whole pairs where a call holds one; in one pass no slice holds terms of two pairs."""
    total = pairs * per_pair
    span, size = per_pair if one_pass else total, per_call // per_pair * per_pair or per_call
    return [
        _Slice(
            start=begin + offset,
            stop=begin + min(offset + size, span),
            first=not one_pass or offset == 0,
            complete=not one_pass or offset + size >= span,
        )
        for begin in range(0, total, span)
        for offset in range(0, span, size)
    ]
