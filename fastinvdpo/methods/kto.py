"""Diffusion-KTO: images that were liked or disliked, each by itself, against a common baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.diffusion.schedule import NoiseSchedule, add_noise, prediction_target
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import (
    STREAM_NOISE,
    STREAM_TIMESTEP,
    Draws,
    Method,
    Objective,
    ObjectiveOutput,
    PairBatch,
    check_batch,
)
from fastinvdpo.methods.single_timestep import TimestepSampling
from fastinvdpo.methods.statistics import Gather, reference_mse, sigmoid
from fastinvdpo.ops import PairStatistics, philox
from fastinvdpo.ops.pair_statistics import pair_statistics

HALOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda logit, sign: sigmoid(logit),
    "loss_averse": lambda logit, sign: logsigmoid(logit),
    "risk_seeking_1": lambda logit, sign: -sign * logsigmoid(-sign * logit),
    "risk_seeking_2": lambda logit, sign: sign * torch.exp(sign * logit / 100) - 1,
    "risk_seeking_3": lambda logit, sign: -logsigmoid(-logit),
}
"""Human utilities ``h(ℓ, y)``: of the signed logit ``ℓ = y·β·(g − κ)`` and the label ``y = ±1``."""

BASELINES = ("mean", "balanced")


class KTOLoss(NamedTuple):
    """What Diffusion-KTO's script computes and logs; scalars, but ``logit``, ``(N,)``.

    Attributes:
        loss: ``mean_j w_y·(1 − h_j)``.
        raw_model_loss, raw_ref_loss: mean squared errors; the first carries a gradient.
        implicit_acc: the share of images with ``ℓ > 0``, that is on their label's side of the baseline.
        kl: κ, the baseline.
        diff_pos, diff_neg: mean ``g − κ`` of liked and disliked images; 0 where there are none.
        logit: ℓ.
    """

    loss: Tensor
    raw_model_loss: Tensor
    raw_ref_loss: Tensor
    implicit_acc: Tensor
    kl: Tensor
    diff_pos: Tensor
    diff_neg: Tensor
    logit: Tensor


@dataclass(frozen=True)
class KTOOutput(ObjectiveOutput):
    """With the labels, bool ``(N,)``, and κ, a scalar; ``margin`` is ℓ, and what is ``(2B, …)`` of pairs ``(N, …)``."""

    liked: Tensor
    kappa: Tensor


class Judged(NamedTuple):
    """The sums of N images, κ, ``g − κ`` and ℓ, both ``(N,)``, and the loss."""

    statistics: PairStatistics
    kappa: Tensor
    advantage: Tensor
    logit: Tensor
    loss: Tensor


@dataclass(frozen=True, kw_only=True)
class KTO(Method):
    """Diffusion-KTO (arXiv 2404.04465), of single images that were liked (y = 1) or disliked (−1), each with a timestep
    and noise of its own: ``loss = mean w_y·(1 − h(ℓ))``, ``ℓ = y·β·(g − κ)``, ``g = −Δ``.

    Attributes:
        beta: β > 0; stands without the ½ of the pair methods.
        halo: h, one of :data:`HALOS`; ``risk_seeking_2`` is unbounded.
        baseline: κ, which carries no gradient, over the micro-batches of all processes. ``"mean"``: the mean of g, at
            least 0. ``"balanced"``: the mean of the means of both labels (the script's ``sigmoid`` offset).
        like_weight, dislike_weight: w of liked and disliked images.
        like_share: the share of draws that take a liked image; None: every image once an epoch.
        timesteps: how timesteps are drawn: a :class:`TimestepSampling`, or a mapping of some of its attributes.

    Raises:
        InvalidInput: a value is out of range.
    """

    name = "kto"
    utilities = ("kto",)
    unpaired = True

    beta: float = 1000.0
    utility: str = "kto"
    halo: str = "sigmoid"
    baseline: str = "mean"
    like_weight: float = 1.0
    dislike_weight: float = 1.0
    like_share: float | None = 0.8
    timesteps: TimestepSampling = TimestepSampling()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "timesteps", TimestepSampling.of(self.timesteps))
        share = self.like_share
        if isinstance(share, bool) or (share is not None and not 0 <= share <= 1):
            raise invalid("like_share", share, "is no share", "use a number from 0 to 1, or null for that of the data")
        for name, known in (("halo", tuple(HALOS)), ("baseline", BASELINES)):
            if getattr(self, name) not in known:
                raise invalid(name, getattr(self, name), "is not known", f"use one of {', '.join(known)}")
        for name in ("like_weight", "dislike_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                remedy = "the published value is 1"
                raise invalid(name, getattr(self, name), "must be finite and not negative", remedy)

    def _objective(self, schedule: NoiseSchedule) -> KTOObjective:
        self.timesteps.check(schedule)
        return KTOObjective(schedule, self)

    def loss(
        self,
        policy_pred: Tensor,
        reference_pred: Tensor,
        target: Tensor,
        liked: Tensor,
        *,
        kappa: Tensor | None = None,
        gather: Gather | None = None,
    ) -> KTOLoss:
        """The loss block of Diffusion-KTO's script.

        Args:
            policy_pred, reference_pred, target: as of :func:`fastinvdpo.preference_loss`, but ``(N, …)``, unpaired: t
                and noise are each image's own.
            liked: bool ``(N,)``.
            kappa: the baseline, a scalar, where ``baseline`` is not to say it: the script's ``original`` offset is
                :func:`mean_reward` of predictions for prompts that belong to other images.
            gather: with several processes, for the baseline, which is one for all; such as ``accelerator.gather``.
        """
        statistics = pair_statistics(policy_pred, reference_pred, target, paired=False)
        found = self.score(statistics, liked, kappa=kappa, gather=gather)
        means = _label_means(found.advantage.detach(), liked.to(found.advantage.device))
        return KTOLoss(
            found.loss,
            found.statistics.policy_mse.mean(),
            reference_mse(found.statistics).mean(),
            (found.logit.detach() > 0).to(found.logit.dtype).mean(),
            found.kappa,
            *means,
            found.logit,
        )

    def score(
        self, statistics: PairStatistics, liked: Tensor, *, kappa: Tensor | None = None, gather: Gather | None = None
    ) -> Judged:
        """What :meth:`loss` is made of, from the sums of its predictions."""
        count = tuple(statistics.policy_mse.shape)
        if not isinstance(liked, Tensor) or liked.dtype != torch.bool or liked.shape != count:
            given = f"{tuple(liked.shape)}, {liked.dtype}" if isinstance(liked, Tensor) else type(liked).__name__
            raise invalid("liked", given, "must be one bool per image", f"pass bool of shape {count}")
        reward, liked = -statistics.difference, liked.to(statistics.policy_mse.device)
        kappa = self._kappa(reward.detach(), liked, gather) if kappa is None else kappa.detach()
        advantage, sign = reward - kappa, 2 * liked.to(reward.dtype) - 1
        logit = sign * self.beta * advantage
        weights = torch.full_like(sign, self.like_weight), torch.full_like(sign, self.dislike_weight)
        loss = (torch.where(liked, *weights) * (1 - HALOS[self.halo](logit, sign))).mean()
        return Judged(statistics, kappa, advantage, logit, loss)

    def _kappa(self, reward: Tensor, liked: Tensor, gather: Gather | None) -> Tensor:
        if gather is not None:
            reward, liked = gather(reward), gather(liked)
        if self.baseline == "mean":
            return reward.mean().clamp(min=0)
        return torch.stack(_label_means(reward, liked)).mean()


@dataclass(frozen=True)
class KTOObjective(Objective):
    """The loss of :class:`KTO`; of :class:`Draws` both are ``(N, …)``, one for each image."""

    method: KTO

    def __call__(
        self, policy: Network, reference: Network, batch: PairBatch, *, seed: int, draws: Draws = Draws()
    ) -> KTOOutput:
        check_batch(batch, self.method)
        assert batch.liked is not None
        latents, index = batch.latents, batch.sample_index
        timesteps, noise = draws.timesteps, draws.noise
        if timesteps is None:
            timesteps = self.method.timesteps.draw(self.schedule, seed, STREAM_TIMESTEP, index)
        if noise is None:
            noise = philox.normal(seed, STREAM_NOISE, index.to(latents.device), tuple(latents.shape[1:]), latents.dtype)
        noisy = add_noise(self.schedule, latents, noise, timesteps)
        target, times = prediction_target(self.schedule, latents, noise, timesteps), timesteps.to(latents.device)
        policy_pred = policy(noisy, times, batch.conditioning)
        with torch.no_grad():
            reference_pred = reference(noisy, times, batch.conditioning)
        statistics = pair_statistics(policy_pred, reference_pred, target, paired=False)
        found = self.method.score(statistics, batch.liked, gather=self.gather)
        errors = statistics.policy_mse, reference_mse(statistics)
        return KTOOutput(found.loss, found.logit, *errors, timesteps, noisy, target, policy_pred, reference_pred,
                         liked=batch.liked.to(latents.device), kappa=found.kappa)  # fmt: skip


def kto(
    policy_pred: Tensor,
    reference_pred: Tensor,
    target: Tensor,
    liked: Tensor,
    *,
    kappa: Tensor | None = None,
    gather: Gather | None = None,
    **options: Any,
) -> KTOLoss:
    """:meth:`KTO.loss` with these options of :class:`KTO`."""
    return KTO(**options).loss(policy_pred, reference_pred, target, liked, kappa=kappa, gather=gather)


def mean_reward(policy_pred: Tensor, reference_pred: Tensor, target: Tensor) -> Tensor:
    """``mean_j −Δ_j``, scalar, no gradient."""
    with torch.no_grad():
        return -pair_statistics(policy_pred, reference_pred, target, paired=False).difference.mean()


def _label_means(value: Tensor, liked: Tensor) -> tuple[Tensor, Tensor]:
    """The means over liked and over disliked images; 0 where there are none."""
    both = torch.stack([liked, ~liked]).to(value.dtype)
    likes, dislikes = ((both * value).sum(1) / both.sum(1).clamp(min=1)).unbind()
    return likes, dislikes
