"""What every method is: options, the objective that they make, of diffusion models on a noise schedule, and what that
takes and gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastinvdpo.diffusion.prompt import Network, Prompt, chunked
from fastinvdpo.diffusion.schedule import FLOW, NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.methods.statistics import AutoBeta, Gather
from fastinvdpo.methods.streaming import LossTerms, WholeLoss
from fastinvdpo.ops.preference_loss import PreferenceLoss, check_beta
from fastinvdpo.ops.preference_loss.utilities import UTILITIES, check_utility

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}
"""How pydantic reads a section of a configuration that is a dataclass; nothing here needs pydantic."""


# Offsets of the random streams of one pair; an inversion uses one offset per step, the strata one each.
STREAM_TIMESTEP, STREAM_NOISE, STREAM_SWAP, STREAM_INVERSION, STREAM_STRATUM = 0, 1, 2, 1 << 16, 1 << 17
STREAM_STORED = 1 << 18  # which of its stored draws a pair takes
STREAM_DIRECTION = 1 << 19  # whether an image follows from its caption, or the caption from its image


@dataclass(frozen=True)
class PairBatch:
    """B pairs of clean latents and what belongs to them. Tensors of 2B samples are stacked [winners; losers]. Of B
    single images (``liked``) every tensor has B rows instead.

    Attributes:
        latents: ``(2B, …)``; of a model of image tokens the codes of its images, int64 ``(2B, N)``.
        conditioning: what the network takes besides latents and timesteps, every tensor ``(2B, …)``.
        sample_index: int64 ``(B,)`` on the host: each pair's number in the whole run. It keys all random numbers.
        unconditional: the empty prompt's conditioning, ``(2B, …)``; needed with guidance.
        scores: preference scores ``(2B,)``; needed by SmPO.
        mask: ``k`` in [0, 1], ``(2B, 1, h, w)`` or another shape that :func:`pair_statistics` takes for 2B samples:
            what every element of a prediction counts in the errors and their products, 1 when None.
        trajectory: what :meth:`ChainObjective.reference_trajectory` gave for these latents, ``(2B, …)``, or
            :meth:`SingleTimestepObjective.store_draws`; computed when None.
        reference_pred: what :meth:`ChainObjective.reference_predictions` gave for that trajectory, ``(2B, N, …)``, or
            :meth:`SingleTimestepObjective.store_draws`; the reference makes forward passes when None.
        stored_draw: int64 ``(B,)`` on the host, where ``reference_pred`` is of draws that were made before: what the
            sample index was then. It keys the random numbers instead.
        liked: of single images, bool ``(B,)``: whether each was liked; None for pairs.
        noise: the initial latent that each image was generated from, ``(2B, …)``, or
        seeds: that of its generator, int64 ``(2B,)``; PNAPO needs one of them.
        step: optimizer steps of the run before the one that the pairs belong to.
    """

    latents: Tensor
    conditioning: dict[str, Tensor]
    sample_index: Tensor
    unconditional: dict[str, Tensor] | None = None
    scores: Tensor | None = None
    trajectory: Tensor | None = None
    reference_pred: Tensor | None = None
    stored_draw: Tensor | None = None
    mask: Tensor | None = None
    liked: Tensor | None = None
    noise: Tensor | None = None
    seeds: Tensor | None = None
    step: int = 0

    @property
    def pairs(self) -> int:
        return self.latents.shape[0] // 2

    def prompt(self, guidance_scale: float = 1.0) -> Prompt:
        return Prompt(self.conditioning, self.unconditional, guidance_scale)


@dataclass(frozen=True)
class Draws:
    """Random numbers to use instead of the counter-based ones.

    Attributes:
        timesteps: int64 ``(B,)`` on the host.
        noise: Diffusion-DPO: ``(B, …)``, one per pair; InPO: ``(S, 2B, …)``, one per step of the inversion and sample.
    """

    timesteps: Tensor | None = None
    noise: Tensor | None = None


@dataclass(frozen=True)
class ObjectiveOutput(PreferenceLoss):
    """The loss with what it was computed from: timesteps ``(2B,)`` or ``(2B, K)`` on the host, the others ``(2B, …)``
    or ``(2B, K, …)``; a method without a reference is one whose reference predicts the target.
    """

    timesteps: Tensor
    noisy_latents: Tensor
    target: Tensor | None
    policy_pred: Tensor
    reference_pred: Tensor


def check_batch(batch: PairBatch, method: Method) -> None:
    paired = not method.unpaired
    samples = batch.latents.shape[0]
    if (batch.liked is None) != paired:
        problem = "belongs to single images, and the method compares pairs" if paired else "is what single images need"
        remedy = "stack [winners; losers] without it" if paired else "pass one bool for each image"
        raise invalid("batch.liked", None if batch.liked is None else tuple(batch.liked.shape), problem, remedy)
    if samples == 0 or (paired and samples % 2):
        raise invalid("batch.latents.shape", tuple(batch.latents.shape), "must be (2B, …)", "stack [winners; losers]")
    entries = samples // 2 if paired else samples
    if batch.sample_index.shape != (entries,) or batch.sample_index.dtype != torch.int64:
        shown = (tuple(batch.sample_index.shape), batch.sample_index.dtype)
        what = "pair" if paired else "image"
        remedy = f"pass shape ({entries},)"
        raise invalid("batch.sample_index", shown, f"must be int64 of one number per {what}", remedy)
    if batch.mask is not None and method.compat is not None:
        remedy = "set it to null, or pass no mask"
        raise invalid("compat", method.compat, "reproduces code that has no masks", remedy)
    if batch.mask is not None and not paired:
        raise invalid("batch.mask.shape", tuple(batch.mask.shape), f"means nothing for {method.name}", "pass no mask")
    if batch.mask is not None and batch.mask.shape[:1] != (samples,):
        raise invalid("batch.mask.shape", tuple(batch.mask.shape), "must have 2B rows", f"pass ({samples}, 1, h, w)")
    for name, tensor in batch.conditioning.items():
        if tensor.shape[0] != samples:
            shape = f"batch.conditioning[{name!r}].shape"
            raise invalid(shape, tuple(tensor.shape), "must have as many rows as the latents", f"pass {samples} rows")


class Follows(NamedTuple):
    """``r ← δ·r + (1 − δ)·p`` after ``every`` optimizer steps, with ``decay`` δ."""

    decay: float
    every: int


class BatchLoss(ABC):
    """The loss of a batch, whole or in parts."""

    @abstractmethod
    def __call__(self, policy: Network, reference: Network, batch: PairBatch, *, seed: int) -> Any:
        """The loss with one graph."""

    def stream(
        self,
        policy: Network,
        reference: Network,
        batch: PairBatch,
        *,
        seed: int,
        max_batch: int | None = None,
        passes: int = 2,
        parameters: Sequence[nn.Parameter] = (),
    ) -> LossTerms:
        """The loss in parts, each with a graph of its own, whose gradients add up to that of :meth:`__call__`: one part
        here, several where a whole chain is scored (``streaming.py``).

        Args:
            policy, reference, batch, seed: as for :meth:`__call__`.
            max_batch: the largest forward pass, in samples (but at least one guided prediction), whose graph is in
                memory at a time; None: no limit.
            passes: for pairs that do not fit into one part, 2 evaluates everything without gradient first, 1 works
                pair by pair with a second gradient buffer.
            parameters: for ``passes=1``, all parameters that get a gradient.
        """
        networks = chunked(policy, max_batch), chunked(reference, max_batch)
        return WholeLoss(lambda: self(*networks, batch, seed=seed))

    def backward(self, policy: Network, reference: Network, batch: PairBatch, **options: Any) -> Any:
        """Add the gradient of the loss to the parameters' ``grad``, part by part; arguments as of :meth:`stream`."""
        terms = self.stream(policy, reference, batch, **options)
        for call in range(terms.calls):
            terms.term(call).backward()
        return terms.result


