"""The sections of a configuration: every key, its type and its default."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from fastinvdpo.config.explain import explain
from fastinvdpo.errors import invalid
from fastinvdpo.io import as_written, expand_path
from fastinvdpo.methods import ALL_METHODS, TimestepSampling, TrainingMethod
from fastinvdpo.models.base import check_frames


def _count_or_share(value: object) -> int | float:
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if count or (isinstance(value, float) and 0 <= value < 1):
        return value  # type: ignore[return-value]
    raise ValueError("is neither a count (0, 10) nor a share below 1 (0.01)")


def _expanded(path: str, info: ValidationInfo) -> str:
    return expand_path(path, str(info.field_name))


Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=1, lt=2**53)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NonEmpty: TypeAlias = Annotated[str, Field(min_length=1)]
Place: TypeAlias = Annotated[NonEmpty, AfterValidator(_expanded), PlainSerializer(as_written)]
Quantization: TypeAlias = Literal["bf16", "fp8", "int8", "nf4"]
CountOrShare: TypeAlias = Annotated[int | float, PlainValidator(_count_or_share)]


class Section(BaseModel):
    """Base of all sections: unknown keys and values of another type are errors, a whole number passes as a float."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _means_something(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if isinstance(value, str) and value.lower() == "none" and cls.model_fields[name].default is None:
            raise invalid(name, value, "is text here", "write null for nothing, ./none for a file of that name")
        return value


class LoraSection(Section):
    """Low-rank adapters on the named modules; without names, on the family's attention projections."""

    rank: Count = 8
    alpha: Positive = 8.0
    target_modules: Annotated[list[NonEmpty], Field(min_length=1)] | None = None


class ModelSection(Section):
    """``family``: ``auto`` infers it from the checkpoint. ``unet_init``: other weights of the denoiser, UNet or
    transformer, to start from; ``vae``: another VAE. ``config``: where ``path`` is a single file, a directory in
    diffusers' format that says what it holds. ``zero_terminal_snr``: rescale the noise schedule so that its last
    level is pure noise; null: as the checkpoint says. ``max_sequence_length``: tokens of a prompt, of SD3 and FLUX.1
    T5's; ``guidance_embedding``: the guidance input of FLUX.1-dev; null: as diffusers' pipelines. Of ``mars``, ``path``
    is a checkpoint or a language model, ``vae`` the VQ tokenizer of images, and ``low_resolution`` the side, in pixels,
    of the small images that images follow from.

    ``reference_dtype``: type of the frozen copy's weights in full fine-tuning; the policy's when null.
    ``reference_quantization``: its linear layers in 16, 8 or 4 bits; convolutions, norms and biases stay in
    ``reference_dtype``. ``quantization``: the same of the network that LoRA adapts, whose frozen weights are policy and
    reference at once. ``offload``: what one of the two made small waits on the host, and crosses over for each product.
    """

    family: Literal[
        "auto", "digits", "stable-diffusion", "stable-diffusion-3", "flux", "flux-kontext", "flux2-klein", "qwen-image",
        "qwen-image-edit", "z-image", "wan", "mars",
    ] = "auto"  # fmt: skip
    path: Place
    unet_init: Place | None = None
    vae: Place | None = None
    revision: NonEmpty | None = None
    variant: NonEmpty | None = None
    config: Place | None = None
    zero_terminal_snr: bool | None = None
    max_sequence_length: Count | None = None
    guidance_embedding: NonNegative | None = None
    low_resolution: Count | None = None
    lora: LoraSection | None = None
    quantization: Quantization | None = None
    reference_dtype: Literal["fp32", "bf16"] | None = None
    reference_quantization: Quantization | None = None
    offload: bool = False
    init_perturbation: Share = 0.0


class BucketsSection(Section):
    """Aspect-ratio buckets of the area of ``data.resolution``, with sides that are multiples of ``multiple``."""

    multiple: Count = 64
    max_aspect: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0


