"""Reading a configuration: preset, YAML file and ``section.key=value`` overrides; the later wins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastinvdpo.config.explain import explain
from fastinvdpo.config.sections import DataSection, known_keys, takes_text
from fastinvdpo.config.train import TrainConfig
from fastinvdpo.errors import invalid
from fastinvdpo.io import read_text

_PRESETS = resources.files("fastinvdpo") / "presets"
_LARGEST_FILE = 1 << 20
_MOST_NODES = 20_000
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-8`` is a number, only ``true`` and ``false`` are booleans, and there are no dates
    (YAML 1.2). A key that stands twice is an error.

    YAML 1.1 reads ``1e-8`` as text and ``mixed_precision: no`` as false.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise yaml.MarkedYAMLError(problem=f"the key {twice} stands twice", problem_mark=node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_REPLACED = {f"{_TAG}{kind}" for kind in ("float", "int", "bool", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
# YAML 1.1 would read 010 as eight.
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(str(node.value)))


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    preset: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The validated configuration of a run. The later wins: ``defaults`` (sections), the preset of the name ``preset``,
    the YAML file ``path``, the ``overrides`` (``section.key=value``).

    Raises ``InvalidInput`` for an unreadable file, a malformed override, an unknown preset, or any mistake in a value.
    """
    merged: dict[str, Any] = dict(defaults or {})
    if preset is not None:
        merged = _merge(merged, _read_preset(preset))
    if path is not None:
        text = read_text(Path(path), "config", _LARGEST_FILE, "name a YAML file")
        merged = _merge(merged, _mapping(text, str(path)))
    _apply(merged, overrides)
    return TrainConfig.from_mapping(merged)


def load_data_section(path: str, overrides: Iterable[str]) -> DataSection:
    """The section ``data`` alone, from ``key=value`` strings. Raises ``InvalidInput`` as :func:`load_config` does."""
    merged: dict[str, Any] = {"data": {"path": path}}
    _apply(merged, (override if override.startswith("data.") else f"data.{override}" for override in overrides))
    try:
        return DataSection.model_validate(merged["data"])
    except ValidationError as error:
        raise explain(error, known_keys, ("data",)) from None


def presets() -> list[str]:
    """Names of the presets: published hyper-parameters per method and model."""
    return sorted(file.name[: -len(".yaml")] for file in _PRESETS.iterdir() if file.name.endswith(".yaml"))


def parse_yaml(text: str, source: str, key: tuple[str, ...] = ()) -> Any:
    """Parse YAML text with the rules above; ``key``: where its value belongs in a configuration.

    Raises ``InvalidInput`` naming ``source`` and the place, and showing nothing of the text.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if text[node.end_mark.index :].strip() and key:
            raise yaml.MarkedYAMLError(problem="there is more after the value", problem_mark=node.end_mark)
        if _nodes(node, {}) > _MOST_NODES:
            raise yaml.MarkedYAMLError(problem=f"its aliases stand for more than {_MOST_NODES:,} values")
        _keep_text(node, key)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = problem or getattr(error, "reason", None) or "nested too deeply, or a number that is too long"
        raise invalid(source, f"{len(text)} characters", f"is not valid YAML ({place}{reason})", "correct it") from None


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, those of aliases again wherever they stand."""
    if id(node) not in known:
        known[id(node)] = _MOST_NODES  # what contains itself
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts if isinstance(part, yaml.Node))
    return known[id(node)]


def _keep_text(node: yaml.Node, key: tuple[str, ...]) -> None:
    """Have ``2024`` or ``1e5`` stay text where a configuration has text, such as the name of a directory."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            _keep_text(value, (*key, str(name.value)))
    elif node.tag in (f"{_TAG}int", f"{_TAG}float") and takes_text(key):
        node.tag = f"{_TAG}str"


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to the same configuration."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)


def _read_preset(name: str) -> dict[str, Any]:
    if name not in presets():
        close = difflib.get_close_matches(name, presets(), n=1)
        remedy = f"did you mean {close[0]}" if close else f"choose one of {', '.join(presets())}"
        raise invalid("preset", name, "is not a known preset", remedy)
    return _mapping((_PRESETS / f"{name}.yaml").read_text("utf-8"), f"preset {name}")


def _mapping(text: str, source: str) -> dict[str, Any]:
    value = parse_yaml(text, source)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        problem = "is not a mapping of sections"
        raise invalid(source, type(value).__name__, problem, "write method:, model:, data:, ... at the top")
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


def _apply(config: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set what the overrides say. Raises ``InvalidInput`` where one undoes another."""
    given: dict[str, str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = tuple(part.strip() for part in key.split("."))
        if not separator or not all(parts):
            remedy = "write, say, training.steps=100"
            raise invalid("override", override, "is not of the form section.key=value", remedy)
        key = ".".join(parts)
        undone = next((other for other in given if f"{other}.".startswith(f"{key}.")), None)
        if undone is not None and given[undone] != text:
            problem = f"is given beside {undone}={given[undone]}, which it undoes"
            raise invalid(key, text, problem, "give one of them")
        given[key] = text
        section: Any = config
        for depth, part in enumerate(parts[:-1]):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                parent = ".".join(parts[: depth + 1])
                raise invalid(key, text, f"sets a key below {parent}, which is a plain value", f"set {parent} itself")
        section[parts[-1]] = _value(text.strip(), parts)


def _value(text: str, key: tuple[str, ...]) -> Any:
    """YAML where it is a list, a mapping or in quotes; otherwise one plain value, ``#`` and ``:`` part of it."""
    if text[:1] in ("[", "{", "'", '"'):
        return parse_yaml(text, ".".join(key), key)
    loader = _Loader("")
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    _keep_text(node, key)
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError):
        raise invalid(".".join(key), text, "is no value", "write it in quotes inside the quotes of the shell") from None