@dataclass(frozen=True)
class Objective(BatchLoss):
    """The loss of a batch of pairs. Its random numbers depend on the seed and the pairs' numbers alone.

    Attributes:
        gather: with several processes that call it together, for what is a mean over all their pairs.
        auto_beta: what chooses β, with a state that belongs into a checkpoint; None: β is constant.
    """

    schedule: NoiseSchedule
    method: Method
    gather: Gather | None = None
    auto_beta: AutoBeta | None = None

    @abstractmethod
    def __call__(
        self, policy: Network, reference: Network, batch: PairBatch, *, seed: int, draws: Draws = Draws()
    ) -> ObjectiveOutput:
        """The loss with one graph. Raises ``InvalidInput`` where the batch lacks what the method needs."""


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(ABC):
    """What the trainer reads of every method, whatever it trains. A method is a frozen dataclass of its options."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: ClassVar[str]
    of_tokens: ClassVar[bool] = False
    """Whether it trains a model whose images are tokens (``methods/mars.py``), and no diffusion model."""
    captioned: ClassVar[bool] = False
    """Whether single images need captions alone, and nobody's judgement."""
    cascaded: ClassVar[bool] = False
    """Whether images follow from small ones of themselves."""
    unpaired: ClassVar[bool] = False
    """Whether it trains on single images that were liked or disliked, instead of pairs."""
    needs_scores: ClassVar[bool] = False
    """Whether pairs need scores."""
    flow_only: ClassVar[bool] = False
    """Whether it is one of flow matching alone."""
    needs_noise: ClassVar[bool] = False
    """Whether pairs need the noise that their images were generated from."""
    needs_reference: ClassVar[bool] = True
    """Whether there is a reference, with its forward passes."""
    policy_inverts: ClassVar[bool] = False
    """Whether the policy inverts the latents that it is trained on, each to its pair's timestep."""
    whole_chain: ClassVar[bool] = False
    """Whether a pair is scored along a whole chain, whose gradient is streamed; otherwise at one timestep."""

    @abstractmethod
    def objective(self, schedule: NoiseSchedule | None) -> Any:
        """The loss for a model with this noise schedule, or without one. Raises ``InvalidInput`` where the two do not
        fit.
        """

    @property
    def fixed_shapes(self) -> bool:
        """Whether all forward passes of a step have few shapes, as CUDA graphs and ``torch.compile`` want it."""
        return True

    @property
    def guided(self) -> bool:
        """Whether networks are evaluated with classifier-free guidance, which needs the empty prompt's conditioning."""
        return False

    @property
    def zero_gradient_at_reference(self) -> bool:
        """Whether the gradient is exactly zero while policy = reference."""
        return False

    @property
    def reference_follows(self) -> Follows | None:
        """How the reference's weights are to follow the policy's, which the owner of the loop does; None: not."""
        return None

    @property
    def like_share(self) -> float | None:
        """The share of an unpaired method's draws that take a liked image; None: every image once an epoch."""
        return None

    @property
    def reference_chain(self) -> dict[str, Any] | None:
        """The options that decide a chain which the reference inverts and a cache may hold; None: there is none."""
        return None

    @property
    def reference_draws(self) -> dict[str, Any] | None:
        """The options that decide draws (timestep, noise, what the reference predicts there) that a cache may hold;
        None: the policy, or a reference that follows it, has a part in them.
        """
        return None

    @property
    def awaits_score_range(self) -> bool:
        """Whether :meth:`with_score_range` must be called before :meth:`objective`."""
        return False

    def with_score_range(self, measured: float) -> TrainingMethod:
        """The method, knowing the range of the data's scores. Raises ``InvalidInput`` where it does not fit."""
        return self


