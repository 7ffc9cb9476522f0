"""``fastinvdpo evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastinvdpo.cli.options import with_checkpoint


@with_checkpoint("base")
@with_checkpoint("aligned", prefix="aligned_")
def evaluate(
    base: Annotated[str, typer.Option(help="Directory or hub id of the model before alignment.", show_default=False)],
    aligned: Annotated[
        str, typer.Option(help="The model after it: a whole one, its network, or an adapter.", show_default=False)
    ],
    prompts: Annotated[
        str,
        typer.Option(help=".txt, .json, .jsonl or .parquet; or partiprompts, hpdv2 (hub).", show_default=False),
    ],
    scorer: Annotated[
        list[str],
        typer.Option(
            help="Repeated: KIND=PATH (pickscore, hps, clip, aesthetic), or MODULE:NAME of your own.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for pictures, evaluation.json and report.html.")] = Path(
        "runs/evaluate"
    ),
    family: Annotated[str, typer.Option(help="auto, digits, stable-diffusion, stable-diffusion-3 or flux.")] = "auto",
    column: Annotated[str | None, typer.Option(help="Column or key of the prompts.", show_default=False)] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Use the first so many.", show_default=False)] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="num_inference_steps=25, guidance_scale (the default of the base's pipeline), seed=0, batch_size=8, "
            "dtype=fp32 or bf16.",
            show_default=False,
        ),
    ] = None,
    shown: Annotated[int, typer.Option(min=0, help="Pairs of pictures in the report.")] = 24,
) -> None:
    """Sample base and aligned model from the same noise, score the pictures, and report who wins how often."""
    from fastinvdpo.evaluation import comparing
    from fastinvdpo.evaluation.prompts import load_prompts
    from fastinvdpo.evaluation.scorers import open_scorers

    summary = comparing.compare(
        base,
        aligned,
        load_prompts(prompts, column=column, limit=max_prompts),
        open_scorers(scorer),
        output,
        family=family,
        sampling=comparing.parse_sampling(options or []),
        shown=shown,
    )
    for note in summary["notes"]:
        typer.echo(f"Note: {note}")
    for name, found in summary["scorers"].items():
        mean, median = (
            " → ".join(f"{found[side][kind]:.5g}" for side in comparing.SIDES) for kind in ("mean", "median")
        )
        rate = "win rate {mean:.3f} [{ci_low:.3f}, {ci_high:.3f}]".format(**found["win_rate"])
        typer.echo(f"{name}: {rate}, {found['ties']} ties of {summary['prompts']}; mean {mean}, median {median}")
    typer.echo(f"Report: {output / comparing.PAGE}, numbers: {output / comparing.SUMMARY}")