class DataSection(Section):
    """The data (docs/guides/data.md). ``form``: what a row is, a pair, an image that was liked or disliked, or an image
    with a caption; of pairs, a method that trains on single images takes winners for likes. ``cache_gib``: host memory
    for latents and prompt embeddings that are the same at every visit. ``split``, ``revision``, ``subset``: of a
    ``datasets`` repository. ``max_broken``: a count, or a share. ``latents``: the mean of the VAE's posterior, or a
    sample of it, the same at every visit of an image. ``masks``: only what is white in the columns ``mask``, or
    ``mask_0`` and ``mask_1``, counts. ``frames``: the first so many of a video, 4k + 1 (Wan); null: images.
    """

    path: Place
    form: Literal["pairs", "likes", "images"] = "pairs"
    format: Literal["auto", "parquet", "folder", "hpd", "webdataset", "datasets"] = "auto"
    split: NonEmpty = "train"
    revision: NonEmpty | None = None
    subset: NonEmpty | None = None
    streaming: bool = False
    shuffle_buffer: Count = 1000
    image_root: Place | None = None
    rank_pairs: Literal["all", "best"] = "all"
    columns: dict[str, NonEmpty] = {}
    ties: Literal["drop", "keep", "error"] = "drop"
    resolution: Count | None = None
    buckets: BucketsSection | None = None
    random_flip: bool = False
    center_crop: bool = True
    relabel_by_score: bool = False
    max_broken: CountOrShare = 0
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    latents: Literal["mean", "sampled"] = "mean"
    masks: bool = False
    frames: Annotated[int, AfterValidator(partial(check_frames, argument="frames"))] | None = None
    cache_gib: NonNegative = 2.0


class OptimizerSection(Section):
    """``name``: ``adamw`` (fused), ``adamw8bit`` with moments in 8 bits (bitsandbytes), or transformers' ``adafactor``
    as the released codes set it for SDXL: the learning rate as given, no relative step, no scaling by the size of a
    weight, updates clipped to a root mean square of 1. It has a decay and an ε of its own: ``beta1``, ``beta2`` and
    ``epsilon`` are Adam's. ``scale_lr``: multiply the learning rate by the pairs per optimizer step, over all
    processes.
    """

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    learning_rate: Positive = 1.0e-8
    scale_lr: bool = False
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Positive = 1.0e-8
    weight_decay: NonNegative = 0.01
    max_grad_norm: Positive | None = 1.0
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant_with_warmup"
    warmup_steps: Annotated[int, Field(ge=0, lt=2**53)] = 500


class TrainingSection(Section):
    """``batch_size`` counts pairs per micro-batch and process; of methods that train on single images, images.

    ``max_batch``: network evaluations in one call at most. It also sets the memory of a step that scores a whole
    trajectory, whose gradient is streamed in calls of that size; null: as many as memory has room for
    (``trainer/accounting.py``), and no limit for other methods. ``gradient_passes``: how such a gradient is
    streamed, 2 with a first pass that has no gradient, 1 with a second gradient buffer; null: 1 with adapters or with
    one pair per step and process, else 2.
    """

    steps: Count = 2000
    batch_size: Count = 1
    gradient_accumulation_steps: Count = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    max_batch: Count | None = None
    gradient_passes: Literal[1, 2] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: Seed = 0
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0


class CacheSection(Section):
    """What does not depend on the policy, stored by ``fastinvdpo precompute`` and read in training.

    ``dtype``: of embeddings, trajectories and reference predictions. fp32 gives the losses of training without a cache;
    bf16 needs half the space, and rounds them to 8 bits. ``draws``: store K draws (timestep and noise) of every pair,
    with the reference's predictions; a visit of the pair takes one of them, and training needs no reference. null:
    every visit draws anew. ``batch_size``: pairs that are encoded and inverted at once; ``training.batch_size`` when
    null.
    """

    path: Place | None = None
    draws: Count | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    batch_size: Count | None = None


class PerformanceSection(Section):
    """How networks compute, not what: a switch changes the last bits of a run and its speed. null: by device.

    ``channels_last``: convolution weights in the layout that tensor cores read; null: on CUDA in half precision
    (mixed_precision bf16 or fp16), not with adamw8bit, which would undo it. ``attention``: PyTorch's own fused
    attention, or that of xformers (CUDA, extra ``xformers``); null: as the model family loads it, which is sdpa today.
    ``compile``: torch.compile of the blocks that repeat (diffusers' transformer blocks), anew for every shape of a
    call; null: off. ``cuda_graphs``: network calls without gradient, which an inversion is made of, replayed as CUDA
    graphs; null: off. Both need calls of few shapes: ``method.static_shapes`` with InPO and SmPO. ``tf32``: float32
    matrix products and convolutions in TF32; null: on CUDA.
    """

    channels_last: bool | None = None
    attention: Literal["sdpa", "xformers"] | None = None
    compile: bool | None = None
    cuda_graphs: bool | None = None
    tf32: bool | None = None


