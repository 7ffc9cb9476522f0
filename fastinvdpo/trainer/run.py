"""A run from its configuration: data, model and cache are opened, then trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fastinvdpo.config import TrainConfig
from fastinvdpo.data import LikedDataset, PairDataset
from fastinvdpo.errors import invalid
from fastinvdpo.trainer import opening
from fastinvdpo.trainer.cache import PairCache
from fastinvdpo.trainer.cache_writing import precompute
from fastinvdpo.trainer.callbacks import Callback, TrainResult
from fastinvdpo.trainer.checkpoint import find_checkpoint
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
    config = opening.with_launcher(config)
    require_extras(config)
    if config.evaluation is not None and not callbacks:
        callback = "fastinvdpo.evaluation.EvaluationCallback(config.evaluation)"
        remedy = f"pass callbacks=[{callback}], as fastinvdpo train does"
        raise invalid("evaluation", config.evaluation.prompts, "needs a callback that samples and scores", remedy)
    with opening.open_output(config) if os.environ.get("RANK", "0") == "0" else nullcontext() as output:
        pairs: PairDataset | LikedDataset | PairCache
        if config.cache.path is None:
            pairs = opening.open_dataset(config)
            config = opening.with_score_range(config, pairs.source)
        else:
            # Refused before anything is computed.
            find_checkpoint(resume, Path(config.output.directory) / "checkpoints")
            if config.method.needs_scores:
                config = opening.with_score_range(config, opening.open_data_source(config.data))
            pairs = precompute(config, progress=progress)
        model = opening.open_model(config, frozen_parts=config.cache.path is None or config.evaluation is not None)
        return PreferenceTrainer(
            model, config.method, pairs, config, callbacks=callbacks, resume=resume, progress=progress, output=output
        ).train()
