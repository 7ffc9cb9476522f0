"""Weights in 8 and 4 bits: below LoRA, where policy and reference are the same quantized network and the result is not,
and in the frozen reference of full fine-tuning.
"""

from __future__ import annotations

import copy
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from fastinvdpo.config.sections import LoraSection
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import merged_into, perturb
from fastinvdpo.models.quantization import Kind, QuantizedLinear, quantize_network
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.opening import open_dataset, open_model
from tests.evaluation.test_in_training import SECTION, Planned, run
from tests.trainer import tiny

KINDS: tuple[Kind, ...] = ("int8", "nf4")
TARGETS = ["to_q", "to_v", "proj", "conv1"]
LORA = LoraSection(rank=2, alpha=4.0, target_modules=TARGETS)
BELOW_LORA: dict[str, Any] = {"lora": LORA.model_dump()}
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def _given(model: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    return latents, torch.tensor([1, 400, 900]), model.encode_prompts(["a one", "a two", ""])


def _shake(network: nn.Module, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def _quantized(network: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear)}


def _plain(layer: QuantizedLinear) -> nn.Linear:
    """A plain layer with the weight that a quantized one stands for."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).requires_grad_(False)
    plain.weight.copy_(layer.dequantized(torch.float32))
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain


@pytest.mark.parametrize(
    ("kind", "dtype", "bias"),
    [("int8", torch.float32, True), ("int8", torch.bfloat16, False), ("nf4", torch.float32, False),
     ("nf4", torch.bfloat16, True), ("fp8", torch.float32, True), ("fp8", torch.bfloat16, False),
     ("bf16", torch.float32, False)],
)  # fmt: skip
def test_a_layer_is_linear_with_the_weight_it_stands_for(kind: Kind, dtype: torch.dtype, bias: bool) -> None:
    original = nn.Linear(48, 24, bias=bias)
    weight = original.weight.detach().clone()
    layer = QuantizedLinear(original, kind)
    found = []
    for one in (layer, _plain(layer).to(dtype)):
        given = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        out = one(given)
        (gradient,) = torch.autograd.grad(out.square().sum(), given)
        assert out.dtype == gradient.dtype == dtype
        found.append((out.detach(), gradient))
    # The same sums of 48 (24) products, perhaps in another order; in bf16 rounded once at the end.
    for ours, theirs in zip(*found, strict=True):
        rounding = 48 * 2**-24 if dtype == torch.float32 else 2**-7
        assert (ours - theirs).abs().max() <= rounding * theirs.abs().max()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.weight.nbytes == weight.numel() * {"bf16": 2, "fp8": 1, "int8": 1, "nf4": 0.5}[kind]
    largest = weight.abs().amax(1, keepdim=True)
    if kind == "int8":  # half a step of the row
        assert ((layer.dequantized(torch.float32) - weight).abs() <= largest * (0.5 / 127 + 2**-22)).all()
    # RMS of a rounding to 7 bits of fraction; of 3; of the row in 254 steps; of the block in 16.
    bound = {"bf16": 0.002, "fp8": 0.03, "int8": 0.01, "nf4": 0.12}[kind]
    assert bound / 8 < (layer.dequantized(torch.float32) - weight).norm() / weight.norm() < bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_nothing_for_its_gradient(kind: Kind) -> None:
    """A kept input would make gradient checkpointing useless, a kept weight the quantization."""
    layer, given = QuantizedLinear(nn.Linear(48, 24), kind), torch.randn(7, 48, requires_grad=True) + 1
    alive, kept = weakref.ref(given), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        out = layer(given)
    del given
    assert out.requires_grad and alive() is None and not kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_follows_autocast(kind: Kind) -> None:
    layer, given = QuantizedLinear(nn.Linear(48, 24), kind), torch.randn(7, 48, requires_grad=True)
    plain = _plain(layer)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(given), plain(given)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    (gradient,), (expected,) = (torch.autograd.grad(out.float().square().sum(), given) for out in (ours, theirs))
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_are_one_quantized_network(workspace: Path, kind: Kind) -> None:
    model = load_model("stable-diffusion", workspace / "model")
    given = _given(model)
    with torch.no_grad():
        base = model.predict(model.network.eval(), *given)
    quantize_network(model, kind)
    layers = _quantized(model.network)
    assert len(layers) > 30 and not any(type(layer) is nn.Linear for layer in model.network.modules())
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    networks = Networks(model, lora=LORA, gradient_checkpointing=False)
    assert all(".lora_" in name for name in networks.trainable())
    reference = networks.reference(*given)
    assert torch.equal(networks.policy(*given), reference)
    with torch.no_grad():
        assert torch.equal(networks.policy(*given), reference)
    assert 1e-4 < (reference - base).norm() / base.norm() < (0.02 if kind == "int8" else 0.2)
    _shake(networks.policy_module)
    policy = networks.policy(*given)
    assert policy.requires_grad and (policy - reference).abs().max() > 1e-3
    assert torch.equal(networks.reference(*given), reference)
    after = {name.replace(".base_layer", ""): value for name, value in networks.policy_module.state_dict().items()}
    for name, value in before.items():
        assert torch.equal(after[name], value)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_alone_is_quantized(workspace: Path, kind: Kind, dtype: torch.dtype | None) -> None:
    model = load_model("stable-diffusion", workspace / "model")
    before, given = {name: value.clone() for name, value in model.network.state_dict().items()}, _given(model)
    with torch.no_grad():
        base = model.predict(model.network.eval(), *given)
    networks = Networks(
        model, lora=None, gradient_checkpointing=False, reference_dtype=dtype, reference_quantization=kind
    )
    tiny.assert_same(dict(networks.policy_module.state_dict()), before)
    assert all(parameter.requires_grad for parameter in networks.policy_module.parameters())
    assert not _quantized(networks.policy_module)
    assert torch.equal(networks.policy(*given), base)

    module = networks.reference_module
    assert module is not None and len(_quantized(module)) > 30
    stored = torch.int8 if kind == "int8" else torch.uint8
    assert {layer.weight.dtype for layer in _quantized(module).values()} == {stored}
    others = {p.dtype for name, p in module.named_parameters() if p.dtype != stored and not name.endswith(".scale")}
    assert others == {dtype or torch.float32}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    reference = networks.reference(*given)
    assert reference.dtype == torch.float32 and not reference.requires_grad
    assert not torch.equal(reference, base)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_the_gradient_of_the_whole_weights(workspace: Path, kind: Kind, checkpointing: bool) -> None:
    """Its float32 error, against float64, is at most twice that of a network with those weights."""
    model = load_model("stable-diffusion", workspace / "model")
    quantize_network(model, kind)
    twin = copy.deepcopy(model.network)
    for name, layer in _quantized(twin).items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, _plain(layer))

    def gradient(network: nn.Module, dtype: torch.dtype, checkpointing: bool = False) -> Tensor:
        one = copy.copy(model)
        one.network = copy.deepcopy(network).to(dtype)
        torch.manual_seed(0)
        networks = Networks(one, lora=LORA, gradient_checkpointing=checkpointing)
        _shake(networks.policy_module)
        latents, times, conditioning = _given(model)
        told = {name: tensor.to(dtype) for name, tensor in conditioning.items()}
        loss = networks.policy(latents.to(dtype), times, told).square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(networks.trainable().values()))])

    exact = gradient(twin, torch.float64)
    rounding = (gradient(twin, torch.float32).double() - exact).norm()
    ours = gradient(model.network, torch.float32, checkpointing)
    assert (ours.double() - exact).norm() <= 2 * rounding
    assert 0 < rounding < 1e-5 * exact.norm()


def _trained(workspace: Path, folder: str, method: str = "diffusion-dpo", **sections: Any) -> Any:
    sections["model"] = {**BELOW_LORA, **sections.get("model", {})}
    return tiny.trained(workspace, folder, method, output={"log_every": 1}, **sections)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_the_original_weights_with_the_adapter(workspace: Path, kind: Kind) -> None:
    result = _trained(workspace, "run", model={"quantization": kind}, training={"ema_decay": 0.5})
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and result.history[0]["margin"] == 0
    assert all(".lora_" in name for name in tiny.stored(result.directory).trainable)
    base, written = (load_file(path / UNET) for path in (workspace / "model", result.model_directory))
    assert base.keys() == written.keys()
    changed = {name for name in base if not torch.equal(base[name], written[name])}
    assert changed == {name for name in base if name.rsplit(".", 2)[-2] in TARGETS and name.endswith("weight")}
    # The adapter alone, put on the original network by peft, predicts the same.
    plain, merged = (load_model("stable-diffusion", path) for path in (workspace / "model", result.model_directory))
    adapted = PeftModel.from_pretrained(plain.network, str(result.directory / "adapter")).eval()
    with torch.no_grad():
        given = _given(plain)
        trained = merged.predict(merged.network.eval(), *given)
        torch.testing.assert_close(plain.predict(adapted, *given), trained, rtol=1e-4, atol=1e-5)
    assert f"its linear layers in {kind}" in (result.directory / "adapter" / "README.md").read_text()


def test_a_model_is_quantized_before_it_reaches_the_device_and_keeps_its_own_weights(workspace: Path) -> None:
    config = tiny.config(workspace, model={**BELOW_LORA, "quantization": "nf4"})
    model = open_model(config)
    assert len(_quantized(model.network)) > 30 and model.unquantized is not None
    tiny.assert_same(dict(model.unquantized().state_dict()), load_file(workspace / "model" / UNET))
    with pytest.raises(InvalidInput, match=r"network = .*: holds quantized weights"):
        model.save(workspace / "copy")
    at_hand = load_model("stable-diffusion", workspace / "model")
    with torch.no_grad():
        for parameter in at_hand.network.parameters():
            parameter.add_(0.01)
    own = {name: value.clone() for name, value in at_hand.network.state_dict().items()}
    written = tiny.weights(tiny.train_model(config, at_hand, open_dataset(config)))
    for name, value in own.items():
        assert torch.equal(written[name], value) or any(target in name for target in TARGETS)


@pytest.mark.parametrize("kind", KINDS)
def test_perturbation_has_the_size_of_the_weights_below_and_merging_leaves_the_network_alone(
    workspace: Path, kind: Kind
) -> None:
    model = open_model(tiny.config(workspace, model={**BELOW_LORA, "quantization": kind}))
    networks = Networks(model, lora=LoraSection(rank=8, target_modules=["to_q", "to_v"]), gradient_checkpointing=False)
    perturb(networks.policy_module, 0.01, seed=3)
    before = {name: value.clone() for name, value in networks.policy_module.state_dict().items()}
    assert model.unquantized is not None
    base = model.unquantized().state_dict()
    merged = merged_into(model.unquantized(), networks.policy_module).state_dict()
    tiny.assert_same(dict(networks.policy_module.state_dict()), before)
    assert merged.keys() == base.keys() == tiny.unet().state_dict().keys()
    names = [name for name in base if name.endswith(("to_q.weight", "to_v.weight"))]
    ratios = [float((merged[name] - base[name]).norm() / base[name].norm()) for name in names]
    assert len(ratios) >= 8 and all(0.005 < ratio < 0.02 for ratio in ratios)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["quantization", "reference_quantization"])
def test_a_cache_holds_the_quantized_reference(
    workspace: Path, key: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses as without, up to the rounding of a network that computes in other batches; bitsandbytes is not
    needed.
    """
    for module in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, module, None)
    lora = BELOW_LORA["lora"] if key == "quantization" else None
    model, cache, losses = {"lora": lora, "init_perturbation": 0.1}, {"path": str(workspace / "cache")}, []
    for folder, path in (("plain", None), ("cached", cache["path"])):
        sections = {"model": {**model, key: kind}, "cache": {"path": path}, "training": {"steps": 2}}
        losses.append([row["loss"] for row in _trained(workspace, folder, "inversion-dpo", **sections).history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != pytest.approx(math.log(2), abs=1e-3)
    with pytest.raises(InvalidInput, match=rf"model\.{key} \('{kind}' there, absent here\)"):
        _trained(workspace, "other", "inversion-dpo", model=model, cache=cache)


@pytest.mark.parametrize("key", ["quantization", "reference_quantization"])
def test_weights_that_wait_on_the_host_give_the_same_run_and_the_other_one_continues_it(
    workspace: Path, key: str
) -> None:
    model = {"lora": BELOW_LORA["lora"] if key == "quantization" else None, key: "fp8"}
    results = []
    for folder, attempts in {"moved": [(True, 2), (False, 4)], "there": [(False, 4)]}.items():
        for offload, steps in attempts:
            sections: dict[str, Any] = {"model": {**model, "offload": offload}, "training": {"steps": steps}}
            result = _trained(workspace, folder, "inpo", **sections)
        results.append((result.history[-1]["loss"], tiny.weights(result)))
    assert results[0][0] == results[1][0]
    tiny.assert_same(results[0][1], results[1][1])


def test_latents_and_embeddings_serve_any_weights(workspace: Path) -> None:
    for kind in ("nf4", None):
        sections = {"model": {"quantization": kind}, "cache": {"path": str(workspace / "cache")}}
        _trained(workspace, str(kind), "inpo", training={"steps": 2}, **sections)


def test_the_best_model_of_an_evaluation_is_whole(workspace: Path) -> None:
    result = run(workspace, "run", Planned(0.1, 0.2, 0.9, 0.3), model={"lora": {"rank": 2}, "quantization": "nf4"})
    assert result.best_model_directory is not None and SECTION["every"] == 2
    best, base = load_file(result.best_model_directory / UNET), load_file(workspace / "model" / UNET)
    assert best.keys() == base.keys()
    assert any(not torch.equal(best[name], base[name]) for name in base)
    assert all(torch.equal(best[name], base[name]) for name in base if "to_" not in name)
