"""The commands: each reads its arguments and hands them to one function of the package."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastinvdpo.cli import data
from fastinvdpo.cli.demo import demo
from fastinvdpo.cli.evaluate import evaluate
from fastinvdpo.cli.invert import invert
from fastinvdpo.cli.options import PathsExpanded
from fastinvdpo.cli.precompute import precompute
from fastinvdpo.cli.score import score
from fastinvdpo.cli.train import train

app = typer.Typer(
    help="Align diffusion models to preference pairs by inversion-based DPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at pairs, and build them from scored images.", no_args_is_help=True)
data_app.command("inspect", cls=PathsExpanded)(data.inspect)
data_app.command("build", cls=PathsExpanded)(data.build)
app.add_typer(data_app, name="data")
for _command in (train, precompute, score, demo, invert, evaluate):
    app.command(cls=PathsExpanded)(_command)
_PASSED_ON: dict[str, Any] = {"context_settings": {"ignore_unknown_options": True}, "add_help_option": False}


@app.command(**_PASSED_ON)
def doctor(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Tell versions, devices and backends, and why a backend is not available; --json for machines."""
    from fastinvdpo import doctor as examination

    raise typer.Exit(examination.main(arguments or []))


@app.command(**_PASSED_ON)
def bench(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Measure the ops beside plain PyTorch and torch.compile; --quick takes a minute, --help tells of the rest."""
    from fastinvdpo._benchmarks import run

    raise typer.Exit(run.main(arguments or []))
