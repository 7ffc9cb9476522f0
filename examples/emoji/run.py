"""The demo: a small Stable Diffusion, aligned to what is preferred among two designers' drawings of emoji.

``fastinvdpo demo`` runs it. Pairs go into a parquet file, a configuration beside it, and the ordinary trainer trains on
them; samples before and after start from the same noise, and judges that saw real drawings alone compare them.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastinvdpo import methods
from fastinvdpo._examples.emoji import judge as judging
from fastinvdpo._examples.emoji.data import IMAGES, PREFERENCES, load_emoji, make_pairs, split
from fastinvdpo._examples.emoji.judge import Judge, Verdict
from fastinvdpo._examples.emoji.pictures import print_table, save_curves, save_grid
from fastinvdpo.data import write_pairs
from fastinvdpo.errors import invalid
from fastinvdpo.evaluation.metrics import win_rate
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.models import load_model
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import TrainConfig, load_config, to_yaml, train
from fastinvdpo.trainer.opening import open_output

if TYPE_CHECKING:
    from PIL.Image import Image

BASE = Path(__file__).with_name("base")
WRITTEN = ("pairs.parquet", "config.yaml", "before_after.png", "curves.png", "summary.json")
# Not those that need to know what noise an image was generated from: drawings have none.
METHODS = {name: method for name, method in methods.METHODS.items() if not method.needs_noise}
MEASURES = {
    "reward": "mean reward",
    "top1": "prompted emoji is the nearest",
    "top5": "prompted emoji among five nearest",
    "noto": "drawn by Noto's designer",
    "saturation": "saturation",
    "frechet": "Fréchet distance to real emoji",
}
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 25, 3.0
STEPS, BATCH_SIZE = 200, 32
COLUMNS = 8
SURE_SCALE = 1 / (2 / (1 + math.exp(-1)) - 1)
"""SmPO's λ where every pair differs by the whole range of the scores: a pair then weighs 1, as in the other methods.

