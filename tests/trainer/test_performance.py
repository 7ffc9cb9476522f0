"""The ``performance:`` section: defaults, what cannot be, and that switches change rounding alone."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastinvdpo.config import checks as config_checks
from fastinvdpo.config.sections import LoraSection, PerformanceSection
from fastinvdpo.errors import InvalidInput, MissingExtra
from fastinvdpo.models import load_model
from fastinvdpo.trainer import performance, train
from fastinvdpo.trainer.checkpoint import load_checkpoint
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.performance import arrange, decide, match_layout, speed_up
from tests.trainer import tiny

OFF = PerformanceSection(channels_last=False, attention=None, compile=False, cuda_graphs=False, tf32=False)
LORA = LoraSection(rank=2, alpha=4.0, target_modules=["to_q", "to_v", "conv1"])


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Dynamo and autograd's graphs, without the generation of code, which takes longest; forgotten afterwards."""
    monkeypatch.setattr(performance, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    torch._dynamo.reset()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if runs were placed on a GPU; for checks that touch none."""
    monkeypatch.setattr(config_checks, "runs_on_cuda", lambda: True)


def _accelerator(device: str, distributed_type: str = "NO") -> Any:
    return SimpleNamespace(device=torch.device(device), distributed_type=SimpleNamespace(value=distributed_type))


@pytest.mark.parametrize(
    ("device", "precision", "optimizer", "on"),
    [
        ("cpu", "no", "adamw", set()),
        ("cpu", "bf16", "adamw", set()),
        ("cuda", "no", "adamw", {"tf32"}),
        ("cuda", "bf16", "adamw", {"tf32", "channels_last"}),
        ("cuda", "bf16", "adamw8bit", {"tf32"}),
        ("cuda", "bf16", "adafactor", {"tf32", "channels_last"}),
    ],
)
def test_defaults_by_device(workspace: Path, device: str, precision: str, optimizer: str, on: set[str]) -> None:
    config = tiny.config(workspace, training={"mixed_precision": precision}, optimizer={"name": optimizer})
    decided = decide(config, nn.Linear(1, 1), _accelerator(device)).model_dump()
    assert {name for name, value in decided.items() if value} == on
    asked = {name: name not in on for name in ("channels_last", "compile", "cuda_graphs", "tf32")}
    config.performance.__dict__.update(asked, attention="sdpa")
    assert decide(config, nn.Linear(1, 1), _accelerator(device)).model_dump() == {**asked, "attention": "sdpa"}


def test_weights_in_half_precision_count_as_half_precision(workspace: Path) -> None:
    config = tiny.config(workspace)
    assert decide(config, nn.Linear(1, 1).bfloat16(), _accelerator("cuda")).channels_last


@pytest.mark.parametrize("key", ["compile", "cuda_graphs"])
def test_shards_are_neither_compiled_nor_recorded(workspace: Path, cuda: None, key: str) -> None:
    config = tiny.config(workspace, performance={key: True})
    with pytest.raises(InvalidInput, match=rf"performance\.{key} = True: is not built for .* FSDP"):
        decide(config, nn.Linear(1, 1), _accelerator("cuda", "FSDP"))


@pytest.mark.parametrize(
    ("method", "sections", "message"),
    [
        ("inpo", {"performance": {"cuda_graphs": True}}, r"performance\.cuda_graphs = True: needs CUDA"),
        ("inpo", {"performance": {"tf32": True}}, r"performance\.tf32 = True: needs CUDA"),
        ("inpo", {"performance": {"attention": "xformers"}}, r"performance\.attention = 'xformers': needs CUDA"),
        ("inpo", {"performance": {"compile": True}}, r"performance\.compile = True: .*set method\.static_shapes to"),
        (
            "diffusion-dpo",
            {"performance": {"channels_last": True}, "optimizer": {"name": "adamw8bit"}},
            r"performance\.channels_last = True: is undone by optimizer adamw8bit",
        ),
        ("inpo", {"performance": {"attention": "flash"}}, r"performance\.attention = 'flash'.*'sdpa' or 'xformers'"),
        ("inpo", {"performance": {"compiled": True}}, r"performance\.compiled.*compile"),
    ],
)
def test_what_cannot_be(workspace: Path, method: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        tiny.config(workspace, method, **sections)


@pytest.mark.parametrize("name", ["inpo", "smpo"])
def test_graphs_need_static_shapes(workspace: Path, cuda: None, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"performance\.cuda_graphs = True: .*set method\.static_shapes to true"):
        tiny.config(workspace, name, performance={"cuda_graphs": True})
    static = tiny.config(
        workspace, name, method={"static_shapes": True}, performance={"cuda_graphs": True, "compile": True}
    )
    assert static.performance.cuda_graphs


def test_a_missing_xformers_is_told_before_anything_is_loaded(
    workspace: Path, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    config = tiny.config(workspace, performance={"attention": "xformers"}, data={"path": "/nowhere"})
    with pytest.raises(MissingExtra, match=r"performance\.attention = xformers needs .*fastinvdpo\[xformers\]"):
        train(config, progress=False)


@pytest.mark.parametrize(("attention", "verb"), [("sdpa", "disable"), ("xformers", "enable")])
def test_attention_is_chosen_for_policy_and_reference(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, attention: Any, verb: str
) -> None:
    networks = Networks(load_model("digits", workspace / "model"), lora=None, gradient_checkpointing=False)
    chosen = []
    for network in (networks.policy_module, networks.reference_module):
        name = f"{verb}_xformers_memory_efficient_attention"
        assert callable(getattr(network, name))  # diffusers has it
        monkeypatch.setattr(network, name, lambda network=network: chosen.append(network))
    arrange(networks, OFF.model_copy(update={"attention": attention}))
    assert chosen == [networks.policy_module, networks.reference_module]


@pytest.mark.parametrize(("key", "value"), [("attention", "sdpa"), ("compile", True)])
def test_a_network_that_offers_no_choice(key: str, value: Any) -> None:
    networks: Any = SimpleNamespace(policy_module=nn.Linear(2, 2), reference_module=None, reference_quantization=None)
    switches = OFF.model_copy(update={key: value})
    with pytest.raises(InvalidInput, match=rf"performance\.{key} = {value!r}: .*Linear"):
        arrange(networks, switches)
        speed_up(networks, switches)


def test_a_network_without_repeated_blocks_is_not_compiled(workspace: Path) -> None:
    model = load_model("digits", workspace / "model")
    for module in model.network.modules():
        if hasattr(module, "transformer_blocks"):
            module.transformer_blocks = nn.ModuleList()
    networks = Networks(model, lora=None, gradient_checkpointing=False)
    with pytest.raises(InvalidInput, match=r"performance\.compile = True: diffusers refuses .*BasicTransformerBlock"):
        speed_up(networks, OFF.model_copy(update={"compile": True}))


Answers = dict[str, Tensor]


def _answers(workspace: Path, switches: PerformanceSection, lora: LoraSection | None, dtype: torch.dtype) -> Answers:
    """Predictions of policy and reference, and the policy's gradient, with trained weights that no longer agree."""
    model = load_model("digits", workspace / "model", dtype=dtype)
    torch.manual_seed(0)
    networks = Networks(model, lora=lora, gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(dtype))
    before = list(networks.trainable().values())
    arrange(networks, switches)
    speed_up(networks, switches)
    after = list(networks.trainable().values())
    assert all(one is other for one, other in zip(before, after, strict=True))  # an optimizer may hold them
    given = (
        torch.randn(4, 1, 8, 8, generator=generator).to(dtype),
        torch.tensor([1, 400, 700, 900]),
        {name: tensor.to(dtype) for name, tensor in model.encode_prompts(["a one", "a two", "a three", ""]).items()},
    )
    reference = networks.reference(*given)
    with torch.no_grad():
        alone = networks.policy(*given)
    policy = networks.policy(*given)
    assert policy.is_contiguous() and reference.is_contiguous()  # as the fused ops read them
    again = networks.reference(*given)  # between a prediction and its backward, as in a step
    assert torch.equal(again, reference)
    gradient = torch.autograd.grad((policy - reference).square().mean(), after)
    flat = torch.cat([part.flatten() for part in gradient])
    return {"reference": reference, "alone": alone, "policy": policy.detach(), "gradient": flat}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("switch", "lora"),
    [("channels_last", None), ("channels_last", LORA), ("compile", LORA)],
    ids=["channels_last-full", "channels_last-lora", "compile-lora"],
)
def test_a_switch_changes_rounding_alone(
    workspace: Path, compiler: None, switch: str, lora: LoraSection | None
) -> None:
    """The float32 error of predictions and gradients, against float64, is at most twice that without the switch."""
    exact = _answers(workspace, OFF, lora, torch.float64)
    plain = _answers(workspace, OFF, lora, torch.float32)
    switched = _answers(workspace, OFF.model_copy(update={switch: True}), lora, torch.float32)
    assert _error(exact["policy"], exact["reference"]) > 1e-3
    for name, value in exact.items():
        rounding = _error(plain[name], value)
        assert 0 < rounding < 1e-5
        assert _error(switched[name], value) < 2 * rounding


