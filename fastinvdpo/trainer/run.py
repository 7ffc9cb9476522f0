"""A run from its configuration: data, model and cache are opened, then trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastinvdpo._extras import require
from fastinvdpo.config import TrainConfig
from fastinvdpo.errors import invalid
from fastinvdpo.trainer.cache_writing import precompute
from fastinvdpo.trainer.callbacks import Callback, TrainResult
from fastinvdpo.trainer.checkpoint import find_checkpoint
from fastinvdpo.trainer.launch import with_launcher
from fastinvdpo.trainer.opening import open_data_source, open_dataset, open_model, with_score_range
from fastinvdpo.trainer.performance import require_extras
from fastinvdpo.trainer.trainer import PreferenceTrainer


def train(
    config: TrainConfig, *, resume: str | Path = "auto", progress: bool = True, callbacks: Sequence[Callback] = ()
) -> TrainResult:
    """Train as configured: open the data, load the model, run the loop, write the model.

    With ``cache.path`` the cache is completed first where something of it is missing; the run then reads nothing else,
    and loads neither text encoders nor VAE.

    Args:
        resume, progress, callbacks: as in :class:`PreferenceTrainer`. The section ``evaluation`` needs a callback:
            ``fastinvdpo.evaluation.EvaluationCallback(config.evaluation)``.

    Raises:
        InvalidInput: configuration, data, model and checkpoint do not fit together.
        MissingExtra: a package of the ``train`` extra is missing.
        NonFiniteLoss: a loss or gradient was not finite; the last good checkpoint is kept.
    """
    config = with_launcher(config)
    for package in ("accelerate", "diffusers"):
        require(package, extra="train", purpose="training")
    require_extras(config)
    if config.evaluation is not None and not callbacks:
        remedy = (
            "pass callbacks=[fastinvdpo.evaluation.EvaluationCallback(config.evaluation)], as fastinvdpo train does"
        )
        raise invalid("evaluation", config.evaluation.prompts, "needs a callback that samples and scores", remedy)
    options: dict[str, Any] = {"callbacks": callbacks, "resume": resume, "progress": progress}
    if config.cache.path is None:
        dataset = open_dataset(config)
        config = with_score_range(config, dataset.source)
        return PreferenceTrainer(open_model(config), config.method, dataset, config, **options).train()
    find_checkpoint(resume, Path(config.output.directory) / "checkpoints")  # refused before anything is computed
    if config.method.needs_scores:
        config = with_score_range(config, open_data_source(config.data))
    cache = precompute(config, progress=progress)
    model = open_model(config, frozen_parts=config.evaluation is not None)
    return PreferenceTrainer(model, config.method, cache, config, **options).train()
