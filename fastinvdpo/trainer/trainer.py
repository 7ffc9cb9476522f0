"""The trainer: one loop for all methods, for full fine-tuning and for LoRA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastinvdpo.atomic import make_directory
from fastinvdpo.config import TrainConfig, complete
from fastinvdpo.data.broken import DataSummary, copy_report, write_report
from fastinvdpo.data.pairs import PairDataset
from fastinvdpo.diffusion.prompt import chunked
from fastinvdpo.errors import NonFiniteLoss, invalid
from fastinvdpo.io import key_hash
from fastinvdpo.methods import Method, PairBatch
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer.accounting import measure_costs, peak_memory
from fastinvdpo.trainer.batches import BatchBuilder, EncodedPairs, PairEncoder, Pairs
from fastinvdpo.trainer.cache import PairCache
from fastinvdpo.trainer.call_size import choose_max_batch, gradient_passes
from fastinvdpo.trainer.callbacks import Callback, Reporting, TrainResult
from fastinvdpo.trainer.checkpoint import (
    Checkpoint,
    check_same_run,
    check_versions,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fastinvdpo.trainer.contents import attempts, contents_of
from fastinvdpo.trainer.draws import DrawOrder, epoch_order
from fastinvdpo.trainer.export import Place, export_model
from fastinvdpo.trainer.hub import Publishing, model_card
from fastinvdpo.trainer.launch import check_launch, with_launcher
from fastinvdpo.trainer.metrics import names
from fastinvdpo.trainer.nonfinite import report_gradient, report_loss
from fastinvdpo.trainer.opening import check_dataset, open_accelerator, open_output, with_score_range
from fastinvdpo.trainer.performance import decide, set_tf32, speed_up, tell_changes
from fastinvdpo.trainer.state import as_checkpoint, build_state, restore_state
from fastinvdpo.trainer.step import training_step

if TYPE_CHECKING:
    from fastinvdpo.models import DiffusionModel


class PreferenceTrainer:
    """Aligns a model to preference pairs::

        model = fastinvdpo.models.load_model("auto", "stable-diffusion-v1-5/stable-diffusion-v1-5")
        pairs = fastinvdpo.data.PairDataset("pairs.parquet", resolution=512)
        config = {"optimizer": {"learning_rate": 1e-8}, "training": {"steps": 400}, "output": {"directory": "run"}}
        result = PreferenceTrainer(model, fastinvdpo.methods.InPO(beta=2000.0), pairs, config).train()

    Args:
        model: its network is trained in place.
        method: the method with its options, or its section of a configuration.
        pairs: the data set, or a complete cache.
        config: the other sections of a configuration, as a mapping or whole; ``model.path`` and ``data.path`` are only
            recorded, since model and pairs are at hand.
        callbacks: called in this order, after :class:`Reporting`.
        resume: ``"auto"`` continues from the newest complete checkpoint of ``output.directory`` if there is one,
            ``"never"`` starts and refuses a directory that has checkpoints, anything else is the path of a checkpoint.
        progress: show a progress bar on standard error.
        output: ``output.directory`` where it has been opened already; the caller closes it.

    Attributes:
        config, model, objective, directory: of the run.
        accelerator: accelerate's, made for this run.
        order: which pair is drawn when. builder: makes batches of them.
        state: what training changes, once :meth:`train` has begun.
        first_step: the step that the run continues after; 0 for a new one.
        reporting: the log.

    Raises:
        InvalidInput: arguments, launch and checkpoint do not fit together; nothing was computed or written.
    """

    def __init__(
        self,
        model: DiffusionModel,
        method: Method | Mapping[str, Any],
        pairs: Pairs | PairCache,
        config: TrainConfig | Mapping[str, Any],
        *,
        callbacks: Sequence[Callback] = (),
        resume: str | Path = "auto",
        progress: bool = True,
        output: OutputDirectory | None = None,
    ) -> None:
        self._began = time.perf_counter()
        self.cache = pairs if isinstance(pairs, PairCache) else None
        self._source = getattr(pairs, "source", None)
        config = with_score_range(with_launcher(complete(config, method, model, pairs)), self._source)
        self.config, self.model, self.directory = config, model, Path(config.output.directory)
        if self.cache is None and config.cache.path is not None:
            problem = "belongs to the files that the configuration names, not to pairs at hand"
            raise invalid("cache.path", config.cache.path, problem, "call train, or set it to null")
        check_dataset(config, pairs)
        found = find_checkpoint(resume, self._checkpoints)
        self.accelerator = open_accelerator(config)
        check_launch(config, self.accelerator)
        self.reporting = Reporting(progress)
        self._callbacks: list[Callback] = [self.reporting, *callbacks]
        if config.output.push_to_hub is not None:
            self._callbacks.append(Publishing(config))
        for callback in self._callbacks:
            callback.on_init(self)
        self.performance = decide(config, model.network, self.accelerator)
        set_tf32(self.performance, self.accelerator.device)
        self.order = self._deal(pairs)
        self._identity = {"effective batch": self.order.effective_batch, "pairs in the data set": len(pairs)}
        if config.data.buckets is not None:
            self._identity["pairs in a batch of one bucket"] = config.training.batch_size
        self._pairs = pairs
        # Another run's checkpoint is refused before anything is computed or written.
        self._stored, self._last_checkpoint = self._load(found), found
        self.objective = config.method.objective(model.schedule)
        self.output, self._opened = output, ExitStack()

    def train(self) -> TrainResult:
        """Train from the first step that is missing, and write the model.

        Raises:
            NonFiniteLoss: a loss or gradient was not finite; the last good checkpoint is kept.
        """
        try:
            self.start()
            self._loop()
            return self._finish()
        finally:
            self.close()

    def prepare(self) -> None:
        """Make the output directory with the counts of the data, and what batches come from; :meth:`start` does."""
        self.summary: DataSummary | None = getattr(self._pairs, "summary", None)
        if self.accelerator.is_main_process:
            if self.output is None:
                self.output = self._opened.enter_context(open_output(self.config))
            make_directory(self._checkpoints)
            if self.cache is not None:
                copy_report(self.cache.directory, self.output)
            elif self.summary is not None and isinstance(self._pairs, PairDataset):
                write_report(self.summary, self._pairs.broken, self.output)
        self.accelerator.wait_for_everyone()
        self.model.to(self.accelerator.device)
        self.builder = self._batches()

    def start(self) -> None:
        """Build what training changes, and continue from the checkpoint; :meth:`train` does."""
        if not hasattr(self, "builder"):
            self.prepare()
        self.state = build_state(
            self.config,
            self.model,
            self.accelerator,
            self.performance,
            effective_batch=self.order.effective_batch,
            reference_is_cached=self.cache is not None and self.cache.has_reference,
        )
        self.state.auto_beta = self.objective.auto_beta
        pair = self.builder.build(self.order.micro_batch(0, 0)[:1])
        self._limit_calls(pair)
        # Counted once; the log multiplies.
        self.costs = measure_costs(self.state.networks, pair, self.config.training)
        for callback in self._callbacks:
            callback.on_start(self)
        # The probes of size and cost see the networks as they are: each size would be compiled otherwise.
        speed_up(self.state.networks, self.performance)
        self.say(str(self.performance))
        if self._stored is not None:
            check_versions(self._stored.meta, self.say)
            tell_changes(self._stored.meta.get("performance"), self.performance, self.say)
            restore_state(self.state, self._stored, self.accelerator)
            history = key_hash({"rows": self.reporting.rows})
            if self.accelerator.is_main_process and self._stored.meta.get("history", history) != history:
                self.say("history.jsonl is not what the checkpoint's run had logged: it was changed or damaged.")
            self._stored = None  # its weights need not stay in memory
            self.say(f"Resuming after step {self.first_step}.")

    def close(self) -> None:
        """Stop threads and close the log; :meth:`train` does."""
        if hasattr(self, "builder"):
            self.builder.close()
        for callback in reversed(self._callbacks):
            callback.close()
        self._opened.close()

    def say(self, message: str) -> None:
        """Show a line above the progress bar, or where there is none, log it."""
        self.reporting.say(message)

    @property
    def _checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def _batches(self) -> BatchBuilder:
        data, pairs = self.config.data, self._pairs
        encoded: EncodedPairs = (
            pairs
            if isinstance(pairs, PairCache)
            else PairEncoder(self.model, pairs, sampled_latents=data.latents == "sampled", cache_gib=data.cache_gib)
        )
        return BatchBuilder(
            encoded,
            self.accelerator.device,
            self.order,
            with_unconditional=self.config.method.guided,
            caption_dropout=data.caption_dropout,
            num_workers=self.config.training.num_workers,
        )

    def _deal(self, pairs: Pairs | PairCache) -> DrawOrder:
        training, accelerator = self.config.training, self.accelerator
        return DrawOrder(
            len(pairs),
            training.seed,
            training.batch_size,
            training.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
            epochs=epoch_order(pairs, training.batch_size),
        )

    def _load(self, path: Path | None) -> Checkpoint | None:
        """The checkpoint to continue from, and what the run had done until then."""
        self.first_step, self._seconds_before = 0, 0.0
        self._evaluations_before: dict[str, int] = {}
        stored = None if path is None else load_checkpoint(path)
        meta: dict[str, Any] = {} if stored is None else stored.meta
        before = meta.get("remembered", {})
        found = contents_of(self.config, self.model, self._pairs, self.accelerator, before)
        self._contents, self._remembered = found
        if stored is not None:
            check_same_run(meta, self.config.as_dict(), self._identity, self._contents)
            self.first_step, self._seconds_before = meta["step"], meta["seconds"]
            self._evaluations_before = meta["network_evaluations"]
        self._attempts = attempts(meta, self.config, self._contents)
        return stored

    def _limit_calls(self, pair: PairBatch) -> None:
        """Choose the largest forward batch, tried on a pair, and how gradients are streamed."""
        training, state = self.config.training, self.state
        state.gradient_passes = gradient_passes(self.config, str(self.accelerator.distributed_type.value))
        if training.max_batch is not None:
            state.max_batch = training.max_batch
        elif self.config.method.whole_chain:
            networks, passes = state.networks, state.gradient_passes
            state.max_batch = choose_max_batch(networks, self.objective, pair, self.accelerator, passes=passes)

    def _loop(self) -> None:
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
            last = step == training.steps
            if step == 1 or last or step % config.output.log_every == 0:
                self._log(step)
            began = time.perf_counter()
            for callback in self._callbacks:
                callback.on_step(self, step)
            self._logged_at += time.perf_counter() - began
            if last or step % config.output.checkpoint_every == 0:
                self._save(step)

    def check_finite(self, step: int) -> None:
        """Raise ``NonFiniteLoss`` if a step since the last look met something that is not finite."""
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
        self.check_finite(step)
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
        row |= self.costs.row(since, pairs=pairs, seconds=now - self._logged_at, devices=self.accelerator.num_processes)
        if self.state.auto_beta is not None:
            row["beta"] = float(self.state.auto_beta.beta)
        row["peak_memory_bytes"] = peak_memory(self.accelerator)
        row["seconds"] = self._seconds()
        self._logged_at, self._logged_step, self._logged_evaluations = now, step, evaluations
        for callback in self._callbacks:
            callback.on_log(self, row)

    def _save(self, step: int) -> None:
        self.check_finite(step)
        meta = {
            "format": 2,
            "config": self.config.as_dict(),
            "run": self._identity,
            "contents": self._contents,
            "attempts": self._attempts,
            "remembered": self._remembered,
            "history": key_hash({"rows": self.reporting.rows}),
            "performance": self.performance.as_dict(),
            "next_draw": step * self.order.effective_batch,
            "network_evaluations": self._evaluations(),
            "seconds": self._seconds(),
        }
        checkpoint = as_checkpoint(self.state, self.accelerator, meta)
        if checkpoint is not None:
            keep = self.config.output.keep_checkpoints
            self._last_checkpoint = save_checkpoint(self._checkpoints, step, checkpoint, keep)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> TrainResult:
        steps = max(self.first_step, self.config.training.steps)
        evaluations, main, networks = self._evaluations(), self.accelerator.is_main_process, self.state.networks
        if main and networks.shards is None:
            self.accelerator.unwrap_model(networks.wrapped, keep_fp32_wrapper=False)
        if main or networks.shards is not None:
            self.export(None if self.output is None else self.output.directory, steps, raw=True)
        self.accelerator.wait_for_everyone()
        result = TrainResult(
            directory=self.directory,
            model_directory=self.directory / "model",
            steps=steps,
            network_evaluations=sum(evaluations.values()) + (self.cache.network_evaluations if self.cache else 0),
            seconds=self._seconds(),
            history=self.reporting.rows,
            data=self.summary,
        )
        for callback in self._callbacks:
            callback.on_end(self, result)
        return result

    def export(self, place: Place | None, step: int, *, raw: bool = False) -> None:
        """Write the model of now with its card; ``raw``: with EMA also, as ``…-raw``, the network that was averaged."""
        ema, networks, card = self.state.ema, self.state.networks, None if place is None else self._card(step)
        export_model(self.model, networks, ema, place, pipeline=self.config.output.pipeline, card=card)
        if raw and ema is not None:
            export_model(self.model, networks, None, place, pipeline=False, suffix="-raw", card=card)

    def _card(self, step: int) -> str:
        sections = [section for callback in self._callbacks for section in callback.card(step)]
        rows = [row for row in self.reporting.rows if row["step"] <= step]
        seen = [attempt for attempt in self._attempts if attempt["after"] < max(step, 1)]
        return model_card(self.config, self.model, rows, sections, step, self.order.pairs, seen)

    def _evaluations(self) -> dict[str, int]:
        """Network evaluations with and without gradient, over all attempts of the run and all processes."""
        counts = dict(self.state.networks.evaluations)
        if self.accelerator.num_processes > 1:
            own = torch.tensor(list(counts.values()), device=self.accelerator.device)
            counts = dict(zip(counts, self.accelerator.reduce(own, "sum").tolist(), strict=True))
        return {kind: count + self._evaluations_before.get(kind, 0) for kind, count in counts.items()}

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began
