"""What the file of a LoRA adapter says about it, in words that older readers know too."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

# Written whatever their values: what readers ask for. peft 0.18 knows all of them.
_ALWAYS = frozenset((
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias", "fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save", "init_lora_weights",
    "rank_pattern", "alpha_pattern",
))  # fmt: skip
# They tell who wrote the file and how it computed, not what the adapter is.
_NEVER = frozenset(("peft_version", "runtime_config"))


def adapter_settings(network: nn.Module) -> dict[str, Any]:
    """The settings of the adapter inside ``network``, for inference, as JSON can hold them.

    peft's own ``to_dict`` has every field that the installed version knows, and diffusers raises a TypeError on one
    that the reader's peft does not. Here a field beyond the common ones stands only where it is not at its default.
    """
    layers: Any = network
    config = layers.peft_config["default"]
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in _ALWAYS or (field.name not in _NEVER and value != default):
            settings[field.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
    return settings | {"peft_type": str(config.peft_type.value), "inference_mode": True}
