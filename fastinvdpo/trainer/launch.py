"""What ``accelerate launch`` was told, by its environment: used where the configuration says nothing, or refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fastinvdpo.config import TrainConfig
from fastinvdpo.errors import invalid

if TYPE_CHECKING:
    from accelerate import Accelerator

# Options of the launcher that are keys of the configuration too, and what it exports where it was told nothing.
_SHARED = {"mixed_precision": "no", "gradient_accumulation_steps": "1"}
_UNSUPPORTED = ("use_deepspeed", "use_megatron_lm", "use_parallelism_config")


def with_launcher(config: TrainConfig) -> TrainConfig:
    """The configuration with ``--mixed_precision`` and ``--gradient_accumulation_steps``, where it has neither.

    Raises:
        InvalidInput: the launcher and the configuration contradict one another, or the launcher was told something that
            the trainer does not support.
    """
    for flag in _UNSUPPORTED:
        if _told(flag) == "true":
            raise invalid(f"--{flag}", True, "is not supported", "launch with --multi_gpu, or --use_fsdp")
    compiled = _told("dynamo_backend")
    if compiled not in ("", "no") and config.performance.compile is not None:
        problem = f"is beside --dynamo_backend {compiled} of accelerate launch"
        raise invalid("performance.compile", config.performance.compile, problem, "drop one of the two")
    training, told = config.training, dict[str, Any]()
    for key, default in _SHARED.items():
        value, own = _told(key) or default, getattr(training, key)
        if value in (default, str(own)):
            continue
        if key in training.model_fields_set:
            problem = f"contradicts --{key} {value} of accelerate launch"
            raise invalid(f"training.{key}", own, problem, "drop one of the two")
        told[key] = int(value) if value.isdigit() else value
    if not told:
        return config
    given = config.model_dump(mode="python", exclude_unset=True)
    return TrainConfig.from_mapping({**given, "training": {**given.get("training", {}), **told}})


def check_launch(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ``InvalidInput`` for a way of sharing a run among processes that the trainer does not support."""
    kind = str(accelerator.distributed_type.value)
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise invalid("distributed_type", kind, "is not supported", "launch with --multi_gpu, or --use_fsdp")
    if kind != "FSDP":
        if _told("USE_FSDP") == "true":
            problem = f"has no effect here, where accelerate chose {kind}"
            raise invalid("--use_fsdp", True, problem, "drop it, or launch several processes on GPUs")
        return
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise invalid("fsdp_version", plugin.fsdp_version, "is not supported", "launch with --fsdp_version 2")
    if plugin.activation_checkpointing:
        remedy = "set training.gradient_checkpointing instead"
        raise invalid("fsdp_activation_checkpointing", True, "renames the weights", remedy)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise invalid("fsdp_offload_params", True, "is not supported", "drop it")
    if config.training.mixed_precision == "fp16":
        problem = "needs a gradient scaler, which is not supported with FSDP"
        raise invalid("training.mixed_precision", "fp16", problem, "choose bf16")
    if config.optimizer.name != "adamw":
        raise invalid("optimizer.name", config.optimizer.name, "does not know sharded weights", "choose adamw")
    if config.model.quantization is not None:
        remedy = "set it to null, or launch without FSDP"
        raise invalid("model.quantization", config.model.quantization, "cannot be sharded", remedy)
    if config.method.reference_follows:
        remedy = "set it to frozen, or launch without FSDP"
        raise invalid("method.reference", "ema", "does not follow sharded weights", remedy)
    if config.method.policy_inverts and config.method.compat is not None:
        problem = "may invert a batch in no step at all, and FSDP needs all processes to begin together"
        raise invalid("method.compat", config.method.compat, problem, "set it to null, or launch without FSDP")
    if config.method.whole_chain and config.training.max_batch is None:
        problem = "is found by a probe, which every process makes for itself, and FSDP needs all of them for a call"
        raise invalid("training.max_batch", None, problem, "give a number, such as 4")


def _told(flag: str) -> str:
    return os.environ.get(f"ACCELERATE_{flag.upper()}", "").lower()
