"""The ``performance:`` section: defaults, what cannot be, and that switches change rounding alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastinvdpo.config import train as config_checks
from fastinvdpo.config.sections import LoraSection, PerformanceSection
from fastinvdpo.errors import InvalidInput, MissingExtra
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import adapters_disabled
from fastinvdpo.trainer import performance, train
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.performance import GraphedCalls, arrange, decide, speed_up
from tests.trainer import tiny

SWITCHES = ("channels_last", "compile", "cuda_graphs", "tf32")
OFF = PerformanceSection(**dict.fromkeys(SWITCHES, False))
LORA = LoraSection(rank=2, alpha=4.0, target_modules=["to_q", "to_v", "conv1"])


def on(**switches: Any) -> PerformanceSection:
    return OFF.model_copy(update=switches)


def networks_of(workspace: Path, lora: LoraSection | None = None) -> Networks:
    return Networks(load_model("stable-diffusion", workspace / "model"), lora=lora, gradient_checkpointing=False)


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
    ("device", "precision", "optimizer", "expected"),
    [
        ("cpu", "no", "adamw", set()),
        ("cpu", "bf16", "adamw", set()),
        ("cuda", "no", "adamw", {"tf32"}),
        ("cuda", "bf16", "adamw", {"tf32", "channels_last"}),
        ("cuda", "bf16", "adamw8bit", {"tf32"}),
        ("cuda", "bf16", "adafactor", {"tf32", "channels_last"}),
    ],
)
def test_defaults_by_device(workspace: Path, device: str, precision: str, optimizer: str, expected: set[str]) -> None:
    config = tiny.config(workspace, training={"mixed_precision": precision}, optimizer={"name": optimizer})
    decided = decide(config, nn.Linear(1, 1), _accelerator(device))
    assert {name for name, value in decided if value} == expected
    given = on(**{name: name not in expected for name in SWITCHES}, attention="sdpa")
    assert decide(config.model_copy(update={"performance": given}), nn.Linear(1, 1), _accelerator(device)) == given
    # Weights in half precision count as half precision.
    assert decide(tiny.config(workspace), nn.Linear(1, 1).bfloat16(), _accelerator("cuda")).channels_last


def test_shards_are_neither_compiled_nor_recorded_nor_laid_out(workspace: Path, cuda: None) -> None:
    for key in ("channels_last", "compile", "cuda_graphs"):
        config = tiny.config(workspace, performance={key: True})
        with pytest.raises(InvalidInput, match=rf"performance\.{key} = True: is not built for .* FSDP"):
            decide(config, nn.Linear(1, 1), _accelerator("cuda", "FSDP"))


@pytest.mark.parametrize("name", ["inpo", "smpo"])
def test_graphs_need_static_shapes(workspace: Path, cuda: None, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"performance\.cuda_graphs = True: .*set method\.static_shapes to true"):
        tiny.config(workspace, name, performance={"cuda_graphs": True})
    both = {"cuda_graphs": True, "compile": True}
    assert tiny.config(workspace, name, method={"static_shapes": True}, performance=both).performance.cuda_graphs


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
    networks, chosen = networks_of(workspace), []
    for network in (networks.policy_module, networks.reference_module):
        name = f"{verb}_xformers_memory_efficient_attention"
        assert callable(getattr(network, name))  # diffusers has it
        monkeypatch.setattr(network, name, lambda network=network: chosen.append(network))
    arrange(networks, on(attention=attention))
    assert chosen == [networks.policy_module, networks.reference_module]


def test_a_network_that_offers_no_choice(workspace: Path) -> None:
    plain: Any = SimpleNamespace(policy_module=nn.Linear(2, 2), reference_module=None, reference_quantization=None)
    with pytest.raises(InvalidInput, match=r"performance\.attention = 'sdpa': .*Linear"):
        arrange(plain, on(attention="sdpa"))
    with pytest.raises(InvalidInput, match=r"performance\.compile = True: .*Linear"):
        speed_up(plain, on(compile=True))
    networks = networks_of(workspace)
    for module in networks.policy_module.modules():
        if hasattr(module, "transformer_blocks"):
            module.transformer_blocks = nn.ModuleList()
    with pytest.raises(InvalidInput, match=r"performance\.compile = True: diffusers refuses .*BasicTransformerBlock"):
        speed_up(networks, on(compile=True))


def _predictions(
    workspace: Path, switches: PerformanceSection, lora: LoraSection | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Predictions of policy and reference, and the policy's gradient, with trained weights that no longer agree."""
    model = load_model("stable-diffusion", workspace / "model", dtype=dtype)
    torch.manual_seed(0)
    networks = Networks(model, lora=lora, gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(dtype))
    before, names = list(networks.trainable().values()), list(networks.policy_module.state_dict())
    arrange(networks, switches)
    speed_up(networks, switches)
    after = list(networks.trainable().values())
    assert all(one is other for one, other in zip(before, after, strict=True))  # an optimizer may hold them
    assert list(networks.policy_module.state_dict()) == names
    if switches.compile:
        compiled = [module for module in networks.policy_module.modules() if module._compiled_call_impl is not None]
        assert {type(module).__name__ for module in compiled} == {"BasicTransformerBlock"}
    if switches.channels_last:
        for network in filter(None, (networks.policy_module, networks.reference_module)):
            weights = [parameter for parameter in network.parameters() if parameter.ndim == 4]
            assert len(weights) > 10
            assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    given = (
        torch.randn(4, 4, 8, 8, generator=generator).to(dtype),
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
    exact = _predictions(workspace, OFF, lora, torch.float64)
    plain = _predictions(workspace, OFF, lora, torch.float32)
    switched = _predictions(workspace, on(**{switch: True}), lora, torch.float32)
    assert _error(exact["policy"], exact["reference"]) > 1e-3
    for name, value in exact.items():
        rounding = _error(plain[name], value)
        assert 0 < rounding < 1e-5
        assert _error(switched[name], value) < 2 * rounding


def test_resumed_equals_uninterrupted_and_another_switch_is_told(
    workspace: Path, compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    def run(folder: str, steps: int, **switches: bool) -> Path:
        torch._dynamo.reset()  # as another process would begin
        return tiny.trained(workspace, folder, training={"steps": steps}, performance=switches).directory

    ends = [run("resumed", steps, compile=True) for steps in (2, 4)]
    tiny.assert_same(tiny.weights(ends[-1]), tiny.weights(run("compiled", 4, compile=True)))
    changed = run("changed", 2, channels_last=True)
    assert tiny.stored(changed, 2).meta["performance"] == on(channels_last=True).model_dump()
    with caplog.at_level(logging.INFO, logger="fastinvdpo.trainer"):
        run("changed", 6)
    assert "Performance: attention the family's, channels_last off, compile off" in caplog.text
    assert "switches than the checkpoint's: channels_last True → False" in caplog.text
    # Rounding moves a weight by parts of a step, 1e-3; another weight's moments would move it by whole steps.
    for name, value in tiny.weights(run("whole", 6)).items():
        torch.testing.assert_close(tiny.weights(changed)[name], value, rtol=0, atol=1e-4)


# Replayed calls, with a recorder that runs the function again where a GPU would replay its kernels


@pytest.fixture
def recorded() -> list[Tensor]:
    """Outputs of the recordings so far."""
    return []


@pytest.fixture
def calls(recorded: list[Tensor]) -> GraphedCalls:
    @torch.no_grad()
    def record(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        recorded.append(torch.full_like(function(), torch.nan))  # recording computes nothing
        output = recorded[-1]
        return output, torch.no_grad()(lambda: output.copy_(function()))

    return GraphedCalls(record)


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2, alpha=4.0)], ids=["copy", "lora"])
def test_policy_and_reference_are_those_without_graphs(
    workspace: Path, calls: GraphedCalls, recorded: list[Tensor], lora: LoraSection | None
) -> None:
    """Also after an update in place, and with other inputs of known shapes; calls with gradient stay as they are."""
    model = load_model("stable-diffusion", workspace / "model")
    networks = Networks(model, lora=lora, gradient_checkpointing=False)
    networks.graphs = calls
    prompts = model.encode_prompts(["a one", "a two", ""])
    for update in range(3):
        with torch.no_grad():
            for parameter in networks.trainable().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        conditioning = {name: tensor.roll(update, 0) for name, tensor in prompts.items()}
        given = (torch.randn(3, 4, 8, 8), torch.tensor([update, 400, 900]), conditioning)
        before = networks.evaluations["without_gradient"]
        with torch.no_grad():
            policy, reference = networks.policy(*given), networks.reference(*given)
            assert networks.evaluations["without_gradient"] == before + 6
            assert torch.equal(policy, model.predict(networks.policy_module, *given))
            if networks.reference_module is not None:
                assert torch.equal(reference, model.predict(networks.reference_module, *given))
            else:
                with adapters_disabled(networks.policy_module):
                    assert torch.equal(reference, model.predict(networks.policy_module, *given))
        assert not torch.equal(policy, reference)
        assert networks.policy(*given).requires_grad
    assert len(recorded) == 2  # one of the policy, one of the reference


