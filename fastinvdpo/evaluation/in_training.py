"""Evaluation in the course of a run: scores of samples every so many steps, and the best model kept beside the last.

It changes nothing of the training: samples come from noise of their own, and the generators are put back afterwards.
Layout, in the output directory::

    evaluation/base.json       settings, scores of the policy before its first step, and all rows; what a resume reads
    evaluation/history.jsonl   a row for each evaluation
    best/                      model/, with LoRA adapter/, each with its card, and best.json: the step it is of
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import nn

from fastinvdpo.atomic import atomic_directory, atomic_file, make_directory
from fastinvdpo.config.sections import EvaluationSection
from fastinvdpo.errors import invalid
from fastinvdpo.evaluation.metrics import win_rate
from fastinvdpo.evaluation.page import grid, scores_figure
from fastinvdpo.evaluation.prompts import digest_of, load_prompts, load_sources
from fastinvdpo.evaluation.sampling import check_sampling, sample_images
from fastinvdpo.evaluation.scorers import Scorer, check_scorers, in_batches, mean_of_frames, open_scorers
from fastinvdpo.io import key_hash, plain, sealed, unsealed
from fastinvdpo.models import DiffusionModel
from fastinvdpo.trainer.callbacks import Callback, Run, TrainResult
from fastinvdpo.trainer.opening import EVALUATION_FILES
from fastinvdpo.trainer.state import random_state, set_random_state

Scores = dict[str, list[float]]
_SHOWN = 16  # samples in a tracker's image


class EvaluationCallback(Callback):
    """Samples the section's prompts, scores the images, and keeps the best model.

    Args:
        section: ``evaluation`` of the configuration; its prompts are loaded here.
        scorers: instead of those that the section names; higher is better, the first one decides what is best.

    Attributes:
        rows: the evaluations so far, the first of them the base, at step 0; empty on all processes but the first.
        settings: what the scores depend on besides the network, as plain types.

    Raises:
        InvalidInput: prompts or scorers that cannot be loaded.
    """

    def __init__(self, section: EvaluationSection, scorers: Sequence[Scorer] | None = None) -> None:
        # Each process of a run has a GPU of its own.
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        self.section, self.rows = section, list[dict[str, Any]]()
        self._texts = load_prompts(section.prompts, column=section.column, limit=section.samples)
        self._scorers = check_scorers(open_scorers(section.scorers, device=device) if scorers is None else scorers)
        kept = {name: getattr(section, name) for name in ("num_inference_steps", "guidance_scale", "seed")}
        keys = {scorer.name: dict(getattr(scorer, "key", {})) for scorer in self._scorers}
        self.settings = plain({"prompts": key_hash({"prompts": self._texts}), **kept, "scorers": keys})
        self._base: Scores = {}
        self._shown: list[Image.Image] = []
        self._sources: Sequence[Image.Image] | None = None

    def on_init(self, trainer: Run) -> None:
        if str(trainer.accelerator.distributed_type.value) == "FSDP":
            remedy = "set it to null and use fastinvdpo evaluate, or launch without FSDP"
            raise invalid("evaluation", self.section.prompts, "is not supported with FSDP", remedy)
        if self.section.guidance_scale is None:
            self.section = self.section.model_copy(update={"guidance_scale": trainer.model.own_guidance})
            self.settings["guidance_scale"] = self.section.guidance_scale
        check_sampling(trainer.model, self.section.num_inference_steps, self.section.guidance_scale)
        if trainer.model.edits:
            self._sources = load_sources(self.section.prompts, limit=self.section.samples)
            self.settings["sources"] = digest_of(self._sources)
        self._folder, self._best = trainer.directory / "evaluation", trainer.directory / "best"

    def on_start(self, trainer: Run) -> None:
        """Score the policy before its first step, or take over what an earlier attempt of the run has found."""
        from accelerate.utils import broadcast_object_list

        main, output = trainer.accelerator.is_main_process, trainer.output
        if output is not None:
            output.claim(*(["best"] if self.section.keep_best else []), files=EVALUATION_FILES)
        stored = self._read(trainer) if main else None
        missing = [main and stored is None]
        broadcast_object_list(missing)
        if missing[0]:
            with _undisturbed():
                scores = self._shared_scores(trainer)
            if output is not None:
                make_directory(self._folder)
                output.remove("best")
                stored = {"settings": self.settings, "scores": scores, "rows": []}
        if stored is None:  # on the other processes
            return
        self._base = stored["scores"]
        self.rows = [row for row in stored["rows"] if row["step"] <= trainer.first_step]
        if not self.rows:
            self._add(trainer, 0, self._base)

    def on_step(self, trainer: Run, step: int) -> None:
        if step % self.section.every and step != trainer.config.training.steps:
            return
        trainer.check_finite(step)
        ema = trainer.state.ema
        with _undisturbed():
            with nullcontext() if ema is None else ema.applied():
                scores = self._shared_scores(trainer)
            if trainer.accelerator.is_main_process:
                self._add(trainer, step, scores)
                if self.section.keep_best:
                    self._keep(trainer, step)
            trainer.accelerator.wait_for_everyone()

    def on_end(self, trainer: Run, result: TrainResult) -> None:
        result.evaluation = self.rows
        result.best_model_directory = self._best / "model" if (self._best / "best.json").is_file() else None

    def card(self, step: int) -> list[str]:
        """The scores of the base and of the model after ``step``, where both are there."""
        found, of = {row["step"]: row for row in self.rows}, self.section
        if not {0, step} <= found.keys():
            return []
        rows = [f"| {name} | {found[0][name]:.6g} | {value:.6g} |" for name, value in found[step].items()]
        settings = f"{of.num_inference_steps} steps with guidance {of.guidance_scale:g} and seed {of.seed}."
        told = f"Up to {of.samples} prompts of `{of.prompts}`, sampled by both models from the same noise in {settings}"
        table = ["| | base | this model |\n|---|---|---|", *rows[1:]]  # the first is the step
        return ["\n".join([f"## Evaluation\n\n{told}\n", *table])]

    def scores(self, model: DiffusionModel, network: nn.Module, places: Sequence[int]) -> Scores:
        """Scores, by scorer, of the prompts at ``places`` of the list, in their order."""
        section = self.section
        found: Scores = {scorer.name: [] for scorer in self._scorers}
        self._shown = []
        for start in range(0, len(places), section.batch_size):
            chosen = places[start : start + section.batch_size]
            texts = [self._texts[place] for place in chosen]
            seen = None if self._sources is None else [self._sources[place] for place in chosen]
            images = sample_images(model, network, texts, chosen, section, seen)
            self._shown += images[:: model.frames][: _SHOWN - len(self._shown)]
            told = [text for text in texts for _ in range(model.frames)]
            for scorer in self._scorers:
                found[scorer.name] += mean_of_frames(in_batches(scorer, images, told).tolist(), model.frames)
        return found

    def _shared_scores(self, trainer: Run) -> Scores:
        """Those of all prompts, which the processes share out; whole on the first."""
        from accelerate.utils import gather_object

        several, own = trainer.accelerator.num_processes, trainer.accelerator.process_index
        places = range(own, len(self._texts), several)
        parts = gather_object([self.scores(trainer.model, trainer.state.networks.policy_module, places)])
        found = {scorer.name: [0.0] * len(self._texts) for scorer in self._scorers}
        for process, part in enumerate(parts):
            for name, scores in part.items():
                found[name][process::several] = scores
        return found

    def _row(self, step: int, scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Mean, and win rate over the base, for each scorer."""
        numbers: dict[str, Any] = {"step": step}
        for name, found in scores.items():
            numbers |= {name: fmean(found), f"{name}_win_rate": win_rate(found, self._base[name]).mean}
        return numbers

    def _read(self, trainer: Run) -> dict[str, Any] | None:
        """What an earlier attempt found for the same settings; a run from its first step is another run."""
        file = self._folder / "base.json"
        if trainer.first_step == 0 or not file.is_file():
            return None
        try:
            stored = unsealed(file)
        except (OSError, ValueError) as error:
            remedy = "restore it, or delete it: the evaluation then starts over, and the best model with it"
            raise invalid("evaluation", str(file), f"cannot be read ({error})", remedy) from None
        if stored["settings"] == self.settings and "rows" in stored:
            return stored
        trainer.say("The evaluation is another one than before: its rows and the best model start over.")
        return None

    def _add(self, trainer: Run, step: int, scores: Scores) -> None:
        row = self._row(step, scores)
        self.rows.append(row)
        stored = {"settings": self.settings, "scores": self._base, "rows": self.rows}
        history = "".join(json.dumps(row) + "\n" for row in self.rows)
        for name, text in {"base.json": json.dumps(sealed(stored), indent=2) + "\n", "history.jsonl": history}.items():
            with atomic_file(self._folder / name) as partial:
                partial.write_text(text)
        trainer.reporting.scalars("evaluation", row)
        trainer.reporting.images("evaluation", lambda: self._images(scores), step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
        trainer.say(f"Evaluation after step {step}: {shown}.")

    def _images(self, scores: Scores) -> dict[str, Image.Image]:
        """For trackers: the first samples, and for each scorer the scores beside the base's."""
        images = {"samples": grid(self._shown)}
        for name, found in scores.items():
            png = scores_figure((self._base[name], found), name, ("base", "now"))
            images[f"{name}_histogram"] = Image.open(io.BytesIO(png)).convert("RGB")
        return images

    def _keep(self, trainer: Run, step: int) -> None:
        scorer = next(iter(self._base))
        *before, mean = [row[scorer] for row in self.rows if row["step"] > 0]
        if (self._best / "best.json").is_file() and mean <= max(before, default=-math.inf):
            return
        assert trainer.output is not None
        plain = _plain_forward(trainer.state.networks.policy_module)
        with trainer.output.directory("best") as temporary, plain:
            trainer.export(lambda name: atomic_directory(temporary / name), step)
            row = {"step": step, "scorer": scorer, "mean": mean}
            (temporary / "best.json").write_text(json.dumps(row, indent=2) + "\n")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Scorers and what they call may use random numbers; the training must not notice."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


@contextmanager
def _plain_forward(network: nn.Module) -> Iterator[None]:
    """Inside, ``network`` is without accelerate's autocast around its forward, which cannot be copied."""
    wrapped: dict[str, Any] = {
        name: network.__dict__.pop(name) for name in ("forward", "_original_forward") if name in network.__dict__
    }
    try:
        yield
    finally:
        network.__dict__.update(wrapped)
