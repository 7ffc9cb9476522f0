"""What several commands take, and how a configuration is read from their arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid

if TYPE_CHECKING:
    from fastinvdpo.config import TrainConfig


def quiet(progress: bool) -> bool:
    """Without progress, diffusers, transformers and the hub draw no bars either."""
    if not progress:
        for package in ("diffusers", "transformers"):
            require(f"{package}.utils.logging", extra="train", purpose="this command").disable_progress_bar()
    return progress


Progress: TypeAlias = Annotated[bool, typer.Option(help="Show a progress bar.", callback=quiet)]
PairsPath: TypeAlias = Annotated[
    str, typer.Argument(help="Pairs in any format that training reads.", show_default=False)
]


def with_checkpoint(name: str, prefix: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add ``--revision`` and ``--variant`` to a command, which gets its argument ``name`` as an ``Origin``."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        helps = {"revision": f"Revision of --{name} on the hub.", "variant": "Variant of its files, such as fp16."}
        added: dict[str, Any] = {
            f"{prefix}{key}": Annotated[str | None, typer.Option(help=text, show_default=False)]
            for key, text in helps.items()
        }

        @functools.wraps(command)
        def called(**given: Any) -> None:
            from fastinvdpo.models.base import Origin

            told = {key: given.pop(f"{prefix}{key}") for key in helps}
            command(**{**given, name: Origin(given[name], **told)})

        signature = inspect.signature(command, eval_str=True)
        keywords = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for key, kind in added.items()
        ]
        changed: Any = called
        changed.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *keywords])
        changed.__annotations__ = {**{p.name: p.annotation for p in signature.parameters.values()}, **added}
        return called

    return decorated


def read_config(arguments: list[str] | None, preset: str | None, defaults: dict[str, Any] | None = None) -> TrainConfig:
    from fastinvdpo.config import load_config

    path, overrides = _split(arguments or [])
    if path is None and preset is None:
        raise invalid("CONFIG.yaml", None, "is missing", "name a configuration file, or a preset with --preset")
    return load_config(path, overrides, preset=preset, defaults=defaults)


def _split(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The configuration file, if the first argument is one, and the overrides."""
    if arguments and "=" not in arguments[0]:
        return Path(arguments[0]), arguments[1:]
    return None, arguments
