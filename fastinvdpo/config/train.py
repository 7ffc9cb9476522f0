"""The training configuration.

Nothing is loaded here; ``TrainConfig.from_mapping`` raises :class:`fastinvdpo.errors.InvalidInput` that names key,
value and remedy for every mistake at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fastinvdpo.config.checks import check_combinations
from fastinvdpo.config.explain import explain
from fastinvdpo.config.sections import RunSections, known_keys, write_method
from fastinvdpo.io import as_written
from fastinvdpo.methods import Method


class TrainConfig(RunSections):
    """One training run. Build it with :meth:`from_mapping`, which explains mistakes."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrainConfig:
        """Validate a nested mapping, as a YAML file holds it.

        Raises:
            InvalidInput: one line per mistake: unknown key (with the closest known one), wrong type, value out of
                range, missing key, or keys that cannot be combined.
        """
        try:
            config = cls.model_validate(dict(mapping))
        except ValidationError as error:
            raise explain(error, known_keys) from None
        check_combinations(config)
        return config

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain numbers, strings, lists and dictionaries."""
        return self.model_dump(mode="python")


def complete(config: TrainConfig | Mapping[str, Any], method: Any, model: Any, pairs: Any) -> TrainConfig:
    """A whole configuration from its sections and what is at hand, which takes the place of what they name."""
    given = config.as_dict() if isinstance(config, TrainConfig) else {key: dict(part) for key, part in config.items()}
    if isinstance(config, TrainConfig) and method is config.method:
        return config
    origin, source = getattr(model, "origin", None), getattr(pairs, "source", None)
    given["method"] = write_method(method) if isinstance(method, Method) else dict(method)
    path = "a model at hand" if origin is None else as_written(str(origin.path))
    given["model"] = {"path": path, "family": model.family, **given.get("model", {})}
    given["data"] = {"path": as_written(str(getattr(source, "path", "pairs at hand"))), **given.get("data", {})}
    return TrainConfig.from_mapping(given)
