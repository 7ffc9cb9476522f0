"""SDXL's refiner and Turbo, another VAE, and families told from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from fastinvdpo.data import ImageGeometry
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.methods import PairBatch, build_objective
from fastinvdpo.models import checkpoint_files, load_model
from tests.models import tiny
from tests.models.test_stable_diffusion import picture


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("refiner")
    tiny.refiner_pipeline().save_pretrained(path, safe_serialization=True)
    return load_model("auto", path)


def test_the_refiner_is_told_an_aesthetic_score(refiner: Any) -> None:
    """As diffusers' pipeline and Diffusion-DPO's script: 6.0 in the place of the target size."""
    geometry = [ImageGeometry((480, 640), (0, 7), (16, 16))]
    assert refiner.encode_prompts(["a"], geometry=geometry)["time_ids"].tolist() == [[480, 640, 0, 7, 6.0]]
    theirs, _ = refiner.pipeline._get_add_time_ids(
        (480, 640), (0, 7), (16, 16), 6.0, 2.5, (480, 640), (0, 7), (16, 16), torch.float32, 24
    )
    assert torch.equal(refiner.encode_geometry(geometry)["time_ids"], theirs)
    assert refiner.encode_geometry([])["time_ids"].shape == (0, 5)


def test_the_refiner_embeds_with_the_second_encoder_and_predicts(refiner: Any) -> None:
    assert len(refiner.frozen_modules()) == 2
    conditioning = refiner.encode_prompts(["a cat", ""])
    ids = refiner.pipeline.tokenizer_2(
        ["a cat", ""], padding="max_length", max_length=tiny.TOKENS, return_tensors="pt"
    ).input_ids
    encoded = refiner.pipeline.text_encoder_2(ids, output_hidden_states=True)
    torch.testing.assert_close(conditioning["encoder_hidden_states"], encoded.hidden_states[-2])
    torch.testing.assert_close(conditioning["text_embeds"], encoded.text_embeds)
    latents = refiner.encode_images([picture(), picture(seed=1)])
    prediction = refiner.predict(refiner.network, latents, torch.tensor([0, 199]), conditioning)
    assert prediction.shape == latents.shape and bool(prediction.isfinite().all())


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("turbo")
    tiny.turbo_pipeline().save_pretrained(path, safe_serialization=True)
    return path


def test_turbo_trains_on_pure_noise(turbo: Path) -> None:
    model = load_model("auto", turbo, zero_terminal_snr=True)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(model.schedule.alphas_cumprod, expected, rtol=0, atol=1e-12)
    assert float(model.schedule.alphas_cumprod[-1]) == 0.0
    assert float(load_model("auto", turbo).schedule.alphas_cumprod[-1]) > 0
    assert model.scheduler_config["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("method", ["diffusion-dpo", "inpo", "smpo"])
def test_every_method_is_finite_at_turbos_timesteps(turbo: Path, method: str) -> None:
    model: Any = load_model("auto", turbo, zero_terminal_snr=True)
    grid = {} if method == "diffusion-dpo" else {"num_inference_steps": 3}
    objective = build_objective(method, model.schedule, timesteps={"values": [249, 499, 749, 999]}, **grid)
    latents, told = torch.randn(8, 4, 8, 8), model.encode_prompts(["a"] * 8)
    batch = PairBatch(latents, told, torch.arange(4), scores=torch.linspace(1, 0, 8))

    def network(latents: Any, times: Any, told: Any) -> Any:
        return model.predict(model.network, latents, times, told)

    out = objective(network, network, batch, seed=2)
    assert 999 in out.timesteps.tolist() and set(out.timesteps.tolist()) <= {249, 499, 749, 999}
    assert bool(out.loss.isfinite()) and bool(out.noisy_latents.isfinite().all())


def test_another_vae_without_loading_it(tmp_path: Path) -> None:
    tiny.sd_pipeline().save_pretrained(tmp_path / "base", safe_serialization=True)
    other = tiny.vae(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "vae", safe_serialization=True)
    whole: Any = load_model("auto", tmp_path / "base", vae=tmp_path / "vae")
    light: Any = load_model("auto", tmp_path / "base", vae=tmp_path / "vae", frozen_parts=False)
    assert light.latent_shape == whole.latent_shape and light.frozen_modules() == ()
    light.save(tmp_path / "saved")
    saved = load_model("auto", tmp_path / "saved")
    assert torch.equal(saved.encode_images([picture()]), whole.encode_images([picture()]))
    files = checkpoint_files("auto", tmp_path / "base", vae=tmp_path / "vae")
    assert {file.parent for file in files["vae"]} == {tmp_path / "vae"}
    assert {file.parent for file in files["unet"]} == {tmp_path / "base" / "unet"}
    with pytest.raises(InvalidInput, match=r"model\.vae = .*does not exist"):
        load_model("auto", tmp_path / "base", vae=tmp_path / "nowhere", frozen_parts=False)


def test_families_are_told_and_options_checked(refiner: Any, turbo: Path, tmp_path: Path) -> None:
    assert refiner.family == load_model("auto", turbo).family == "stable-diffusion"
    with pytest.raises(InvalidInput, match=r"model\.max_sequence_length = 3: means nothing for a model of the family"):
        load_model("auto", turbo, max_sequence_length=3)
    with pytest.raises(InvalidInput, match=r"model\.vae = 'x': means nothing for a model of the family digits"):
        load_model("digits", tiny.write_digits(tmp_path / "digits"), vae="x")


def test_our_ddim_sampling_is_that_of_the_pipeline(tmp_path: Path, monkeypatch: Any) -> None:
    """Theirs rounds its coefficients to float32: latents stay below 8, and four steps multiply by less than 4."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd", safe_serialization=True)
    model: Any = load_model("auto", tmp_path / "sd")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("fastinvdpo.evaluation.sampling.philox.normal", lambda *arguments: noise)
    ours = sample(model, model.network, ["a cat", "zebra"], num_inference_steps=4, guidance_scale=1.0)
    model.pipeline.set_progress_bar_config(disable=True)
    theirs = model.pipeline(
        ["a cat", "zebra"], num_inference_steps=4, guidance_scale=1.0, latents=noise, height=16, width=16,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
