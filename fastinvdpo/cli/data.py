"""``fastinvdpo data inspect`` and ``fastinvdpo data build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastinvdpo.cli.options import PairsPath


def inspect(
    path: PairsPath,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...", help="Keys of the section data, as in format=hpd.", show_default=False
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for pairs.png, data.json and broken.jsonl.")] = Path(
        "runs/inspect"
    ),
    pairs: Annotated[int, typer.Option(min=1, help="Pairs on the sheet.")] = 8,
) -> None:
    """Count rows, ties and broken rows by cause, tell sizes, captions and scores, and draw a sheet of pairs."""
    from fastinvdpo.config.files import load_data_section
    from fastinvdpo.data.broken import REPORT
    from fastinvdpo.data.inspecting import SHEET, inspect_pairs
    from fastinvdpo.output import OutputDirectory
    from fastinvdpo.trainer.opening import open_pairs

    data = load_data_section(path, options or [])
    with OutputDirectory(output, reads=[data.path]) as place:
        place.claim(SHEET, *REPORT)
        typer.echo(inspect_pairs(open_pairs(data, all_broken=True), place, pairs=pairs))


def build(
    structured: Annotated[Path, typer.Argument(help="JSON Lines of structured images.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Parquet file to write; without it the input is checked.")] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="NAME=NUMBER, repeated: weights of the scores. Without any: Pareto dominance."),
    ] = None,
    margin: Annotated[float, typer.Option(help="Least difference between winner and loser.")] = 0.0,
    max_pairs: Annotated[int, typer.Option(help="Pairs of one prompt, at most.")] = 4,
    balance: Annotated[bool, typer.Option(help="About equally many pairs for every relation.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the choice of pairs.")] = 0,
    image_root: Annotated[Path | None, typer.Option(help="Directory of the images, if not that of the file.")] = None,
) -> None:
    """Turn several scored images per prompt into pairs, with a data card beside them."""
    from fastinvdpo._examples.structured.building import PairRule, build_pairs, parse_weights, relation_counts
    from fastinvdpo._examples.structured.schema import read_structured

    rule = PairRule(parse_weights(weight or []), margin, max_pairs, balance, seed)
    if output is None:
        typer.echo(f"{len(read_structured(structured))} images, no mistakes. --output writes pairs.")
        return
    pairs = build_pairs(structured, output, rule, image_root=image_root)
    counts = ", ".join(f"{count} {relation}" for relation, count in sorted(relation_counts(pairs).items()))
    typer.echo(f"{len(pairs)} pairs ({counts}): {output}, described in {output.with_suffix('.md')}")
