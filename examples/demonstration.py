"""What the demos share: pairs, training through the ordinary trainer, before and after in numbers and images."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch

from fastinvdpo import methods
from fastinvdpo._examples.pairs import check_preference
from fastinvdpo._examples.pictures import print_table, save_curves, save_grid
from fastinvdpo.data import write_pairs
from fastinvdpo.errors import invalid
from fastinvdpo.evaluation.metrics import Interval, win_rate
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.models import load_model
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import TrainConfig, load_config, to_yaml, train
from fastinvdpo.trainer.opening import open_output

if TYPE_CHECKING:
    from PIL.Image import Image

CONTROLS = ("shuffle",)
WRITTEN = ("pairs.parquet", "config.yaml", "before_after.png", "curves.png", "summary.json")
# Not those that need to know what noise an image was generated from: real ones have none.
METHODS = {name: method for name, method in methods.METHODS.items() if not method.needs_noise}
BATCH_SIZE = 32
SURE_SCALE = 1 / (2 / (1 + math.exp(-1)) - 1)
"""SmPO's λ where every pair differs by the whole range of the scores: a pair then weighs 1, as in the other methods.

At the published λ = 10, which is for graded scores, it would weigh 4.6.
"""


@dataclass(frozen=True)
class Run:
    """What a demo is called with; ``steps`` None: those of the recipe."""

    method: str
    preference: str
    seed: int = 0
    steps: int | None = None
    control: str | None = None

    @property
    def title(self) -> str:
        control = f", control {self.control}" if self.control else ""
        return f"{self.method}, preference {self.preference}, seed {self.seed}{control}"

    @property
    def name(self) -> str:
        return "-".join([self.method, self.preference, str(self.seed), *([self.control] if self.control else [])])


class Verdict(Protocol):
    """What a judge found in ``n`` images: a reward each, ``(n,)``, and the entries of summary.json."""

    @property
    def rewards(self) -> np.ndarray: ...

    def as_dict(self) -> dict[str, float]: ...


class Demo(ABC):
    """One demo: its model, its preferences, its judge.

    Attributes:
        methods: names in :data:`METHODS`.
        measures: what its verdicts measure beside the reward: the key in summary.json and the words of the table.
        prompts: what is sampled before and after.
        shown: places of the prompts in the picture, and the words above them.
        columns: how many images stand beside each other there.
        claimed: names in the output beside those that every demo writes.
    """

    methods: ClassVar[tuple[str, ...]]
    preferences: ClassVar[tuple[str, ...]]
    measures: ClassVar[Mapping[str, str]]
    columns: ClassVar[int]
    prompts: list[str]
    shown: Mapping[int, str]
    claimed: tuple[str, ...] = ()

    @abstractmethod
    def base(self, preference: str, directory: Path) -> Path:
        """The directory of the base model, ``directory`` being that of the run."""

    @abstractmethod
    def rows(self, run: Run) -> list[dict]:
        """The pairs of a run, as :func:`fastinvdpo.data.write_pairs` takes them."""

    @abstractmethod
    def config(self, run: Run, directory: Path, rows: Sequence[dict]) -> TrainConfig:
        """The training configuration of a run in a directory."""

    @abstractmethod
    def draw(self, model: Path, seed: int) -> list[Image]:
        """One image per prompt; equal seeds start from equal noise."""

    @abstractmethod
    def judge(self, preference: str, images: Sequence[list[Image]]) -> tuple[float, list[Verdict]]:
        """Accuracy of the classifier on held-out real images, and its verdict on each list of images."""

    def prepare(self, run: Run, output: OutputDirectory, progress: bool) -> None:  # noqa: B027
        """What comes before the training, such as a base model of one's own."""


