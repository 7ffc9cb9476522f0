"""``fastinvdpo train``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fastinvdpo.cli.options import Progress, read_config

# A preset names no data, and --dry-run reads none.
NO_DATA = "path/to/pairs"


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [section.key=value]...",
            help="A configuration file, then values that override it; values are read as YAML.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Start from published hyper-parameters, such as inpo-sd15; 'list' shows all names."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(help="'auto' continues from the newest checkpoint, 'never' starts, or the path of a checkpoint."),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved configuration and the count of network evaluations, and stop.",
        ),
    ] = False,
    progress: Progress = True,
) -> None:
    """Train a model as CONFIG.yaml says; every key can be overridden, as in training.steps=100."""
    from fastinvdpo import config as configuration

    if preset == "list":
        typer.echo("\n".join(configuration.presets()))
        return
    config = read_config(arguments, preset, defaults={"data": {"path": NO_DATA}} if dry_run and preset else None)
    if dry_run:
        from fastinvdpo.trainer.dry_run import described
        from fastinvdpo.trainer.opening import with_launcher

        config = with_launcher(config)
        typer.echo(configuration.to_yaml(config), nl=False)
        typer.echo(described(config))
        return
    from fastinvdpo.evaluation import EvaluationCallback
    from fastinvdpo.trainer import train as run

    callbacks = [] if config.evaluation is None else [EvaluationCallback(config.evaluation)]
    result = run(config, resume=resume, progress=progress, callbacks=callbacks)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(
            f"{result.steps} steps in {result.seconds:.0f} s, {result.network_evaluations:,} network evaluations. "
            f"Model: {result.model_directory}"
        )
        if result.best_model_directory is not None:
            typer.echo(f"Best model: {result.best_model_directory}")
        if result.data is not None:
            listed = f" Listed in {result.directory / 'broken.jsonl'}." if result.data.broken else ""
            typer.echo(f"Data: {result.data}.{listed}")
