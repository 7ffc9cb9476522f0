"""The training configuration, and combinations of its values that are valid one by one and cannot work together.

Nothing is loaded here; ``TrainConfig.from_mapping`` raises :class:`fastinvdpo.errors.InvalidInput` that names key,
value and remedy for every mistake at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from fastinvdpo.config.explain import explain
from fastinvdpo.config.sections import RunSections, known_keys, write_method
from fastinvdpo.data import Buckets
from fastinvdpo.data.rows import FORMS, MASKS
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import as_written
from fastinvdpo.methods import TrainingMethod


class TrainConfig(RunSections):
    """One training run. Build it with :meth:`from_mapping`, which explains mistakes."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrainConfig:
        """Validate a nested mapping, as a YAML file holds it.

        Raises ``InvalidInput`` with one line per mistake: unknown key (with the closest known one), wrong type, value
        out of range, missing key, or keys that cannot be combined.
        """
        try:
            config = cls.model_validate(dict(mapping))
        except ValidationError as error:
            raise explain(error, known_keys) from None
        if config.method.unpaired and "form" not in config.data.model_fields_set:
            form = "images" if config.method.captioned else "likes"
            config = config.model_copy(update={"data": config.data.model_copy(update={"form": form})})
        _check_combinations(config)
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
    given["method"] = write_method(method) if isinstance(method, TrainingMethod) else dict(method)
    path = "a model at hand" if origin is None else as_written(str(origin.path))
    given["model"] = {"path": path, "family": model.family, **given.get("model", {})}
    form = next((name for name, form in FORMS.items() if form is getattr(source, "form", None)), None)
    at_hand: dict[str, Any] = {"path": as_written(str(getattr(source, "path", "pairs at hand")))}
    at_hand |= {} if form is None else {"form": form}
    at_hand |= {"masks": True} if getattr(pairs, "has_masks", False) else {}
    at_hand |= {"frames": frames} if (frames := getattr(source, "frames", None)) else {}
    given["data"] = {**at_hand, **given.get("data", {})}
    return TrainConfig.from_mapping(given)


def _check_combinations(config: TrainConfig) -> None:
    """Raise one ``InvalidInput`` with a line for each impossible combination."""
    checks = (_method, _tokens, _model, _data, _optimizer, _training, _cache, _performance)
    if problems := [problem for check in checks for problem in check(config)]:
        raise InvalidInput("\n".join(str(problem) for problem in problems))


def runs_on_cuda() -> bool:
    """Whether accelerate will place a run on a CUDA device; looks for one without touching it."""
    return not _forced_to_cpu() and torch.cuda.is_available()


def _forced_to_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _method(config: TrainConfig) -> Iterator[InvalidInput]:
    method = config.method
    if method.zero_gradient_at_reference and config.model.init_perturbation == 0:
        problem = f"starts policy = reference, where the gradient of {method.name} with these options is exactly zero"
        remedy = "set it to 0.01, or choose a variant whose gradient has a determined direction (endpoint)"
        yield invalid("model.init_perturbation", 0.0, problem, remedy)


def _tokens(config: TrainConfig) -> Iterator[InvalidInput]:
    method, model, performance = config.method, config.model, config.performance
    if model.family != "auto" and (model.family == "mars") != method.of_tokens:
        kinds = ("models of image tokens", "diffusion models")
        problem = f"trains {kinds[not method.of_tokens]}, and a model of family {model.family} is none of them"
        yield invalid("method.name", method.name, problem, "choose another method, or another model.family")
    if not method.of_tokens:
        return
    off = {
        "cache.path": config.cache.path,
        "evaluation": config.evaluation and config.evaluation.prompts,
        "data.latents": config.data.latents if config.data.latents != "mean" else None,
        "data.masks": config.data.masks or None,
        "model.lora": model.lora and model.lora.rank,
        "model.quantization": model.quantization,
        "model.reference_dtype": model.reference_dtype,
        "model.reference_quantization": model.reference_quantization,
        "performance.cuda_graphs": performance.cuda_graphs or None,
    }
    for key, value in off.items():
        if value is not None:
            remedy = {"data.latents": "set it to mean", "data.masks": "set it to false"}.get(key, "set it to null")
            yield invalid(key, value, f"is not built for {method.name}, which trains a model of image tokens", remedy)


