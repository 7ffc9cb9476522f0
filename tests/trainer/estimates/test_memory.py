"""Estimated memory, part by part, against the tensors of a run that was set up on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.live_memory import LiveMemory
from fastinvdpo.models import load_model
from fastinvdpo.trainer import TrainConfig
from fastinvdpo.trainer.accounting import forward_flops
from fastinvdpo.trainer.call_size import saved_bytes
from fastinvdpo.trainer.estimates.activations import FakeNetworks
from fastinvdpo.trainer.estimates.architecture import Architecture, find_architecture
from fastinvdpo.trainer.estimates.estimate import Estimate, estimate
from fastinvdpo.trainer.estimates.memory import QUANTIZED_WEIGHTS, largest_call, samples_with_gradient, weight_bytes
from fastinvdpo.trainer.estimates.published import PUBLISHED
from fastinvdpo.trainer.loop import _Run
from fastinvdpo.trainer.opening import open_dataset, open_model
from fastinvdpo.trainer.quantization import quantize_linear_layers
from fastinvdpo.trainer.step import training_step
from tests.models import tiny as models
from tests.trainer import tiny
from tests.trainer.test_bitsandbytes import needs_bitsandbytes

LENGTH = 6


def set_up(config: TrainConfig) -> _Run:
    """A run up to its first step, without a cache."""
    run = _Run(config, open_model(config), open_dataset(config), "never", False)
    run._set_up()
    return run


def close(run: _Run) -> None:
    run.builder.close()
    run.reporter.close()


def bytes_of(tensors: Iterable[Any]) -> int:
    """Of tensors, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(found.values())


def optimizer_bytes(run: _Run) -> int:
    inner = run.state.optimizer.optimizer
    return bytes_of(value for state in inner.state.values() for value in state.values())


def make_a_step(run: _Run) -> None:
    training = run.config.training
    batches = [run.builder.build(range(training.batch_size))]
    training_step(run.state, run.objective, batches, run.accelerator, accumulation=1, max_grad_norm=1.0, seed=0)


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "ema": {"training": {"ema_decay": 0.9}},
    "bf16-reference": {"model": {"reference_dtype": "bf16"}},
    "lora": {"model": {"lora": {"rank": 2}}, "training": {"ema_decay": 0.9}},
    "adafactor": {"optimizer": {"name": "adafactor"}},
    "int8": {"model": {"reference_quantization": "int8"}},
    "lora-int8": {"model": {"lora": {"rank": 2}, "quantization": "int8"}},
    "nf4": {"model": {"reference_quantization": "nf4", "reference_dtype": "bf16"}},
}


@pytest.mark.parametrize(
    "sections",
    [
        *(pytest.param(sections, id=name) for name, sections in VARIANTS.items()),
        pytest.param({"optimizer": {"name": "adamw8bit"}}, id="adamw8bit", marks=needs_bitsandbytes),
    ],
)
def test_what_a_run_keeps_is_what_was_estimated(workspace: Path, sections: dict[str, Any]) -> None:
    config = tiny.config(workspace, **sections)
    found = estimate(config, device_type="cpu")
    run = set_up(config)
    try:
        networks = run.state.networks
        trained = list(networks.trainable().values())
        make_a_step(run)
        parts = found.parts
        adapters = parts["adapters (LoRA)"]
        assert parts["weights of the policy"] + adapters == bytes_of(_tensors(networks.policy_module))
        assert parts["gradients"] == sum(parameter.nbytes for parameter in trained)
        assert parts[f"optimiser states ({config.optimizer.name})"] == optimizer_bytes(run)
        averages = {} if run.state.ema is None else run.state.ema.averages
        assert parts["moving average (EMA)"] == bytes_of(averages.values())
        reference = networks.reference_module
        assert parts["copy as reference"] == (0 if reference is None else bytes_of(_tensors(reference)))
        assert (reference is None) == (config.model.lora is not None)
    finally:
        close(run)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("kind", QUANTIZED_WEIGHTS)
@pytest.mark.parametrize("shape", [(64, 32), (33, 70), (5, 13)])
def test_quantised_layers(kind: Any, shape: tuple[int, int]) -> None:
    network = nn.Sequential(nn.Linear(*shape), nn.LayerNorm(shape[1]))
    expected = weight_bytes(network.requires_grad_(False), kind)
    quantize_linear_layers(network, kind)
    assert bytes_of(_tensors(network)) == expected


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name, build in models.PIPELINES.items():
        build().save_pretrained(root / name, safe_serialization=True)
    tiny.write_data(root / "pairs.parquet")
    return root


def family_config(root: Path, family: str, **sections: Any) -> TrainConfig:
    length = {"max_sequence_length": LENGTH} if family in models.FLOW else {}
    model = {"family": "auto", "path": str(root / family), **length, **sections.pop("model", {})}
    return tiny.config(root, model=model, data={"resolution": 16}, **sections)


def described(config: TrainConfig) -> Architecture:
    found = find_architecture(config)
    assert isinstance(found, Architecture), found
    return found


