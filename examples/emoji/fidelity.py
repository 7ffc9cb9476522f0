"""How faithful a base model is to its prompts: what the card of the model states.

    python -m fastinvdpo._examples.emoji.fidelity --base DIRECTORY [--grid FILE.png]

samples the 300 held-out prompts as the demo does, and prints the judge's verdict on them, and as the most that can be
had its verdict on the drawings after the model's own autoencoder. The grid has the drawings above, the samples below.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastinvdpo._examples.emoji.run import BASE, EmojiDemo
from fastinvdpo._examples.pictures import save_grid
from fastinvdpo.models import load_model


def measure(base: Path, grid: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """The verdicts on the samples, ``samples``, and on both designers' reconstructed drawings, ``autoencoder``."""
    demo, model = EmojiDemo(base), load_model("stable-diffusion", base)
    drawings = [[Image.fromarray(image) for image in images] for images in demo.held_out.images]
    with torch.no_grad():
        rebuilt = [model.decode_latents(model.encode_images(images)) for images in drawings]
    drawn = demo.draw(base, seed)
    _, verdicts = demo.judge("prompt", [drawn, *rebuilt])
    samples, *autoencoder = (verdict.as_dict() for verdict in verdicts)
    if grid is not None:
        shown = list(demo.shown)
        real, sampled = ([images[place] for place in shown] for images in (drawings[1], drawn))
        save_grid(grid, real, sampled, list(demo.shown.values()), columns=demo.columns, rows=("real ", "sample "))
    return {"samples": samples, "autoencoder": autoencoder}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the verdicts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--grid", type=Path)
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.base, options.grid), indent=2))


if __name__ == "__main__":
    main()
