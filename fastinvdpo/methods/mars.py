"""MARS (arXiv 2407.07614): three stages of training on captioned images, and preference pairs, on image tokens.

What is trained is no diffusion model: it gives the log-probabilities of the tokens of an image after its caption, or of
a caption after its image. docs/mars.md says what is the paper's, and what is ours.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import STREAM_DIRECTION, BatchLoss, PairBatch, PreferenceMethod, TrainingMethod
from fastinvdpo.methods.statistics import AutoBeta, Gather, implicit_accuracy
from fastinvdpo.ops import philox
from fastinvdpo.ops.preference_loss.utilities import UTILITIES


@dataclass(frozen=True)
class TokenOutput:
    """The loss of a batch, a number of each pair or image that is finite where the loss is, ``(B,)``, and scalars for
    the log, by name.
    """

    loss: Tensor
    entries: Tensor
    metrics: dict[str, Tensor]


class TokenMethod(TrainingMethod):
    """A method for models of image tokens.

    Its networks are called as ``network(codes int64 (n, N), captioning int64 (n,), conditioning)``, where
    ``captioning`` is 0 for an image after its caption, and 1 for a caption after its image. They give log-probabilities
    ``(n, …)``, one for each token in order, and 0 behind the last one. ``conditioning`` has ``length``, the tokens of a
    caption, and ``spoken``, those of them that follow an image, their end included.
    """

    of_tokens = True
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of :attr:`TokenOutput.metrics`."""
    shares: ClassVar[dict[str, str]] = {}
    """Metrics that count some entries alone, and the metric that is the share of those."""

    def objective(self, schedule: NoiseSchedule | None) -> TokenObjective:
        """The loss. Raises ``InvalidInput`` for a model with a noise schedule."""
        if schedule is not None:
            problem = "trains models of image tokens, and this is a diffusion model"
            raise invalid("method.name", self.name, problem, "choose a method of diffusion models, or a MARS model")
        return TokenObjective(self)

    @abstractmethod
    def loss(self, policy: Network, reference: Network, batch: PairBatch, seed: int) -> TokenOutput:
        """The loss of a batch with one graph."""


@dataclass(frozen=True)
class TokenObjective(BatchLoss):
    """The loss of a batch, as :class:`fastinvdpo.methods.Objective` is of diffusion models. It depends on the seed and
    the numbers of the pairs or images alone; ``gather`` and ``auto_beta`` have no use.
    """

    method: TokenMethod
    gather: Gather | None = None
    auto_beta: AutoBeta | None = None

    def __call__(self, policy: Network, reference: Network, batch: PairBatch, *, seed: int) -> TokenOutput:
        """The loss with one graph. Raises ``InvalidInput`` where the batch is none of image tokens."""
        codes, entries, sides = batch.latents, len(batch.sample_index), 1 if self.method.unpaired else 2
        if codes.ndim != 2 or codes.dtype != torch.int64:
            shown = (tuple(codes.shape), codes.dtype)
            raise invalid("batch.latents", shown, "are no codes of images", "pass int64 (n, N)")
        if len(codes) != sides * entries or entries == 0:
            problem = f"is not {sides} for each of {entries} sample indices"
            raise invalid("batch.latents.shape", tuple(codes.shape), problem, "stack [winners; losers] of pairs")
        return self.method.loss(policy, reference, batch, seed)


class _Stage(TokenMethod):
    """Cross-entropy: the mean over images of the mean over an image's tokens, or its caption's. Without a reference."""

    unpaired = captioned = True
    needs_reference = False

    def loss(self, policy: Network, reference: Network, batch: PairBatch, seed: int) -> TokenOutput:
        captioning = self.captioning(batch, seed)
        log_probs = policy(batch.latents, captioning, batch.conditioning)
        tokens = torch.where(captioning == 1, batch.conditioning["spoken"], batch.latents.shape[1])
        losses = -log_probs.sum(1) / tokens
        spoken = captioning.to(losses.dtype)
        parts = {"caption": spoken, "image": 1 - spoken}
        found = {f"{name}_loss": (share * losses.detach()).mean() for name, share in parts.items()}
        found |= {f"{name}s": share.mean() for name, share in parts.items()}
        return TokenOutput(losses.mean(), losses, {"loss": losses.detach().mean(), **found})

    def captioning(self, batch: PairBatch, seed: int) -> Tensor:
        """Of each image, whether its caption follows from it, int64 ``(B,)``."""
        return torch.zeros_like(batch.latents[:, 0])


