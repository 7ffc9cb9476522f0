"""What a training run calls every so many steps: samples of a prompt list, scored."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastinvdpo.data.digests import key_hash
from fastinvdpo.evaluation.metrics import win_rate
from fastinvdpo.evaluation.prompts import load_prompts
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.evaluation.scorers import Scorer, check_scorers, in_batches, open_scorers

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel
    from fastinvdpo.trainer.config import EvaluationSection


class Evaluator:
    """A :class:`fastinvdpo.trainer.evaluating.Evaluate` of some prompts and scorers, sampled as the section says."""

    def __init__(self, section: EvaluationSection, prompts: Sequence[str], scorers: Sequence[Scorer]) -> None:
        self._section, self._texts, self._scorers = section, list(prompts), check_scorers(scorers)
        self.settings: dict[str, Any] = {
            "prompts": key_hash({"prompts": self._texts}),
            "num_inference_steps": section.num_inference_steps,
            "guidance_scale": section.guidance_scale,
            "seed": section.seed,
            "scorers": {scorer.name: dict(getattr(scorer, "key", {})) for scorer in self._scorers},
        }

    @property
    def prompts(self) -> int:
        return len(self._texts)

    def __call__(self, model: DiffusionModel, network: nn.Module, places: Sequence[int]) -> dict[str, list[float]]:
        section = self._section
        scores: dict[str, list[float]] = {scorer.name: [] for scorer in self._scorers}
        for start in range(0, len(places), section.batch_size):
            chosen = places[start : start + section.batch_size]
            texts = [self._texts[place] for place in chosen]
            latents = sample(
                model,
                network,
                texts,
                num_inference_steps=section.num_inference_steps,
                guidance_scale=section.guidance_scale,
                seed=section.seed,
                batch_size=section.batch_size,
                places=chosen,
            )
            pictures = model.decode_latents(latents)
            for scorer in self._scorers:
                scores[scorer.name] += in_batches(scorer, pictures, texts).tolist()
        return scores

    def row(self, base: Mapping[str, Sequence[float]], scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Mean and win rate over the base for each scorer."""
        numbers: dict[str, float] = {}
        for name, found in scores.items():
            numbers |= {name: fmean(found), f"{name}_win_rate": win_rate(found, base[name]).mean}
        return numbers


def evaluator(section: EvaluationSection, scorers: Sequence[Scorer] | None = None) -> Evaluator:
    """What the section describes, its prompts and scorers loaded; ``scorers`` take the place of the section's.

    Raises:
        InvalidInput: prompts or scorers that cannot be loaded.
    """
    prompts = load_prompts(section.prompts, column=section.column, limit=section.samples)
    # Each process of a run has a GPU of its own.
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return Evaluator(section, prompts, open_scorers(section.scorers, device=device) if scorers is None else scorers)
