"""Configurations: sections, what they mean together, YAML files, presets. Each room gets its own section."""

from fastinvdpo._extras import require

for _package in ("pydantic", "yaml"):
    require(_package, extra="train", purpose="a configuration")

from fastinvdpo.config.files import load_config, load_data_section, presets, to_yaml
from fastinvdpo.config.train import TrainConfig, complete

__all__ = ["TrainConfig", "complete", "load_config", "load_data_section", "presets", "to_yaml"]
