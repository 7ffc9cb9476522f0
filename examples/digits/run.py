"""The demo on digits: an 8x8 model of scikit-learn's scans, and what is preferred among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastinvdpo._examples import demonstration
from fastinvdpo._examples.demonstration import (
    SURE_SCALE,
    Demo,
    Run,
    Verdict,
    as_array,
    run_settings,
)
from fastinvdpo._examples.digits import base as base_models
from fastinvdpo._examples.digits import digits
from fastinvdpo._examples.digits.judge import Judge
from fastinvdpo._examples.pairs import score_range
from fastinvdpo.methods import DiffusionDPO, InPO, InversionDPO, SmPO
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import TrainConfig

if TYPE_CHECKING:
    from PIL.Image import Image

METHODS = {method.name: method for method in (DiffusionDPO, InPO, SmPO, InversionDPO)}
"""Those that the recipes were found for: the others mean something else by β."""
CHAIN = {"num_inference_steps": 10, "guidance_scale": 1.0, "timesteps_per_step": 1}
"""Options of Inversion-DPO on digits."""
PAIRS = 2000
NUM_INFERENCE_STEPS = 25


@dataclass(frozen=True)
class Recipe:
    """What depends on the preference: the base model, and how strongly it is trained.

    ``inverting_beta`` is the β of the methods whose policy inverts its own training latents (InPO, SmPO), where it is
    another one: with a weak tie to the reference, latents and policy drift together and the digits fade.
    """

    base: str
    beta: float
    learning_rate: float
    steps: int
    inverting_beta: float


RECIPES = {
    "slant": Recipe("clean", beta=1000.0, learning_rate=2e-5, steps=200, inverting_beta=1000.0),
    "bold": Recipe("clean", beta=1000.0, learning_rate=1e-5, steps=100, inverting_beta=1000.0),
    "digit": Recipe("noisy", beta=200.0, learning_rate=2e-5, steps=300, inverting_beta=500.0),
}


class DigitsDemo(Demo):
    """The demo on digits; ``train_base``: train the base model again first."""

    methods = tuple(METHODS)
    preferences = digits.PREFERENCES
    measures: ClassVar = {"accuracy": "accuracy of the prompted digit", "frechet": "Fréchet distance to real scans"}
    columns = 10

    def __init__(self, train_base: bool = False) -> None:
        self.train_set, self.held_out = digits.load_splits()
        self.prompts = self.held_out.prompts
        labels = self.held_out.labels
        # Three of each digit, so that a column shows one digit.
        self.shown = {
            int(np.flatnonzero(labels == digit)[turn]): digits.NAMES[digit] for turn in range(3) for digit in range(10)
        }
        self.claimed = ("base",) if train_base else ()

    def base(self, preference: str, directory: Path) -> Path:
        return directory / "base" if self.claimed else base_models.WEIGHTS / RECIPES[preference].base

    def rows(self, run: Run) -> list[dict]:
        return digits.make_pairs(self.train_set, run.preference, PAIRS, run.seed, shuffle=run.control == "shuffle")

    def config(self, run: Run, directory: Path, rows: Sequence[dict]) -> TrainConfig:
        base = self.base(run.preference, directory)
        return build_config(run.method, run.preference, run.seed, run.steps, directory, base, score_range(rows))

    def draw(self, model: Path, seed: int) -> list[Image]:
        return draw_images(model, self.prompts, seed)

    def judge(self, preference: str, images: Sequence[list[Image]]) -> tuple[float, list[Verdict]]:
        judge = Judge()
        verdicts: list[Verdict] = [judge.judge(preference, as_array(one), self.held_out.labels) for one in images]
        return judge.held_out_accuracy, verdicts

    def prepare(self, run: Run, output: OutputDirectory, progress: bool) -> None:
        def report(step: int, loss: float) -> None:
            if progress:
                print(f"base model, step {step}: loss {loss:.4f}", flush=True)

        if self.claimed:
            with output.directory("base") as partial:
                base_models.train_base(RECIPES[run.preference].base, partial, report=report)


def run_demo(
    *,
    method: str = "inversion-dpo",
    preference: str = "slant",
    seed: int = 0,
    steps: int | None = None,
    output: str | Path | None = None,
    control: str | None = None,
    train_base: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Align a small diffusion model of handwritten digits to a preference and say what that changed.

    Args:
        method: a name in :data:`METHODS`.
        preference: ``slant`` (leaning to the right wins), ``bold`` (more ink wins) or ``digit`` (the prompted digit
            wins; starts from a base model that saw wrong captions).
        seed: of the pairs, of training and of sampling.
        steps: optimizer steps; the recipe of the preference when None.
        output: directory to write; ``runs/demo/METHOD-PREFERENCE-SEED`` when None. An earlier demo there is replaced.
        control: ``"shuffle"`` makes winners and losers random: nothing should be learned.
        train_base: train the base model again first (5 to 8 minutes on one core) instead of using the shipped one.
        progress: show a progress bar, and print the table at the end.

    Returns and raises what :func:`fastinvdpo._examples.demonstration.run_demo` does.
    """
    run = Run(method, preference, seed, steps, control)
    return demonstration.run_demo(DigitsDemo(train_base), run, output=output, progress=progress)


def build_config(
    method: str, preference: str, seed: int, steps: int | None, directory: Path, base: Path, score_range: float
) -> TrainConfig:
    """The training configuration of a demo run: 32 pairs a step, AdamW without weight decay, 20 warm-up steps."""
    recipe, chosen = RECIPES[preference], METHODS[method]
    options: dict[str, Any] = {"beta": recipe.inverting_beta if chosen.policy_inverts else recipe.beta}
    if chosen.needs_scores:
        options |= {"score_range": score_range, "preference_scale": SURE_SCALE if preference == "digit" else 10.0}
    if chosen.whole_chain:
        options |= CHAIN
    run = Run(method, preference, seed, recipe.steps if steps is None else steps)
    model = {"family": "digits", "path": str(base)}
    return TrainConfig.from_mapping(run_settings(run, options, model, directory, recipe.learning_rate))


def draw_images(model_path: str | Path, prompts: list[str], seed: int) -> list[Image]:
    """One image per prompt from the digits model in a directory; equal seeds start from equal noise."""
    steps = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": 1.0}
    return demonstration.draw_images("digits", model_path, prompts, seed, **steps)
