"""Policy and reference from one model: full fine-tuning beside a frozen copy, or adapters that can be switched off.

Both are kept in the same precision unless model.reference_dtype says otherwise: the signal is the small difference
between their predictions, and a reference with rounded weights adds the rounding to it. Both are in evaluation mode:
dropout would put noise into that difference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastinvdpo.errors import invalid
from fastinvdpo.models.adapters import adapters_disabled, add_lora
from fastinvdpo.models.quantization import quantize_linear_layers
from fastinvdpo.trainer.sharding import Shards

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastinvdpo.config.sections import LoraSection
    from fastinvdpo.models import DiffusionModel
    from fastinvdpo.trainer.graphs import GraphedCalls


class Networks:
    """The network that is trained and the one it is compared with.

    Args:
        reference: ``"copy"`` keeps a frozen copy of the network (with ``lora`` its adapters are switched off instead);
            ``"moving"`` is that with weights that may be changed, with ``lora`` a second set of adapter weights;
            ``"none"`` has no reference, for cached predictions and methods that need none; ``"self"`` takes the network
            itself, which must then not be trained.
        reference_dtype: type of the reference's weights where it is a network of its own; the policy's when None.
        reference_quantization: of its linear layers, see :func:`quantize_linear_layers`.

    Attributes:
        policy_module: the trained network, with adapters inside when ``lora`` is given.
        lora: whether it has adapters.
        reference_module: the copy, or None when there is no reference or it is the policy with other adapter weights.
        reference_adapters: these weights by name, where the reference moves.
        shards: of the policy, with FSDP2; None otherwise.
        evaluations: counts of network evaluations (one sample through one network), with and without gradient.
        graphs: replays calls without gradient, where given.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        lora: LoraSection | None,
        gradient_checkpointing: bool,
        reference: Literal["copy", "moving", "none", "self"] = "copy",
        reference_dtype: torch.dtype | None = None,
        reference_quantization: Literal["int8", "nf4"] | None = None,
    ) -> None:
        self._model, self._reference = model, reference
        network = model.network.eval()
        self.lora = lora is not None
        self.reference_module: nn.Module | None = None
        self.reference_adapters: dict[str, Tensor] = {}
        if lora is not None:
            targets = lora.target_modules or model.default_lora_targets
            add_lora(network, rank=lora.rank, alpha=lora.alpha, targets=targets)
            if reference == "moving":
                trained = ((name, p) for name, p in network.named_parameters() if p.requires_grad)
                self.reference_adapters = {name: p.detach().clone() for name, p in trained}
        elif reference == "self":
            self.reference_module = network.requires_grad_(False)
            if reference_dtype is not None:
                network.to(reference_dtype)
        else:
            if reference != "none":
                self.reference_module = frozen_copy(network, reference_dtype)
            network.requires_grad_(True)
        self.reference_quantization = reference_quantization
        if reference_quantization is not None and self.reference_module is not None:
            quantize_linear_layers(self.reference_module, reference_quantization)
        if gradient_checkpointing:
            _checkpoint_activations(network)
        self.policy_module = network
        self._wrapped: nn.Module = network
        self.shards: Shards | None = None
        self._accelerator: Accelerator | None = None
        self.graphs: GraphedCalls | None = None
        self.evaluations = {"with_gradient": 0, "without_gradient": 0}

    def prepare(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> Any:
        """Let accelerate wrap the policy for its device, process group and precision, and its optimizer; returns that.

        With FSDP2 the trained weights are others afterwards: see :meth:`trainable`.
        """
        self.use_precision(accelerator)
        if accelerator.distributed_type.value == "FSDP":
            self.shards = Shards(self.policy_module, optimizer, accelerator)
            self._wrapped = self.policy_module = self.shards.module
            return self.shards.optimizer
        self._wrapped = accelerator.prepare_model(self.policy_module)
        return accelerator.prepare_optimizer(optimizer)

    def use_precision(self, accelerator: Accelerator) -> None:
        """Predict in the accelerator's mixed precision."""
        self._accelerator = accelerator

    @property
    def wrapped(self) -> nn.Module:
        """The policy as accelerate wrapped it; gradients of several processes meet there."""
        return self._wrapped

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the policy by name; with FSDP2 this process's shards of them."""
        if self.shards is not None:
            return self.shards.trained
        return {name: p for name, p in self.policy_module.named_parameters() if p.requires_grad}

    def policy(self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Prediction of the policy; with gradient where gradients are enabled."""
        if torch.is_grad_enabled():
            if self.shards is not None:
                self.shards.release()
            return self._predict("with_gradient", self._wrapped, latents, timesteps, conditioning)
        if self.shards is not None:
            self.shards.keep()
        # An inversion needs no gradient, so it must not enter a wrapper that prepares to exchange gradients.
        return self._predict("without_gradient", self.policy_module, latents, timesteps, conditioning)

    def probe(self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`policy`, for a measurement: it does not count, and no gradients are exchanged. With FSDP2 all
        processes must call it, without gradient.
        """
        before = dict(self.evaluations)
        if self.shards is not None:
            self.shards.keep()
        prediction = self._predict("with_gradient", self.policy_module, latents, timesteps, conditioning)
        if self.shards is not None:
            self.shards.release()  # a checkpoint that is read next goes into the shards
        self.evaluations = before
        return prediction

    @torch.no_grad()
    def reference(self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Prediction of the reference, never with gradient."""
        if self._reference == "none":
            raise RuntimeError("a prediction of the reference is needed, and this run keeps none")
        told = (latents, timesteps, conditioning)
        if self.reference_module is not None:
            return self._predict("without_gradient", self.reference_module, *told, caller="reference")
        if self.shards is not None:
            self.shards.keep()
        other = self._exchanged() if self.reference_adapters else adapters_disabled(self.policy_module)
        with other:
            return self._predict("without_gradient", self.policy_module, *told, caller="reference")

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
        self,
        kind: str,
        network: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        *,
        caller: str = "policy",
    ) -> Tensor:
        self.evaluations[kind] += latents.shape[0]
        if self.graphs is not None and kind == "without_gradient":
            return self.graphs(caller, partial(self._compute, network), latents, timesteps, conditioning)
        return self._compute(network, latents, timesteps, conditioning)

    def _compute(
        self, network: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        mixed = self._accelerator is not None and self._accelerator.mixed_precision != "no"
        with self._accelerator.autocast() if mixed and self._accelerator else nullcontext():
            prediction = self._model.predict(network, latents, timesteps, conditioning)
        # The objective's own arithmetic stays in the latents' type (float32), and in their layout.
        return prediction.to(latents.dtype).contiguous()


def frozen_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy without gradients, its floating-point weights as ``dtype``; never a whole copy in another type first."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        if dtype is not None and tensor.is_floating_point():
            cast = tensor.detach().to(dtype, copy=True)
            memo[id(tensor)] = nn.Parameter(cast, False) if isinstance(tensor, nn.Parameter) else cast
    return copy.deepcopy(network, memo).requires_grad_(False)


def _checkpoint_activations(network: nn.Module) -> None:
    enable: Any = getattr(network, "enable_gradient_checkpointing", None)
    if enable is None:
        remedy = "set training.gradient_checkpointing to false"
        raise invalid("training.gradient_checkpointing", True, f"{type(network).__name__} does not support it", remedy)
    enable()
