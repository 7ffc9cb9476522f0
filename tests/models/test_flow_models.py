"""SD3 and FLUX through the real loading, encoding, predicting and saving code, at tiny widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline

from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.inversion import invert_images
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.models import load_model
from tests.cases import SD_SCHEDULER
from tests.models import tiny
from tests.models.test_stable_diffusion import picture

LENGTH = 6
OPTIONS = {"resolution": 16, "max_sequence_length": LENGTH}
PROMPTS = ["a cat", "zebra"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    for name in tiny.FLOW:
        tiny.PIPELINES[name]().save_pretrained(root / name, safe_serialization=True)
    return {name: root / name for name in tiny.FLOW}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, Any]:
    return {name: load_model("auto", path, **OPTIONS) for name, path in directories.items()}


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def in_their_layout(name: str, latents: torch.Tensor) -> torch.Tensor:
    """FluxPipeline keeps latents packed."""
    return latents if name == "sd3" else FluxPipeline._pack_latents(latents, 2, 4, 8, 8)


@contextmanager
def recorded(network: Any) -> Iterator[list[tuple[dict[str, Any], torch.Tensor]]]:
    """The arguments and the output of every call of a network."""
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []

    def record(module: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
        assert not inputs
        calls.append((named, output[0]))

    handle = network.register_forward_hook(record, with_kwargs=True)
    yield calls
    handle.remove()


def their_latents(model: Any, name: str, **arguments: Any) -> torch.Tensor:
    """What diffusers' pipeline makes of the noise, without guidance by a second call."""
    model.pipeline.set_progress_bar_config(disable=True)
    own = {"guidance_scale": 1.0 if name == "sd3" else 3.5, "latents": in_their_layout(name, NOISE)}
    size = {"height": 16, "width": 16, "output_type": "latent", "return_dict": False, "max_sequence_length": LENGTH}
    latents: torch.Tensor = model.pipeline(prompt=PROMPTS, **own, **size, **arguments)[0]
    return latents


@pytest.mark.parametrize("name", tiny.FLOW)
def test_predict_feeds_the_transformer_what_the_pipeline_does(models: dict[str, Any], name: str) -> None:
    model = models[name]
    with recorded(model.network) as calls, torch.no_grad():
        their_latents(model, name, num_inference_steps=1, sigmas=[1.0])
        prediction = model.predict(model.network, NOISE, torch.tensor([999, 999]), model.encode_prompts(PROMPTS))
    (theirs, answer), (ours, _) = calls
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[key], value) and ours[key].dtype == value.dtype, key
        elif key not in ("joint_attention_kwargs", "return_dict"):
            assert ours.get(key) == value, key
    assert torch.equal(in_their_layout(name, prediction), answer)


