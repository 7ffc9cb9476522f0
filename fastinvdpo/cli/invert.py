"""``fastinvdpo invert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastinvdpo.cli.options import with_checkpoint


@with_checkpoint("model")
def invert(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, or one parquet file of pairs.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Directory or hub id of the model.", show_default=False)],
    family: Annotated[str, typer.Option(help="auto, digits, stable-diffusion, stable-diffusion-3 or flux.")] = "auto",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt for all images; repeated, one for each.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for latents, report and picture.")] = Path("runs/invert"),
    num_inference_steps: Annotated[int, typer.Option(help="Steps up to the noise, and as many down.")] = 50,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Guidance in both directions; without it none, FLUX.1-dev is told 3.5.", show_default=False),
    ] = None,
    renoise_iterations: Annotated[int, typer.Option(help="ReNoise iterations of each step up.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images that pass the network at once.")] = 8,
    max_images: Annotated[int, typer.Option(help="Use the first so many images.")] = 16,
) -> None:
    """Invert images to noise and sample them back: reconstruction error, latents and a picture."""
    from fastinvdpo.evaluation.inversion import run_invert

    report = run_invert(
        family,
        model,
        images,
        output=output,
        prompts=prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        renoise_iterations=renoise_iterations,
        batch_size=batch_size,
        max_images=max_images,
    )
    typer.echo(json.dumps(report, indent=2))