def _model(config: TrainConfig) -> Iterator[InvalidInput]:
    model = config.model
    if "kohya" in config.output.formats and model.lora is None:
        yield invalid("output.formats", "kohya", "is a format of adapters", "add model.lora, or leave it out")
    if model.quantization is not None and model.lora is None:
        remedy = "add model.lora; for full fine-tuning model.reference_quantization makes the frozen copy small"
        yield invalid("model.quantization", model.quantization, "freezes what full fine-tuning trains", remedy)
    if model.offload and model.quantization is None and model.reference_quantization is None:
        remedy = "name model.quantization with model.lora, or model.reference_quantization; bf16 is the widest"
        yield invalid("model.offload", True, "moves quantized weights alone, and none are", remedy)
    for key in ("reference_dtype", "reference_quantization"):
        value, method = getattr(model, key), config.method
        if value is not None and not method.needs_reference:
            problem = f"has no meaning with method {method.name}, which has no reference"
            yield invalid(f"model.{key}", value, problem, "set it to null")
        elif value not in (None, "fp32") and method.reference_follows:
            problem = "stands still where weights are rounded, and method.reference makes it follow the policy"
            yield invalid(f"model.{key}", value, problem, "set it to null, or method.reference to frozen")
        elif value is not None and model.lora is not None:
            problem = "has no meaning with LoRA, where the reference is the policy with its adapters off"
            other = ", set model.quantization instead" if key == "reference_quantization" else ""
            yield invalid(f"model.{key}", value, problem, f"set it to null{other}, or drop model.lora")


def _data(config: TrainConfig) -> Iterator[InvalidInput]:
    data, method = config.data, config.method
    schema = FORMS[data.form].schema
    if data.form != "pairs" and not method.unpaired:
        problem = f"has no pairs to compare, as method {method.name} does"
        yield invalid("data.form", data.form, problem, "set it to pairs, or method.name to kto")
    if data.form == "images" and method.unpaired and not method.captioned:
        problem = f"does not say which images were liked, and {method.name} compares them by that"
        yield invalid("data.form", data.form, problem, "set it to likes or pairs")
    if method.needs_noise and data.buckets is not None:
        problem = f"resize and crop images, and {method.name} needs those that their noise gives"
        yield invalid("data.buckets", data.buckets, problem, "drop it")
    if method.like_share is not None and data.buckets is not None:
        problem = "balances labels draw by draw, and data.buckets want batches of one shape"
        yield invalid("method.like_share", method.like_share, problem, "set it to null, or drop data.buckets")
    for name in data.columns:
        if name not in schema:
            remedy = f"use the names {', '.join(schema)} on the left, your file's names on the right"
            problem = "does not translate a column that is read"
            yield invalid(f"data.columns.{name}", data.columns[name], problem, remedy)
    if ("score_0" in data.columns) != ("score_1" in data.columns):
        yield invalid("data.columns", data.columns, "names the score of one side only", "name both score_0 and score_1")
    if not data.masks and (named := [name for name in MASKS if name in data.columns]):
        problem = f"leaves {named[0]} unread, which data.columns names"
        yield invalid("data.masks", False, problem, "set it to true, or drop the name")
    if data.masks and (compat := getattr(method, "compat", None)) is not None:
        problem = "reproduces code that has no masks"
        yield invalid("method.compat", compat, problem, "set it to null, or data.masks to false")
    if data.masks and method.unpaired:
        yield invalid("data.masks", True, f"means nothing for {method.name}", "set it to false")
    if not data.center_crop and data.resolution is None:
        problem = "means a random crop of unknown size"
        yield invalid("data.center_crop", False, problem, "set data.resolution as well")
    if data.buckets is None:
        return
    if data.resolution is None:
        yield invalid("data.buckets", None, "have no area", "set data.resolution, the side of the square bucket")
    else:
        try:
            Buckets(data.resolution, data.buckets.multiple, data.buckets.max_aspect)
        except InvalidInput as error:
            yield error
    if data.streaming:
        problem = "does not look at images before they are used, and data.buckets need all their sizes"
        yield invalid("data.streaming", True, problem, "set it to false, or drop data.buckets")
    if config.cache.path is not None:
        problem = "stores latents of one size, and data.buckets give several"
        yield invalid("cache.path", config.cache.path, problem, "set it to null, or drop data.buckets")


