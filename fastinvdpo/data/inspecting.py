"""A look at a set of pairs before training on it: a summary, and a sheet of some pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from fastinvdpo.data.broken import by_cause, write_report
from fastinvdpo.data.pairs import Pair, PairDataset
from fastinvdpo.data.rows import SCORES
from fastinvdpo.output import OutputDirectory

SHEET = "pairs.png"
_SIDE, _GAP, _TEXT = 160, 8, 360
_WON, _LOST, _TIED = (46, 125, 50), (198, 40, 40), (117, 117, 117)
_SIZES_SHOWN = 5


def inspect_pairs(dataset: PairDataset, output: OutputDirectory, *, pairs: int = 8) -> str:
    """Write ``data.json``, ``broken.jsonl`` and a sheet of the first ``pairs`` pairs; return a summary as text."""
    write_report(dataset.summary, dataset.broken, output)
    with output.file(SHEET) as partial:
        sheet([dataset[i] for i in range(min(pairs, len(dataset)))]).save(partial, "PNG")
    found, sizes = dataset.summary, [f"{w} x {h} ({count})" for (h, w), count in dataset.image_sizes.most_common()]
    if len(sizes) > _SIZES_SHOWN:
        sizes = [*sizes[:_SIZES_SHOWN], f"{len(sizes) - _SIZES_SHOWN} other sizes"]
    captions = [dataset.caption(i) for i in range(len(dataset))]
    lengths = [len(caption) for caption in captions]
    kept = {"pairs": found.pairs, "ties": f"{found.ties} ({'kept' if found.ties_kept else 'dropped'})"}
    if found.liked is not None:
        kept = {"liked": f"{found.liked} ({found.both} also disliked)", "disliked": found.pairs - found.liked}
    if found.captioned:
        kept = {"images": found.pairs}
    masks = ", ".join(map(dataset.source.shown, dataset.source.stored_masks)) or "none"
    lines = {
        "path": f"{found.path} ({found.format})",
        "rows": found.rows,
        **kept,
        "broken": by_cause(found.broken) or "none",
        "sizes" if found.captioned else "images": ", ".join(sizes) or "not looked at (streaming)",
        "captions": f"{len(set(captions))} distinct, {captions.count('')} empty, {min(lengths)} to {max(lengths)} "
        f"characters, median {statistics.median(lengths):g}",
        "scores": _scores(dataset),
        "masks": masks if dataset.has_masks or masks == "none" else f"{masks}, not read (data.masks)",
        "sheet": output.path / SHEET,
    }
    return "\n".join(f"{name:9} {value}" for name, value in lines.items())


def _scores(dataset: PairDataset) -> str:
    scores = None if dataset.unpaired else dataset.scores()
    if scores is None:
        return "none"
    won, lost = (statistics.fmean(side) for side in zip(*scores, strict=True))
    higher = sum(winner > loser for winner, loser in scores) / len(scores)
    columns = ", ".join(dataset.source.shown(name) for name in SCORES)
    return f"{columns}: winners {won:.4g}, losers {lost:.4g} on average; the winner's is higher in {higher:.1%}"


def sheet(pairs: Sequence[Pair]) -> Image.Image:
    """One line a pair: winner (green), loser (red; both gray for a tie), row, caption, scores; or a line for each image
    that was liked (green) or disliked (red).
    """
    cell = _SIDE + 2 * _GAP
    page = Image.new("RGB", (2 * cell + _TEXT, max(1, len(pairs)) * cell), "white")
    draw = ImageDraw.Draw(page)
    for line, pair in enumerate(pairs):
        frames = (_TIED, _TIED) if pair.tie else (_LOST,) if pair.liked is False else (_WON, _LOST)
        for column, ((image, *_), frame) in enumerate(zip(pair.sides, frames, strict=False)):
            way = Image.Resampling.NEAREST if max(image.size) * 4 < _SIDE else Image.Resampling.BICUBIC
            small = ImageOps.expand(ImageOps.contain(image.convert("RGB"), (_SIDE, _SIDE), way), 3, frame)
            place = (column * cell + (cell - small.width) // 2, line * cell + (cell - small.height) // 2)
            page.paste(small, place)
        told = [f"row {pair.row}" + (", tie" if pair.tie else "")]
        if pair.scores is not None:
            told.append(f"scores {pair.scores[0]:.4g}, {pair.scores[1]:.4g}")
        text = pair.caption.encode("ascii", "replace").decode()  # the built-in font has little more
        told += [text[start : start + 56] for start in range(0, min(len(text), 56 * 7), 56)]
        draw.multiline_text((2 * cell, line * cell + _GAP), "\n".join(told), fill="black")
    return page
