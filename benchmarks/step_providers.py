"""Who makes a training step: the trainer of this package in its variants, and the order of the released codes."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo.config import TrainConfig, files
from fastinvdpo.diffusion.prompt import Network
from fastinvdpo.errors import invalid
from fastinvdpo.methods import (
    METHODS,
    ChainObjective,
    DiffusionDPO,
    InPO,
    PairBatch,
)
from fastinvdpo.methods.base import STREAM_INVERSION, STREAM_NOISE, STREAM_TIMESTEP
from fastinvdpo.methods.smpo import PICKSCORE_RANGE, preference_probability
from fastinvdpo.models.adapters import perturb
from fastinvdpo.ops import philox
from fastinvdpo.trainer import PreferenceTrainer
from fastinvdpo.trainer.accounting import AUTOCAST, gradient_factor
from fastinvdpo.trainer.networks import Networks, frozen_copy
from fastinvdpo.trainer.step import training_step

from . import peers
from .peers.common import scaled_linear
from .step_models import SIZES, RandomModel, RandomPairs

Evaluations = dict[str, int]
PERTURBATION = 0.01  # of the policy's weights: at policy = reference the released Inversion-DPO has no gradient
PEERS = {"released": False, "released-checkpointed": True}
"""Provider and whether it checkpoints activations."""
OURS = {
    name: ("ours", "ours-two-passes", "ours-cached", "ours-cached-endpoint")
    if method.whole_chain
    else ("ours", "ours-corrected")
    for name, method in METHODS.items()
    if name in peers.STEPS
}
OTHER_OBJECTIVE = ("ours-corrected", "ours-cached-endpoint")
"""Our defaults, which compute something else than the released codes: timed, and never compared."""


@dataclass(frozen=True)
class StepCase:
    """A method on a size of network, ``pairs`` pairs a step; ``config`` is that of the trainer."""

    size: str
    method: str
    pairs: int
    config: TrainConfig

    @property
    def timesteps(self) -> int:
        """N of the inversion; 1 where nothing is inverted."""
        return getattr(self.config.method, "num_inference_steps", 1)

    @property
    def autocast(self) -> torch.dtype | None:
        return AUTOCAST.get(self.config.training.mixed_precision)


def build_case(
    size: str, method: str, pairs: int, overrides: Sequence[str], directory: Path, num_inference_steps: int | None
) -> StepCase:
    """The case with the trainer's configuration; ``overrides`` are ``section.key=value`` and win.

    Raises:
        InvalidInput: whatever the trainer would refuse.
    """
    settings = {
        "method.name": method,
        "method.compat": "released",
        "model.family": "stable-diffusion",
        "model.path": "random-weights",
        "model.init_perturbation": PERTURBATION,
        "data.path": "random-pairs",
        "optimizer.warmup_steps": 0,
        "training.batch_size": pairs,
        "training.steps": 1000000,
        "training.mixed_precision": SIZES[size].mixed_precision,
        "output.directory": str(directory),
        "output.tensorboard": "false",
    }
    if METHODS[method].whole_chain:
        settings["training.gradient_passes"] = 1
    if num_inference_steps is not None and hasattr(METHODS[method], "num_inference_steps"):
        settings["method.num_inference_steps"] = num_inference_steps
    if SIZES[size].mixed_precision == "bf16":
        settings["model.reference_dtype"] = "bf16"
    given = {override.partition("=")[0].strip() for override in overrides}
    ours = [f"{key}={value}" for key, value in settings.items() if key not in given]
    config = files.load_config(None, [*ours, *overrides])
    if config.method.name != method or config.training.batch_size != pairs:
        raise invalid("--override", list(overrides), "changes method or pairs", "use --method and --pairs")
    return StepCase(size, method, pairs, config)


class Provider(ABC):
    """Makes steps of one case.

    Attributes:
        gradient_factor: forward evaluations that one with gradient counts as.
        networks: what counts evaluations, in an attribute of that name.
        parameters, optimizer: what a step changes, and how.
        max_batch: network evaluations in one call, where the provider chooses.
    """

    name: str
    gradient_factor: int
    networks: Networks | ReleasedNetworks
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_batch: int | None = None

    @property
    def evaluations(self) -> Evaluations:
        return dict(self.networks.evaluations)

    def warm_up(self) -> None:
        """Let the optimizer allocate what it keeps, with a gradient of zero."""
        if not self.optimizer.state:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def forward(self) -> object:
        """One evaluation of the policy without gradient, whose FLOPs are counted."""

    @abstractmethod
    def prepare(self, number: int) -> Any:
        """What step ``number`` is given, drawn outside of the clock."""

    @abstractmethod
    def step(self, prepared: Any) -> None:
        """A whole optimizer step."""

    @abstractmethod
    def gradient(self, prepared: Any) -> list[Tensor]:
        """The gradient of the step's loss, by parameter; nothing is updated."""


