"""What a configuration names, opened: data set, model, output directory, accelerator. What ``accelerate launch`` was
told, by its environment, is used where the configuration says nothing, or refused.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastinvdpo._extras import require
from fastinvdpo.config import TrainConfig
from fastinvdpo.config.explain import under
from fastinvdpo.config.sections import DataSection
from fastinvdpo.data import (
    Buckets,
    CaptionedDataset,
    GeneratedDataset,
    LikedDataset,
    PairDataset,
    PairSource,
    open_source,
)
from fastinvdpo.data.broken import REPORT
from fastinvdpo.data.rows import WrongForm
from fastinvdpo.data.score_range import measured_range, stored_range
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import has_key
from fastinvdpo.models import resolve_family
from fastinvdpo.models.base import Origin, TrainedModel
from fastinvdpo.models.loading import FLOW_FAMILIES, family_class, load_any
from fastinvdpo.models.quantization import quantize_network
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer.checkpoint import FILES

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EVALUATION_FILES = ("evaluation/base.json", "evaluation/history.jsonl")
# Options of the launcher that are keys of the configuration too, and what it exports where it was told nothing.
_SHARED = {"mixed_precision": "no", "gradient_accumulation_steps": "1"}
_UNSUPPORTED = ("use_deepspeed", "use_megatron_lm", "use_parallelism_config")


def open_dataset(config: TrainConfig) -> PairDataset:
    """The pairs, or single images. Raises ``InvalidInput`` when they, or the method's needs, are not met."""
    method = config.method
    kind = LikedDataset if method.unpaired else GeneratedDataset if method.needs_noise else PairDataset
    kind = CaptionedDataset if method.captioned else kind
    try:
        edits = family_class(family_of(config)).edits
        dataset = open_pairs(config.data, kind, seed=config.training.seed, sources=edits)
    except WrongForm as error:
        what = "images that were liked or disliked" if method.unpaired else "pairs"
        what = "images with captions" if method.captioned else what
        raise InvalidInput(f"method.name = {method.name!r} trains on {what}, and {error}") from None
    check_pairs(config, dataset)
    return dataset


def open_pairs(
    data: DataSection,
    kind: type[PairDataset] | None = None,
    *,
    seed: int = 0,
    all_broken: bool = False,
    sources: bool | None = None,
) -> PairDataset:
    """The data set of a ``kind`` that the section describes (None: by ``data.form``); with ``all_broken`` any number of
    rows may be broken. ``sources``: as of :meth:`PairSource.with_sources`.
    """
    resolution = None
    if data.buckets is not None and data.resolution is not None:
        resolution = Buckets(data.resolution, data.buckets.multiple, data.buckets.max_aspect)
    names = ("ties", "random_flip", "center_crop", "relabel_by_score")
    kinds: dict[str, type[PairDataset]] = {"likes": LikedDataset, "images": CaptionedDataset}
    return (kind or kinds.get(data.form, PairDataset))(
        open_data_source(data).with_sources(sources),
        resolution=resolution or data.resolution,
        seed=seed,
        max_broken=sys.maxsize if all_broken else data.max_broken,
        **{name: getattr(data, name) for name in names},
    )


def open_data_source(data: DataSection) -> PairSource:
    """The rows that the section names, before any of them is checked. Raises ``InvalidInput`` where there are none."""
    keys = (
        *("form", "format", "columns", "split", "revision", "subset"),
        *("streaming", "shuffle_buffer", "image_root", "rank_pairs"),
    )
    return (
        open_source(data.path, **{key: getattr(data, key) for key in keys})
        .with_masks(data.masks)
        .with_frames(data.frames)
    )


def check_masks(config: TrainConfig, has_masks: bool) -> None:
    """Raise ``InvalidInput`` when pairs at hand have masks and the configuration says they have none, or vice versa."""
    if has_masks != config.data.masks:
        problem = f"is not what the pairs at hand were opened with, which {'have' if has_masks else 'have no'} masks"
        remedy = "set it to what they have, or open them with open_source(…).with_masks()"
        raise invalid("data.masks", config.data.masks, problem, remedy)


def check_sources(model: TrainedModel, pairs: Any) -> None:
    """Raise ``InvalidInput`` when pairs at hand have source images and the model edits none, or vice versa."""
    if model.edits != getattr(pairs, "has_sources", False):
        problem = "edits source images, which the pairs have not" if model.edits else "takes no source images"
        remedy = "open them with open_source(…).with_sources(), or choose another model"
        raise invalid("model.family", model.family, problem, remedy)