@pytest.mark.parametrize("family", models.PIPELINES)
def test_a_checkpoint_is_known_by_its_configuration_files(root: Path, family: str) -> None:
    """As loading it tells: shapes, schedule, sizes of all parts."""
    config = family_config(root, family)
    found, loaded = described(config), open_model(config)
    told = loaded.encode_prompts(["a"])
    assert found.told == {name: tuple(tensor.shape[1:]) for name, tensor in told.items()}
    assert found.latents == loaded.latent_shape
    assert torch.equal(found.model.schedule.alphas_cumprod, loaded.schedule.alphas_cumprod)
    assert sum(found.frozen().values()) == sum(bytes_of(_tensors(part)) for part in loaded.frozen_modules())
    state = {name: tensor.shape for name, tensor in loaded.network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.model.network.state_dict().items()} == state


PRECISIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"training": {"gradient_checkpointing": True}},
    "bf16": {"training": {"mixed_precision": "bf16"}},
    "bf16-checkpointed": {"training": {"mixed_precision": "bf16", "gradient_checkpointing": True}},
    "bf16-lora": {"training": {"mixed_precision": "bf16"}, "model": {"lora": {"rank": 2}}},
    "bf16-reference": {"training": {"mixed_precision": "bf16"}, "model": {"reference_dtype": "bf16"}},
}
CALLS = [
    *(("sdxl", precision) for precision in ("plain", "bf16-checkpointed", "bf16-lora")),
    *((family, "bf16-checkpointed") for family in ("sd3", "flux")),
]
"""The others are in tests/trainer/estimated.py, which make test-deep runs."""


@contextmanager
def statistics_of_norms(network: nn.Module) -> Iterator[list[int]]:
    """Inside, how many numbers each norm keeps beside its input that half precision concerns: means and rates."""
    found: list[int] = []

    def count(norm: Any, inputs: tuple[Any, ...], output: Any) -> None:
        groups = getattr(norm, "num_groups", None)
        rows = inputs[0].shape[0] * groups if groups else inputs[0].numel() // inputs[0].shape[-1]
        found.append(2 * rows if inputs[0].dtype == torch.bfloat16 else 0)

    norms = [each for each in network.modules() if isinstance(each, nn.GroupNorm | nn.LayerNorm)]
    handles = [norm.register_forward_hook(count) for norm in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("family", "precision"), CALLS)
def test_a_call_keeps_what_was_estimated(root: Path, tmp_path: Path, family: str, precision: str) -> None:
    check_call(root, tmp_path, family, precision)


def check_call(root: Path, tmp_path: Path, family: str, precision: str) -> None:
    """The graph of a call to the byte; under autocast but for the statistics of norms, which are float32 on a CPU, and
    half of that to the fake tensor mode. What lives at once until the gradient is there is at least the graph, and a
    block's; and at most twice what a block, or without blocks the graph, keeps beyond both: a gradient for each of
    its tensors, and casts of weights.
    """
    output = {"directory": str(tmp_path / "run")}
    config = family_config(root, family, output=output, **PRECISIONS[precision])
    samples = 3
    found = FakeNetworks(config, described(config)).activations(samples, None, "cpu")
    run = set_up(config)
    try:
        networks = run.state.networks
        pair = run.builder.build(range(2))
        latents = pair.latents[:samples].clone()
        told = {name: tensor[:samples].clone() for name, tensor in pair.conditioning.items()}
        times = torch.zeros(samples, dtype=torch.int64)
        with statistics_of_norms(networks.policy_module) as statistics:
            real = saved_bytes(lambda: networks.probe(latents, times, told), networks.policy_module)
        assert found.graph <= real <= found.graph + 2 * sum(statistics)
        for parameter in networks.trainable().values():
            parameter.grad = torch.zeros_like(parameter)
        with LiveMemory() as live:
            networks.policy(latents, times, told).square().mean().backward()
        checkpointing = config.training.gradient_checkpointing
        assert (found.block > 0) == checkpointing
        inside = found.block if checkpointing else found.graph
        assert max(found.graph, found.block) <= live.peak <= found.total + 2 * inside + found.casts
        first = {name: tensor[:1] for name, tensor in told.items()}
        with torch.no_grad():
            assert found.forward_flops == forward_flops(lambda: networks.probe(latents[:1], times[:1], first))
    finally:
        close(run)


def test_norms_on_a_gpu_take_float32(root: Path) -> None:
    """More than on a CPU in half precision, and the same in float32."""
    for precision, more in (("bf16", True), ("plain", False)):
        config = family_config(root, "sdxl", **PRECISIONS[precision])
        networks = FakeNetworks(config, described(config))
        cpu, cuda = (networks.activations(2, None, device).graph for device in ("cpu", "cuda"))
        assert (cuda > cpu) == more
        assert more or cuda == cpu