def test_a_shape_of_its_own_is_a_graph_of_its_own_up_to_the_largest_number(
    calls: GraphedCalls, recorded: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a call returns outlives the next replay, and expanded inputs are read."""

    def predict(latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        return latents * timesteps.reshape(-1, 1) + conditioning.get("text", 0)

    found = []
    for rows in (2, 3, 2, 3):
        latents, times = torch.randn(rows, 5), torch.arange(rows)
        found.append((calls("policy", predict, latents, times, {}), latents * times.reshape(-1, 1)))
    assert all(torch.equal(one, expected) for one, expected in found)
    assert [output.shape[0] for output in recorded] == [2, 3]
    calls("policy", predict, torch.randn(2, 5), torch.tensor([0.5, 1.0]), {})  # another dtype
    text = torch.tensor([[2.0]]).expand(2, 1)
    assert torch.equal(
        calls("policy", predict, torch.zeros(2, 5), torch.arange(2), {"text": text}), torch.full((2, 5), 2.0)
    )
    calls("reference", predict, torch.randn(2, 5), torch.arange(2), {})
    assert len(recorded) == 5
    monkeypatch.setattr(performance, "LARGEST_NUMBER", 5)
    with pytest.warns(UserWarning, match="more than 5 shapes"):
        assert torch.equal(calls("policy", predict, torch.ones(4, 5), torch.ones(4), {}), torch.ones(4, 5))
    assert len(recorded) == 5
