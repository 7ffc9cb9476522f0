"""The trainer: one loop for all methods, for full fine-tuning and for LoRA."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastinvdpo.atomic import make_directory
from fastinvdpo.config import TrainConfig, complete
from fastinvdpo.data.broken import DataSummary, copy_report, write_report
from fastinvdpo.data.pairs import PairDataset
from fastinvdpo.diffusion.prompt import chunked
from fastinvdpo.errors import NonFiniteLoss, invalid
from fastinvdpo.io import key_hash
from fastinvdpo.methods import TrainingMethod
from fastinvdpo.models.base import TrainedModel
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import opening
from fastinvdpo.trainer.accounting import choose_max_batch, gradient_passes, measure_costs, peak_memory
from fastinvdpo.trainer.batches import BatchBuilder, EncodedPairs, PairEncoder, Pairs
from fastinvdpo.trainer.cache import PairCache, reference_key
from fastinvdpo.trainer.callbacks import Callback, Place, Reporting, TrainResult
from fastinvdpo.trainer.checkpoint import (
    Checkpoint,
    attempts,
    changes,
    check_same_run,
    contents_of,
    discard_older,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    versions,
)
from fastinvdpo.trainer.export import Publishing, export_model, model_card
from fastinvdpo.trainer.order import DrawOrder, epoch_order
from fastinvdpo.trainer.performance import decide, speed_up
from fastinvdpo.trainer.state import as_checkpoint, build_state, restore_state
from fastinvdpo.trainer.step import origin, training_step


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
        order: which pair is drawn when. builder: makes batches of them. objective: of the method.
        others: those of :class:`fastinvdpo.trainer.callbacks.Run`.

    Raises:
        InvalidInput: arguments, launch and checkpoint do not fit together; nothing was computed or written.
    """

    def __init__(
        self,
        model: TrainedModel,
        method: TrainingMethod | Mapping[str, Any],
        pairs: Pairs | PairCache,
        config: TrainConfig | Mapping[str, Any],
        *,
        callbacks: Sequence[Callback] = (),
        resume: str | Path = "auto",
        progress: bool = True,
        output: OutputDirectory | None = None,
    ) -> None:
        self._began = time.perf_counter()
        self._pairs, self.cache = pairs, pairs if isinstance(pairs, PairCache) else None
        config = opening.with_launcher(complete(config, method, model, pairs))
        config = opening.with_score_range(config, getattr(pairs, "source", None))
        self.config, self.model, self.directory = config, model, Path(config.output.directory)
        self._checkpoints, training = self.directory / "checkpoints", config.training
        if self.cache is not None:
            self.cache.check_draws(reference_key(config))
        elif config.cache.path is not None:
            problem = "belongs to the files that the configuration names, not to pairs at hand"
            raise invalid("cache.path", config.cache.path, problem, "call train, or set it to null")
        opening.check_pairs(config, pairs)
        opening.check_cascade(config, model)
        opening.check_masks(config, getattr(pairs, "has_masks", False))
        opening.check_sources(model, pairs)
        self._last_checkpoint = find_checkpoint(resume, self._checkpoints)
        self.accelerator = opening.open_accelerator(config)
        opening.check_launch(config, self.accelerator)
        self.reporting = Reporting(progress)
        publishing = [] if config.output.push_to_hub is None else [Publishing(config)]
        self._callbacks: list[Callback] = [self.reporting, *callbacks, *publishing]
        for callback in self._callbacks:
            callback.on_init(self)
        self.performance = decide(config, model.network, self.accelerator)
        self.order = DrawOrder(
            len(pairs),
            training.seed,
            training.batch_size,
            training.gradient_accumulation_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            epochs=epoch_order(pairs, training.batch_size, config.method.like_share),
        )
        self._identity = {"effective batch": self.order.effective_batch, "pairs in the data set": len(pairs)}
        if config.data.buckets is not None:
            self._identity["pairs in a batch of one bucket"] = training.batch_size
        # Another run's checkpoint is refused before anything is computed or written.
        self._stored = self._load(self._last_checkpoint)
        self.objective = config.method.objective(model.schedule)
        self.output, self._opened = output, ExitStack()

    def train(self) -> TrainResult:
        """Train from the first step that is missing, and write the model. Raises ``NonFiniteLoss`` where a loss or
        gradient is not finite; the last good checkpoint is kept.
        """
        try:
            self.start()
            self._loop()
            return self._finish()
        finally:
            self.close()

    def prepare(self) -> None:
        """Make the output directory with the counts of the data, and what batches come from; :meth:`start` does."""
        config, pairs = self.config, self._pairs
        self.summary: DataSummary | None = getattr(pairs, "summary", None)
        if self.accelerator.is_main_process:
            opening.warn_of_masks(getattr(pairs, "source", None))
            if self.output is None:
                self.output = self._opened.enter_context(opening.open_output(config))
            make_directory(self._checkpoints)
            if self.cache is not None:
                copy_report(self.cache.directory, self.output)
            elif self.summary is not None and isinstance(pairs, PairDataset):
                write_report(self.summary, pairs.broken, self.output)
        self.accelerator.wait_for_everyone()
        self.model.to(self.accelerator.device)
        encoded: EncodedPairs
        if isinstance(pairs, PairCache):
            encoded = pairs
        else:
            sampled = config.data.latents == "sampled"
            encoded = PairEncoder(self.model, pairs, sampled_latents=sampled, cache_gib=config.data.cache_gib)
        self.builder = BatchBuilder(
            encoded,
            self.accelerator.device,
            self.order,
            with_unconditional=config.method.guided,
            caption_dropout=config.data.caption_dropout,
            num_workers=config.training.num_workers,
        )

    def start(self) -> None:
        """Build what training changes, and continue from the checkpoint; :meth:`train` does."""
        if not hasattr(self, "builder"):
            self.prepare()
        config, accelerator = self.config, self.accelerator
        cached = self.cache is not None and self.cache.has_reference and config.reference_options is not None
        self.state = state = build_state(
            config,
            self.model,
            accelerator,
            self.performance,
            effective_batch=self.order.effective_batch,
            reference_is_cached=cached,
        )
        state.auto_beta = self.objective.auto_beta
        pair = self.builder.build(self.order.micro_batch(0, 0)[:1])
        state.gradient_passes = passes = gradient_passes(config, str(accelerator.distributed_type.value))
        state.max_batch = config.training.max_batch
        if state.max_batch is None and config.method.whole_chain:
            state.max_batch = choose_max_batch(state.networks, self.objective, pair, accelerator, passes=passes)
        # Counted once; the log multiplies.
        self.costs = measure_costs(state.networks, pair, config.training)
        for callback in self._callbacks:
            callback.on_start(self)
        # The probes of size and cost see the networks as they are: each size would be compiled otherwise.
        speed_up(state.networks, self.performance)
        attention = self.performance.attention or "the family's"
        switches = [f"{name} {'on' if value else 'off'}" for name, value in self.performance if name != "attention"]
        self.say(f"Performance: attention {attention}, {', '.join(switches)}.")
        if config.cache.draws is not None:
            self.say(f"Draws: one of {config.cache.draws} a pair that are stored with the reference's predictions.")
        if self._stored is not None:
            meta = self._stored.meta
            for what, before, now in (
                ("versions", meta["versions"], versions()),
                ("performance switches", meta.get("performance", {}), self.performance.model_dump()),
            ):
                if changed := changes(before, now):
                    self.say(f"Other {what} than the checkpoint's: {changed}; results may differ in the last bits.")
            restore_state(state, self._stored, accelerator)
            if accelerator.is_main_process and meta.get("history") not in (None, self._history()):
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

    def _load(self, path: Path | None) -> Checkpoint | None:
        """The checkpoint to continue from, and what the run had done until then."""
        stored = None if path is None else load_checkpoint(path)
        self._before = meta = {} if stored is None else stored.meta
        found = contents_of(self.config, self.model, self._pairs, self.accelerator, meta.get("remembered", {}))
        self._contents, self._remembered = found
        if stored is not None:
            check_same_run(meta, self.config.as_dict(), self._identity, self._contents)
        self.first_step: int = meta.get("step", 0)
        if self.first_step > (steps := self.config.training.steps):
            problem = f"has been passed: {path} is of step {self.first_step}"
            raise invalid("training.steps", steps, problem, "ask for more steps, or name another output.directory")
        self._attempts = attempts(meta, self.config, self._contents)
        return stored

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
        if not float(accelerator.reduce(guard.found, "sum")):
            return
        if self.state.networks.shards is not None:
            self.state.networks.shards.gather()  # together, since what follows only the process that found it does
        last, raised, training = self._last_checkpoint, guard.raised(), self.config.training
        kept = "No checkpoint was due yet." if last is None else f"The last good checkpoint is {last}."
        if raised is None:
            raise NonFiniteLoss(f"Another process met a loss that is not finite, up to step {step}. {kept}")
        kind, draw = raised
        at = draw // self.order.effective_batch + 1
        if kind == "gradient":
            micros = range(training.gradient_accumulation_steps)
            rows = [self.builder.row(draw) for micro in micros for draw in self.order.micro_batch(at - 1, micro)]
            listed = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
            found = f"The gradient of step {at} is not finite although its loss is; its pairs are in data rows {listed}"
        else:
            batch = self.builder.build(range(draw, draw + 1))
            networks, size = self.state.networks, self.state.max_batch
            with torch.no_grad():
                limited = chunked(networks.policy, size), chunked(networks.reference, size)
                out = self.objective(*limited, batch, seed=training.seed)
            what = "image" if self.config.method.unpaired else "pair"
            where = f"{what} in data row {self.builder.row(draw)} (draw {draw}), {origin(batch, out)}"
            found = f"The loss of step {at} is not finite: {where}"
        remedy = "look at the images and scores there, lower optimizer.learning_rate or method.beta"
        remedy += ", or train with mixed_precision bf16 or no"
        raise NonFiniteLoss(f"{found}. No update was made with it. {kept} Remedy: {remedy}.")

    def _log(self, step: int) -> None:
        self.check_finite(step)
        row: dict[str, Any] = {"step": step, **self.state.metrics.take(self.accelerator)}
        now, pairs = time.perf_counter(), (step - self._logged_step) * self.order.effective_batch
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
            "history": self._history(),
            "performance": self.performance.model_dump(),
            "next_draw": step * self.order.effective_batch,
            "network_evaluations": self._evaluations(),
            "seconds": self._seconds(),
        }
        if (checkpoint := as_checkpoint(self.state, self.accelerator, meta)) is not None:
            keep = self.config.output.keep_checkpoints
            self._last_checkpoint = save_checkpoint(self._checkpoints, step, checkpoint, keep)
        self.accelerator.wait_for_everyone()

    def _history(self) -> str:
        return key_hash({"rows": self.reporting.rows})

    def _finish(self) -> TrainResult:
        steps = max(self.first_step, self.config.training.steps)
        evaluations, main, networks = self._evaluations(), self.accelerator.is_main_process, self.state.networks
        if main and networks.shards is None:
            self.accelerator.unwrap_model(networks.wrapped, keep_fp32_wrapper=False)
        if main or networks.shards is not None:
            self.export(None if self.output is None else self.output.directory, steps, raw=True)
        last = self._last_checkpoint
        if main and last is not None and last.parent.resolve() == self._checkpoints.resolve():
            discard_older(last, self.config.output.keep_checkpoints)  # of an attempt that was killed before it did
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
        ema, networks, card = self.state.ema, self.state.networks, ""
        if place is not None:
            sections = [section for callback in self._callbacks for section in callback.card(step)]
            rows = [row for row in self.reporting.rows if row["step"] <= step]
            seen = [attempt for attempt in self._attempts if attempt["after"] < max(step, 1)]
            card = model_card(self.config, self.model, rows, sections, step, self.order.pairs, seen)
        output = self.config.output
        write = functools.partial(export_model, self.model, networks, formats=output.formats, card=card)
        write(ema, place, pipeline=output.pipeline)
        if raw and ema is not None:
            write(None, place, pipeline=False, suffix="-raw")

    def _evaluations(self) -> dict[str, int]:
        """Network evaluations with and without gradient, over all attempts of the run and all processes."""
        kinds, own = zip(*self.state.networks.evaluations.items(), strict=True)
        counts = self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), "sum").tolist()
        before = self._before.get("network_evaluations", {})
        return {kind: count + before.get(kind, 0) for kind, count in zip(kinds, counts, strict=True)}

    def _seconds(self) -> float:
        return float(self._before.get("seconds", 0.0)) + time.perf_counter() - self._began
