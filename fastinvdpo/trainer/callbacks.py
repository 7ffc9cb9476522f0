"""What happens beside the steps of a run: the hooks of a callback; logs and the progress bar."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from PIL.Image import Image

from fastinvdpo._extras import require
from fastinvdpo.atomic import atomic_file

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config import TrainConfig
    from fastinvdpo.data.broken import DataSummary
    from fastinvdpo.output import OutputDirectory
    from fastinvdpo.trainer.step import TrainingState

_LOGGER = logging.getLogger("fastinvdpo.trainer")

Place: TypeAlias = Callable[[str], AbstractContextManager[Path]]
"""Opens a directory of a name to write into."""


@dataclass
class TrainResult:
    """What a run left behind, over all its attempts.

    Attributes:
        directory: the output directory; model_directory: the trained model, for ``load_model``.
        network_evaluations: samples sent through a network, in all processes, with what the cache cost whenever it was
            computed.
        seconds: wall time, without the part of a killed attempt after its last checkpoint.
        history: the rows of history.jsonl.
        data: what became of every row of the data, where the data set tells.
        evaluation: the rows of evaluation/history.jsonl.
        best_model_directory: the model with the best of them, where it is kept.
    """

    directory: Path
    model_directory: Path
    steps: int
    network_evaluations: int
    seconds: float
    history: list[dict[str, Any]]
    data: DataSummary | None = None
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    best_model_directory: Path | None = None


class Run(Protocol):
    """What a callback sees of the trainer.

    Attributes:
        output: to write results into ``directory``; from ``on_start`` on, None on all processes but the first.
        state: what training changes; from ``on_start`` on.
        first_step: the step that the run continues after; 0 for a new one.
    """

    config: TrainConfig
    model: Any  # a TrainedModel
    directory: Path
    output: OutputDirectory | None
    accelerator: Accelerator
    state: TrainingState
    first_step: int
    reporting: Reporting

    def say(self, message: str) -> None:
        """Show a line above the progress bar, or where there is none, log it."""

    def check_finite(self, step: int) -> None:
        """Raise ``NonFiniteLoss`` if a step since the last look met something that is not finite."""

    def export(self, place: Place | None, step: int) -> None:
        """Write the model of now, after ``step``, with its card into directories that ``place`` opens by name."""


class Callback:
    """Hooks into a run; override those that are needed. All processes call them, in the order of the callbacks."""

    def on_init(self, trainer: Run) -> None:
        """Before anything is computed or written. Raise ``InvalidInput`` here for what cannot work."""

    def on_start(self, trainer: Run) -> None:
        """``trainer.state`` is built; a checkpoint is not restored yet, so the policy still is the base."""

    def on_step(self, trainer: Run, step: int) -> None:
        """After an optimizer step, counted from 1. Time spent here does not count as training."""

    def on_log(self, trainer: Run, row: Mapping[str, Any]) -> None:
        """Means since the last row; ``row["step"]`` is the step they end at."""

    def on_end(self, trainer: Run, result: TrainResult) -> None:
        """The result is written. It may be added to."""

    def card(self, step: int) -> list[str]:
        """Sections for the model card of the model after a step."""
        return []

    def close(self) -> None:
        """The run is over; it may have failed."""


class Reporting(Callback):
    """``history.jsonl``, accelerate's trackers (TensorBoard, Weights & Biases, …) and a progress bar on standard error.

    ``rows``: the logged rows; those of earlier attempts first.
    """

    def __init__(self, progress: bool = True) -> None:
        self.rows: list[dict[str, Any]] = []
        self._progress, self._trackers = progress, False
        self._bar: Any = None

    def on_start(self, trainer: Run) -> None:
        accelerator, first = trainer.accelerator, trainer.first_step
        self._accelerator, self._path = accelerator, trainer.directory / "history.jsonl"
        if accelerator.is_main_process:
            self.rows = [row for row in read_history(self._path) if row["step"] <= first]
            with atomic_file(self._path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        if accelerator.log_with:
            # Rows of an earlier attempt after its last checkpoint are superseded.
            wandb = {"name": trainer.directory.name, "config": trainer.config.as_dict(), "dir": str(trainer.directory)}
            options = {"tensorboard": {"purge_step": first + 1}, "wandb": wandb}
            accelerator.init_trackers("fastinvdpo", init_kwargs=options)
            self._trackers = True
        tqdm = require("tqdm.auto", extra="train", purpose="the progress bar").tqdm
        hidden = not self._progress or not accelerator.is_local_main_process
        self._bar = tqdm(total=trainer.config.training.steps, initial=first, desc="training", disable=hidden)

    def on_step(self, trainer: Run, step: int) -> None:
        self._bar.update()

    def on_log(self, trainer: Run, row: Mapping[str, Any]) -> None:
        self.scalars("train", row)
        if not trainer.accelerator.is_main_process:
            return
        self.rows.append(dict(row))
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = {"loss": "loss", "accuracy": "implicit_accuracy", "pairs/s": "pairs_per_second"}
        self._bar.set_postfix({name: f"{row[key]:.3g}" for name, key in shown.items() if key in row})

    def scalars(self, group: str, row: Mapping[str, Any]) -> None:
        """Numbers for the trackers alone, below ``group``; ``row["step"]`` is the step they belong to."""
        values = {f"{group}/{name}": value for name, value in row.items() if name != "step"}
        self._accelerator.log(values, step=row["step"])

    def images(self, group: str, make: Callable[[], Mapping[str, Image]], step: int) -> None:
        """RGB images for the trackers that take them; without one, ``make`` is not called."""
        trackers = [tracker for tracker in self._accelerator.trackers if tracker.name in ("tensorboard", "wandb")]
        images = make() if trackers else {}
        named = {f"{group}/{name}": np.asarray(image)[None] for name, image in images.items()}
        for tracker in trackers:
            tracker.log_images(named, step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))

    def say(self, message: str) -> None:
        """Show a line above the bar, or where there is none, log it."""
        if not self._bar.disable:
            self._bar.write(message, file=sys.stderr)
        elif self._accelerator.is_main_process:
            _LOGGER.info(message)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._trackers:
            self._accelerator.end_training()


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's history.jsonl; a last line cut off by a kill is left out, and with a warning a damaged one."""
    rows = []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line.endswith(b"\n"):
                rows.append(json.loads(line) | {})
        except (ValueError, TypeError):
            warnings.warn(f"line {number} of {path} is damaged, and left out", stacklevel=2)
    return rows
