"""What a person looks at afterwards: a table, a before/after picture grid, training curves, a JSON summary.

Files appear under their names only when they are complete.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.io import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image

_DPI = 120
_BEFORE, _AFTER = "tab:gray", "tab:blue"


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary`` as indented JSON. Raises InvalidInput for NaN or infinity, which JSON does not know."""
    target = Path(path)
    try:
        text = json.dumps(summary, indent=2, allow_nan=False)
    except ValueError as error:
        raise invalid("summary", dict(summary), f"cannot be written as JSON ({error})", "leave the value out") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as partial:
        partial.write_text(text + "\n")
    return target


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
) -> Path:
    """A picture of pairs: above what the base model drew, below what the aligned one drew from the same noise.

    ``before``, ``after`` and ``captions`` have one length; ``columns`` of them make a band of two rows.
    """
    if not len(before) == len(after) == len(captions) > 0:
        sizes = (len(before), len(after), len(captions))
        raise invalid("after", sizes, "is not paired with before and captions", "pass one of each per picture")
    numpy = require("numpy", extra="train", purpose="drawing the report")
    width, height = before[0].size
    bands = -(-len(before) // columns)
    # One array for all pictures: axes of their own would take matplotlib seconds. NaN stays white.
    cell, band_height = 1.15 * width, 2.9 * height
    canvas = numpy.full((round(bands * band_height), round(columns * cell)), numpy.nan)
    figure = _figure((0.8 * columns + 0.6, 2.0 * bands + 0.4))
    axis = figure.subplots()
    axis.set_axis_off()
    for place, (old, new, caption) in enumerate(zip(before, after, captions, strict=True)):
        band, column = divmod(place, columns)
        left, top = round(column * cell), round((band + 0.2) * band_height)
        for offset, image, label in ((0, old, "before "), (round(1.15 * height), new, "after ")):
            row = top + offset
            canvas[row : row + height, left : left + width] = numpy.asarray(image.convert("L"))
            if column == 0:
                axis.text(left - 0.5, row + height / 2, label, ha="right", va="center", fontsize=7)
        axis.text(left + width / 2 - 0.5, top - 0.8, caption, ha="center", va="bottom", fontsize=7)
    axis.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    figure.suptitle(title, fontsize=9)
    return _save_figure(figure, path)


def save_curves(
    path: str | Path,
    history: Sequence[Mapping[str, Any]],
    rewards: tuple[Sequence[float], Sequence[float]],
    *,
    keys: Sequence[str] = ("loss", "implicit_accuracy", "margin"),
    title: str = "",
) -> Path:
    """Curves over the optimiser steps of ``history``, and histograms of the samples' rewards (before, after)."""
    if not history:
        raise invalid("history", history, "is empty", "pass the history of a training run")
    figure = _figure((3.2 * (len(keys) + 1), 2.8))
    *curves, last = figure.subplots(1, len(keys) + 1)
    steps = [row["step"] for row in history]
    for axis, key in zip(curves, keys, strict=True):
        axis.plot(steps, [row[key] for row in history], color=_AFTER, linewidth=1)
        axis.set(xlabel="optimiser step", title=key.replace("_", " "))
    _histogram(last, rewards, ("before", "after"))
    last.set(xlabel="reward", ylabel="samples", title="reward of the samples")
    figure.suptitle(title, fontsize=9)
    return _save_figure(figure, path)


def plot_scores(name: str, base: Sequence[float], aligned: Sequence[float]) -> bytes:
    """A PNG: histograms of the scores of both sides, and the difference of every prompt, sorted."""
    figure = _figure((9.6, 3.0))
    left, right = figure.subplots(1, 2)
    _histogram(left, (base, aligned), ("base", "aligned"))
    left.set(xlabel=name, ylabel="pictures")
    gains = sorted(new - old for old, new in zip(base, aligned, strict=True))
    right.axhline(0, color="black", linewidth=0.5)
    right.step([(place + 0.5) / len(gains) for place in range(len(gains))], gains, where="mid", color=_AFTER)
    right.set(xlabel="share of the prompts", ylabel="aligned − base", xlim=(0, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _histogram(axis: Any, sides: tuple[Sequence[float], Sequence[float]], labels: tuple[str, str]) -> None:
    low, high = (bound(bound(side) for side in sides) for bound in (min, max))
    bins = [low + (high - low) * place / 30 for place in range(31)] if high > low else 30
    for side, label, colour in zip(sides, labels, (_BEFORE, _AFTER), strict=True):
        axis.hist(side, bins=bins, alpha=0.6, label=label, color=colour)
    axis.legend()


def _figure(size: tuple[float, float]) -> Any:
    """A figure of ``size`` inches that needs no display and touches none of matplotlib's global state."""
    module = require("matplotlib.figure", extra="train", purpose="drawing the report")
    return module.Figure(figsize=size, layout="constrained")


def _save_figure(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as partial:
        figure.savefig(partial, format="png", dpi=_DPI)
    return target
