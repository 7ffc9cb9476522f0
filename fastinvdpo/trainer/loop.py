"""The training loop: one for all methods, for full fine-tuning and for LoRA."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastinvdpo._extras import require
from fastinvdpo.data import PairDataset
from fastinvdpo.data.broken import DataSummary, copy_report, write_report
from fastinvdpo.diffusion.prompt import chunked
from fastinvdpo.errors import NonFiniteLoss, invalid
from fastinvdpo.methods import PairBatch
from fastinvdpo.trainer.accounting import measure_costs, peak_memory
from fastinvdpo.trainer.atomic import clean_leftovers
from fastinvdpo.trainer.batches import BatchBuilder, Pairs
from fastinvdpo.trainer.cache import PairCache
from fastinvdpo.trainer.cache_writing import precompute
from fastinvdpo.trainer.cached_batches import CachedBatches
from fastinvdpo.trainer.call_size import choose_max_batch, gradient_passes
from fastinvdpo.trainer.checkpoint import (
    Checkpoint,
    check_same_run,
    check_versions,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fastinvdpo.trainer.config import TrainConfig
from fastinvdpo.trainer.draws import DrawOrder, epoch_order
from fastinvdpo.trainer.evaluating import Evaluate, open_evaluation
from fastinvdpo.trainer.export import export_model
from fastinvdpo.trainer.metrics import names
from fastinvdpo.trainer.model_card import data_digest, model_card
from fastinvdpo.trainer.nonfinite import report_gradient, report_loss
from fastinvdpo.trainer.opening import (
    check_dataset,
    open_accelerator,
    open_data_source,
    open_dataset,
    open_model,
    with_score_range,
)
from fastinvdpo.trainer.performance import (
    decide,
    require_extras,
    set_tf32,
    speed_up,
    tell_changes,
)
from fastinvdpo.trainer.publishing import check_publishing, publish
from fastinvdpo.trainer.reporting import Reporter
from fastinvdpo.trainer.sharding import check_launch
from fastinvdpo.trainer.state import as_checkpoint, build_state, restore_state
from fastinvdpo.trainer.step import training_step

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        directory: the output directory; model_directory: the trained model, for ``load_model``.
        steps: optimiser steps made, over all attempts of the run.
        network_evaluations: samples sent through a network, over all attempts and processes, with what the cache cost
            whenever it was computed.
        seconds: wall time of all attempts, without the part of a killed one after its last checkpoint.
        history: the rows of history.jsonl.
        data: what became of every row of the data, where the data set tells.
        evaluation: the rows of evaluation/history.jsonl.
        best_model_directory: the model with the best of them, where it is kept.
    """

    directory: Path
    model_directory: Path
    steps: int
    network_evaluations: int
    seconds: float
    history: list[dict[str, Any]]
    data: DataSummary | None = None
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    best_model_directory: Path | None = None


def train(
    config: TrainConfig, *, resume: str | Path = "auto", progress: bool = True, evaluate: Evaluate | None = None
) -> TrainResult:
    """Train as configured: open the data, load the model, run the loop, write the model.

    With ``cache.path`` the cache is completed first where something of it is missing; the run then reads nothing else,
    and loads neither text encoders nor VAE.

    Args:
        resume: ``"auto"`` continues from the newest complete checkpoint of ``output.directory`` if there is one,
            ``"never"`` starts and refuses a directory that has checkpoints, anything else is the path of a checkpoint.
        progress: show a progress bar on standard error.
        evaluate: draws and scores what the section ``evaluation`` asks for; it is needed exactly with that section.

    Raises:
        InvalidInput: configuration, data, model and checkpoint do not fit together.
        MissingExtra: a package of the ``train`` extra is missing.
        NonFiniteLoss: a loss or gradient was not finite; the last good checkpoint is kept.
    """
    for package in ("accelerate", "diffusers"):
        require(package, extra="train", purpose="training")
    require_extras(config)
    if config.cache.path is None:
        dataset = open_dataset(config)
        config = with_score_range(config, dataset.source)
        return train_model(config, open_model(config), dataset, resume=resume, progress=progress, evaluate=evaluate)
    find_checkpoint(resume, Path(config.output.directory) / "checkpoints")  # refused before anything is computed
    if config.method.needs_scores:
        config = with_score_range(config, open_data_source(config.data))
    cache = precompute(config, progress=progress)
    model = open_model(config, frozen_parts=config.evaluation is not None)
    return _Run(config, model, cache, resume, progress, evaluate).run()