def run_demo(demo: Demo, run: Run, *, output: str | Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Align the demo's model to a preference and say what that changed.

    Returns:
        The summary, as written to ``summary.json`` in ``output`` (``runs/demo/METHOD-PREFERENCE-SEED`` when None)
        beside the others of ``WRITTEN`` and ``training/``. ``seconds`` is the wall time of the whole demo.

    Raises:
        InvalidInput: the run, or the directory, is not one that the demo can use.
        MissingExtra: a package of the ``train`` extra is missing.
    """
    check_run(demo, run)
    threads = torch.get_num_threads()
    # Two take 87 s instead of 120 on two idle cores, but 450 beside another job: they wait for each other.
    torch.set_num_threads(1)
    try:
        with OutputDirectory(Path("runs") / "demo" / run.name if output is None else output) as place:
            place.claim(*WRITTEN, *demo.claimed)
            return _run(demo, run, place, progress)
    finally:
        torch.set_num_threads(threads)


def _run(demo: Demo, run: Run, output: OutputDirectory, progress: bool) -> dict[str, Any]:
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
    demo.prepare(run, output, progress)
    with output.file("pairs.parquet") as partial:
        write_pairs(partial, rows)
    output.write("config.yaml", to_yaml(config))
    # From the file, so that `fastinvdpo train config.yaml` is the very same run.
    result = train(load_config(directory / "config.yaml"), resume="never", progress=progress)

    models = (demo.base(run.preference, directory), result.model_directory)
    images = [demo.draw(Path(model), run.seed) for model in models]
    accuracy, (before, after) = demo.judge(run.preference, images)
    rate = win_rate(after.rewards, before.rewards)
    shown = [[one[place] for place in demo.shown] for one in images]
    with output.file("before_after.png") as partial:
        captions = list(demo.shown.values())
        save_grid(partial, shown[0], shown[1], captions, columns=demo.columns, title=run.title)
    with output.file("curves.png") as partial:
        rewards = (before.rewards.tolist(), after.rewards.tolist())
        save_curves(partial, result.history, rewards, title=run.title)
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
        "classifier_accuracy": accuracy,
        "status": "ok",
    }
    output.write("summary.json", summary)
    if progress:
        _print_summary(run.title, demo.measures, summary, rate)
        print(f"{len(demo.prompts)} samples each, same prompts and noise. Pictures, curves and numbers: {directory}")
    return summary


def check_run(demo: Demo, run: Run) -> None:
    """Raise InvalidInput for anything the demo does not know, before any work is done."""
    if run.method not in demo.methods:
        raise invalid("method", run.method, "is not known", f"choose one of {', '.join(demo.methods)}")
    check_preference(run.preference, demo.preferences)
    if run.steps is not None and run.steps < 1:
        raise invalid("steps", run.steps, "must be positive", "leave it out for the recipe's own number")
    if run.control is not None and run.control not in CONTROLS:
        raise invalid("control", run.control, "is not known", f"choose {', '.join(CONTROLS)}, or leave it out")


def run_settings(
    run: Run, options: Mapping[str, Any], model: Mapping[str, Any], directory: Path, learning_rate: float
) -> dict[str, Any]:
    """The sections of a configuration that trains on ``directory/pairs.parquet`` into ``directory/training``.

    32 pairs a step, AdamW without weight decay, 20 warm-up steps. ``run.steps`` is a number here.
    """
    method, steps = METHODS[run.method], run.steps or 1
    cache = str(directory / "training" / "cache") if method.whole_chain else None
    return {
        "method": {"name": run.method, **options},
        "model": dict(model),
        "data": {"path": str(directory / "pairs.parquet"), "form": "pairs", "relabel_by_score": method.needs_scores},
        "cache": {"path": cache},
        "optimizer": {
            "learning_rate": learning_rate,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "warmup_steps": min(20, steps),
        },
        "training": {"steps": steps, "batch_size": BATCH_SIZE, "seed": run.seed},
        "output": {
            "directory": str(directory / "training"),
            "checkpoint_every": steps,
            "keep_checkpoints": 1,
            "log_every": 5,
        },
    }


def draw_images(family: str, path: str | Path, prompts: list[str], seed: int, **options: Any) -> list[Image]:
    """One image per prompt from the model in a directory, with :func:`fastinvdpo.evaluation.sampling.sample`."""
    model = load_model(family, path)
    return model.decode_latents(sample(model, model.network, prompts, seed=seed, **options))


def as_array(images: list[Image]) -> np.ndarray:
    """Images of one size as uint8 ``(n, h, w)``, or ``(n, h, w, 3)`` in color."""
    return np.stack([np.asarray(image) for image in images])


def _print_summary(title: str, measures: Mapping[str, str], summary: Mapping[str, Any], rate: Interval) -> None:
    labels = {"reward": "mean reward", **measures}
    rows = [[words, *(f"{summary[side][key]:.3f}" for side in ("before", "after"))] for key, words in labels.items()]
    rows.insert(1, ["win rate over the base", "0.500", f"{rate.mean:.3f} [{rate.ci_low:.3f}, {rate.ci_high:.3f}]"])
    rows += [
        ["network evaluations", "", f"{summary['network_evaluations']:,}"],
        ["wall time, training", "", f"{summary['seconds_training']:.0f} s"],
        ["wall time, everything", "", f"{summary['seconds']:.0f} s"],
    ]
    print_table(title, ["", "before", "after (95 % interval)"], rows)