At the published λ = 10, which is for graded scores, it would weigh 4.6.
"""


@dataclass(frozen=True)
class Recipe:
    """A method's learning rate, its β, None for its own, and its other options where they are not the published ones.

    AdamW divides by the size of the gradient, so that one learning rate serves most: β says where the pull ends.
    """

    beta: float | None = 1000.0
    options: Mapping[str, Any] | None = None
    learning_rate: float = 2e-5


RECIPES = {name: Recipe() for name in METHODS} | {
    "diffusion-dpo": Recipe(learning_rate=5e-5),
    "inversion-dpo": Recipe(options={"num_inference_steps": 10, "guidance_scale": 1.0, "timesteps_per_step": 1}),
    "dspo": Recipe(options={"variant": "sdxl"}),  # sd15 at its published β is fine-tuning on winners
    "poly-dpo": Recipe(options={"alpha": 1.0}),  # the published 8 is for labels as noisy as Pick-a-Pic's
    "snpo": Recipe(beta=500.0),  # without the ½ of the others
    "kto": Recipe(beta=500.0),  # likewise
    "mapo": Recipe(beta=None),  # weighs the margin's term, and is the published one
}


@dataclass(frozen=True)
class Run:
    """What the demo is called with; ``steps`` None: STEPS. Raises ``InvalidInput`` for anything that it does not know.

    ``control`` ``"shuffle"`` makes winners and losers random: nothing should be learned.
    """

    method: str = "diffusion-dpo"
    preference: str = "noto"
    seed: int = 0
    steps: int | None = None
    control: str | None = None

    def __post_init__(self) -> None:
        known = {"method": tuple(METHODS), "preference": PREFERENCES, "control": ("shuffle",)}
        for name, choices in known.items():
            value = getattr(self, name)
            if value not in choices and not (name == "control" and value is None):
                raise invalid(name, value, "is not known", f"choose one of {', '.join(choices)}")
        if self.steps is not None and self.steps < 1:
            raise invalid("steps", self.steps, "must be positive", f"leave it out for {STEPS}")

    @property
    def title(self) -> str:
        control = f", control {self.control}" if self.control else ""
        return f"{self.method}, preference {self.preference}, seed {self.seed}{control}"

    @property
    def name(self) -> str:
        return "-".join([self.method, self.preference, str(self.seed), *([self.control] if self.control else [])])


class EmojiDemo:
    """The base model in a directory, what it is trained on and what is sampled from it.

    Attributes:
        base: the directory.
        prompts: the 300 held-out names.
        shown: places of the prompts in the image, three rows of COLUMNS.

    Raises ``InvalidInput`` where images, judges or the base model are missing.
    """

    def __init__(self, base: str | Path | None = None) -> None:
        self.base = BASE if base is None else Path(base)
        for file in (IMAGES, judging.WEIGHTS):
            if not file.is_file():
                remedy = "run the demo in a checkout of the repository, which has what the installed package leaves out"
                raise invalid(file.stem, str(file), "is missing", remedy)
        if not (self.base / "model_index.json").is_file():
            remedy = "train one with python -m fastinvdpo._examples.emoji.train_base, or name another directory"
            if base is None:
                remedy = f"run the demo in a checkout of the repository, which has one, or {remedy}"
            raise invalid("base", str(self.base), "holds no pipeline", remedy)
        self.emoji, (train, held_out) = load_emoji(), split()
        self.train_set, self.held_out = self.emoji.take(train), self.emoji.take(held_out)
        self.prompts = self.held_out.names
        # The first of each category.
        categories = [name for name in dict.fromkeys(self.emoji.categories) if name != "Component"]
        places = [np.flatnonzero(np.array(self.held_out.categories) == name)[:3] for name in categories]
        self.shown = [int(place) for place in np.concatenate(places)[: 3 * COLUMNS]]

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self.emoji)

    def rows(self, run: Run) -> list[dict]:
        """The pairs of a run, as :func:`fastinvdpo.data.write_pairs` takes them."""
        return make_pairs(self.train_set, run.preference, run.seed, shuffle=run.control == "shuffle")

    def config(
        self, run: Run, directory: Path, rows: Sequence[dict], learning_rate: float | None = None
    ) -> TrainConfig:
        """The configuration of a run on ``directory/pairs.parquet``, which holds ``rows``, into ``directory/training``.

        32 pairs a step, AdamW without weight decay, 20 warm-up steps.
        """
        method, recipe, steps = METHODS[run.method], RECIPES[run.method], run.steps or STEPS
        options: dict[str, Any] = {**(recipe.options or {}), **({} if recipe.beta is None else {"beta": recipe.beta})}
        if method.needs_scores:
            scores = [row[key] for row in rows for key in ("score_0", "score_1")]
            scale = 10.0 if run.preference == "vivid" else SURE_SCALE
            options |= {"score_range": max(scores) - min(scores), "preference_scale": scale}
        training = directory / "training"
        optimizer = {"learning_rate": learning_rate or recipe.learning_rate, "weight_decay": 0.0, "max_grad_norm": 1.0}
        return TrainConfig.from_mapping(
            {
                "method": {"name": run.method, **options},
                "model": {"family": "stable-diffusion", "path": str(self.base)},
                "data": {
                    "path": str(directory / "pairs.parquet"),
                    "form": "pairs",
                    "relabel_by_score": method.needs_scores,
                },
                "cache": {"path": str(training / "cache") if method.whole_chain else None},
                "optimizer": {**optimizer, "warmup_steps": min(20, steps)},
                "training": {"steps": steps, "batch_size": BATCH_SIZE, "seed": run.seed},
                "output": {
                    "directory": str(training),
                    "checkpoint_every": steps,
                    "keep_checkpoints": 1,
                    "log_every": 5,
                },
            }
        )

    def sample(self, model: Path, seed: int) -> list[Image]:
        """One image per prompt; equal seeds start from equal noise."""
        loaded = load_model("stable-diffusion", model)
        options: dict[str, Any] = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE}
        return loaded.decode_latents(sample(loaded, loaded.network, self.prompts, seed=seed, **options))

    def verdict(self, preference: str, images: Sequence[Image]) -> Verdict:
        """The judge's, on one image per prompt."""
        return self.judge.judge(preference, np.stack([np.asarray(image) for image in images]), self.prompts)


