"""Methods that score a pair at one timestep: which one, and their objective."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.diffusion.schedule import FLOW, NoiseSchedule, prediction_target, recover_noise
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import (
    STREAM_TIMESTEP,
    STRICT,
    Draws,
    Method,
    Objective,
    ObjectiveOutput,
    PairBatch,
    check_batch,
)
from fastinvdpo.methods.statistics import AutoBeta, Gather, Scored, pair_margin, reference_mse, safeguard
from fastinvdpo.ops import PairStatistics, PreferenceLoss, pair_statistics, philox, preference_loss
from fastinvdpo.ops.preference_loss.utilities import UTILITIES

Density = Literal["uniform", "logit-normal"]


@dataclass(frozen=True)
class TimestepSampling:
    """How a pair's level is drawn.

    Attributes:
        range: first and last level, both included; all of the schedule when None. An SDXL refiner sees 0 to 199.
        values: the levels to draw from instead; SDXL-Turbo's are 249, 499, 749, 999.
        density: ``"uniform"``, or ``"logit-normal"`` (arXiv 2403.03206, section 3.1): the place in the range or list is
            ``1/(1 + exp(−z))`` with ``z ~ N(logit_mean, logit_std²)``, counted towards noise. None: logit-normal for
            flow matching, uniform else. The shift of a flow schedule is in its levels, so it acts on either.

    Raises:
        InvalidInput: a value is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    range: Sequence[int] | None = None
    values: Sequence[int] | None = None
    density: Density | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.range is not None and self.values is not None:
            raise invalid("timesteps.values", self.values, "cannot be had with timesteps.range", "drop one of them")
        for name in ("range", "values"):
            levels = getattr(self, name)
            if levels is None:
                continue
            # A list, as a configuration file gives it.
            object.__setattr__(self, name, list(levels))
            if not levels or not all(isinstance(level, int) and level >= 0 for level in levels):
                raise invalid(f"timesteps.{name}", list(levels), "are not levels", "list whole numbers from 0")
        if self.range is not None and not (len(self.range) == 2 and self.range[0] <= self.range[1]):
            remedy = "give the first and the last level"
            raise invalid("timesteps.range", self.range, "is not a range of levels", remedy)
        if self.density not in (None, *get_args(Density)):
            raise invalid("timesteps.density", self.density, "is not known", f"use one of {get_args(Density)}, or null")
        if not math.isfinite(self.logit_mean):
            raise invalid("timesteps.logit_mean", self.logit_mean, "must be finite", "the published value is 0")
        if not 0 < self.logit_std < math.inf:
            raise invalid("timesteps.logit_std", self.logit_std, "must be positive", "the published value is 1")

    @classmethod
    def of(cls, given: TimestepSampling | Mapping[str, Any] | None) -> TimestepSampling:
        """From itself, from a mapping of its attributes, or the default. Raises ``InvalidInput`` for other keys."""
        if isinstance(given, TimestepSampling):
            return given
        known = cls.__dataclass_fields__
        for name in given or {}:
            if name not in known:
                raise invalid("timesteps", name, "is not an option of timesteps", f"use some of {', '.join(known)}")
        return cls(**(given or {}))

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise ``InvalidInput`` unless all levels are those of the schedule."""
        last = schedule.num_train_timesteps - 1
        for name, levels in (("range", self.range), ("values", self.values)):
            if levels is not None and max(levels) > last:
                raise invalid(f"timesteps.{name}", levels, "exceeds the schedule", f"use levels from 0 to {last}")

    def draw(self, schedule: NoiseSchedule, seed: int, offset: int, index: Tensor) -> Tensor:
        """Levels int64 ``(B,)``, one for each stream ``index`` int64 ``(B,)``."""
        levels = self._levels(schedule)
        if self._is_uniform(schedule):
            places = philox.integers(seed, offset, index, len(levels))
        else:
            normal = torch.special.ndtri(philox.uniform(seed, offset, index))  # a uniform 0 is −∞, and place 0
            share = torch.sigmoid(self.logit_mean + self.logit_std * normal)
            places = (share * len(levels)).long().clamp(max=len(levels) - 1)
        return int(levels[0]) + places if self.values is None else levels[places.cpu()]

    def _levels(self, schedule: NoiseSchedule) -> Tensor:
        """All levels there are to draw, int64 on the host, ascending."""
        if self.values is not None:
            return torch.tensor(sorted(self.values))
        low, high = self.range or (0, schedule.num_train_timesteps - 1)
        return torch.arange(low, high + 1)

    def _is_uniform(self, schedule: NoiseSchedule) -> bool:
        return (self.density or ("logit-normal" if schedule.prediction_type == FLOW else "uniform")) == "uniform"


@dataclass(frozen=True, kw_only=True)
class SingleTimestepMethod(Method):
    """A method that scores a pair at one timestep, against the noise that made the noisy latents.

    Attributes:
        timesteps: how timesteps are drawn: a :class:`TimestepSampling`, or a mapping of some of its attributes.
        safeguard: μ of Diffusion-SDPO in [0, 1], which scales down the loser's gradient where it would raise the
            winner's error (``statistics.safeguard``): pair by pair; with ``compat`` by micro-batch. None: off.
        anchor: A, adds ``A·mean m((p − r)²)`` over both sides (Flow-DPO of SimpleTuner).
        sft_weight: adds so much of the winners' mean squared error.
        auto_beta: f in (0, ½), the mean of ``σ(−z)`` that β is chosen for (Flow-DPO of SimpleTuner): from an average
            over steps, between a thousandth of ``beta`` and ``beta``. None: β is constant.
    """

    beta_scales_margin: ClassVar[bool] = True
    """Whether the loss depends on β by the margin alone, which is proportional to it."""
    draw_options: ClassVar[tuple[str, ...]] = ()
    """The options that decide noisy latents and what is predicted there; none where draws cannot be stored."""

    timesteps: TimestepSampling = TimestepSampling()
    safeguard: float | None = None
    anchor: float = 0.0
    sft_weight: float = 0.0
    auto_beta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "timesteps", TimestepSampling.of(self.timesteps))
        if isinstance(self.safeguard, bool) or (self.safeguard is not None and not 0 <= self.safeguard <= 1):
            raise invalid("safeguard", self.safeguard, "out of range", "use a number from 0 to 1, or null for none")
        for name in ("anchor", "sft_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise invalid(name, getattr(self, name), "must be finite and not negative", "use 0 for none")
        if self.auto_beta is not None:
            if not 0 < self.auto_beta < 0.5:
                raise invalid("auto_beta", self.auto_beta, "out of range", "use a share such as 0.2, or null")
            if not self.beta_scales_margin or self.utility == "ipo":
                what = self.utility if self.beta_scales_margin else self.name
                problem = f"chooses the scale of a margin, and β of {what} is more than that"
                raise invalid("auto_beta", self.auto_beta, problem, "set it to null")
        if self.anchor and not self.needs_reference:
            problem = f"needs a reference, which {self.name} has not"
            raise invalid("anchor", self.anchor, problem, "use sft_weight, or 0")

    @abstractmethod
    def trajectory(
        self, schedule: NoiseSchedule, network: Network, batch: PairBatch, timesteps: Tensor, draws: Draws, seed: int
    ) -> tuple[Tensor, Tensor]:
        """``(noisy latents, noise)`` at ``timesteps`` int64 ``(2B,)`` on the host, both ``(2B, …)``."""

    def inverting_network(self, policy: Network, reference: Network) -> Network:
        """The network that :meth:`trajectory` gets."""
        return policy

    def pair_weight(self, batch: PairBatch) -> Tensor | None:
        """What each pair's margin counts, ``(B,)``; None: 1."""
        return None

    def prepare(self, batch: PairBatch, seed: int) -> PairBatch:
        """The batch as the method sees it."""
        return batch

    def loss(
        self,
        policy_pred: Tensor,
        reference_pred: Tensor | None,
        target: Tensor,
        pair_weight: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        gather: Gather | None = None,
        auto_beta: AutoBeta | None = None,
    ) -> PreferenceLoss:
        """The loss of predictions ``(2B, …)``, in one op where it is a utility of the margin and nothing else.

        Args:
            mask: as of :func:`preference_loss`, in all sums, those of ``anchor``, ``sft_weight`` and ``safeguard`` too.
            gather, auto_beta: as of :class:`Objective`; with the option ``auto_beta`` one of :meth:`new_auto_beta`,
                the same at every call.
        """
        added = self.anchor or self.sft_weight or self.safeguard is not None or self.auto_beta is not None
        if self.utility in UTILITIES and not added:
            assert reference_pred is not None
            given = {"pair_weight": pair_weight, "mask": mask, **self.preference}
            return preference_loss(policy_pred, reference_pred, target, **given)
        return self.finish(self.score(policy_pred, reference_pred, target, pair_weight, gather, auto_beta, mask))

    def new_auto_beta(self) -> AutoBeta | None:
        """What chooses β for the option ``auto_beta``, before the first step; None without it."""
        return None if self.auto_beta is None else AutoBeta(self.auto_beta, minimum=1e-3 * self.beta, maximum=self.beta)

    def score(
        self,
        policy_pred: Tensor,
        reference_pred: Tensor | None,
        target: Tensor,
        pair_weight: Tensor | None = None,
        gather: Gather | None = None,
        auto_beta: AutoBeta | None = None,
        mask: Tensor | None = None,
    ) -> Scored:
        """What :meth:`finish` makes a loss of; arguments as of :meth:`loss`."""
        statistics = pair_statistics(policy_pred, reference_pred, target, mask)
        safeguarded, scale = statistics, None
        if self.safeguard is not None:
            elements = policy_pred[0].numel() if self.compat else None
            safeguarded, scale = safeguard(
                statistics, self.safeguard, pair_weight=pair_weight, released_elements=elements
            )
        margin = self.margin(safeguarded)
        margin = margin if pair_weight is None else pair_weight.to(margin.dtype) * margin
        if self.auto_beta is not None:
            if auto_beta is None:
                remedy = "pass auto_beta=method.new_auto_beta(), the same at every call"
                raise invalid("auto_beta", self.auto_beta, "asks for an average over steps", remedy)
            gap = 2 / self.beta * margin.detach()
            margin = auto_beta.update(gap if gather is None else gather(gap)) / self.beta * margin
        return Scored(statistics, safeguarded, scale, margin, gather)

    def margin(self, statistics: PairStatistics) -> Tensor:
        """``z`` per pair, ``(B,)``: positive where the policy prefers the winner."""
        return pair_margin(statistics, self.beta)

    def pair_losses(self, scored: Scored) -> Tensor:
        """The loss of every pair, ``(B,)``: of its margin, and of ``scored.safeguarded``."""
        return UTILITIES[self.utility].value(scored.margin, self.beta, self.label_smoothing)

    def finish(self, scored: Scored) -> PreferenceLoss:
        """The mean loss with its additional terms, which no safeguard touches."""
        statistics, loss = scored.statistics, self.pair_losses(scored).mean()
        if self.anchor:
            assert statistics.shift_mse is not None
            loss = loss + self.anchor * statistics.shift_mse.mean()
        if self.sft_weight:
            loss = loss + self.sft_weight * statistics.policy_mse.chunk(2)[0].mean()
        return PreferenceLoss(loss, scored.margin, statistics.policy_mse, reference_mse(statistics))

    @property
    def reference_draws(self) -> dict[str, Any] | None:
        if not self.draw_options or not self.needs_reference or self.reference_follows is not None:
            return None
        timesteps = {f"timesteps.{name}": value for name, value in dataclasses.asdict(self.timesteps).items()}
        return timesteps | {name: getattr(self, name) for name in self.draw_options}

    def _objective(self, schedule: NoiseSchedule) -> SingleTimestepObjective:
        self.timesteps.check(schedule)
        return SingleTimestepObjective(schedule, self, auto_beta=self.new_auto_beta())