@pytest.mark.parametrize("training", [{}, {"batch_size": 1}, {"max_batch": 3}], ids=str)
def test_the_size_of_a_call_is_that_of_the_run(workspace: Path, training: dict[str, Any]) -> None:
    config = tiny.config(workspace, "inversion-dpo", training={"gradient_passes": 1, **training})
    found = estimate(config, device_type="cpu")
    run = set_up(config)
    try:
        assert found.max_batch == run.state.max_batch
        assert found.passes == run.state.gradient_passes
        calls: list[int] = []
        policy = run.state.networks.policy

        def watched(latents: Tensor, timesteps: Tensor, told: Any) -> Tensor:
            calls.append(latents.shape[0])
            return policy(latents, timesteps, told)

        pair = run.builder.build(range(config.training.batch_size))
        limits: dict[str, Any] = {"max_batch": None, "passes": 1, "parameters": run.state.parameters}
        terms = run.objective.stream(
            watched, run.state.networks.reference, pair, seed=0, **{**limits, "max_batch": run.state.max_batch}
        )
        graphs = []
        for call in range(terms.calls):
            before = sum(calls)
            terms.term(call).backward()
            graphs.append(sum(calls) - before)
        assert found.activations is not None
        assert max(graphs) == found.activations.samples == samples_with_gradient(config, found.max_batch)
    finally:
        close(run)


def test_a_gpu_is_filled_as_the_probe_fills_it(workspace: Path) -> None:
    """By doubling, to four fifths of what is free; without a GPU at hand the least call is assumed."""
    config = tiny.config(workspace, "inversion-dpo")
    networks = FakeNetworks(config, described(config))
    assert largest_call(config, networks, 0, 2, "cuda", None) == 2
    trained = networks.trained_bytes()
    one, two = (networks.activations(n, None, "cuda").total + trained for n in (1, 2))
    room = 2 * trained + 1000 + int((one + 6.5 * (two - one)) / 0.8) + 2
    assert largest_call(config, networks, 1000, 2, "cuda", room) == 4
    assert largest_call(config, networks, 1000, 2, "cuda", room + 4 * (two - one)) == 8


PARTS_OF_A_CACHED_RUN = ("text encoders", "VAE", "copy as reference")


def test_a_cache_leaves_out_encoders_and_reference(root: Path, tmp_path: Path) -> None:
    def parts(method: str, **sections: Any) -> dict[str, int]:
        model = {"family": "auto", "path": str(root / "sdxl")}
        config = tiny.config(root, method, model=model, data={"resolution": 16}, **sections)
        found: Estimate = estimate(config, device_type="cpu")
        return {name: found.parts[name] for name in PARTS_OF_A_CACHED_RUN}

    cache = {"cache": {"path": str(tmp_path / "cache")}}
    assert all(parts("inversion-dpo").values())
    assert not any(parts("inversion-dpo", **cache).values())
    latents_alone = parts("inpo", **cache)
    assert latents_alone["copy as reference"] == parts("inpo")["copy as reference"]
    assert latents_alone["VAE"] == latents_alone["text encoders"] == 0


# Millions of parameters, as the checkpoints' safetensors files hold them.
SIZES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": 859.52, "vae": 83.65, "text": 123.06},
    "stabilityai/stable-diffusion-xl-base-1.0": {"unet": 2567.46, "vae": 83.65, "text": 123.06 + 694.66},
    "stabilityai/sdxl-turbo": {"unet": 2567.46, "vae": 83.65, "text": 123.06 + 694.66},
    "stabilityai/stable-diffusion-xl-refiner-1.0": {"unet": 2259.5, "vae": 83.65, "text": 694.66},
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_architectures_have_their_sizes(workspace: Path, path: str) -> None:
    config = tiny.config(workspace, model={"family": "auto", "path": path}, data={"resolution": 512})
    found = described(config)
    parameters = sum(parameter.numel() for parameter in found.model.network.parameters())
    frozen = found.frozen()
    measured = {"unet": parameters, "vae": frozen["VAE"] / 4, "text": frozen["text encoders"] / 4}
    assert {part: count / 1e6 for part, count in measured.items()} == pytest.approx(SIZES[path], rel=2e-4)
    assert found.latents == (4, 64, 64)


def test_an_unknown_model_is_said_to_be_unknown(workspace: Path) -> None:
    config = tiny.config(workspace, model={"family": "auto", "path": "somebody/something"})
    found = estimate(config, device_type="cpu")
    assert isinstance(found.architecture, str) and "give a local path" in found.architecture
    assert found.evaluations.with_gradient == 2 and not found.parts


def test_loaded_sizes_agree_with_the_digits_model(workspace: Path) -> None:
    config = tiny.config(workspace)
    found, loaded = described(config), load_model("digits", workspace / "model")
    assert found.told == {
        "encoder_hidden_states": tuple(loaded.encode_prompts(["a"])["encoder_hidden_states"].shape[1:])
    }
    assert found.frozen() == {"text encoders": 0, "VAE": 0} and found.latents == loaded.latent_shape