def test_channels_last_is_the_layout_of_every_convolution(workspace: Path) -> None:
    networks = Networks(load_model("digits", workspace / "model"), lora=None, gradient_checkpointing=False)
    arrange(networks, OFF.model_copy(update={"channels_last": True}))
    for network in (networks.policy_module, networks.reference_module):
        assert network is not None
        weights = [parameter for parameter in network.parameters() if parameter.ndim == 4]
        assert len(weights) > 10
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_compiled_blocks_keep_their_names(workspace: Path, compiler: None) -> None:
    networks = Networks(load_model("digits", workspace / "model"), lora=LORA, gradient_checkpointing=False)
    names = list(networks.policy_module.state_dict())
    speed_up(networks, OFF.model_copy(update={"compile": True}))
    assert list(networks.policy_module.state_dict()) == names
    compiled = [module for module in networks.policy_module.modules() if module._compiled_call_impl is not None]
    assert {type(module).__name__ for module in compiled} == {"BasicTransformerBlock"}


def test_a_loaded_state_takes_the_layout_of_its_parameter() -> None:
    """The fused AdamW reads moments as flat arrays: in another layout it would give each weight another's."""
    values, gradient = torch.randn(8, 4, 2, 2), torch.randn(8, 4, 2, 2)

    def prepared(layout: torch.memory_format) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(values.clone(memory_format=torch.contiguous_format).contiguous(memory_format=layout))
        parameter.grad = gradient.contiguous(memory_format=layout)
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)

    first, plain = prepared(torch.contiguous_format)
    plain.step()
    other, loaded = prepared(torch.channels_last)
    loaded.load_state_dict(copy.deepcopy(plain.state_dict()))
    match_layout(loaded)
    assert loaded.state[other]["exp_avg"].stride() == other.stride()
    with torch.no_grad():
        other.copy_(first)
    for optimizer, parameter in ((plain, first), (loaded, other)):
        parameter.grad = torch.empty_like(parameter).copy_(gradient.square())
        optimizer.step()
    torch.testing.assert_close(other, first, rtol=1e-6, atol=0)


