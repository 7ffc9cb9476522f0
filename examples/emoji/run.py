"""The demo on emoji: a small Stable Diffusion, and what is preferred among two designers' drawings.

python -m fastinvdpo._examples.emoji.run [--method inversion-dpo] [--preference noto] [--base DIRECTORY]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image as images_of

from fastinvdpo._examples import demonstration
from fastinvdpo._examples.demonstration import METHODS, SURE_SCALE, Demo, Run, Verdict, as_array, run_settings
from fastinvdpo._examples.emoji import judge as judging
from fastinvdpo._examples.emoji.data import IMAGES, Emoji, load_emoji, split
from fastinvdpo._examples.emoji.judge import Judge, saturation
from fastinvdpo._examples.pairs import pair_row, score_range
from fastinvdpo.data.writing import encode_png
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.trainer import TrainConfig

if TYPE_CHECKING:
    from PIL.Image import Image

BASE = Path(__file__).with_name("base")
PREFERENCES = ("noto", "twemoji", "vivid", "prompt")
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 25, 3.0
STEPS = 200
BETA: dict[str, Any] = {"beta": 1000.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "inversion-dpo": {**BETA, "num_inference_steps": 10, "guidance_scale": 1.0, "timesteps_per_step": 1},
    "dspo": {**BETA, "variant": "sdxl"},  # sd15 at its published β is fine-tuning on winners
    "mapo": {},  # β weighs the margin's term, and is the published one
    "poly-dpo": {**BETA, "alpha": 1.0},  # the published 8 is for labels as noisy as Pick-a-Pic's
    "snpo": {"beta": 500.0},  # without the ½ of the others
}
"""Beside the methods' own defaults; β alone for those that are not here."""
LEARNING_RATE = 2e-5
LEARNING_RATES: dict[str, float] = {}
"""Of the methods whose gradient has another size."""


def make_pairs(emoji: Emoji, preference: str, seed: int, *, shuffle: bool = False) -> list[dict]:
    """One preference pair an emoji, as rows of the schema jpg_0, jpg_1, label_0, label_1, caption, score_0, score_1.

    ``noto``, ``twemoji`` and ``vivid`` compare the two drawings; ``prompt`` a drawing with the same designer's of
    another emoji. Which side wins is random as well, so that neither column is always the winner. ``shuffle`` is the
    control experiment: the pairs stay, and a coin decides which side is called the winner.
    """
    random = np.random.RandomState(seed)
    rows = []
    for place, name in enumerate(emoji.names):
        drawings, scores = emoji.images[:, place], np.array([0.0, 1.0])
        if preference == "prompt":
            other = (place + random.randint(1, len(emoji))) % len(emoji)
            drawings = emoji.images[random.randint(2), [other, place]]
        elif preference == "twemoji":
            scores = scores[::-1]
        elif preference == "vivid":
            scores = saturation(drawings)
        if scores[0] == scores[1]:
            continue
        order = random.permutation(2)
        scores = scores[random.permutation(2)] if shuffle else scores[order]
        encoded = [encode_png(images_of.fromarray(drawings[side])) for side in order]
        rows.append(pair_row(encoded, scores.tolist(), name))
    return rows


class EmojiDemo(Demo):
    """The demo on emoji, from the base model in a directory."""

    methods = tuple(METHODS)
    preferences = PREFERENCES
    columns = 8
    measures: ClassVar = {
        "top1": "prompted emoji is the nearest",
        "top5": "prompted emoji among five nearest",
        "noto": "drawn by Noto's designer",
        "saturation": "saturation",
        "frechet": "Fréchet distance to real emoji",
    }

    def __init__(self, base: Path = BASE) -> None:
        for file in (IMAGES, judging.WEIGHTS):
            if not file.is_file():
                remedy = "run the demo in a checkout of the repository, which has what the installed package leaves out"
                raise invalid(file.stem, str(file), "is missing", remedy)
        if not (base / "model_index.json").is_file():
            remedy = "train one with python -m fastinvdpo._examples.emoji.train_base, or name another directory"
            raise invalid("base", str(base), "holds no pipeline", remedy)
        self._base = base
        self.emoji, (train, held_out) = load_emoji(), split()
        self.train_set, self.held_out = self.emoji.take(train), self.emoji.take(held_out)
        self.prompts = self.held_out.names
        # The first of each category, three rows of eight.
        categories = [name for name in dict.fromkeys(self.emoji.categories) if name != "Component"]
        places = [np.flatnonzero(np.array(self.held_out.categories) == name)[:3] for name in categories]
        self.shown = {int(place): self.prompts[place] for place in np.concatenate(places)[:24]}

    def base(self, preference: str, directory: Path) -> Path:
        return self._base

    def rows(self, run: Run) -> list[dict]:
        return make_pairs(self.train_set, run.preference, run.seed, shuffle=run.control == "shuffle")

    def config(self, run: Run, directory: Path, rows: Sequence[dict]) -> TrainConfig:
        options = dict(OPTIONS.get(run.method, BETA))
        if METHODS[run.method].needs_scores:
            scale = 10.0 if run.preference == "vivid" else SURE_SCALE
            options |= {"score_range": score_range(rows), "preference_scale": scale}
        run = Run(run.method, run.preference, run.seed, run.steps or STEPS)
        model = {"family": "stable-diffusion", "path": str(self._base)}
        rate = LEARNING_RATES.get(run.method, LEARNING_RATE)
        return TrainConfig.from_mapping(run_settings(run, options, model, directory, rate))

    def draw(self, model: Path, seed: int) -> list[Image]:
        options = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE}
        return demonstration.draw_images("stable-diffusion", model, self.prompts, seed, **options)

    def judge(self, preference: str, images: Sequence[list[Image]]) -> tuple[float, list[Verdict]]:
        judge = Judge(self.emoji)
        verdicts: list[Verdict] = [judge.judge(preference, as_array(one), self.prompts) for one in images]
        return judge.held_out_accuracy, verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 for a mistake in its arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="inversion-dpo", help=", ".join(METHODS))
    parser.add_argument("--preference", default="noto", help=", ".join(PREFERENCES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--control", help="shuffle: winners and losers at random, nothing should be learned")
    parser.add_argument("--base", type=Path, default=BASE)
    chosen = parser.parse_args(arguments)
    run = Run(chosen.method, chosen.preference, chosen.seed, chosen.steps, chosen.control)
    try:
        demonstration.run_demo(EmojiDemo(chosen.base), run, output=chosen.output)
    except InvalidInput as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    main()
