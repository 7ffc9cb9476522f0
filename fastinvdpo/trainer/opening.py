"""What a configuration names, opened: data set, model, accelerator."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

import torch

from fastinvdpo._extras import require
from fastinvdpo.config import TrainConfig
from fastinvdpo.config.explain import under
from fastinvdpo.config.sections import DataSection
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import has_key
from fastinvdpo.models.quantization import quantize_network
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer.checkpoint import FILES

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.data import PairDataset, PairSource
    from fastinvdpo.models import DiffusionModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL_OPTIONS = ("vae", "zero_terminal_snr", "max_sequence_length", "guidance_embedding")
EVALUATION_FILES = ("evaluation/base.json", "evaluation/history.jsonl")
FLOW_FAMILIES = ("stable-diffusion-3", "flux")


class Scored(Protocol):
    @property
    def has_scores(self) -> bool: ...


def open_dataset(config: TrainConfig) -> PairDataset:
    """The pairs. Raises ``InvalidInput`` when they, or the method's needs, are not met."""
    dataset = open_pairs(config.data, seed=config.training.seed)
    check_dataset(config, dataset)
    return dataset


def open_pairs(data: DataSection, *, seed: int = 0, all_broken: bool = False) -> PairDataset:
    """The pairs that the section describes; with ``all_broken`` any number of rows may be broken."""
    from fastinvdpo.data import Buckets, PairDataset

    resolution = None
    if data.buckets is not None and data.resolution is not None:
        resolution = Buckets(data.resolution, data.buckets.multiple, data.buckets.max_aspect)
    return PairDataset(
        open_data_source(data),
        ties=data.ties,
        resolution=resolution or data.resolution,
        random_flip=data.random_flip,
        center_crop=data.center_crop,
        relabel_by_score=data.relabel_by_score,
        seed=seed,
        max_broken=sys.maxsize if all_broken else data.max_broken,
    )


def open_data_source(data: DataSection) -> PairSource:
    """The rows that the section names, before any of them is checked. Raises ``InvalidInput`` where there are none."""
    from fastinvdpo.data import open_source

    return open_source(
        data.path,
        format=data.format,
        columns=data.columns,
        split=data.split,
        revision=data.revision,
        subset=data.subset,
        streaming=data.streaming,
        shuffle_buffer=data.shuffle_buffer,
        image_root=data.image_root,
        rank_pairs=data.rank_pairs,
    )


def check_dataset(config: TrainConfig, dataset: Scored) -> None:
    """Raise ``InvalidInput`` when the method needs what the data set lacks."""
    if config.method.needs_scores and not dataset.has_scores:
        remedy = "add columns score_0 and score_1, or name yours in data.columns"
        problem = f"weighs pairs by scores, and {config.data.path} has none"
        raise invalid("method.name", config.method.name, problem, remedy)


def with_score_range(config: TrainConfig, source: PairSource | None) -> TrainConfig:
    """The configuration with ``method.score_range`` as a number where it is ``auto``; others as they are.

    Raises:
        InvalidInput: no range is stored with the scores, or a given number is not of their unit.
    """
    from fastinvdpo.data.score_range import measured_range, stored_range

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


def open_model(config: TrainConfig, *, frozen_parts: bool = True) -> DiffusionModel:
    """The model to start from, on the host; without text encoders and VAE when ``frozen_parts`` is False.

    With ``model.quantization`` its network is quantized here, so that a device never has to hold it whole.
    """
    model = _load(config, frozen_parts)
    if config.model.quantization is not None:
        quantize_network(model, config.model.quantization, again=lambda: _load(config, False).network)
    return model


def _load(config: TrainConfig, frozen_parts: bool) -> DiffusionModel:
    from fastinvdpo.models import load_model, resolve_family

    source = config.model
    family = resolve_family(source.family, source.path, source.revision)
    options = {name: getattr(source, name) for name in MODEL_OPTIONS}
    if family in FLOW_FAMILIES:
        options["resolution"] = config.data.resolution
    return load_model(
        family,
        source.path,
        unet_init=source.unet_init,
        revision=source.revision,
        variant=source.variant,
        frozen_parts=frozen_parts,
        **options,
    )


def open_output(config: TrainConfig) -> OutputDirectory:
    """The output directory, for this process alone.

    Raises:
        InvalidInput: it cannot be written, another run writes there, or files are in the way that no run wrote.
    """
    from fastinvdpo.data.broken import REPORT

    # An earlier version left no mark.
    earlier = "checkpoints/step-????????/meta.json"
    output = OutputDirectory(
        config.output.directory,
        "output.directory",
        earlier=lambda path: any(has_key(file, "versions") for file in path.glob(earlier)),
        reads=[config.model.path, config.data.path, config.cache.path],
    )
    try:
        growing = ["history.jsonl", *(f"checkpoints/step-????????/{name}" for name in FILES)]
        growing += ["tensorboard/fastinvdpo/*"] if config.output.tensorboard else []
        models = ["model", *(["adapter"] if config.model.lora is not None else [])]
        results = [*REPORT, *models, *([f"{name}-raw" for name in models] if config.training.ema_decay else [])]
        if config.evaluation is not None:
            growing += EVALUATION_FILES
            results += ["best"] if config.evaluation.keep_best else []
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
