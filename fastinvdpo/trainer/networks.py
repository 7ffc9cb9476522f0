"""Policy and reference from one model: full fine-tuning beside a frozen copy, or adapters that can be switched off; and
moving averages of the trained weights: the model that is written (EMA), and a reference that follows the policy.

Both are kept in the same precision unless model.reference_dtype says otherwise: the signal is the small difference
between their predictions, and a reference with rounded weights adds the rounding to it. Both are in evaluation mode:
dropout would put noise into that difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.methods import Follows
from fastinvdpo.models.adapters import adapters_disabled, add_lora
from fastinvdpo.models.quantization import Kind, quantize_linear_layers
from fastinvdpo.trainer.sharding import Shards, like

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config.sections import LoraSection
    from fastinvdpo.models.base import TrainedModel


class Networks:
    """The network that is trained and the one it is compared with.

    Args:
        reference: ``"copy"`` keeps a frozen copy of the network (with ``lora`` its adapters are switched off instead);
            ``"moving"`` is that with weights that may be changed, with ``lora`` a second set of adapter weights;
            ``"none"`` has no reference, for cached predictions and methods that need none; ``"self"`` takes the network
            itself, which must then not be trained.
        reference_dtype: type of the reference's weights where it is a network of its own; the policy's when None.
        reference_quantization, offload: of its linear layers, see :func:`quantize_linear_layers`.

    Attributes:
        policy_module: the trained network, with adapters inside where ``lora`` is True.
        wrapped: that as accelerate wrapped it; gradients of several processes meet there.
        reference_module: the copy, or None when there is no reference or it is the policy with other adapter weights.
        reference_adapters: these weights by name, where the reference moves.
        shards: of the policy, with FSDP2; None otherwise.
        evaluations: counts of network evaluations (one sample through one network), with and without gradient.
        accelerator: predictions are made in its mixed precision, where given.
        graphs: replays calls without gradient, where given (:class:`fastinvdpo.trainer.performance.GraphedCalls`).
    """

    def __init__(
        self,
        model: TrainedModel,
        *,
        lora: LoraSection | None,
        gradient_checkpointing: bool,
        reference: Literal["copy", "moving", "none", "self"] = "copy",
        reference_dtype: torch.dtype | None = None,
        reference_quantization: Kind | None = None,
        offload: bool = False,
    ) -> None:
        self._model, self._reference = model, reference
        network = model.network.eval()
        self.lora, self.reference_quantization = lora is not None, reference_quantization
        self.policy_module = self.wrapped = network
        self.shards: Shards | None = None
        self.accelerator: Accelerator | None = None
        self.graphs: Callable[..., Tensor] | None = None
        self.evaluations = {"with_gradient": 0, "without_gradient": 0}
        self.reference_module: nn.Module | None = None
        self.reference_adapters: dict[str, Tensor] = {}
        if lora is not None:
            targets = lora.target_modules or model.default_lora_targets
            add_lora(network, rank=lora.rank, alpha=lora.alpha, targets=targets)
            if reference == "moving":
                self.reference_adapters = {name: p.detach().clone() for name, p in self.trainable().items()}
        elif reference == "self":
            self.reference_module = network.requires_grad_(False)
            if reference_dtype is not None:
                network.to(reference_dtype)
        else:
            trained = model.trained(network)
            if reference != "none":
                self.reference_module = frozen_copy(network, reference_dtype, trained)
            network.requires_grad_(False)
            for parameter in trained.values():
                parameter.requires_grad_(True)
        if reference_quantization is not None and self.reference_module is not None:
            quantize_linear_layers(self.reference_module, reference_quantization, offload)
        if gradient_checkpointing:
            enable: Any = getattr(network, "enable_gradient_checkpointing", None)
            if enable is None:
                problem = f"{type(network).__name__} does not support it"
                remedy = "set training.gradient_checkpointing to false"
                raise invalid("training.gradient_checkpointing", True, problem, remedy)
            enable()

    def prepare(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> Any:
        """Let accelerate wrap the policy for its device, process group and precision, and its optimizer; returns that.
        With FSDP2 the trained weights are others afterwards: see :meth:`trainable`.
        """
        self.accelerator = accelerator
        if accelerator.distributed_type.value == "FSDP":
            self.shards = Shards(self.policy_module, optimizer, accelerator)
            self.wrapped = self.policy_module = self.shards.module
            return self.shards.optimizer
        self.wrapped = accelerator.prepare_model(self.policy_module)
        return accelerator.prepare_optimizer(optimizer)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the policy by name; with FSDP2 this process's shards of them."""
        if self.shards is not None:
            return self.shards.trained
        return {name: p for name, p in self.policy_module.named_parameters() if p.requires_grad}

    def policy(self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Prediction of the policy; with gradient where gradients are enabled."""
        gradient = torch.is_grad_enabled()
        if self.shards is not None:
            (self.shards.release if gradient else self.shards.keep)()
        # An inversion needs no gradient, so it must not enter a wrapper that prepares to exchange gradients.
        network = self.wrapped if gradient else self.policy_module
        return self._predict("policy", network, latents, timesteps, conditioning)

    def probe(self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`policy`, for a measurement: it does not count, and no gradients are exchanged. With FSDP2 all
        processes must call it, without gradient.
        """
        if self.shards is not None:
            self.shards.keep()
        prediction = self._compute(self.policy_module, latents, timesteps, conditioning)
        if self.shards is not None:
            self.shards.release()  # a checkpoint that is read next goes into the shards
        return prediction

    @torch.no_grad()
    def reference(self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Prediction of the reference, never with gradient."""
        if self._reference == "none":
            raise RuntimeError("a prediction of the reference is needed, and this run keeps none")
        given = (latents, timesteps, conditioning)
        if self.reference_module is not None:
            return self._predict("reference", self.reference_module, *given)
        if self.shards is not None:
            self.shards.keep()
        with self._exchanged() if self.reference_adapters else adapters_disabled(self.policy_module):
            return self._predict("reference", self.policy_module, *given)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        """Inside, the adapters have the reference's weights. Nothing is written to the policy's: a graph of its
        prediction that waits for its backward pass keeps them.
        """
        trained = self.trainable()
        own = {name: parameter.data for name, parameter in trained.items()}
        try:
            for name, weights in self.reference_adapters.items():
                trained[name].data = weights
            yield
        finally:
            for name, weights in own.items():
                trained[name].data = weights

    def _predict(
        self, caller: str, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        gradient = torch.is_grad_enabled()
        self.evaluations["with_gradient" if gradient else "without_gradient"] += latents.shape[0]
        if self.graphs is not None and not gradient:
            return self.graphs(caller, partial(self._compute, network), latents, timesteps, conditioning)
        return self._compute(network, latents, timesteps, conditioning)

    def _compute(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        accelerator = self.accelerator
        mixed = accelerator is not None and accelerator.mixed_precision != "no"
        with accelerator.autocast() if mixed else nullcontext():  # type: ignore[union-attr]
            prediction = self._model.predict(network, latents, timesteps, conditioning)
        # The objective's own arithmetic stays in the latents' type (float32), and in their layout; tokens have none.
        return (prediction.to(latents.dtype) if latents.is_floating_point() else prediction).contiguous()


def frozen_copy(
    network: nn.Module, dtype: torch.dtype | None = None, trained: Mapping[str, nn.Parameter] | None = None
) -> nn.Module:
    """A copy without gradients, its floating-point weights as ``dtype``; never a whole copy in another type first.
    Parameters that are not ``trained`` are those of the network itself; None: all are copied.
    """
    memo: dict[int, Any] = {}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if trained is not None and isinstance(tensor, nn.Parameter) and name not in trained:
            memo[id(tensor)] = tensor
        elif dtype is not None and tensor.is_floating_point():
            cast = tensor.detach().to(dtype, copy=True)
            memo[id(tensor)] = nn.Parameter(cast, False) if isinstance(tensor, nn.Parameter) else cast
    return copy.deepcopy(network, memo).requires_grad_(False)


class EMA:
    """``average ← δ·average + (1 − δ)·weights`` after every optimizer step s, with ``δ = min(decay, s/(9 + s))``, and
    0 at the first: it grows, so that the average of a short run is not what it started from. diffusers' ``EMAModel``.

    ``parameters``: the trained weights by name; their storage is followed, not copied.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        training = require("diffusers.training_utils", extra="train", purpose="training.ema_decay")
        self._parameters = dict(parameters)
        self._model = training.EMAModel(list(self._parameters.values()), decay=decay, foreach=True)

    @property
    def averages(self) -> dict[str, Tensor]:
        return dict(zip(self._parameters, self._model.shadow_params, strict=True))

    @property
    def steps(self) -> int:
        """Updates so far."""
        return int(self._model.optimization_step)

    def update(self) -> None:
        """Move the averages towards the weights of now."""
        self._model.step(list(self._parameters.values()))

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Take over stored averages, bit for bit."""
        self._model.optimization_step = steps
        for name, average in self.averages.items():
            average.copy_(like(averages[name], average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the averages; afterwards its own weights again."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        _copy(self.averages, self._parameters)
        try:
            yield
        finally:
            _copy(own, self._parameters)


class MovingReference:
    """``r ← δ·r + (1 − δ)·p`` after every so many optimizer steps, of all weights, or of those of the adapters, in
    networks with ``reference="moving"``.

    Attributes:
        averages: r by name, in float32 at least; the reference's own weights, unless those are in half precision.
        steps: optimizer steps so far.
    """

    def __init__(self, networks: Networks, follows: Follows) -> None:
        self._networks, self._follows, self.steps = networks, follows, 0
        module = networks.reference_module
        self._weights: dict[str, Tensor] = networks.reference_adapters or dict(module.named_parameters())  # type: ignore[union-attr]
        exact = (torch.float32, torch.float64)
        self.averages = {name: p if p.dtype in exact else p.detach().float() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count an optimizer step, and move if it is time."""
        self.steps += 1
        if self.steps % self._follows.every:
            return
        trained, module = self._networks.trainable(), self._networks.reference_module
        for name, average in self.averages.items():
            average.lerp_(trained[name].to(average.dtype), 1 - self._follows.decay)
        _copy(self.averages, self._weights)
        if module is not None:
            _copy(dict(self._networks.policy_module.named_buffers()), dict(module.named_buffers()))

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], steps: int) -> None:
        """Take over stored averages, bit for bit."""
        self.steps = steps
        _copy(averages, self.averages)
        _copy(self.averages, self._weights)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        if tensor is not values[name]:
            tensor.copy_(values[name])
