"""Reading a configuration: preset, YAML file and ``section.key=value`` overrides; the later wins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastinvdpo.config.sections import DataSection
from fastinvdpo.config.train import TrainConfig
from fastinvdpo.errors import invalid


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-8`` is a number, and only ``true`` and ``false`` are booleans (YAML 1.2).

    YAML 1.1 reads ``1e-8`` as text and ``mixed_precision: no`` as false.
    """


_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_REPLACED = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:bool"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
# YAML 1.1 would read 010 as eight.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    preset: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The validated configuration of a run.

    Args:
        path: YAML file; its keys win over the preset's.
        overrides: ``section.key=value`` strings, the value parsed as YAML; they win over the file.
        preset: name of a preset, see :func:`presets`.
        defaults: sections that stand below all of these.

    Raises:
        InvalidInput: unreadable file, malformed override, unknown preset, or any mistake in a value.
    """
    merged: dict[str, Any] = dict(defaults or {})
    if preset is not None:
        merged = _merge(merged, _read_preset(preset))
    if path is not None:
        merged = _merge(merged, _read_file(Path(path)))
    for override in overrides:
        _apply(merged, override)
    return TrainConfig.from_mapping(merged)


def load_data_section(path: str, overrides: Iterable[str]) -> DataSection:
    """The section ``data`` alone, from ``key=value`` strings. Raises ``InvalidInput`` as :func:`load_config` does."""
    merged: dict[str, Any] = {"data": {"path": path}}
    for override in overrides:
        _apply(merged, override if override.startswith("data.") else f"data.{override}")
    return TrainConfig.data_section(merged["data"])


def presets() -> list[str]:
    """Names of the presets: published hyper-parameters per method and model."""
    return sorted(name[: -len(".yaml")] for name in _preset_files())


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text with the rules above. Raises ``InvalidInput`` naming ``source``."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise invalid(source, text, f"is not valid YAML ({' '.join(str(error).split())})", "correct it") from None


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to the same configuration."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)


def _preset_files() -> dict[str, str]:
    folder = resources.files("fastinvdpo") / "presets"
    return {entry.name: entry.read_text("utf-8") for entry in folder.iterdir() if entry.name.endswith(".yaml")}


def _read_preset(name: str) -> dict[str, Any]:
    files = _preset_files()
    if f"{name}.yaml" not in files:
        close = difflib.get_close_matches(name, presets(), n=1)
        remedy = f"did you mean {close[0]}" if close else f"choose one of {', '.join(presets())}"
        raise invalid("preset", name, "is not a known preset", remedy)
    return _mapping(parse_yaml(files[f"{name}.yaml"], f"preset {name}"), f"preset {name}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("config", str(path), f"cannot be read ({error})", "name a YAML file") from None
    return _mapping(parse_yaml(text, str(path)), str(path))


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise invalid(source, value, "is not a mapping of sections", "write method:, model:, data:, ... at the top")
    return value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``. A section that names another method replaces the preset's options entirely."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            other_method = key == "method" and value.get("name", below.get("name")) != below.get("name")
            merged[key] = dict(value) if other_method else _merge(below, value)
        else:
            merged[key] = value
    return merged


def _apply(config: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise invalid("override", override, "is not of the form section.key=value", "write, say, training.steps=100")
    section: Any = config
    for depth, part in enumerate(parts[:-1]):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            parent = ".".join(parts[: depth + 1])
            raise invalid(key, text, f"sets a key below {parent}, which is a plain value", f"set {parent} itself")
    section[parts[-1]] = parse_yaml(text, key)