@dataclass(frozen=True, kw_only=True)
class PreferenceMethod(TrainingMethod):
    """The options of a loss of preference margins.

    Attributes:
        beta: ``β > 0``, how strongly the policy is tied to the reference.
        utility: name of ``u``, which makes a loss of a pair's margin (``ops/preference_loss/utilities.py``).
        label_smoothing: ``ε`` in [0, 0.5), the share of wrong labels; of the utilities that use it.

    Raises:
        InvalidInput: a value is out of range.
    """

    utilities: ClassVar[tuple[str, ...]] = tuple(UTILITIES)
    """What may be chosen as ``utility``: the fused ones, or the method's own under the method's name."""

    beta: float
    utility: str = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if self.utilities == (self.name,):  # the method's own
            for option, own in (("utility", self.name), ("label_smoothing", 0)):
                if (value := getattr(self, option)) != own:
                    raise invalid(option, value, f"is not used by {self.name}, which has a loss of its own", "drop it")
        else:
            check_utility(self.utility, self.label_smoothing)
        if self.utility in UTILITIES and UTILITIES[self.utility].smoothed and self.label_smoothing == 0:
            problem = f"makes utility {self.utility!r} the same as sigmoid"
            remedy = "set the share of wrong labels you expect, such as 0.1, or choose utility sigmoid"
            raise invalid("label_smoothing", self.label_smoothing, problem, remedy)

    @property
    def preference(self) -> dict[str, Any]:
        """The options that ``preference_loss`` takes."""
        return {"beta": self.beta, "utility": self.utility, "label_smoothing": self.label_smoothing}


@dataclass(frozen=True, kw_only=True)
class Method(PreferenceMethod):
    """A method's options: its constructor, its section of the configuration and its documentation at once.

    Attributes:
        beta, utility, label_smoothing: as of :class:`PreferenceMethod`.
        compat: ``"released"`` reproduces the released code's grid, levels, weighting and float32 schedule, with a
            current diffusers; ``"released-diffusers-0.20"``, of InPO and SmPO, with the version that they pin, whose
            inverse scheduler is another one.

    Raises:
        InvalidInput: a value is out of range.
    """

    compats: ClassVar[tuple[str, ...]] = ("released",)
    """What may be chosen as ``compat``, beside None."""

    compat: Literal["released", "released-diffusers-0.20"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat not in (None, *self.compats):
            known = ", ".join(self.compats)
            raise invalid("compat", self.compat, f"is not known of {self.name}", f"use {known} or null")

    def objective(self, schedule: NoiseSchedule | None) -> Objective:
        """The loss on a model's noise schedule. Raises ``InvalidInput`` where schedule and options do not fit."""
        if schedule is None:
            problem = "trains diffusion models, and this one has no noise schedule"
            raise invalid("method.name", self.name, problem, "choose a method of image tokens, such as mars-dpo")
        if self.compat and schedule.prediction_type == FLOW:
            problem = "is the code of diffusion models, and knows no flow matching"
            raise invalid("compat", self.compat, problem, "set it to null")
        if self.flow_only and schedule.prediction_type != FLOW:
            problem = f"{self.name} is of flow matching, as SD3's and FLUX's, and the model predicts something else"
            raise invalid("prediction_type", schedule.prediction_type, problem, "use another model, or another method")
        return self._objective(schedule.released() if self.compat else schedule)

    @abstractmethod
    def _objective(self, schedule: NoiseSchedule) -> Objective:
        """The loss on ``schedule``, whose precision is decided."""


def check_count(option: str, value: object) -> None:
    """Raise ``InvalidInput`` unless ``value`` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid(option, value, "must be a whole number above 0", "use 1 or more")