def warn_of_masks(source: PairSource | None) -> None:
    """One line where masks are stored, and not read."""
    if source is not None and source.stored_masks and not source.masks:
        names = " and ".join(map(source.shown, source.stored_masks))
        warnings.warn(f"data.masks is false: {names} of {source.path} is left unread, everything counts", stacklevel=1)


def check_pairs(config: TrainConfig, pairs: Any) -> None:
    """Raise ``InvalidInput`` when the data set lacks what the method needs: scores, noise, pairs or single images."""
    unpaired, captioned = config.method.unpaired, config.method.captioned
    if (unpaired, captioned) != (getattr(pairs, "unpaired", False), getattr(pairs, "captioned", False)):
        what, remedy = ("single images", "a LikedDataset") if unpaired else ("pairs", "a PairDataset")
        what, remedy = ("images with captions", "a CaptionedDataset") if captioned else (what, remedy)
        problem = f"trains on {what}, which {type(pairs).__name__} does not hold"
        raise invalid("method.name", config.method.name, problem, f"pass {remedy}, or choose another method")
    if config.method.needs_noise and not getattr(pairs, "has_noise", False):
        problem = f"needs the noise that images were generated from, which {type(pairs).__name__} does not hold"
        raise invalid("method.name", config.method.name, problem, "pass a GeneratedDataset, or choose another method")
    if config.method.needs_scores and not pairs.has_scores:
        remedy = "add columns score_0 and score_1, or name yours in data.columns"
        problem = f"weighs pairs by scores, and {config.data.path} has none"
        raise invalid("method.name", config.method.name, problem, remedy)


def with_score_range(config: TrainConfig, source: PairSource | None) -> TrainConfig:
    """The configuration with ``method.score_range`` as a number where it is ``auto``; others as they are. Raises
    ``InvalidInput`` where no range is stored with the scores, or a given number is not of their unit.
    """
    method = config.method
    if not method.needs_scores:
        return config
    names = [config.data.columns.get(name, name) for name in ("score_0", "score_1")]
    found = None if source is None else stored_range(source, (names[0], names[1]))
    if found is None and not method.awaits_score_range:
        found = None if source is None else measured_range(source)
        if found is None or found.value == 0:
            return config
    if found is None:
        problem = f"no range of the columns {names[0]!r} and {names[1]!r} is stored in {config.data.path}"
        remedy = "score the pairs with fastinvdpo score, or give the largest minus the smallest score of the set"
        raise invalid("method.score_range", "auto", problem, remedy)
    try:
        return config.model_copy(update={"method": method.with_score_range(found.value)})
    except InvalidInput as error:
        raise under("method", error) from None


def check_cascade(config: TrainConfig, model: Any) -> None:
    """Raise ``InvalidInput`` where images are to follow from small ones and the model has none, or vice versa."""
    side, method = getattr(model, "low_resolution", None), config.method
    if method.of_tokens and (side is None) == method.cascaded:
        problem = f"is the side of small images, which {method.name} {'needs' if method.cascaded else 'has no use for'}"
        remedy = "set it, such as to 256" if method.cascaded else "set it to null, or train with mars-stage3"
        raise invalid("model.low_resolution", side, problem, remedy)


def open_model(config: TrainConfig, *, frozen_parts: bool = True) -> Any:
    """The model to start from, on the host; without text encoders and VAE when ``frozen_parts`` is False. With
    ``model.quantization`` its network is quantized here, so that a device never has to hold it whole.
    """
    source = config.model
    family = family_of(config)
    keys = (*Origin._fields[1:], "zero_terminal_snr", "max_sequence_length", "guidance_embedding", "low_resolution")
    options: dict[str, Any] = {key: getattr(source, key) for key in keys}
    options["frames"] = config.data.frames
    if family in FLOW_FAMILIES:
        options["resolution"] = config.data.resolution
    load = partial(load_any, family, source.path, **options)
    model = load(frozen_parts=frozen_parts)
    if source.quantization is not None:

        def again() -> nn.Module:
            return load(frozen_parts=False).network

        quantize_network(model, source.quantization, again, offload=source.offload)
    return model


def family_of(config: TrainConfig) -> str:
    source = config.model
    return resolve_family(source.family, Origin(source.path, revision=source.revision, config=source.config))


def reference_dtype(config: TrainConfig) -> torch.dtype | None:
    dtype = config.model.reference_dtype
    return None if dtype is None else DTYPES[dtype]