def run_demo(
    run: Run, *, base: str | Path | None = None, output: str | Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Align a small Stable Diffusion to a preference and say what that changed.

    Args:
        base: directory of the model to start from; the shipped one when None.
        output: directory to write; ``runs/demo/METHOD-PREFERENCE-SEED`` when None. An earlier demo there is replaced.
        progress: show a progress bar, and print the table at the end.

    Returns:
        The summary, as written to ``summary.json`` in ``output`` beside the others of ``WRITTEN`` and ``training/``.
        ``seconds`` is the wall time of the whole demo.

    Raises:
        InvalidInput: a file is missing, or the directory is not one that the demo can use.
        MissingExtra: a package of the ``train`` extra is missing.
    """
    demo, threads = EmojiDemo(base), torch.get_num_threads()
    # Two are faster on two idle cores, but several times slower beside another job: they wait for each other.
    torch.set_num_threads(1)
    try:
        with OutputDirectory(Path("runs") / "demo" / run.name if output is None else output) as place:
            place.claim(*WRITTEN)
            return _run(demo, run, place, progress)
    finally:
        torch.set_num_threads(threads)


def _run(demo: EmojiDemo, run: Run, output: OutputDirectory, progress: bool) -> dict[str, Any]:
    began, directory = time.perf_counter(), output.path
    rows = demo.rows(run)
    config = demo.config(run, directory, rows)
    with open_output(config) as earlier:
        # A summary of an earlier demo must not stand beside a training that did not end.
        output.remove("summary.json")
        if (directory / "training" / "cache").exists():
            with OutputDirectory(directory / "training" / "cache") as cache:
                cache.remove()
        earlier.remove()
    with output.file("pairs.parquet") as partial:
        write_pairs(partial, rows)
    output.write("config.yaml", to_yaml(config))
    # From the file, so that `fastinvdpo train config.yaml` is the very same run.
    result = train(load_config(directory / "config.yaml"), resume="never", progress=progress)

    images = [demo.sample(model, run.seed) for model in (demo.base, result.model_directory)]
    before, after = (demo.verdict(run.preference, one) for one in images)
    rate = win_rate(after.rewards, before.rewards)
    shown = [[one[place] for place in demo.shown] for one in images]
    with output.file("before_after.png") as partial:
        save_grid(
            partial, shown[0], shown[1], [demo.prompts[place] for place in demo.shown], columns=COLUMNS, title=run.title
        )
    with output.file("curves.png") as partial:
        save_curves(partial, result.history, (before.rewards.tolist(), after.rewards.tolist()), title=run.title)
    summary = {
        "method": run.method,
        "preference": run.preference,
        "seed": run.seed,
        "control": run.control,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "win_rate": rate._asdict(),
        "network_evaluations": result.network_evaluations,
        "seconds": time.perf_counter() - began,
        "seconds_training": result.seconds,
        "steps": result.steps,
        "classifier_accuracy": demo.judge.held_out_accuracy,
        "status": "ok",
    }
    output.write("summary.json", summary)
    if progress:
        values = [
            [MEASURES[key], *(f"{side[key]:.3f}" for side in (before.as_dict(), after.as_dict()))] for key in MEASURES
        ]
        values.insert(
            1, ["win rate over the base", "0.500", f"{rate.mean:.3f} [{rate.ci_low:.3f}, {rate.ci_high:.3f}]"]
        )
        values += [
            ["network evaluations", "", f"{result.network_evaluations:,}"],
            ["wall time, training", "", f"{result.seconds:.0f} s"],
            ["wall time, everything", "", f"{summary['seconds']:.0f} s"],
        ]
        print_table(run.title, ["", "before", "after (95 % interval)"], values)
        print(f"{len(demo.prompts)} samples each, same prompts and noise. Images, curves and numbers: {directory}")
    return summary
