"""``fastinvdpo demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastinvdpo.cli.options import quiet


def demo(
    method: Annotated[str, typer.Option(help="diffusion-dpo, inpo, smpo or inversion-dpo.")] = "inversion-dpo",
    preference: Annotated[
        str, typer.Option(help="slant (leaning right wins), bold (more ink wins) or digit (the prompted digit wins).")
    ] = "slant",
    seed: Annotated[int, typer.Option(help="Seed of pairs, training and samples.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps instead of the recipe's.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write, instead of runs/demo/METHOD-PREFERENCE-SEED.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="'shuffle' draws winners and losers at random: nothing should be learned.")
    ] = None,
    train_base: Annotated[
        bool, typer.Option("--train-base", help="Train the base model again first, 5 to 8 minutes on one core.")
    ] = False,
    progress: Annotated[
        bool, typer.Option(help="Show a progress bar and the table at the end.", callback=quiet)
    ] = True,
) -> None:
    """Align a small model of handwritten digits to a preference in minutes on a CPU, and show what changed."""
    from fastinvdpo._examples.digits.run import run_demo

    run_demo(
        method=method,
        preference=preference,
        seed=seed,
        steps=steps,
        output=output,
        control=control,
        train_base=train_base,
        progress=progress,
    )
