"""AdamW with 8-bit moments from bitsandbytes, and a frozen reference in 8 or 4 bits, which needs none of it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastinvdpo.config.sections import OptimizerSection
from fastinvdpo.errors import InvalidInput, MissingExtra
from fastinvdpo.models import load_model
from fastinvdpo.models.quantization import quantize_linear_layers
from fastinvdpo.trainer import train
from fastinvdpo.trainer.checkpoint import load_checkpoint
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.state import _check_kernel, build_optimizer
from tests.trainer import tiny

try:
    import bitsandbytes
except ImportError as error:
    bitsandbytes, REASON = None, f"bitsandbytes cannot be imported: {error}"
else:
    REASON = ""
needs_bitsandbytes = pytest.mark.skipif(bitsandbytes is None, reason=REASON)
KINDS = ("int8", "nf4")
Kind = Literal["int8", "nf4"]


def test_without_the_extra_nothing_is_loaded(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = tiny.config(workspace, data={"path": "/nowhere"}, optimizer={"name": "adamw8bit"})
    with pytest.raises(MissingExtra, match=r"optimizer\.name = adamw8bit needs .*fastinvdpo\[bnb\]"):
        train(config, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_few_bits_need_no_extra(workspace: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    for module in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, module, None)
    model = {"reference_quantization": kind}
    assert train(tiny.config(workspace, model=model, training={"steps": 2}), progress=False).steps == 2


def test_a_device_without_kernels_is_told() -> None:
    with pytest.raises(InvalidInput, match=r"adamw8bit.*no kernels for meta in the installed bitsandbytes"):
        _check_kernel("meta")


SETTINGS = OptimizerSection(name="adamw8bit", learning_rate=0.01, warmup_steps=0, weight_decay=0.1)


@needs_bitsandbytes
@pytest.mark.parametrize("size", [4096, 5000, 65 * 77])
def test_adamw8bit_is_adamw_with_rounded_moments(size: int) -> None:
    """Each update is AdamW's, in float64, from the moments that the one before left. A moment is a value of the code
    times the largest of its block of 256: the nearest one, as far as a table of 2^16 cells over [-1, 1] tells, in which
    the kernel for CPUs looks it up.
    """
    generator = torch.Generator().manual_seed(size)
    weight = nn.Parameter(torch.randn(size, generator=generator))
    optimizer, _ = build_optimizer(SETTINGS, [weight], effective_batch=1, steps=5)
    beta1, beta2 = SETTINGS.beta1, SETTINGS.beta2
    means = [torch.zeros(size, dtype=torch.float64) for _ in range(2)]
    for step in range(1, 5):
        before = weight.detach().double()
        sizes = 10 ** (4 * torch.rand(size, generator=generator) - 4)
        weight.grad = sizes * torch.randn(size, generator=generator)
        gradient = weight.grad.double()
        optimizer.step()
        for mean, beta, power in zip(means, (beta1, beta2), (1, 2), strict=True):
            mean.mul_(beta).add_((1 - beta) * gradient**power)
        update = (means[0] / (1 - beta1**step)) / ((means[1] / (1 - beta2**step)).sqrt() + SETTINGS.epsilon)
        expected = before * (1 - 0.01 * 0.1) - 0.01 * update
        # A few roundings of float32 in each part; 1 - β2 as float32 has it is off by 2^-24 / (1 - β2) of itself.
        allowed = 8 * 2**-24 * before.abs() + 0.01 * update.abs() * (8 * 2**-24 + 2**-24 / (1 - beta2))
        assert ((weight.detach().double() - expected).abs() <= allowed).all()
        state = optimizer.state[weight]
        for which, mean in enumerate(means, 1):
            code, indices = state[f"qmap{which}"].double(), state[f"state{which}"].long()
            largest = nn.functional.pad(mean.abs(), (0, -size % 256)).view(-1, 256).amax(1)
            assert ((state[f"absmax{which}"].double() - largest).abs() <= 4 * 2**-24 * largest).all()
            scale = state[f"absmax{which}"].double().repeat_interleave(256)[:size]
            distances = ((mean / scale)[:, None] - code).abs()
            taken = distances.gather(1, indices[:, None])[:, 0]
            assert (taken <= distances.amin(1) + 2**-15 + 8 * 2**-24).all()
            mean.copy_(code[indices] * scale)


@needs_bitsandbytes
def test_a_wrong_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    update = functional.optimizer_update_8bit_blockwise

    def misplaced(*arguments: Any, **options: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.shape == (20,):  # the largest of each block
                argument.copy_(argument.roll(1))
        update(*arguments, **options)

    build_optimizer(SETTINGS, [nn.Parameter(torch.zeros(8))], effective_batch=1, steps=5)
    monkeypatch.setattr(functional, "optimizer_update_8bit_blockwise", misplaced)
    with pytest.raises(InvalidInput, match=r"adamw8bit.*: makes other updates than AdamW on cpu .*choose adamw"):
        build_optimizer(SETTINGS, [nn.Parameter(torch.zeros(8))], effective_batch=1, steps=5)


@needs_bitsandbytes
def test_adamw8bit_resumes_bit_for_bit(workspace: Path) -> None:
    def weights(name: str, *attempts: int) -> dict[str, Tensor]:
        directory = tiny.trained_in_attempts(workspace / name, *attempts, optimizer={"name": "adamw8bit"})
        return load_file(directory / "model" / "unet" / "diffusion_pytorch_model.safetensors")

    resumed, whole = weights("resumed", 4, 6), weights("whole", 6)
    stored = load_checkpoint(tiny.complete_checkpoints(workspace / "whole" / "checkpoints")[-1])
    # bitsandbytes wraps what it quantized once more, and leaves tensors below 4096 elements alone.
    states = stored.state["optimizer"]["state"].values()
    moments = [
        next((inner for inner in state.values() if isinstance(inner, dict)), state)["state1"] for state in states
    ]
    assert {moment.dtype for moment in moments} == {torch.uint8, torch.float32}
    base = load_file(workspace / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    large = [name for name, value in base.items() if value.numel() >= 4096]
    assert large and all(not torch.equal(whole[name], base[name]) for name in large)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)


def _layers(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_alone_is_quantized(workspace: Path, kind: Kind, dtype: torch.dtype | None) -> None:
    model = load_model("digits", workspace / "model")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    given = (torch.randn(3, 1, 8, 8), torch.tensor([1, 400, 900]), model.encode_prompts(["a one", "a two", ""]))
    with torch.no_grad():
        base = model.predict(model.network.eval(), *given)
    networks = Networks(
        model, lora=None, gradient_checkpointing=False, reference_dtype=dtype, reference_quantization=kind
    )
    assert networks.reference_module is not None
    for name, parameter in networks.policy_module.named_parameters():
        assert parameter.requires_grad and parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    assert all(type(layer) is nn.Linear for layer in _layers(networks.policy_module))
    assert torch.equal(networks.policy(*given), base)

    stored = torch.int8 if kind == "int8" else torch.uint8
    assert len(_layers(networks.reference_module)) > 30
    assert {layer.weight.dtype for layer in _layers(networks.reference_module)} == {stored}
    parameters = dict(networks.reference_module.named_parameters())
    others = {p.dtype for name, p in parameters.items() if p.dtype != stored and not name.endswith(".scale")}
    assert others == {dtype or torch.float32}
    assert not any(parameter.requires_grad for parameter in networks.reference_module.parameters())
    reference = networks.reference(*given)
    assert reference.dtype == torch.float32 and not reference.requires_grad
    assert not torch.equal(reference, base)


def test_int8_errs_by_the_rounding_of_weights() -> None:
    """One scale s = max|w|/127 for each row w of the weight, and a rounding of half a unit: |Σ wx - Σ w'x| ≤ Σ |x| s/2,
    and 48 roundings of float32 in the sum.
    """
    layer, given = nn.Linear(48, 24), torch.randn(7, 48)
    network = nn.Sequential(copy.deepcopy(layer)).eval()
    quantize_linear_layers(network, "int8")
    with torch.no_grad():
        exact = layer.double()(given.double())
        found = network(given).double()
        weight, inputs = layer.weight.abs(), given.double().abs()
        unit = weight.amax(1, keepdim=True) / 127
        bound = inputs @ unit.expand_as(weight).T / 2 + 48 * 2**-24 * (inputs @ weight.T)
    assert ((found - exact).abs() <= bound).all()
    assert (found - exact).abs().max() > 1e-4


def test_nf4_predicts_what_the_rounded_weights_do(workspace: Path) -> None:
    """Weights move by at most half the largest gap of the code, (1 - 0.696)/2 of their block's largest; inputs do not.

    The float32 error against those weights in float64 is that of any float32 prediction.
    """
    model = load_model("digits", workspace / "model")
    networks = Networks(model, lora=None, gradient_checkpointing=False, reference_quantization="nf4")
    assert networks.reference_module is not None
    exact = copy.deepcopy(model.network).double()
    for rounded, linear, original in zip(
        _layers(networks.reference_module), _layers(exact), _layers(model.network), strict=True
    ):
        weight = rounded.dequantized(torch.float32)
        largest = original.weight.detach().flatten().abs()
        blocks = nn.functional.pad(largest, (0, -len(largest) % 64)).view(-1, 64).amax(1).repeat_interleave(64)
        moved = (weight - original.weight).detach().flatten().abs()
        assert moved.max() > 0
        assert (moved <= 0.1520 * blocks[: len(moved)]).all()
        linear.weight.data.copy_(weight)
    given = (torch.randn(3, 1, 8, 8), torch.tensor([1, 400, 900]), model.encode_prompts(["a one", "a two", ""]))
    doubled = (given[0].double(), given[1], {name: tensor.double() for name, tensor in given[2].items()})
    with torch.no_grad():
        expected = model.predict(exact, *doubled)
        plain = model.predict(copy.deepcopy(exact).float(), *given)
        found = networks.reference(*given)
    rounding = (plain - expected).norm()
    assert (found - expected).norm() < 2 * rounding < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_a_quantized_reference(workspace: Path, kind: Kind) -> None:
    """From the cache the same losses as without, up to the rounding of a network asked in other batches."""
    losses = []
    for cache in (None, str(workspace / "cache")):
        config = tiny.config(
            workspace,
            "inversion-dpo",
            model={"reference_quantization": kind},
            cache={"path": cache},
            training={"steps": 2},
            output={"directory": str(workspace / f"run-{cache is None}"), "log_every": 1},
        )
        losses.append([row["loss"] for row in train(config, progress=False).history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    changed = tiny.config(workspace, "inversion-dpo", cache={"path": str(workspace / "cache")})
    with pytest.raises(InvalidInput, match=rf"model\.reference_quantization \('{kind}' there, absent here\)"):
        train(changed, progress=False)