@dataclass(frozen=True, kw_only=True)
class MarsStage1(_Stage):
    """Stage I, bidirectional: images after captions, and captions after images; the loss is on what comes after.

    Attributes:
        caption_share: the share of images whose caption follows from them. An image without a caption, because it has
            none or because it was dropped (``data.caption_dropout``), is never among these.

    Raises:
        InvalidInput: a value is out of range.
    """

    name = "mars-stage1"
    metrics = ("loss", "image_loss", "caption_loss", "images", "captions")
    shares: ClassVar[dict[str, str]] = {"image_loss": "images", "caption_loss": "captions"}

    caption_share: float = 0.5

    def __post_init__(self) -> None:
        share = self.caption_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise invalid("caption_share", share, "is no share", "use a number from 0 to 1, such as 0.5")

    def captioning(self, batch: PairBatch, seed: int) -> Tensor:
        drawn = philox.uniform(seed, STREAM_DIRECTION, batch.sample_index) < self.caption_share
        return (drawn.to(batch.latents.device) & (batch.conditioning["length"] > 0)).long()


@dataclass(frozen=True, kw_only=True)
class MarsStage2(_Stage):
    """Stage II: images after captions."""

    name = "mars-stage2"


@dataclass(frozen=True, kw_only=True)
class MarsStage3(_Stage):
    """Stage III: images after captions and small images of themselves (``model.low_resolution``)."""

    name = "mars-stage3"
    cascaded = True


@dataclass(frozen=True, kw_only=True)
class MarsDPO(PreferenceMethod, TokenMethod):
    """Preference on image tokens: ``z = β·[r(winner) − r(loser)]``, ``r = Σ_t log π − log π_ref`` over an image's
    tokens, and ``loss = mean u(z)``. Experimental: docs/mars.md has a published negative result.

    Attributes:
        beta, utility, label_smoothing: as of :class:`PreferenceMethod`; β stands without the ½ of diffusion models.
        reduction: ``sum`` over an image's tokens, or their ``mean``, for which β is as many times larger.

    Raises:
        InvalidInput: a value is out of range.
    """

    name = "mars-dpo"
    _of_sides = ("log_prob_winner", "log_prob_loser", "reference_log_prob_winner", "reference_log_prob_loser")
    metrics = ("loss", "margin", "implicit_accuracy", *_of_sides)

    beta: float = 0.1
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in ("sum", "mean"):
            raise invalid("reduction", self.reduction, "is not known", "use sum or mean")

    def loss(self, policy: Network, reference: Network, batch: PairBatch, seed: int) -> TokenOutput:
        given = batch.latents, torch.zeros_like(batch.latents[:, 0]), batch.conditioning
        ours = policy(*given)
        with torch.no_grad():
            theirs = reference(*given)
        tokens = batch.latents.shape[1]
        ratios = (ours - theirs).sum(1) / (tokens if self.reduction == "mean" else 1)  # of equal models exactly 0
        winner, loser = ratios.chunk(2)
        margin = self.beta * (winner - loser)
        loss = UTILITIES[self.utility].value(margin, self.beta, self.label_smoothing).mean()
        sides = [side.mean() / tokens for found in (ours, theirs) for side in found.detach().sum(1).chunk(2)]
        seen = margin.detach()
        found = {"loss": loss.detach(), "margin": seen.mean(), "implicit_accuracy": implicit_accuracy(seen, tie=0.5)}
        return TokenOutput(loss, margin, {**found, **dict(zip(self._of_sides, sides, strict=True))})
