"""Wan through the real loading, encoding, predicting and sampling code, at tiny widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.inversion import invert_images
from fastinvdpo.evaluation.sampling import initial_noise, sample
from fastinvdpo.models import load_model
from fastinvdpo.models.base import pixels_of
from tests.cases import SD_SCHEDULER
from tests.models import tiny
from tests.models.test_flow_models import LENGTH, PROMPTS, recorded
from tests.models.test_stable_diffusion import picture

FRAMES = 5
KINDS: dict[str, dict[str, Any]] = {
    "unipc": {},
    "euler": {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)},
    "ti2v": {"ti2v": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("wan")
    for kind, parts in KINDS.items():
        tiny.wan_pipeline(**parts).save_pretrained(root / kind, safe_serialization=True)
    options = {"resolution": 16, "max_sequence_length": LENGTH, "frames": FRAMES}
    return {kind: load_model("auto", root / kind, **options) for kind in KINDS}


def theirs(model: Any, steps: int, **arguments: Any) -> Any:
    """What WanPipeline makes of our noise."""
    model.pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_frames": FRAMES, "max_sequence_length": LENGTH, "return_dict": False}
    noise = initial_noise(model, 0, range(len(PROMPTS)))
    return model.pipeline(prompt=PROMPTS, latents=noise, num_inference_steps=steps, **size, **arguments)[0]


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["alone", "guided"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_sampling_is_that_of_the_pipeline(models: dict[str, Any], kind: str, scale: float) -> None:
    """Of UniPC, a solver of second order, as well: the same calls of the network, and the same steps."""
    model = models[kind]
    with recorded(model.network) as calls:
        expected = theirs(model, 5, guidance_scale=scale, output_type="latent")
        ours = sample(model, model.network, PROMPTS, num_inference_steps=5, guidance_scale=scale)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert float(expected.abs().max()) > 1
    assert {given["timestep"].shape[1:] for given, _ in calls} == {(8,) if kind == "ti2v" else ()}, "one for each token"


def test_a_latent_is_that_of_the_vae_and_becomes_the_frames_of_the_pipeline(models: dict[str, Any]) -> None:
    model = models["unipc"]
    assert (model.latent_shape, model.image_size, model.size_factor) == ((4, 2, 4, 4), (16, 16), 8)
    assert (model.frames, model.own_guidance, model.schedule.prediction_type) == (5, 5.0, "flow")
    video = [picture((16, 16), seed) for seed in range(FRAMES)]
    config, vae = model.pipeline.vae.config, model.pipeline.vae
    mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        posterior = vae.encode(pixels_of(video, "RGB").transpose(0, 1)[None]).latent_dist
    torch.testing.assert_close(model.encode_images([video]), (posterior.mode() - mean) / std)
    both = model.encode_images([video, video[::-1]], torch.tensor([3, 3]))
    assert both.shape == (2, *model.latent_shape)
    assert torch.equal(both[:1], model.encode_images([video], torch.tensor([3])))
    assert not torch.allclose(both[:1], model.encode_images([video]))

    frames = model.decode_latents(sample(model, model.network, PROMPTS, num_inference_steps=3, guidance_scale=1.0))
    expected = [frame for shown in theirs(model, 3, guidance_scale=1.0, output_type="pil") for frame in shown]
    ours, plain = (np.stack([np.asarray(frame, np.int16) for frame in shown]) for shown in (frames, expected))
    assert len(frames) == 2 * FRAMES and np.abs(ours - plain).max() <= 1 and (ours != plain).mean() < 0.01
    with pytest.raises(InvalidInput, match=r"latents = .*pass floating-point \(n, 4, frames, h, w\)"):
        model.decode_latents(torch.zeros(1, 4, 4, 4))


def test_an_image_is_a_video_of_one_frame_and_inverts(models: dict[str, Any]) -> None:
    path = models["unipc"].origin.path
    model = load_model("auto", path, resolution=16, max_sequence_length=LENGTH)
    image = picture((16, 16))
    latents = model.encode_images([image])
    assert latents.shape == (1, 4, 1, 4, 4) and torch.equal(latents, model.encode_images([[image]]))
    few, many = (invert_images(model, [image], ["a cat"], num_inference_steps=steps) for steps in (10, 40))
    assert float(many.latent_mse) < float(few.latent_mse) / 4
    with pytest.raises(InvalidInput, match=r"len\(images\[0\]\) = 2: are not the 1 of the model"):
        model.encode_images([[image, image]])
    assert load_model("auto", path).latent_shape == (4, 1, 120, 208), "WanPipeline's own size, of this VAE"


def test_the_schedule_of_unipc_is_that_of_its_flow(models: dict[str, Any]) -> None:
    config = models["unipc"].scheduler_config
    schedule = NoiseSchedule.from_config(config)
    same = NoiseSchedule.from_config(models["euler"].scheduler_config)
    assert schedule.sigmas is not None and torch.equal(schedule.sigmas, same.sigmas)
    levels = models["unipc"].sampling_levels(7)
    scheduler = UniPCMultistepScheduler.from_config(config)
    scheduler.set_timesteps(7)
    assert torch.equal(schedule.model_times(levels), scheduler.timesteps.float())
    torch.testing.assert_close(schedule.rates(levels)[1], scheduler.sigmas[:-1].double(), rtol=0, atol=1e-3)
    for name in ("use_dynamic_shifting", "use_karras_sigmas", "thresholding"):
        with pytest.raises(InvalidInput, match=rf"scheduler\.{name} = True: is not computed here"):
            NoiseSchedule.from_config({**config, name: True})
    with pytest.raises(InvalidInput, match=r"scheduler\.use_flow_sigmas = False: contradicts flow_prediction"):
        NoiseSchedule.from_config({**config, "use_flow_sigmas": False})


def test_what_is_not_trained_here_is_refused_by_name(models: dict[str, Any], tmp_path: Path) -> None:
    first = tiny.wan_pipeline()
    first.register_to_config(boundary_ratio=0.9)
    first.save_pretrained(tmp_path / "a14b")
    with pytest.raises(InvalidInput, match=r"has two transformers.*A14B.*use Wan 2\.1, or TI2V-5B of Wan 2\.2"):
        load_model("auto", tmp_path / "a14b")
    kinds = {"ddim": DDIMScheduler(**SD_SCHEDULER), "betas": UniPCMultistepScheduler()}
    for name, scheduler in kinds.items():
        tiny.wan_pipeline(scheduler=scheduler).save_pretrained(tmp_path / name)
        with pytest.raises(InvalidInput, match=f"its scheduler {type(scheduler).__name__} is not one of flow matching"):
            load_model("auto", tmp_path / name)
    shifted = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tiny.wan_pipeline(scheduler=shifted).save_pretrained(tmp_path / "dynamic")
    with pytest.raises(InvalidInput, match="its schedule is shifted by the size"):
        load_model("auto", tmp_path / "dynamic")
    with pytest.raises(InvalidInput, match=r"data\.frames = 6: is not 4k \+ 1 frames.*use 5 or 9"):
        load_model("auto", models["unipc"].origin.path, frames=6)
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd")
    with pytest.raises(InvalidInput, match=r"data\.frames = 5: means nothing for a model of the family stable-diff"):
        load_model("auto", tmp_path / "sd", frames=5)
    with pytest.raises(InvalidInput, match=r"images\[1\]\.size = \(8, 16\): differs from that of the first"):
        video = [picture((16, 16)), Image.new("RGB", (8, 16))]
        models["unipc"].encode_images([[*video, *video, video[0]]])