def train_model(
    config: TrainConfig,
    model: DiffusionModel,
    dataset: Pairs,
    *,
    resume: str | Path = "auto",
    progress: bool = True,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """As :func:`train`, with model and data set at hand. The model's network is trained in place."""
    if config.cache.path is not None:
        problem = "belongs to the files that the configuration names, not to a model at hand"
        raise invalid("cache.path", config.cache.path, problem, "call train, or set it to null")
    config = with_score_range(config, getattr(dataset, "source", None))
    return _Run(config, model, dataset, resume, progress, evaluate).run()


class _Run:
    """The parts of one run, and the order in which they are used."""

    def __init__(
        self,
        config: TrainConfig,
        model: DiffusionModel,
        dataset: Pairs | PairCache,
        resume: str | Path,
        progress: bool,
        evaluate: Evaluate | None = None,
    ) -> None:
        self._began = time.perf_counter()
        self.config, self.model = config, model
        self.directory = Path(config.output.directory)
        self.checkpoints = self.directory / "checkpoints"
        check_dataset(config, dataset)
        check_publishing(config)
        found = find_checkpoint(resume, self.checkpoints)
        self.accelerator = open_accelerator(config.training.mixed_precision, config.training.seed)
        check_launch(config, self.accelerator)
        self.evaluation = open_evaluation(config, evaluate, self.directory, self.accelerator)
        self.performance = decide(config, model.network, self.accelerator)
        set_tf32(self.performance, self.accelerator.device)
        self.order = self._deal(dataset)
        self._identity = {"effective batch": self.order.effective_batch, "pairs in the data set": len(dataset)}
        if config.data.buckets is not None:
            self._identity["pairs in a batch of one bucket"] = config.training.batch_size
        # Another run's checkpoint is refused before anything is computed or written.
        self._stored = self._load(found)
        self._last_checkpoint = found
        self.objective = config.method.objective(model.schedule)
        self._prepare_directory()
        self.reporter = Reporter(
            self.directory,
            first_step=self.first_step,
            total_steps=config.training.steps,
            tensorboard=config.output.tensorboard,
            progress=progress and self.accelerator.is_local_main_process,
            active=self.accelerator.is_main_process,
        )
        model.to(self.accelerator.device)
        self.cache = dataset if isinstance(dataset, PairCache) else None
        self._source = getattr(dataset, "source", None)
        self.summary = self._report_data(dataset)
        self.builder = self._batches(dataset)

    def run(self) -> TrainResult:
        """Train from the first step that is missing, and write the model."""
        try:
            self.reporter.start()
            self._set_up()
            self._train()
            return self._finish()
        finally:
            self.builder.close()
            self.reporter.close()

    def _batches(self, source: Pairs | PairCache) -> BatchBuilder | CachedBatches:
        options: dict[str, Any] = {
            "with_unconditional": self.config.method.guided,
            "caption_dropout": self.config.data.caption_dropout,
            "num_workers": self.config.training.num_workers,
        }
        if isinstance(source, PairCache):
            return CachedBatches(source, self.accelerator.device, self.order, **options)
        data = self.config.data
        options |= {"sampled_latents": data.latents == "sampled", "cache_gib": data.cache_gib}
        return BatchBuilder(self.model, source, self.order, **options)

    def _report_data(self, source: Pairs | PairCache) -> DataSummary | None:
        """Write the counts of the data and the list of broken rows beside the run."""
        summary: DataSummary | None = getattr(source, "summary", None)
        if summary is not None and self.accelerator.is_main_process:
            if isinstance(source, PairCache):
                copy_report(source.directory, self.directory)
            elif isinstance(source, PairDataset):
                write_report(summary, source.broken, self.directory)
        return summary

    def _deal(self, dataset: Pairs | PairCache) -> DrawOrder:
        training, accelerator = self.config.training, self.accelerator
        return DrawOrder(
            len(dataset),
            training.seed,
            training.batch_size,
            training.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
            epochs=epoch_order(dataset, training.batch_size),
        )

    def _load(self, path: Path | None) -> Checkpoint | None:
        """The checkpoint to continue from, and what the run had done until then."""
        self.first_step, self._seconds_before = 0, 0.0
        self._evaluations_before: dict[str, int] = {}
        if path is None:
            return None
        stored = load_checkpoint(path)
        check_same_run(stored.meta, self.config.as_dict(), self._identity)
        self.first_step, self._seconds_before = stored.meta["step"], stored.meta["seconds"]
        self._evaluations_before = stored.meta["network_evaluations"]
        return stored

    def _set_up(self) -> None:
        """Build what training changes, and continue from the checkpoint."""
        self.state = build_state(
            self.config,
            self.model,
            self.accelerator,
            self.performance,
            effective_batch=self.order.effective_batch,
            reference_is_cached=self.cache is not None and self.cache.has_reference,
        )
        pair = self.builder.build(self.order.micro_batch(0, 0)[:1])
        self._limit_calls(pair)
        # Counted once; the log multiplies.
        self.costs = measure_costs(self.state.networks, pair, self.config.training)
        if self.evaluation is not None:
            self.evaluation.start(self.model, self.state, self.reporter, self.first_step)
        # The probes of size and cost see the networks as they are: each size would be compiled otherwise.
        speed_up(self.state.networks, self.performance)
        self.reporter.say(str(self.performance))
        if self._stored is not None:
            check_versions(self._stored.meta, self.reporter.say)
            tell_changes(self._stored.meta.get("performance"), self.performance, self.reporter.say)
            restore_state(self.state, self._stored, self.accelerator)
            self._stored = None  # its weights need not stay in memory
            self.reporter.say(f"Resuming after step {self.first_step}.")

    def _train(self) -> None:
        config, training = self.config, self.config.training
        requests = (
            self.order.micro_batch(step, micro)
            for step in range(self.first_step, training.steps)
            for micro in range(training.gradient_accumulation_steps)
        )
        batches = self.builder.batches(requests)
        self._logged_at, self._logged_step = time.perf_counter(), self.first_step
        self._logged_evaluations = self._evaluations()
        for step in range(self.first_step + 1, training.steps + 1):
            training_step(
                self.state,
                self.objective,
                islice(batches, training.gradient_accumulation_steps),
                self.accelerator,
                accumulation=training.gradient_accumulation_steps,
                max_grad_norm=config.optimizer.max_grad_norm,
                seed=training.seed,
            )
            self.reporter.step()
            last = step == training.steps
            if step == 1 or last or step % config.output.log_every == 0:
                self._log(step)
            if self.evaluation is not None and (last or step % self.evaluation.every == 0):
                self._check_finite(step)
                self._logged_at += self.evaluation.after(step, self.model, self.state, self._card)  # not training
            if last or step % config.output.checkpoint_every == 0:
                self._save(step)

    def _prepare_directory(self) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            clean_leftovers(self.checkpoints)
            clean_leftovers(self.directory)
        self.accelerator.wait_for_everyone()

    def _limit_calls(self, pair: PairBatch) -> None:
        """Decide how many samples a network is asked about at once, tried on a pair, and how gradients are streamed."""
        training, state = self.config.training, self.state
        state.gradient_passes = gradient_passes(self.config, str(self.accelerator.distributed_type.value))
        if training.max_batch is not None:
            state.max_batch = training.max_batch
        elif self.config.method.whole_chain:
            networks, passes = state.networks, state.gradient_passes
            state.max_batch = choose_max_batch(networks, self.objective, pair, self.accelerator, passes=passes)
            if self.accelerator.device.type == "cuda":
                self.reporter.say(f"{state.max_batch} network evaluations fit into one call (training.max_batch).")

    def _check_finite(self, step: int) -> None:
        """Raise if a step since the last look met something that is not finite."""
        accelerator, guard = self.accelerator, self.state.guard
        several = accelerator.num_processes > 1
        found = float(accelerator.reduce(guard.found.clone(), "sum")) if several else float(guard.found)
        if not found:
            return
        if self.state.networks.shards is not None:
            self.state.networks.shards.gather()  # together, since what follows only the process that found it does
        kept = "No checkpoint was due yet."
        if self._last_checkpoint is not None:
            kept = f"The last good checkpoint is {self._last_checkpoint}."
        raised = guard.raised()
        if raised is None:
            raise NonFiniteLoss(f"Another process met a loss that is not finite, up to step {step}. {kept}")
        kind, draw = raised
        at = draw // self.order.effective_batch + 1
        if kind == "gradient":
            micros = range(self.config.training.gradient_accumulation_steps)
            draws = [draw for micro in micros for draw in self.order.micro_batch(at - 1, micro)]
            report_gradient(step=at, rows=[self.builder.row(draw) for draw in draws], kept=kept)
        batch = self.builder.build(range(draw, draw + 1))
        networks, size = self.state.networks, self.state.max_batch
        limited = chunked(networks.policy, size), chunked(networks.reference, size)
        with torch.no_grad():
            out = self.objective(*limited, batch, seed=self.config.training.seed)
        report_loss(batch, out, step=at, row=self.builder.row(draw), kept=kept)

    def _log(self, step: int) -> None:
        self._check_finite(step)
        means = self.state.metrics.device_means()
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        self.state.metrics.clear()
        row: dict[str, Any] = {"step": step, **dict(zip(names(), means.tolist(), strict=True))}
        now = time.perf_counter()
        pairs = (step - self._logged_step) * self.order.effective_batch
        row["learning_rate"] = self.state.learning_rate
        evaluations = self._evaluations()
        since = {kind: count - self._logged_evaluations[kind] for kind, count in evaluations.items()}
        row |= {f"network_evaluations_{kind}": count for kind, count in evaluations.items()}
        processes = self.accelerator.num_processes
        row |= self.costs.row(since, pairs=pairs, seconds=now - self._logged_at, devices=processes)
        row["peak_memory_bytes"] = peak_memory(self.accelerator)
        row["seconds"] = self._seconds()
        self._logged_at, self._logged_step, self._logged_evaluations = now, step, evaluations
        self.reporter.row(row)

    def _save(self, step: int) -> None:
        self._check_finite(step)
        meta = {
            "format": 1,
            "config": self.config.as_dict(),
            "run": self._identity,
            "performance": self.performance.as_dict(),
            "next_draw": step * self.order.effective_batch,
            "network_evaluations": self._evaluations(),
            "seconds": self._seconds(),
        }
        checkpoint = as_checkpoint(self.state, self.accelerator, meta)
        if checkpoint is not None:
            keep = self.config.output.keep_checkpoints
            self._last_checkpoint = save_checkpoint(self.checkpoints, step, checkpoint, keep)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> TrainResult:
        steps = max(self.first_step, self.config.training.steps)
        evaluations, main, networks = self._evaluations(), self.accelerator.is_main_process, self.state.networks
        if main and networks.shards is None:
            self.accelerator.unwrap_model(networks.wrapped, keep_fp32_wrapper=False)
        if main or networks.shards is not None:
            export_model(
                self.model,
                networks,
                self.state.ema,
                self.directory,
                write=main,
                pipeline=self.config.output.pipeline,
                card=self._card(steps) if main else None,
            )
        self.accelerator.wait_for_everyone()
        if main and (address := publish(self.config, self.directory)) is not None:
            self.reporter.say(f"Uploaded to {address}.")
        return TrainResult(
            directory=self.directory,
            model_directory=self.directory / "model",
            steps=steps,
            network_evaluations=sum(evaluations.values()) + (self.cache.network_evaluations if self.cache else 0),
            seconds=self._seconds(),
            history=self.reporter.rows,
            data=self.summary,
            evaluation=[] if self.evaluation is None else self.evaluation.rows,
            best_model_directory=None if self.evaluation is None else self.evaluation.best_model,
        )

    def _card(self, step: int) -> str:
        return model_card(
            self.config,
            self.model,
            self.reporter.rows,
            step=step,
            pairs=self.order.pairs,
            digest=self._digest,
            evaluation=[] if self.evaluation is None else self.evaluation.rows,
        )

    @cached_property
    def _digest(self) -> str:
        """Of the data, which is read for it once, whatever the number of cards."""
        if not self.config.output.data_hash:
            return "not hashed (output.data_hash)"
        return data_digest(self._source, None if self.cache is None else self.cache.directory)

    def _evaluations(self) -> dict[str, int]:
        """Network evaluations with and without gradient, over all attempts of the run and all processes."""
        counts = dict(self.state.networks.evaluations)
        if self.accelerator.num_processes > 1:
            own = torch.tensor(list(counts.values()), device=self.accelerator.device)
            counts = dict(zip(counts, self.accelerator.reduce(own, "sum").tolist(), strict=True))
        return {kind: count + self._evaluations_before.get(kind, 0) for kind, count in counts.items()}

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began
