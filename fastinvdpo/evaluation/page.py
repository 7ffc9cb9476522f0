"""The report of an evaluation as one HTML file that loads nothing: styles, curves and pictures are inside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastinvdpo._extras import require
from fastinvdpo.io import atomic_file

DPI = 120
BEFORE, AFTER = "tab:gray", "tab:blue"
_LARGEST = 512  # longest side of a picture on the page, in pixels; larger ones are scaled down and stored as JPEG
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.plot { max-width: 100%; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; }
.pair img { width: 100%; }
.small img { image-rendering: pixelated; }
figcaption, .note { font-size: 13px; color: #555; overflow-wrap: anywhere; }
"""
# Even a prompt that held markup could load nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(path: Path, summary: Mapping[str, Any], root: Path, *, shown: int) -> Path:
    """Write the report of ``summary`` (:func:`fastinvdpo.evaluation.comparing.compare`) with its pictures in ``root``.

    ``shown`` pairs of pictures are on it, the first of the list: a choice by score would flatter one side.
    """
    samples = summary["samples"]
    count = min(shown, len(samples))
    parts = [
        "<h1>Aligned model against base model</h1>",
        f'<p class="note">{_text(_settings(summary))}</p>',
        *(f"<p>{_text(note)}</p>" for note in summary.get("notes", ())),
        _table(summary["scorers"]),
        '<p class="note">Win rate: share of prompts whose aligned picture scores higher, a tie counted half, with its '
        "95 % interval (Wilson).</p>",
        *(_plot(name, samples) for name in summary["scorers"]),
    ]
    if count:
        parts.append(f"<h2>Pictures: base left, aligned right, from the same noise ({count} of {len(samples)})</h2>")
        parts.append(f'<div class="grid">{"".join(_pair(entry, root) for entry in samples[:count])}</div>')
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Evaluation</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with atomic_file(path) as partial:
        partial.write_text(page, "utf-8")
    return path


def table_rows(scorers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the result, as the page shows them."""
    columns = ["scorer", "mean, base", "mean, aligned", "median, base", "median, aligned", "win rate", "ties"]
    rows = []
    for name, found in scorers.items():
        rate = found["win_rate"]
        numbers = [found[side][kind] for kind in ("mean", "median") for side in ("base", "aligned")]
        shown_rate = f"{rate['mean']:.3f} [{rate['ci_low']:.3f}, {rate['ci_high']:.3f}]"
        rows.append([name, *(f"{number:.5g}" for number in numbers), shown_rate, str(found["ties"])])
    return columns, rows


def _settings(summary: Mapping[str, Any]) -> str:
    guided = "no guidance" if summary["guidance_scale"] == 1 else f"guidance {summary['guidance_scale']:g}"
    return (
        f"Base {summary['base']}, aligned {summary['aligned']}. {summary['prompts']} prompts, "
        f"{summary['num_inference_steps']} DDIM steps, {guided}, seed {summary['seed']}, {summary['dtype']}."
    )


def _table(scorers: Mapping[str, Any]) -> str:
    columns, rows = table_rows(scorers)
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _plot(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    before, after = ([entry["scores"][name][side] for entry in samples] for side in ("base", "aligned"))
    picture = _image("image/png", plot_scores(name, before, after), f"scores of {name}", "plot")
    return f"<h2>{_text(name)}</h2>{picture}"


def _pair(entry: Mapping[str, Any], root: Path) -> str:
    shown = [_encoded(root / entry[side]) for side in ("base", "aligned")]
    pictures = "".join(
        _image(kind, data, side) for (kind, data, _), side in zip(shown, ("base", "aligned"), strict=True)
    )
    scores = "; ".join(f"{name} {both['base']:.5g} → {both['aligned']:.5g}" for name, both in entry["scores"].items())
    small = " small" if shown[0][2] else ""
    caption = f"<figcaption>{_text(entry['prompt'])}<br>{_text(scores)}</figcaption>"
    return f'<figure><div class="pair{small}">{pictures}</div>{caption}</figure>'


def _encoded(path: Path) -> tuple[str, bytes, bool]:
    """``(type, bytes, whether its pixels should stay visible)`` of a picture for the page."""
    image_module = require("PIL.Image", extra="train", purpose="drawing the report")
    with image_module.open(path) as picture:
        longest = max(picture.size)
        if longest <= _LARGEST / 2:
            return "image/png", path.read_bytes(), longest <= 64
        small = picture.convert("RGB")
        small.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=90)
    return "image/jpeg", buffer.getvalue(), False


def _image(kind: str, data: bytes, alt: str, style: str = "") -> str:
    told = f' class="{style}"' if style else ""
    return f'<img{told} alt="{_text(alt)}" src="data:{kind};base64,{base64.b64encode(data).decode()}">'


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def plot_scores(name: str, base: Sequence[float], aligned: Sequence[float]) -> bytes:
    """A PNG: histograms of the scores of both sides, and the difference of every prompt, sorted."""
    figure = new_figure((9.6, 3.0))
    left, right = figure.subplots(1, 2)
    histogram(left, (base, aligned), ("base", "aligned"))
    left.set(xlabel=name, ylabel="pictures")
    gains = sorted(new - old for old, new in zip(base, aligned, strict=True))
    right.axhline(0, color="black", linewidth=0.5)
    right.step([(place + 0.5) / len(gains) for place in range(len(gains))], gains, where="mid", color=AFTER)
    right.set(xlabel="share of the prompts", ylabel="aligned − base", xlim=(0, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


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