@pytest.mark.parametrize("switch", ["channels_last", "compile"])
def test_resumed_equals_uninterrupted(workspace: Path, compiler: None, switch: str) -> None:
    def config(name: str, steps: int) -> Any:
        output = {"directory": str(workspace / name)}
        return tiny.config(workspace, training={"steps": steps}, performance={switch: True}, output=output)

    train(config("resumed", 2), progress=False)
    torch._dynamo.reset()  # as another process would begin
    train(config("resumed", 4), progress=False)
    torch._dynamo.reset()
    train(config("whole", 4), progress=False)
    whole, resumed = tiny.weights(workspace / "whole"), tiny.weights(workspace / "resumed")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)


def test_another_switch_continues_a_run_and_is_told(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    def config(name: str, steps: int, **switches: bool) -> Any:
        output = {"directory": str(workspace / name)}
        return tiny.config(workspace, training={"steps": steps}, performance=switches, output=output)

    train(config("changed", 2, channels_last=True), progress=False)
    stored = load_checkpoint(tiny.complete_checkpoints(workspace / "changed" / "checkpoints")[-1])
    assert stored.meta["performance"] == {**OFF.model_dump(), "channels_last": True}
    with caplog.at_level(logging.INFO, logger="fastinvdpo.trainer"):
        train(config("changed", 6), progress=False)
    assert "Performance: attention the family's, channels_last off, compile off" in caplog.text
    assert "switches than the checkpoint's: channels_last True → False" in caplog.text
    train(config("whole", 6), progress=False)
    changed = tiny.weights(workspace / "changed")
    # Rounding moves a weight by parts of a step, 1e-3; another weight's moments would move it by whole steps.
    for name, value in tiny.weights(workspace / "whole").items():
        torch.testing.assert_close(changed[name], value, rtol=0, atol=1e-4)
