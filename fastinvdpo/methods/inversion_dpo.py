"""Inversion-DPO: the method that scores a pair along a whole inverted chain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastinvdpo.diffusion.inversion import InversionSettings, ModelTime, inversion_steps, plan_grid
from fastinvdpo.diffusion.prompt import Conditioning, Network, Prompt, chunked, predict, weighted_sum
from fastinvdpo.diffusion.schedule import (
    FLOW,
    NoiseSchedule,
    predicted_clean_and_noise,
    prediction_target,
    recover_noise,
)
from fastinvdpo.errors import invalid
from fastinvdpo.methods.base import (
    STREAM_STRATUM,
    Draws,
    Method,
    Objective,
    ObjectiveOutput,
    PairBatch,
    check_batch,
    check_count,
)
from fastinvdpo.methods.streaming import LossTerms, ScoredTerms, StreamedLoss
from fastinvdpo.ops import philox, preference_loss


class _ScoringInputs(NamedTuple):
    """Latents ``(n, …)``, the network's timesteps int64 ``(n,)`` on the host, and targets ``(n, …)``."""

    noisy: Tensor
    times: Tensor
    target: Tensor | None


Variant = Literal["endpoint", "step", "distance", "distance-policy"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True, kw_only=True)
class InversionDPO(Method):
    """Inversion-DPO (arXiv 2507.11554): the policy is scored along a whole inverted chain, which is treated as data.

    Attributes:
        variant: ``"endpoint"`` scores against the noise that leads from ``x_0`` to each latent of the chain; ``"step"``
            against the noise that the inversion itself used to arrive there; ``"distance"`` and ``"distance-policy"``
            measure the distance between policy and reference at the inversion's own inputs, as the released code does
            (chain inverted by the reference) or as its derivation reads (by the policy). None: ``"endpoint"``, or
            ``"distance"`` with ``compat="released"``.
        num_inference_steps: N, levels of the chain.
        guidance_scale: of the inversion and of the predictions that are scored; 1 is none.
        timesteps_per_step: k levels of the chain that a pair is scored at in a step; None: all N.
        model_time: the level that the network gets in a step of the inversion: its ``"destination"``, or ``"source"``.
    """

    name = "inversion-dpo"
    whole_chain = True

    beta: float = 2000.0
    num_inference_steps: int = 80
    variant: Variant | None = None
    guidance_scale: float = 2.0
    timesteps_per_step: int | None = None
    model_time: ModelTime = "destination"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant is None:
            object.__setattr__(self, "variant", "distance" if self.compat else "endpoint")
        InversionSettings(model_time=self.model_time)
        check_count("num_inference_steps", self.num_inference_steps)
        if self.variant not in VARIANTS:
            raise invalid("variant", self.variant, "is not known", f"use one of {', '.join(VARIANTS)}")
        if self.compat and self.variant != "distance":
            remedy = "set variant to distance, or compat to null"
            raise invalid("variant", self.variant, "is not what the released code computes", remedy)
        if (k := self.timesteps_per_step) is not None:
            check_count("timesteps_per_step", k)
            if k > self.num_inference_steps:
                problem = f"exceeds num_inference_steps = {self.num_inference_steps}"
                raise invalid("timesteps_per_step", k, problem, "lower it, or set it to null to score every level")
        if not 0 <= self.guidance_scale < math.inf:
            remedy = "the published value is 2"
            raise invalid("guidance_scale", self.guidance_scale, "must be finite and not negative", remedy)

    def _objective(self, schedule: NoiseSchedule) -> ChainObjective:
        plan_grid(schedule, 1, self.num_inference_steps)  # fail now, not at the first batch
        if self.scores_distance and schedule.prediction_type == FLOW:
            problem = "weighs by 1/(2ᾱ) of a diffusion chain, which flow matching does not have"
            raise invalid("variant", self.variant, problem, "use variant 'endpoint' or 'step'")
        if self.scores_distance:
            warnings.warn(
                f"variant {self.variant!r} scores the squared distance between policy and reference. That distance "
                "does not distinguish a move towards the winners from the opposite move, its gradient is exactly zero "
                "while policy = reference, and its loss falls either way: the initial perturbation decides the "
                "direction of the result. Use it to compare with the released code, and variant 'endpoint' to align a "
                "model.",
                stacklevel=3,
            )
        return ChainObjective(schedule, self)

    @property
    def scores_distance(self) -> bool:
        return self.variant in ("distance", "distance-policy")

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1

    @property
    def zero_gradient_at_reference(self) -> bool:
        return self.scores_distance

    @property
    def reference_chain(self) -> dict[str, Any] | None:
        if self.variant == "distance-policy":
            return None
        names = ("name", "variant", "num_inference_steps", "guidance_scale", "model_time", "compat")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ChainObjective(Objective):
    """The loss of :class:`InversionDPO`."""

    method: InversionDPO

    @torch.no_grad()
    def reference_trajectory(
        self, reference: Network, latents: Tensor, conditioning: Conditioning, unconditional: Conditioning | None = None
    ) -> Tensor:
        """The chain of ``latents`` ``(n, …)`` as the objective needs it, in their dtype: ``(n, N, …)``; for ``step``
        ``(n, 2N, …)``, latents, then targets.
        """
        return self._invert(reference, latents, conditioning, unconditional)[0]

    @torch.no_grad()
    def _invert(
        self, network: Network, latents: Tensor, conditioning: Conditioning, unconditional: Conditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        """The chain, and the predictions at its latents where the inversion makes just these forward passes."""
        distance, with_targets = self.method.scores_distance, self.method.variant == "step"
        prompt = Prompt(conditioning, unconditional, self.method.guidance_scale)
        count = self.method.num_inference_steps
        plan = plan_grid(self.schedule, latents.shape[0], count)
        settings = InversionSettings(model_time=self.method.model_time)
        chain = latents.new_empty(len(latents), 2 * count if with_targets else count, *latents.shape[1:])
        visited = None if distance else chain[:, :count]
        predictions = torch.empty_like(chain) if distance else None
        walk = inversion_steps(network, self.schedule, latents, plan, prompt, settings, trajectory=visited)
        for position, step in enumerate(walk):
            if predictions is None and not with_targets:
                continue
            used = weighted_sum(step.outputs, step.weights)
            if predictions is not None:
                chain[:, position], predictions[:, position] = step.source, used
            else:
                source, level = plan.source[:, position], plan.target[:, position]
                clean, noise = predicted_clean_and_noise(self.schedule, step.source, used, source)
                chain[:, count + position] = prediction_target(self.schedule, clean, noise, level)
        return chain, predictions

    @torch.no_grad()
    def reference_predictions(
        self, reference: Network, chain: Tensor, conditioning: Conditioning, unconditional: Conditioning | None = None
    ) -> Tensor:
        """The (guided) predictions of the reference that the objective scores against, ``(n, N, …)``.

        Args:
            chain: what :meth:`reference_trajectory` gave, ``(n, N, …)`` or ``(n, 2N, …)``, in the networks' type.
        """
        prompt = Prompt(conditioning, unconditional, self.method.guidance_scale)
        times = self._levels_and_times()[1].to(chain.device)
        predictions = [predict(reference, chain[:, k], time.expand(len(chain)), prompt) for k, time in enumerate(times)]
        return torch.stack(predictions, dim=1)

    def __call__(
        self, policy: Network, reference: Network, batch: PairBatch, *, seed: int, draws: Draws = Draws()
    ) -> ObjectiveOutput:
        check_batch(batch, self.method)
        chain, stored = self._reference(policy, reference, batch)
        positions, weight = self._scored_positions(batch, seed)
        rows, k = torch.arange(2 * batch.pairs), positions.shape[1]
        rows, columns = rows.repeat_interleave(k), positions.repeat(2, 1).flatten()
        inputs = self._inputs(batch, chain, rows, columns)
        prompt = batch.prompt(self.method.guidance_scale).repeat_interleave(k)
        policy_pred = predict(policy, inputs.noisy, inputs.times.to(chain.device), prompt).unflatten(0, (-1, k))
        reference_pred = self._reference_pred(reference, stored, rows, columns, inputs, prompt).unflatten(0, (-1, k))
        noisy, target = inputs.noisy.unflatten(0, (-1, k)), inputs.target
        target = None if target is None else target.unflatten(0, (-1, k))
        result = preference_loss(
            policy_pred,
            reference_pred,
            target,
            mask=None if batch.mask is None else batch.mask.unsqueeze(1),
            timestep_weight=weight.to(noisy.device, torch.promote_types(noisy.dtype, torch.float32)),
            **self.method.preference,
        )
        return ObjectiveOutput(**vars(result), timesteps=inputs.times.view(-1, k), noisy_latents=noisy, target=target,
                               policy_pred=policy_pred, reference_pred=reference_pred)  # fmt: skip

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
        """See :meth:`Objective.stream`; memory does not depend on the number of timesteps."""
        check_batch(batch, self.method)
        if passes not in (1, 2):
            raise invalid("passes", passes, "is not known", "use 1 or 2")
        policy, reference = chunked(policy, max_batch), chunked(reference, max_batch)
        chain, stored = self._reference(policy, reference, batch)
        positions, weight = self._scored_positions(batch, seed)
        prompt, pairs = batch.prompt(self.method.guidance_scale), batch.pairs

        def score(rows: Tensor, columns: Tensor, reference_pred: Tensor | None) -> ScoredTerms:
            pair, n = rows % pairs, rows.numel()
            place, selected = positions[pair, columns], prompt.select(rows)
            inputs = self._inputs(batch, chain, rows, place)
            policy_pred = predict(policy, inputs.noisy, inputs.times.to(chain.device), selected)
            if reference_pred is None:
                reference_pred = self._reference_pred(reference, stored, rows, place, inputs, selected)
            # To the loss each term is a pair of its own: a winner whose loser stays where the reference is, so that
            # the loser's part is zero; terms of losers count with the opposite sign.
            signed = weight[pair, columns] * (1 - 2 * (rows // pairs))
            result = preference_loss(
                torch.cat([policy_pred, reference_pred]),
                torch.cat([reference_pred, reference_pred]),
                None if inputs.target is None else torch.cat([inputs.target, inputs.target]),
                mask=None if batch.mask is None else batch.mask[rows.to(batch.mask.device)],
                pair_weight=signed.to(chain.device, torch.promote_types(inputs.noisy.dtype, torch.float32)),
                **self.method.preference,
            )
            return ScoredTerms(result.margin, result.policy_mse[:n], result.reference_mse[:n], reference_pred)

        return StreamedLoss(
            score,
            pairs=pairs,
            timesteps=positions.shape[1],
            terms_per_call=None if max_batch is None else max(1, max_batch // len(prompt.weights)),
            passes=passes,
            parameters=parameters,
            **self.method.preference,
        )

    def _reference(self, policy: Network, reference: Network, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """The trajectories ``(2B, …)``, where the batch is, and the reference's predictions as far as they are known:
        from the cache if the batch has them, else from the inversion.
        """
        if batch.trajectory is not None:
            return batch.trajectory.to(batch.latents.device), batch.reference_pred
        of_reference = self.method.reference_chain is not None
        inverting = reference if of_reference else policy
        chain, predictions = self._invert(inverting, batch.latents, batch.conditioning, batch.unconditional)
        return chain, predictions if of_reference and batch.reference_pred is None else batch.reference_pred

    @torch.no_grad()
    def _reference_pred(
        self,
        reference: Network,
        stored: Tensor | None,
        rows: Tensor,
        positions: Tensor,
        inputs: _ScoringInputs,
        prompt: Prompt,
    ) -> Tensor:
        """The reference's predictions at ``inputs`` of samples ``rows``: of those that are ``stored``, if any are."""
        if stored is None:
            return predict(reference, inputs.noisy, inputs.times.to(inputs.noisy.device), prompt)
        return stored[rows.to(stored.device), positions.to(stored.device)].to(inputs.noisy)

    def _levels_and_times(self) -> tuple[Tensor, Tensor]:
        """The levels of the chain, and the timesteps that networks are scored with, int64 ``(N,)`` on the host."""
        plan = plan_grid(self.schedule, 1, self.method.num_inference_steps)
        from_source = self.method.scores_distance and self.method.model_time == "source"
        return plan.target[0], plan.source[0].clamp(min=0) if from_source else plan.target[0]

    def _inputs(self, batch: PairBatch, chain: Tensor, rows: Tensor, positions: Tensor) -> _ScoringInputs:
        """What samples ``rows`` are scored on at ``positions`` of the chain, both int64 ``(n,)`` on the host."""
        levels, times = (table[positions] for table in self._levels_and_times())
        rows, positions = rows.to(chain.device), positions.to(chain.device)
        noisy, target = chain[rows, positions].to(batch.latents.dtype), None
        if self.method.variant == "step":
            target = chain[rows, positions + self.method.num_inference_steps].to(noisy.dtype)
        elif not self.method.scores_distance:
            clean = batch.latents[rows]
            noise = recover_noise(self.schedule, noisy, clean, levels)
            target = prediction_target(self.schedule, clean, noise, levels)
        return _ScoringInputs(noisy, times, target)

    def _scored_positions(self, batch: PairBatch, seed: int) -> tuple[Tensor, Tensor]:
        """Positions ``(B, K)`` and the weights of their scores, float64 ``(B, K)``: a distance enters with the opposite
        sign (+β/2).
        """
        positions, weight = self._sample_positions(batch, seed)
        if self.method.scores_distance:
            weight = weight / (-2 * self.schedule.alpha_bar(self._levels_and_times()[0][positions]))
        return positions, weight

    def _sample_positions(self, batch: PairBatch, seed: int) -> tuple[Tensor, Tensor]:
        """Which positions of the chain each pair is scored at, int64 ``(B, K)``, and their weights, float64 ``(B, K)``.

        All N with weight 1/N, or one drawn from each of k equal strata of the chain, with weight 1/k: the sum over the
        drawn positions is an unbiased estimate of the mean over the chain, so margins are estimated without bias. The
        loss is not linear in the margin, and is biased: by about ``u''(z)·Var(ẑ)/2``, upwards for a convex utility, and
        its gradient by ``Cov(u'(ẑ), ∇ẑ)`` and the like. Both fall with k.
        """
        n, k, pairs = self.method.num_inference_steps, self.method.timesteps_per_step, batch.pairs
        if k is None or k == n:
            return torch.arange(n).expand(pairs, n), torch.full((pairs, n), 1 / n, dtype=torch.float64)
        draws = [philox.uniform(seed, STREAM_STRATUM + stratum, batch.sample_index) for stratum in range(k)]
        positions = ((torch.arange(k) + torch.stack(draws, dim=1)) * (n / k)).long().clamp(max=n - 1)
        return positions, torch.full((pairs, k), 1 / k, dtype=torch.float64)
