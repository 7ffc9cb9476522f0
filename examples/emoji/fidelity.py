"""How faithful a base model is to its prompts: what the card of the model states.

    python -m fastinvdpo._examples.emoji.fidelity [--base DIRECTORY] [--grid FILE.png]

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

from fastinvdpo._examples.emoji.pictures import save_grid
from fastinvdpo._examples.emoji.run import COLUMNS, EmojiDemo
from fastinvdpo.models import load_model


def measure(base: Path | None = None, grid: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """The verdicts on the samples, ``samples``, and on both designers' reconstructed drawings, ``autoencoder``."""
    demo = EmojiDemo(base)
    model = load_model("stable-diffusion", demo.base)
    drawings = [[Image.fromarray(image) for image in images] for images in demo.held_out.images]
    with torch.no_grad():
        rebuilt = [model.decode_latents(model.encode_images(images)) for images in drawings]
    drawn = demo.sample(demo.base, seed)
    samples, *autoencoder = (demo.verdict("prompt", images).as_dict() for images in (drawn, *rebuilt))
    if grid is not None:
        real, sampled = ([images[place] for place in demo.shown] for images in (drawings[1], drawn))
        names = [demo.prompts[place] for place in demo.shown]
        save_grid(grid, real, sampled, names, columns=COLUMNS, rows=("real ", "sample "))
    return {"samples": samples, "autoencoder": autoencoder}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the verdicts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--grid", type=Path)
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.base, options.grid), indent=2))


if __name__ == "__main__":
    main()