@dataclass(frozen=True)
class SingleTimestepObjective(Objective):
    """The loss of a :class:`SingleTimestepMethod`."""

    method: SingleTimestepMethod

    def __call__(
        self, policy: Network, reference: Network, batch: PairBatch, *, seed: int, draws: Draws = Draws()
    ) -> ObjectiveOutput:
        check_batch(batch, self.method)
        batch, timesteps, noisy, noise = self._noised(policy, reference, batch, seed, draws)
        target = prediction_target(self.schedule, batch.latents, noise, timesteps)
        times = timesteps.to(noisy.device)
        policy_pred = policy(noisy, times, batch.conditioning)
        if not self.method.needs_reference:
            known = target
        elif batch.reference_pred is not None:
            known = batch.reference_pred.to(noisy)
        else:
            with torch.no_grad():
                known = reference(noisy, times, batch.conditioning)
        given = known if self.method.needs_reference else None
        weight = self.method.pair_weight(batch)
        result = self.method.loss(
            policy_pred, given, target, weight, mask=batch.mask, gather=self.gather, auto_beta=self.auto_beta
        )
        return ObjectiveOutput(**vars(result), timesteps=timesteps, noisy_latents=noisy, target=target,
                               policy_pred=policy_pred, reference_pred=known)  # fmt: skip

    @torch.no_grad()
    def store_draws(self, reference: Network, batch: PairBatch, *, seed: int, dtype: torch.dtype) -> PairBatch:
        """The batch with what may be stored of its draws, as ``dtype``, after which it needs no reference:
        ``reference_pred``, and where the reference makes them ``trajectory``, the noisy latents.
        """
        check_batch(batch, self.method)
        seen, timesteps, noisy, _ = self._noised(reference, reference, batch, seed)
        trajectory = None
        if self.method.policy_inverts:  # rounded before it is used, so that training sees what the reference saw
            trajectory = noisy.to(dtype)
            noisy = trajectory.to(noisy)
        prediction = reference(noisy, timesteps.to(noisy.device), seen.conditioning).to(dtype)
        return dataclasses.replace(
            batch, trajectory=trajectory, reference_pred=prediction, stored_draw=batch.sample_index
        )

    def _noised(
        self, policy: Network, reference: Network, batch: PairBatch, seed: int, draws: Draws = Draws()
    ) -> tuple[PairBatch, Tensor, Tensor, Tensor]:
        """The batch as the method sees it, timesteps ``(2B,)`` on the host, noisy latents and their noise."""
        if batch.stored_draw is None:  # what is stored is a chain, of another method
            batch = dataclasses.replace(batch, trajectory=None, reference_pred=None)
        else:
            batch = dataclasses.replace(batch, sample_index=batch.stored_draw)
        batch = self.method.prepare(batch, seed)
        drawn = draws.timesteps
        if drawn is None:
            drawn = self.method.timesteps.draw(self.schedule, seed, STREAM_TIMESTEP, batch.sample_index)
        timesteps = drawn.repeat(2)
        if batch.trajectory is not None:
            noisy = batch.trajectory.to(batch.latents)
            return batch, timesteps, noisy, recover_noise(self.schedule, noisy, batch.latents, timesteps)
        inverting = self.method.inverting_network(policy, reference)
        noisy, noise = self.method.trajectory(self.schedule, inverting, batch, timesteps, draws, seed)
        return batch, timesteps, noisy, noise
