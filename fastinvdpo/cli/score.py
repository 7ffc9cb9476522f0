"""``fastinvdpo score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastinvdpo.cli.options import PairsPath, Progress


def score(
    path: PairsPath,
    scorer: Annotated[
        list[str],
        typer.Option(
            help="KIND=PATH_OR_ID[,option=value]..., repeated; KIND is pickscore, hps, clip or aesthetic; options are "
            "name, processor, revision and, below an aesthetic head, clip.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Parquet file to write.", show_default=False)],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...", help="Keys of the section data, as in max_broken=0.03.", show_default=False
        ),
    ] = None,
    relabel: Annotated[str | None, typer.Option(help="Name of the scorer whose higher score wins the pair.")] = None,
    named: Annotated[bool, typer.Option("--named", help="Columns score_NAME_0 even for a single scorer.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that pass a scorer at once.")] = 32,
    device: Annotated[str, typer.Option(help="'auto', or a device of PyTorch's, such as cuda:1.")] = "auto",
    progress: Progress = True,
) -> None:
    """Score the images of pairs and write the scores beside them; killed at any moment, it continues."""
    from fastinvdpo.config.files import load_data_section
    from fastinvdpo.evaluation.scoring import list_of_broken, open_to_score, run_scorers

    data = load_data_section(path, options or [])
    result = run_scorers(
        open_to_score(data),
        scorer,
        output,
        batch_size=batch_size,
        device=device,
        relabel=relabel,
        named=named,
        max_broken=data.max_broken,
        progress=progress,
    )
    typer.echo(str(result))
    if result.broken:
        typer.echo(f"Listed in {list_of_broken(output)}.")
