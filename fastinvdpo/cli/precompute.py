"""``fastinvdpo precompute``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fastinvdpo.cli.options import Progress, read_config


def precompute(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [section.key=value]...",
            help="The configuration of the training, with cache.path; then values that override it.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Start from published hyper-parameters.")] = None,
    progress: Progress = True,
) -> None:
    """Store what does not depend on the policy: latents, embeddings, and for Inversion-DPO all of the reference."""
    config = read_config(arguments, preset)
    from fastinvdpo.trainer import precompute as fill

    cache = fill(config, progress=progress)
    if os.environ.get("RANK", "0") == "0":
        images, captions = cache.index.first["image"][-1], cache.index.first["caption"][-1]
        typer.echo(
            f"{len(cache)} pairs: {images} images, {captions} captions, {cache.network_evaluations:,} network "
            f"evaluations. Cache: {cache.directory}"
        )
        if cache.summary is not None:
            typer.echo(f"Data: {cache.summary}.")
