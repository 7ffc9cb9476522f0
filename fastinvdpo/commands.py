"""The commands of the command line: each reads its arguments and hands them to one function of the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fastinvdpo.errors import invalid

app = typer.Typer(
    help="Align diffusion models to preference pairs by inversion-based DPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train a model as CONFIG.yaml says; every key can be overridden, as in training.steps=100."""
    from fastinvdpo.trainer import config_files

    if preset == "list":
        typer.echo("\n".join(config_files.presets()))
        return
    path, overrides = _split(arguments or [])
    if path is None and preset is None:
        raise invalid("CONFIG.yaml", None, "is missing", "name a configuration file, or a preset with --preset")
    config = config_files.load_config(path, overrides, preset=preset)
    if dry_run:
        typer.echo(config_files.to_yaml(config), nl=False)
        return
    from fastinvdpo.trainer import loop

    result = loop.train(config, resume=resume, progress=progress)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(
            f"{result.steps} steps in {result.seconds:.0f} s, {result.network_evaluations:,} network evaluations. "
            f"Model: {result.model_directory}"
        )


@app.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
def doctor(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Tell versions, devices and backends, and why a backend is not available; --json for machines."""
    from fastinvdpo import doctor as examination

    raise typer.Exit(examination.main(arguments or []))


def _split(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The configuration file, if the first argument is one, and the overrides."""
    if arguments and "=" not in arguments[0]:
        return Path(arguments[0]), arguments[1:]
    return None, arguments