def _optimizer(config: TrainConfig) -> Iterator[InvalidInput]:
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.name == "adafactor":
        for key in ("beta1", "beta2", "epsilon"):
            value = getattr(optimizer, key)
            if value != type(optimizer).model_fields[key].default:
                problem = "belongs to Adam and means nothing for optimizer adafactor"
                yield invalid(f"optimizer.{key}", value, problem, "drop it, or set optimizer.name to adamw")
    if optimizer.lr_scheduler == "constant":
        if optimizer.warmup_steps > 0 and "warmup_steps" in optimizer.model_fields_set:
            problem, remedy = "is ignored by lr_scheduler constant", "set it to 0, or choose constant_with_warmup"
            yield invalid("optimizer.warmup_steps", optimizer.warmup_steps, problem, remedy)
    elif optimizer.warmup_steps > steps:
        problem = f"exceeds training.steps = {steps}"
        yield invalid("optimizer.warmup_steps", optimizer.warmup_steps, problem, "lower it, or train longer")


def _training(config: TrainConfig) -> Iterator[InvalidInput]:
    training = config.training
    on_cpu = not runs_on_cuda() and (_forced_to_cpu() or not torch.backends.mps.is_available())
    if training.mixed_precision == "fp16" and on_cpu:
        yield invalid("training.mixed_precision", "fp16", "needs a GPU, and none is in use", "choose no or bf16")
    if not math.isfinite(config.optimizer.learning_rate * config.effective_batch()):
        yield invalid("optimizer.learning_rate", config.optimizer.learning_rate, "overflows", "lower it")
    if training.gradient_passes is not None and not config.method.whole_chain:
        key, problem = "training.gradient_passes", f"means nothing for method {config.method.name!r}"
        yield invalid(key, training.gradient_passes, problem, "set it to null")


def _cache(config: TrainConfig) -> Iterator[InvalidInput]:
    data, path = config.data, config.cache.path
    if config.cache.draws is not None:
        yield from _draws(config, config.cache.draws)
    if path is None:
        return
    moving = {"data.random_flip": data.random_flip, "data.center_crop = false": not data.center_crop}
    for name, used in moving.items():
        if used:
            problem = f"needs the same latents at every visit, and {name} changes them"
            yield invalid("cache.path", path, problem, f"drop {name}, or set cache.path to null")
    if config.cache.draws is None and config.method.reference_chain and data.caption_dropout > 0:
        problem = "holds trajectories, which follow the captions, and data.caption_dropout changes those"
        yield invalid("cache.path", path, problem, "drop data.caption_dropout, or set cache.path to null")


def _draws(config: TrainConfig, draws: int) -> Iterator[InvalidInput]:
    method, off = config.method, "set cache.draws to null"
    if config.cache.path is None:
        yield invalid("cache.draws", draws, "are stored in a cache, and there is none", f"set cache.path, or {off}")
    if method.reference_draws is not None:
        return
    problem, remedy = f"are not stored for method {method.name}", off
    if method.whole_chain:
        problem = f"are of one timestep each, and {method.name} scores a chain, which the cache holds without them"
    elif not method.needs_reference:
        problem = f"hold what a reference predicts, and {method.name} has none"
    elif method.reference_follows is not None:
        problem = "hold what the reference predicts, and method.reference = ema changes that"
        remedy = f"set method.reference to frozen, or {off}"
    elif method.policy_inverts:
        problem = f"hold noisy latents, and {method.name} makes them with the policy, which changes"
        remedy = f"set method.inverter to reference, or {off}"
    yield invalid("cache.draws", draws, problem, remedy)


def _performance(config: TrainConfig) -> Iterator[InvalidInput]:
    switches = config.performance
    if not runs_on_cuda():
        for key in ("attention", "cuda_graphs", "tf32"):
            value = getattr(switches, key)
            if value not in (None, False, "sdpa"):
                yield invalid(f"performance.{key}", value, "needs CUDA, which is not in use", "set it to null")
    if switches.channels_last and config.optimizer.name == "adamw8bit":
        problem = "is undone by optimizer adamw8bit, which makes the weights contiguous"
        yield invalid("performance.channels_last", True, problem, "set it to null, or optimizer.name to adamw")
    if switches.compile and config.model.quantization is not None:
        problem = f"is not built for layers in {config.model.quantization}"
        yield invalid("performance.compile", True, problem, "set it to null, or model.quantization to null")
    for key, used in (("compile", switches.compile), ("cuda_graphs", switches.cuda_graphs)):
        if used and not config.method.fixed_shapes:
            problem = "needs forward passes of few shapes, and those of an inversion shrink the further it gets"
            yield invalid(f"performance.{key}", True, problem, "set method.static_shapes to true")
