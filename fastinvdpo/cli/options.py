"""What several commands take, and how a configuration is read from their arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.io import expand_path

if TYPE_CHECKING:
    from fastinvdpo.config import TrainConfig


# Paths that may also be the name of a repository, or another word.
_PATHS_AS_TEXT = {"path", "model", "base", "aligned", "prompts", "resume"}


def quiet(progress: bool) -> bool:
    """Without progress, diffusers, transformers and the hub draw no bars either."""
    if not progress:
        for package in ("diffusers", "transformers"):
            require(f"{package}.utils.logging", extra="train", purpose="this command").disable_progress_bar()
    return progress


class PathsExpanded(TyperCommand):
    """A command whose paths have ``~`` and variables expanded where the shell did not, as behind ``--output=``."""

    def invoke(self, context: Any) -> Any:
        context.params = {name: _expanded(name, value) for name, value in context.params.items()}
        return super().invoke(context)


def _expanded(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(name, one) for one in value]
    is_path = isinstance(value, Path) or (isinstance(value, str) and name in _PATHS_AS_TEXT)
    return type(value)(expand_path(str(value), name)) if is_path else value


def with_checkpoint(name: str, prefix: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add ``--revision``, ``--variant`` and ``--config`` to a command, which gets ``name`` as an ``Origin``."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        helps = {
            "revision": f"Revision of --{name} on the hub.",
            "variant": "Variant of its files, such as fp16.",
            "config": f"Directory in diffusers' format that describes --{name}, a single file.",
        }
        added: dict[str, Any] = {
            f"{prefix}{key}": Annotated[str | None, typer.Option(help=text, show_default=False)]
            for key, text in helps.items()
        }

        @functools.wraps(command)
        def called(**given: Any) -> None:
            from fastinvdpo.models.base import Origin

            origin = {key: given.pop(f"{prefix}{key}") for key in helps}
            command(**{**given, name: Origin(given[name], **origin)})

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
    from fastinvdpo.config.sections import known_keys

    path, overrides = None, arguments or []
    if overrides:
        key, separator, _ = overrides[0].partition("=")
        is_key = key.partition(".")[0].strip() in known_keys(())
        if not separator or "/" in key or (not is_key and ("." not in key or Path(overrides[0]).is_file())):
            path, *overrides = overrides
            path = expand_path(path, "config")
    if path is None and preset is None:
        raise invalid("CONFIG.yaml", None, "is missing", "name a configuration file, or a preset with --preset")
    return load_config(path, overrides, preset=preset, defaults=defaults)