class EvaluationSection(Section):
    """Scores of samples in the course of a run (docs/guides/evaluation.md): of the first ``samples`` prompts, every so
    many steps and after the last one. ``guidance_scale``: null: as the model's own pipeline. ``keep_best``: keep the
    model with the highest mean of the first scorer.
    """

    every: Count = 500
    prompts: Place
    column: NonEmpty | None = None
    samples: Count = 64
    scorers: Annotated[list[NonEmpty], Field(min_length=1)]
    num_inference_steps: Count = 25
    guidance_scale: NonNegative | None = None
    seed: Seed = 0
    batch_size: Count = 8
    keep_best: bool = True


class OutputSection(Section):
    """``trackers``: of accelerate, such as wandb, beside ``tensorboard``. ``pipeline``: write the whole pipeline into
    ``model``, not the trained network alone. ``data_hash``: read the images once more, for resumes and the model card.
    ``push_to_hub``: OWNER/NAME of the repository that the result is uploaded to. ``formats``: of LoRA adapters, beside
    peft's: ``diffusers``, and ``kohya``, which ComfyUI, Forge and kohya's scripts read (models/kohya.py).
    """

    directory: Place
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    log_every: Count = 10
    tensorboard: bool = True
    trackers: list[NonEmpty] = []
    pipeline: bool = True
    formats: list[Literal["diffusers", "kohya"]] = ["diffusers"]
    data_hash: bool = True
    push_to_hub: NonEmpty | None = None
    hub_private: bool = True


def read_method(section: object) -> TrainingMethod:
    """The method of the section ``method``: its ``name``, and its options. A method is returned as it is.

    Raises ``InvalidInput`` with one line per mistake, by key.
    """
    if isinstance(section, TrainingMethod):
        return section
    if not isinstance(section, Mapping):
        raise invalid("method", section, "is not a section", "write a mapping of key: value pairs")
    name = section.get("name")
    if name not in list(ALL_METHODS):  # it may be of any type
        problem = "is missing and has no default" if name is None else "names no known method"
        raise invalid("method.name", name, problem, f"choose one of {', '.join(map(repr, ALL_METHODS))}")
    options = {key: value for key, value in section.items() if key != "name"}
    try:
        # As JSON: pydantic reads a dataclass strictly from that alone.
        found: TrainingMethod = TypeAdapter(ALL_METHODS[name]).validate_json(json.dumps(options, default=str))
        return found
    except ValidationError as error:
        raise explain(error, known_keys, ("method", name)) from None


def write_method(method: Any) -> dict[str, Any]:
    return {"name": method.name, **dataclasses.asdict(method)}


class RunSections(Section):
    """All sections of a run, each valid by itself."""

    method: Annotated[TrainingMethod, PlainValidator(read_method), PlainSerializer(write_method)]
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    cache: CacheSection = CacheSection()
    performance: PerformanceSection = PerformanceSection()
    evaluation: EvaluationSection | None = None
    output: OutputSection

    def effective_batch(self, processes: int = 1) -> int:
        """Pairs per optimizer step over all processes."""
        return self.training.batch_size * self.training.gradient_accumulation_steps * processes

    @property
    def reference_options(self) -> dict[str, Any] | None:
        """The method's options that decide what a cache holds of the reference; None: it holds nothing of it."""
        return self.method.reference_draws if self.cache.draws else self.method.reference_chain


def known_keys(path: tuple[str, ...]) -> list[str]:
    """Keys that may stand in the section ``path`` of a configuration; ``("method", NAME)`` for a method's options."""
    if path[:1] == ("method",):
        if path[2:] == ("timesteps",):
            return [field.name for field in dataclasses.fields(TimestepSampling)]
        methods = [ALL_METHODS[path[1]]] if len(path) > 1 else ALL_METHODS.values()
        return sorted({"name", *(field.name for method in methods for field in dataclasses.fields(method))})
    section = _section_at(path)
    return [] if section is None else list(section.model_fields)


def takes_text(key: tuple[str, ...]) -> bool:
    """Whether the value of a key may be any text."""
    section = _section_at(key[:-1]) if key else None
    field = None if section is None else section.model_fields.get(key[-1])
    return field is not None and _has_text(field.annotation)


def _section_at(path: tuple[str, ...]) -> type[Section] | None:
    found: type[Section] | None = RunSections
    for name in path:
        field = None if found is None else found.model_fields.get(name)
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
    return found


def _has_text(annotation: Any) -> bool:
    return annotation is str or any(map(_has_text, get_args(annotation)))
