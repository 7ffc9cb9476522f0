"""What a person looks at after the demo: a table, a grid of images before and after, training curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinvdpo._extras import require
from fastinvdpo.evaluation.page import AFTER, DPI, histogram, new_figure

if TYPE_CHECKING:
    from PIL.Image import Image


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output: first column left-aligned, the others right-aligned."""
    console = require("rich.console", extra="train", purpose="printing the report").Console(highlight=False)
    table = require("rich.table", extra="train", purpose="printing the report").Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def save_grid(
    path: str | Path,
    before: Sequence[Image],
    after: Sequence[Image],
    captions: Sequence[str],
    *,
    columns: int = 10,
    title: str = "",
    rows: tuple[str, str] = ("before ", "after "),
) -> None:
    """An image of pairs: above those of the base model, below those of the aligned one from the same noise.

    ``before``, ``after`` and ``captions`` have one length; ``columns`` of them make a band of two rows.
    """
    numpy = require("numpy", extra="train", purpose="drawing the report")
    width, height = before[0].size
    bands = -(-len(before) // columns)
    # One array for all images: axes of their own would take matplotlib seconds.
    cell, band_height = 1.15 * width, 2.9 * height
    canvas = numpy.full((round(bands * band_height), round(columns * cell), 3), 255, dtype=numpy.uint8)
    inches = 8.0 / columns
    figure = new_figure((inches * columns + 0.6, 2.5 * inches * bands + 0.4))
    axis = figure.subplots()
    axis.set_axis_off()
    for place, (old, new, caption) in enumerate(zip(before, after, captions, strict=True)):
        band, column = divmod(place, columns)
        left, top = round(column * cell), round((band + 0.2) * band_height)
        for offset, image, label in ((0, old, rows[0]), (round(1.15 * height), new, rows[1])):
            row = top + offset
            canvas[row : row + height, left : left + width] = numpy.asarray(image.convert("RGB"))
            if column == 0:
                axis.text(left - 0.5, row + height / 2, label, ha="right", va="center", fontsize=7)
        words = textwrap.fill(caption, round(18 * inches))
        axis.text(left + width / 2 - 0.5, top - 0.1 * height, words, ha="center", va="bottom", fontsize=7)
    axis.imshow(canvas, interpolation="nearest")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, format="png", dpi=DPI)


def save_curves(
    path: str | Path,
    history: Sequence[Mapping[str, Any]],
    rewards: tuple[Sequence[float], Sequence[float]],
    *,
    keys: Sequence[str] = ("loss", "implicit_accuracy", "margin"),
    title: str = "",
) -> None:
    """Curves over the optimizer steps of ``history``, and histograms of the samples' rewards (before, after)."""
    figure = new_figure((3.2 * (len(keys) + 1), 2.8))
    *curves, last = figure.subplots(1, len(keys) + 1)
    steps = [row["step"] for row in history]
    for axis, key in zip(curves, keys, strict=True):
        axis.plot(steps, [row[key] for row in history], color=AFTER, linewidth=1)
        axis.set(xlabel="optimizer step", title=key.replace("_", " "))
    histogram(last, rewards, ("before", "after"))
    last.set(xlabel="reward", ylabel="samples", title="reward of the samples")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, format="png", dpi=DPI)