class Trainer:
    """This package's trainer, shared by all its variants. What it trains is there after :meth:`set_up`; its device,
    batch and model are there before.
    """

    def __init__(self, case: StepCase) -> None:
        self.case, self.model = case, RandomModel(SIZES[case.size])
        self.run = PreferenceTrainer(
            self.model, case.config.method, RandomPairs(case.pairs), case.config, resume="never", progress=False
        )
        self.run.prepare()
        self.device: torch.device = self.run.accelerator.device
        self.batch = self.run.builder.build(range(case.pairs))

    def set_up(self) -> None:
        """Networks and optimizer; the model's network is taken, not copied."""
        self.run.start()

    def close(self) -> None:
        self.run.close()


def one_sample(batch: PairBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The inputs of a forward pass of one sample."""
    conditioning = {name: tensor[:1] for name, tensor in batch.conditioning.items()}
    return batch.latents[:1], torch.zeros(1, dtype=torch.int64, device=batch.latents.device), conditioning


class Ours(Provider):
    """``training_step`` as the trainer calls it."""

    networks: Networks

    def __init__(self, name: str, trainer: Trainer) -> None:
        self.name, self._trainer = name, trainer
        case, state = trainer.case, trainer.run.state
        self.networks, self.parameters, self.max_batch = state.networks, state.parameters, state.max_batch
        self.optimizer = state.optimizer.optimizer
        self.gradient_factor = gradient_factor(
            lora=state.networks.lora, gradient_checkpointing=case.config.training.gradient_checkpointing
        )
        self._passes = 2 if name == "ours-two-passes" else 1
        method = case.config.method
        if name in OTHER_OBJECTIVE:
            corrected: dict[str, Any] = {"compat": None, **({"variant": None} if method.whole_chain else {})}
            method = dataclasses.replace(method, **corrected)
        self.objective = method.objective(trainer.model.schedule)
        self._batch = trainer.batch
        if "cached" in name:
            self._batch = self._with_reference(trainer.batch)

    def _with_reference(self, batch: PairBatch) -> PairBatch:
        """The batch as it comes from a complete cache."""
        objective, networks = self.objective, self.networks
        assert isinstance(objective, ChainObjective)
        prompts = batch.conditioning, batch.unconditional
        chain = objective.reference_trajectory(networks.reference, batch.latents, *prompts)
        predictions = objective.reference_predictions(networks.reference, chain, *prompts)
        return dataclasses.replace(batch, trajectory=chain, reference_pred=predictions)

    @torch.no_grad()
    def forward(self) -> object:
        return self.networks.probe(*one_sample(self._batch))

    def prepare(self, number: int) -> PairBatch:
        return dataclasses.replace(self._batch, sample_index=draws(number, self._trainer.case.pairs))

    def step(self, prepared: PairBatch) -> None:
        state, training = self._trainer.run.state, self._trainer.case.config.training
        state.gradient_passes = self._passes
        training_step(
            state,
            self.objective,
            [prepared],
            self._trainer.run.accelerator,
            accumulation=1,
            max_grad_norm=self._trainer.case.config.optimizer.max_grad_norm,
            seed=training.seed,
        )

    def gradient(self, prepared: PairBatch) -> list[Tensor]:
        terms = self.objective.stream(
            self.networks.policy,
            self.networks.reference,
            prepared,
            seed=self._trainer.case.config.training.seed,
            max_batch=self.max_batch,
            passes=self._passes,
            parameters=self.parameters,
        )
        for call in range(terms.calls):
            terms.term(call).backward()
        return take_gradients(self.parameters)


class Released(Provider):
    """The released order, with PyTorch's AdamW and clipping."""

    networks: ReleasedNetworks

    def __init__(self, name: str, case: StepCase, networks: ReleasedNetworks, batch: PairBatch) -> None:
        self.name, self._case, self.networks, self._batch = name, case, networks, batch
        self.parameters, self.optimizer = networks.parameters, networks.optimizer
        self._checkpointing = PEERS[name]
        self.gradient_factor = gradient_factor(lora=False, gradient_checkpointing=self._checkpointing)

    @torch.no_grad()
    def forward(self) -> object:
        return self.networks.policy(*one_sample(self._batch))

    def prepare(self, number: int) -> peers.Inputs:
        return released_inputs(self._case, self._batch, number)

    def step(self, prepared: peers.Inputs) -> None:
        self._accumulate(prepared)
        limit = self._case.config.optimizer.max_grad_norm
        if limit is not None:
            nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, prepared: peers.Inputs) -> list[Tensor]:
        self._accumulate(prepared)
        return take_gradients(self.parameters)

    def float32_gradient(self, prepared: peers.Inputs) -> list[Tensor]:
        """The gradient without half precision."""
        return self.networks.float32_gradient(prepared)

    def _accumulate(self, prepared: peers.Inputs) -> None:
        self.networks.checkpoint(self._checkpointing)
        settings = released_settings(self._case)
        peers.STEPS[self._case.method](self.networks.policy, self.networks.reference, prepared, settings)