@pytest.mark.parametrize("name", tiny.FLOW)
def test_our_sampling_is_that_of_the_pipeline(models: dict[str, Any], name: str, monkeypatch: Any) -> None:
    """The same grid, the same network calls. Theirs keeps sigmas as float32: a few roundings of latents up to 4."""
    model = models[name]
    monkeypatch.setattr("fastinvdpo.evaluation.sampling.philox.normal", lambda *arguments: NOISE)
    own = {"guidance_scale": 1.0} if name == "sd3" else {}
    ours = sample(model, model.network, PROMPTS, num_inference_steps=4, **own)
    theirs = their_latents(model, name, num_inference_steps=4)
    torch.testing.assert_close(in_their_layout(name, ours), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", tiny.FLOW)
def test_shapes_schedule_and_conditioning(models: dict[str, Any], name: str) -> None:
    model = models[name]
    assert model.family == ("stable-diffusion-3" if name == "sd3" else "flux")
    assert (model.latent_shape, model.image_size, model.size_factor) == ((4, 8, 8), (16, 16), 4)
    assert model.schedule.prediction_type == "flow"
    assert len(model.frozen_modules()) == (4 if name == "sd3" else 3)
    assert not any(p.requires_grad for module in model.frozen_modules() for p in module.parameters())
    conditioning = model.encode_prompts(["a cat", "", "a longer prompt than that"])
    tokens = tiny.TOKENS + LENGTH if name == "sd3" else LENGTH
    width, pooled = (40, 40) if name == "sd3" else (24, 16)
    assert conditioning["encoder_hidden_states"].shape == (3, tokens, width)
    assert conditioning["pooled_projections"].shape == (3, pooled)
    with pytest.raises(InvalidInput, match=r"images\[0\]\.size = \(18, 16\): is not a multiple of 4"):
        model.encode_images([picture((18, 16))])


def test_the_dynamic_shift_follows_the_resolution(directories: dict[str, Path]) -> None:
    small = load_model("auto", directories["flux"], resolution=16).schedule
    large = load_model("auto", directories["flux"], resolution=256).schedule
    own = load_model("auto", directories["flux"])
    assert own.image_size == (256, 256)  # 128 latents, as FluxPipeline assumes, times this VAE's factor
    levels = torch.tensor([499])
    assert torch.equal(own.schedule.rates(levels)[1], large.rates(levels)[1])
    assert float(small.rates(levels)[1]) < float(large.rates(levels)[1])
    with pytest.raises(InvalidInput, match=r"data\.resolution = 18: is not a multiple of 4"):
        load_model("auto", directories["flux"], resolution=18)


def test_sd3_without_t5_has_zeros_there_and_another_scheduler_is_refused(tmp_path: Path) -> None:
    tiny.sd3_pipeline(t5=False).save_pretrained(tmp_path / "small")
    conditioning = load_model("auto", tmp_path / "small", max_sequence_length=LENGTH).encode_prompts(["a"])
    assert conditioning["encoder_hidden_states"].shape == (1, tiny.TOKENS + LENGTH, 40)
    assert not conditioning["encoder_hidden_states"][:, tiny.TOKENS :].any()
    tiny.sd3_pipeline(scheduler=DDIMScheduler(**SD_SCHEDULER)).save_pretrained(tmp_path / "odd")
    with pytest.raises(InvalidInput, match="its scheduler DDIMScheduler is not one of flow matching"):
        load_model("auto", tmp_path / "odd")


def test_guidance_embedding_reaches_the_transformer(directories: dict[str, Path], models: dict[str, Any]) -> None:
    one: Any = load_model("flux", directories["flux"], guidance_embedding=1.0, **OPTIONS)
    told = one.encode_prompts(PROMPTS)
    with torch.no_grad():
        outputs = [m.predict(m.network, NOISE, torch.tensor([9, 9]), told) for m in (one, models["flux"])]
    assert not torch.allclose(*outputs)
    with pytest.raises(InvalidInput, match=r"model\.guidance_embedding = 1\.0: is no input of this transformer"):
        load_model("flux", directories["schnell"], guidance_embedding=1.0)
    with pytest.raises(InvalidInput, match=r"guidance_embedding = 1\.0: means nothing for a model of the family"):
        load_model("auto", directories["sd3"], guidance_embedding=1.0)


def test_half_precision_keeps_times_and_vae(directories: dict[str, Path]) -> None:
    for name in ("sd3", "flux"):
        model: Any = load_model("auto", directories[name], dtype=torch.bfloat16, **OPTIONS)
        assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in model.pipeline.vae.parameters()} == {torch.float32}
        with torch.no_grad():
            told = model.encode_prompts(PROMPTS)
            prediction = model.predict(model.network, NOISE, torch.tensor([3, 998]), told)
        assert prediction.dtype == torch.bfloat16 and bool(prediction.isfinite().all())


def test_the_family_is_told_from_the_checkpoint(directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"model\.path = .*is a FluxPipeline"):
        load_model("stable-diffusion-3", directories["flux"])
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(InvalidInput, match=r"model\.path = .*is a KandinskyPipeline.*supported are"):
        load_model("auto", tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no model_index\.json"):
        load_model("auto", tmp_path / "nothing")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_inversion_and_the_way_back_agree_better_with_more_steps(models: dict[str, Any], name: str) -> None:
    """An Euler step of the inversion calls the network at its source, the step back at its destination: the error of a
    path of N steps falls as 1/N, its square as 1/N².
    """
    few, many = (invert_images(models[name], [picture()], ["a cat"], num_inference_steps=steps) for steps in (10, 40))
    assert float(many.latent_mse) < float(few.latent_mse) / 4
