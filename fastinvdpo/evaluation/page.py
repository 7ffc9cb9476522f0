"""The report of an evaluation as one HTML file that loads nothing: styles, curves and images are inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from fastinvdpo._extras import require

DPI = 120
BEFORE, AFTER = "tab:gray", "tab:blue"
_LARGEST = 512  # longest side of an image on the page, in pixels; larger ones are scaled down and stored as JPEG
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
img { max-width: 100%; }
.pair img { width: 100%; }
.pair img + img { position: relative; }
.pair img:first-child:hover + img { left: calc(-100% - .3rem); pointer-events: none; }
.small img { image-rendering: pixelated; }
figcaption, .note { font-size: 13px; color: #555; overflow-wrap: anywhere; }
"""
# Even a prompt that held markup could load nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_COLUMNS = ("scorer", "mean, base", "mean, aligned", "median, base", "median, aligned", "win rate", "ties")
_SIDES = ("base", "aligned")


def report_page(summary: Mapping[str, Any], root: Path, *, shown: int) -> str:
    """The report of ``summary`` (:func:`fastinvdpo.evaluation.comparing.compare`) with its images in ``root``.

    ``shown`` pairs of images are on it, the first of the list: a choice by score would flatter one side.
    """
    samples = summary["samples"]
    pairs = [_pair(sample, root) for sample in samples[:shown]]
    guided = "no guidance" if summary["guidance_scale"] == 1 else f"guidance {summary['guidance_scale']:g}"
    settings = (
        f"Base {summary['base']}, aligned {summary['aligned']}. {summary['prompts']} prompts, "
        f"{summary['num_inference_steps']} steps, {guided}, seed {summary['seed']}, {summary['dtype']}."
    )
    parts = [
        "<h1>Aligned model against base model</h1>",
        f'<p class="note">{html.escape(settings)}</p>',
        *(f"<p>{html.escape(note)}</p>" for note in summary["notes"]),
        f"<table>{_row('th', _COLUMNS)}{''.join(map(_result, summary['scorers'].items()))}</table>",
        '<p class="note">Win rate: share of prompts whose aligned image scores higher, a tie counted half, with its '
        "95 % interval (Wilson).</p>",
        *(f"<h2>{html.escape(name)}</h2>{_plot(name, samples)}" for name in summary["scorers"]),
    ]
    if pairs:
        parts.append(f"<h2>Images: base left, aligned right, from the same noise ({len(pairs)} of {len(samples)})</h2>")
        parts.append('<p class="note">Over a base image, the pointer lays the aligned one on top of it.</p>')
        parts.append(f'<div class="grid">{"".join(pairs)}</div>')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Evaluation</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def histogram(axis: Any, sides: tuple[Sequence[float], Sequence[float]], labels: tuple[str, str]) -> None:
    low, high = (bound(bound(side) for side in sides) for bound in (min, max))
    bins = [low + (high - low) * place / 30 for place in range(31)] if high > low else 30
    for side, label, color in zip(sides, labels, (BEFORE, AFTER), strict=True):
        axis.hist(side, bins=bins, alpha=0.6, label=label, color=color)
    axis.legend()


def new_figure(size: tuple[float, float]) -> Any:
    """A figure of ``size`` inches that needs no display and touches none of matplotlib's global state."""
    module = require("matplotlib.figure", extra="train", purpose="drawing the report")
    return module.Figure(figsize=size, layout="constrained")


def _row(kind: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"


def _result(scored: tuple[str, Mapping[str, Any]]) -> str:
    name, found = scored
    numbers = [f"{found[side][kind]:.5g}" for kind in ("mean", "median") for side in _SIDES]
    rate = "{mean:.3f} [{ci_low:.3f}, {ci_high:.3f}]".format(**found["win_rate"])
    return _row("td", [name, *numbers, rate, str(found["ties"])])


def _plot(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    base, aligned = ([sample["scores"][name][side] for sample in samples] for side in _SIDES)
    png = scores_figure((base, aligned), name)
    return _image("image/png", png, f"scores of {name}")


def scores_figure(sides: tuple[Sequence[float], Sequence[float]], name: str, labels: tuple[str, str] = _SIDES) -> bytes:
    """PNG: histograms of the scores of both sides, and the difference of every prompt, sorted."""
    base, aligned = sides
    figure = new_figure((9.6, 3.0))
    left, right = figure.subplots(1, 2)
    histogram(left, sides, labels)
    left.set(xlabel=name, ylabel="images")
    gains = sorted(new - old for old, new in zip(base, aligned, strict=True))
    right.axhline(0, color="black", linewidth=0.5)
    right.step([(place + 0.5) / len(gains) for place in range(len(gains))], gains, where="mid", color=AFTER)
    right.set(xlabel="share of the prompts", ylabel=f"{labels[1]} − {labels[0]}", xlim=(0, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def grid(images: Sequence[Image.Image], columns: int = 4, titles: Sequence[str] = (), gap: int = 0) -> Image.Image:
    """Images of one size as one RGB image, ``columns`` in a row, ``gap`` pixels apart; ``titles`` of the columns."""
    width, height = (side + gap for side in images[0].size)
    columns, top = min(columns, len(images)), 20 if titles else 0
    page = Image.new("RGB", (columns * width + gap, top + -(-len(images) // columns) * height + gap), "white")
    for number, image in enumerate(images):
        page.paste(image.convert("RGB"), (gap + number % columns * width, top + gap + number // columns * height))
    for column, title in enumerate(titles):
        ImageDraw.Draw(page).text((gap + column * width, gap // 2), title, fill="black")
    return page


def _pair(sample: Mapping[str, Any], root: Path) -> str:
    shown = [_encoded(root / sample[side]) for side in _SIDES]
    images = "".join(_image(kind, data, side) for (kind, data, _), side in zip(shown, _SIDES, strict=True))
    scores = "; ".join(f"{name} {both['base']:.5g} → {both['aligned']:.5g}" for name, both in sample["scores"].items())
    small = " small" if shown[0][2] else ""
    caption = f"<figcaption>{html.escape(sample['prompt'])}<br>{html.escape(scores)}</figcaption>"
    return f'<figure><div class="pair{small}">{images}</div>{caption}</figure>'


def _encoded(path: Path) -> tuple[str, bytes, bool]:
    """``(type, bytes, whether its pixels should stay visible)`` of an image for the page."""
    with Image.open(path) as image:
        longest = max(image.size)
        if longest <= _LARGEST / 2:
            return "image/png", path.read_bytes(), longest <= 64
        small = image.convert("RGB")
        small.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=90)
    return "image/jpeg", buffer.getvalue(), False


def _image(kind: str, data: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{base64.b64encode(data).decode()}">'