class ReleasedNetworks:
    """Policy and reference as the trainer starts with them; shared by the released steps of a case. The network of
    ``model`` becomes the policy.
    """

    def __init__(self, case: StepCase, model: RandomModel, device: torch.device) -> None:
        self._case, self.device, self._model = case, device, model
        model.to(device)
        self._modules = {"reference": frozen_copy(model.network, case.autocast), "policy": model.network}
        with torch.no_grad():
            perturb(model.network, case.config.model.init_perturbation, case.config.training.seed)
        self.autocast = case.autocast
        self.parameters = list(model.network.parameters())
        optimizer = case.config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay
        )
        self.evaluations: Evaluations = {"with_gradient": 0, "without_gradient": 0}

    @property
    def policy(self) -> Network:
        return lambda *inputs: self._predict("policy", *inputs)

    @property
    def reference(self) -> Network:
        return lambda *inputs: self._predict("reference", *inputs)

    def checkpoint(self, wanted: bool) -> None:
        """Checkpoint the policy's activations, or not."""
        policy: Any = self._modules["policy"]
        (policy.enable_gradient_checkpointing if wanted else policy.disable_gradient_checkpointing)()

    def float32_gradient(self, inputs: peers.Inputs) -> list[Tensor]:
        """The gradient without autocast, with the weights as they are: what half precision is judged by."""
        modules, autocast = self._modules, self.autocast
        self._modules = {**modules, "reference": copy.deepcopy(modules["reference"]).float()}
        self.autocast = None
        try:
            self.checkpoint(True)  # it changes no bit, and graphs of all calls in twice the bytes need not fit
            peers.STEPS[self._case.method](self.policy, self.reference, inputs, released_settings(self._case))
            return take_gradients(self.parameters)
        finally:
            self._modules, self.autocast = modules, autocast

    def _predict(self, role: str, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        kind = "with_gradient" if torch.is_grad_enabled() else "without_gradient"
        self.evaluations[kind] += latents.shape[0]
        half = self.autocast
        with nullcontext() if half is None else torch.autocast(self.device.type, half):
            predicted = self._model.predict(self._modules[role], latents, timesteps, conditioning)
        return predicted.to(latents.dtype)


def draws(number: int, pairs: int) -> Tensor:
    """The draws of a step."""
    return torch.arange(number * pairs, (number + 1) * pairs)


def released_inputs(case: StepCase, batch: PairBatch, number: int) -> peers.Inputs:
    """The numbers that our objective uses in step ``number``, for the released step."""
    seed, draw, latents = case.config.training.seed, draws(number, case.pairs), batch.latents
    shape, device = tuple(latents.shape[1:]), latents.device
    noise = probabilities = None
    method = case.config.method
    if isinstance(method, DiffusionDPO):
        noise = philox.normal(seed, STREAM_NOISE, draw.to(device), shape)
    if isinstance(method, InPO):
        rows = torch.cat([2 * draw, 2 * draw + 1]).to(device)
        steps = range(STREAM_INVERSION, STREAM_INVERSION + case.timesteps)
        noise = torch.stack([philox.normal(seed, step, rows, shape) for step in steps])
    if method.needs_scores:
        assert batch.scores is not None
        winner, loser = batch.scores.chunk(2)
        probabilities = preference_probability(winner, loser, PICKSCORE_RANGE).float()
    timesteps = philox.integers(seed, STREAM_TIMESTEP, draw, 1000)
    return peers.Inputs(latents, batch.conditioning, batch.unconditional, timesteps, noise, probabilities)


def released_settings(case: StepCase) -> peers.Settings:
    known = {field.name for field in dataclasses.fields(peers.Settings)}
    options = {key: value for key, value in vars(case.config.method).items() if key in known}
    return peers.Settings(scaled_linear(), **options)


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found
