"""The demo: pairs of real digits, training through the ordinary trainer, before and after in numbers and images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastinvdpo._examples.digits import base as base_models
from fastinvdpo._examples.digits import digits
from fastinvdpo._examples.digits.judge import Judge, Verdict
from fastinvdpo._examples.digits.pictures import print_table, save_curves, save_grid
from fastinvdpo.data import write_pairs
from fastinvdpo.errors import invalid
from fastinvdpo.evaluation.metrics import Interval, win_rate
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.methods import METHODS as METHOD_TABLE
from fastinvdpo.methods import DiffusionDPO, InPO, InversionDPO, SmPO
from fastinvdpo.models import load_model
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import TrainConfig, load_config, to_yaml, train
from fastinvdpo.trainer.opening import open_output

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastinvdpo.trainer import TrainResult

METHODS = {method.name: method for method in (DiffusionDPO, InPO, SmPO, InversionDPO)}
"""Those that the recipes were found for: the others mean something else by β."""
CONTROLS = ("shuffle",)
WRITTEN = ("pairs.parquet", "config.yaml", "before_after.png", "curves.png", "summary.json")
CHAIN = {"num_inference_steps": 10, "guidance_scale": 1.0, "timesteps_per_step": 1}
"""Options of Inversion-DPO on digits."""
PAIRS, BATCH_SIZE = 2000, 32
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

    Returns:
        The summary, as written to ``summary.json`` beside ``pairs.parquet``, ``config.yaml``, ``before_after.png``,
        ``curves.png`` and ``training/``. ``seconds`` is the wall time of the whole demo.

    Raises:
        InvalidInput: an argument is not one of those above.
        MissingExtra: a package of the ``train`` extra is missing.
    """
    check_arguments(method, preference, steps, control)
    name = "-".join([method, preference, str(seed), *([control] if control else [])])
    threads = torch.get_num_threads()
    # Two take 87 s instead of 120 on two idle cores, but 450 beside another job: they wait for each other.
    torch.set_num_threads(1)
    try:
        with OutputDirectory(Path("runs") / "demo" / name if output is None else output) as place:
            place.claim(*WRITTEN, *(["base"] if train_base else []))
            return _run(place, method, preference, seed, steps, control, train_base, progress)
    finally:
        torch.set_num_threads(threads)


def _run(
    output: OutputDirectory,
    method: str,
    preference: str,
    seed: int,
    steps: int | None,
    control: str | None,
    train_base: bool,
    progress: bool,
) -> dict[str, Any]:
    began, directory, recipe = time.perf_counter(), output.path, RECIPES[preference]
    base = directory / "base" if train_base else base_models.WEIGHTS / recipe.base
    train_set, held_out = digits.load_splits()
    rows = digits.make_pairs(train_set, preference, PAIRS, seed, shuffle=control == "shuffle")
    config = build_config(method, preference, seed, steps, directory, base, digits.score_range(rows))
    with open_output(config) as earlier:
        # A summary of an earlier demo must not stand beside a training that did not end.
        output.remove("summary.json")
        if (directory / "training" / "cache").exists():
            with OutputDirectory(directory / "training" / "cache") as cache:
                cache.remove()
        earlier.remove()
    if train_base:
        _train_base(recipe.base, output, progress)
    with output.file("pairs.parquet") as partial:
        write_pairs(partial, rows)
    output.write("config.yaml", to_yaml(config))
    # From the file, so that `fastinvdpo train config.yaml` is the very same run.
    result = train(load_config(directory / "config.yaml"), resume="never", progress=progress)

    judge = Judge()
    images = [draw_images(path, held_out.prompts, seed) for path in (base, result.model_directory)]
    before, after = (judge.judge(preference, as_array(one), held_out.labels) for one in images)
    rate = win_rate(after.rewards, before.rewards)
    title = f"{method}, preference {preference}, seed {seed}" + (f", control {control}" if control else "")
    _save_pictures(output, title, held_out, images, (before, after), result)
    summary = {
        "method": method,
        "preference": preference,
        "seed": seed,
        "control": control,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "win_rate": rate._asdict(),
        "network_evaluations": result.network_evaluations,
        "seconds": time.perf_counter() - began,
        "seconds_training": result.seconds,
        "steps": result.steps,
        "classifier_accuracy": judge.held_out_accuracy,
        "status": "ok",
    }
    output.write("summary.json", summary)
    if progress:
        _print_summary(title, before, after, rate, summary, directory)
    return summary


def check_arguments(method: str, preference: str, steps: int | None, control: str | None) -> None:
    """Raise InvalidInput for anything the demo does not know, before any work is done."""
    if method not in METHODS:
        raise invalid("method", method, "is not known", f"choose one of {', '.join(METHODS)}")
    digits.check_preference(preference)
    if steps is not None and steps < 1:
        raise invalid("steps", steps, "must be positive", "leave it out for the recipe's own number")
    if control is not None and control not in CONTROLS:
        raise invalid("control", control, "is not known", f"choose {', '.join(CONTROLS)}, or leave it out")