def open_output(config: TrainConfig) -> OutputDirectory:
    """The output directory, for this process alone. Raises ``InvalidInput`` where it cannot be written, another run
    writes there, or files are in the way that no run wrote.
    """
    earlier = "checkpoints/step-????????/meta.json"  # that version left no mark
    output = OutputDirectory(
        config.output.directory,
        "output.directory",
        earlier=lambda path: any(has_key(file, "versions") for file in path.glob(earlier)),
        reads=[config.model.path, config.data.path, config.cache.path],
    )
    models = ["model", *(["adapter"] if config.model.lora is not None else [])]
    results = [*REPORT, *models, *([f"{name}-raw" for name in models] if config.training.ema_decay else [])]
    growing = ["history.jsonl", *(f"checkpoints/step-????????/{name}" for name in FILES)]
    growing += ["tensorboard/fastinvdpo/*"] if config.output.tensorboard else []
    if config.evaluation is not None:
        growing += EVALUATION_FILES
        results += ["best"] if config.evaluation.keep_best else []
    try:
        output.claim(*results, files=growing)
    except BaseException:
        output.close()
        raise
    return output


def open_accelerator(config: TrainConfig) -> Accelerator:
    """A fresh accelerator. Its state is shared in the process, and an earlier run may have had another precision."""
    accelerate = require("accelerate", extra="train", purpose="training")
    accelerate.state.AcceleratorState._reset_state()
    trackers = [*(["tensorboard"] if config.output.tensorboard else []), *config.output.trackers]
    accelerator: Accelerator = accelerate.Accelerator(
        mixed_precision=config.training.mixed_precision,
        log_with=trackers or None,
        project_dir=f"{config.output.directory}/tensorboard",
        # The loop accumulates; accelerate would divide by what its launcher was told once more.
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
    )
    accelerate.utils.set_seed(config.training.seed)
    return accelerator


def with_launcher(config: TrainConfig) -> TrainConfig:
    """The configuration with ``--mixed_precision`` and ``--gradient_accumulation_steps``, where it has neither. Raises
    ``InvalidInput`` where the two contradict one another, or the launcher was told what the trainer does not support.
    """
    for flag in _UNSUPPORTED:
        if _option(flag) == "true":
            raise invalid(f"--{flag}", True, "is not supported", "launch with --multi_gpu, or --use_fsdp")
    compiled, training, given = _option("dynamo_backend"), config.training, dict[str, Any]()
    if compiled not in ("", "no") and config.performance.compile is not None:
        problem = f"is beside --dynamo_backend {compiled} of accelerate launch"
        raise invalid("performance.compile", config.performance.compile, problem, "drop one of the two")
    for key, default in _SHARED.items():
        value, own = _option(key) or default, getattr(training, key)
        if value in (default, str(own)):
            continue
        if key in training.model_fields_set:
            problem = f"contradicts --{key} {value} of accelerate launch"
            raise invalid(f"training.{key}", own, problem, "drop one of the two")
        given[key] = int(value) if value.isdigit() else value
    if not given:
        return config
    stated = config.model_dump(mode="python", exclude_unset=True)
    return TrainConfig.from_mapping({**stated, "training": {**stated.get("training", {}), **given}})


def check_launch(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ``InvalidInput`` for a way of sharing a run among processes that the trainer does not support."""
    kind = str(accelerator.distributed_type.value)
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise invalid("distributed_type", kind, "is not supported", "launch with --multi_gpu, or --use_fsdp")
    if kind != "FSDP":
        if _option("use_fsdp") == "true":
            problem = f"has no effect here, where accelerate chose {kind}"
            raise invalid("--use_fsdp", True, problem, "drop it, or launch several processes on GPUs")
        return
    from torch.distributed.fsdp import CPUOffloadPolicy

    if config.method.of_tokens:
        problem = "trains a part of its network, which is not built for parameters in shards"
        raise invalid("method.name", config.method.name, problem, "launch without FSDP")
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
    if config.method.policy_inverts and (compat := getattr(config.method, "compat", None)) is not None:
        problem = "may invert a batch in no step at all, and FSDP needs all processes to begin together"
        raise invalid("method.compat", compat, problem, "set it to null, or launch without FSDP")
    if config.method.whole_chain and config.training.max_batch is None:
        problem = "is found by a probe, which every process makes for itself, and FSDP needs all of them for a call"
        raise invalid("training.max_batch", None, problem, "give a number, such as 4")


def _option(flag: str) -> str:
    """What ``accelerate launch`` exports for a flag."""
    return os.environ.get(f"ACCELERATE_{flag.upper()}", "").lower()