def build_config(
    method: str, preference: str, seed: int, steps: int | None, directory: Path, base: Path, score_range: float
) -> TrainConfig:
    """The training configuration of a demo run: 32 pairs a step, AdamW without weight decay, 20 warm-up steps."""
    recipe, chosen = RECIPES[preference], METHODS[method]
    options: dict[str, Any] = {"beta": recipe.inverting_beta if chosen.policy_inverts else recipe.beta}
    if chosen.needs_scores:
        options |= {"score_range": score_range, "preference_scale": _smpo_scale(preference)}
    if chosen.whole_chain:
        options |= CHAIN
    steps = recipe.steps if steps is None else steps
    settings = run_settings(method, options, base, directory, recipe.learning_rate, steps, seed)
    settings["cache"] = {"path": str(directory / "training" / "cache") if chosen.whole_chain else None}
    settings["output"]["log_every"] = 5
    return TrainConfig.from_mapping(settings)


def run_settings(
    method: str, options: Mapping[str, Any], base: Path, directory: Path, learning_rate: float, steps: int, seed: int
) -> dict[str, Any]:
    """The sections of a configuration that trains on ``directory/pairs.parquet`` into ``directory/training``."""
    return {
        "method": {"name": method, **options},
        "model": {"family": "digits", "path": str(base)},
        "data": {"path": str(directory / "pairs.parquet"), "relabel_by_score": METHOD_TABLE[method].needs_scores},
        "optimizer": {
            "learning_rate": learning_rate,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "warmup_steps": min(20, steps),
        },
        "training": {"steps": steps, "batch_size": BATCH_SIZE, "seed": seed},
        "output": {"directory": str(directory / "training"), "checkpoint_every": steps, "keep_checkpoints": 1},
    }


def _smpo_scale(preference: str) -> float:
    """SmPO's λ: the published 10 for graded scores.

    Under ``digit`` every pair differs by the whole range of the scores and would weigh 4.6 times what it weighs in the
    other methods: there, the λ that makes it 1.
    """
    return 1 / (2 / (1 + math.exp(-1)) - 1) if preference == "digit" else 10.0


def draw_images(model_path: str | Path, prompts: list[str], seed: int) -> list[Image]:
    """One image per prompt from the digits model in a directory; equal seeds start from equal noise."""
    model = load_model("digits", model_path)
    latents = sample(
        model, model.network, prompts, num_inference_steps=NUM_INFERENCE_STEPS, guidance_scale=1.0, seed=seed
    )
    return model.decode_latents(latents)


def as_array(images: list[Image]) -> np.ndarray:
    """Gray images as uint8 ``(n, 8, 8)``."""
    return np.stack([np.asarray(image) for image in images])


def _train_base(name: str, output: OutputDirectory, progress: bool) -> None:
    def report(step: int, loss: float) -> None:
        if progress:
            print(f"base model, step {step}: loss {loss:.4f}", flush=True)

    with output.directory("base") as partial:
        base_models.train_base(name, partial, report=report)


def _save_pictures(
    output: OutputDirectory,
    title: str,
    held_out: digits.Digits,
    images: list[list[Image]],
    verdicts: tuple[Verdict, Verdict],
    result: TrainResult,
) -> None:
    # Three of each digit, so that a column shows one digit.
    places = [int(np.flatnonzero(held_out.labels == digit)[turn]) for turn in range(3) for digit in range(10)]
    shown = [[one[place] for place in places] for one in images]
    captions = [digits.NAMES[held_out.labels[place]] for place in places]
    with output.file("before_after.png") as partial:
        save_grid(partial, shown[0], shown[1], captions, title=title)
    rewards = (verdicts[0].rewards.tolist(), verdicts[1].rewards.tolist())
    with output.file("curves.png") as partial:
        save_curves(partial, result.history, rewards, title=title)


def _print_summary(
    title: str, before: Verdict, after: Verdict, rate: Interval, summary: dict[str, Any], directory: Path
) -> None:
    rows = [
        ["mean reward", f"{before.rewards.mean():.4f}", f"{after.rewards.mean():.4f}"],
        ["win rate over the base", "0.500", f"{rate.mean:.3f} [{rate.ci_low:.3f}, {rate.ci_high:.3f}]"],
        ["accuracy of the prompted digit", f"{before.accuracy:.3f}", f"{after.accuracy:.3f}"],
        ["Fréchet distance to real scans", f"{before.frechet:.3f}", f"{after.frechet:.3f}"],
        ["network evaluations", "", f"{summary['network_evaluations']:,}"],
        ["wall time, training", "", f"{summary['seconds_training']:.0f} s"],
        ["wall time, everything", "", f"{summary['seconds']:.0f} s"],
    ]
    print_table(title, ["", "before", "after (95 % interval)"], rows)
    print(f"{len(before.rewards)} samples each, same prompts and noise. Pictures, curves and numbers: {directory}")
