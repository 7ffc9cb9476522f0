"""SD3 and FLUX through the real loading, encoding, predicting and saving code, at tiny widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline

from fastinvdpo.errors import InvalidInput, MissingExtra
from fastinvdpo.evaluation.inversion import invert_images
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.models import load_model
from fastinvdpo.models.base import pixels_of
from fastinvdpo.models.flow import unpack_latents
from fastinvdpo.models.loading import checkpoint_files, own_guidance
from tests.cases import SD_SCHEDULER
from tests.models import tiny
from tests.models.test_stable_diffusion import picture

LENGTH = 10
FLOW = tuple(name for name in tiny.FLOW if name != "wan")  # which has a time axis: test_wan.py
_STATISTICS = ("latents_mean", "latents_std")
OPTIONS = {"resolution": 16, "max_sequence_length": LENGTH}
PROMPTS = ["a cat", "zebra"]
FAMILY = {"sd3": "stable-diffusion-3", "schnell": "flux", "klein": "flux2-klein", "qwen": "qwen-image"}
# What the pipelines' call takes for no second forward pass, and for one.
ALONE: dict[str, dict[str, Any]] = {"sd3": {"guidance_scale": 1.0}, "klein": {"guidance_scale": 1.0}, "qwen": {},
                                    "z-image": {"guidance_scale": 0.0}}  # fmt: skip
GUIDED: dict[str, dict[str, Any]] = {"sd3": {"guidance_scale": 3.0}, "klein": {"guidance_scale": 3.0},
                                     "qwen": {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
                                     "z-image": {"guidance_scale": 2.0}}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    for name in FLOW:
        tiny.PIPELINES[name]().save_pretrained(root / name, safe_serialization=True)
    return {name: root / name for name in FLOW}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, Any]:
    return {name: load_model("auto", path, **OPTIONS) for name, path in directories.items()}


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def noise(name: str) -> torch.Tensor:
    return NOISE.reshape(2, 16, 4, 4) if name == "klein" else NOISE


def as_tokens(name: str, latents: torch.Tensor) -> torch.Tensor:
    """As the transformer of the family takes and gives them."""
    if name == "klein":
        return latents.flatten(2).transpose(1, 2)
    return latents if name in ("sd3", "z-image") else FluxPipeline._pack_latents(latents, 2, 4, 8, 8)


def as_latents(name: str, tokens: torch.Tensor) -> torch.Tensor:
    return tokens if name in ("sd3", "z-image") else unpack_latents(tokens, 4, 4)


@contextmanager
def recorded(network: Any) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """The arguments, those without a name under their number, and the output of every call of a network."""
    calls: list[tuple[dict[str, Any], Any]] = []

    def record(module: Any, inputs: Any, named: dict[str, Any], output: Any) -> None:
        calls.append(({**named, **{str(i): value for i, value in enumerate(inputs)}}, output[0]))

    handle = network.register_forward_hook(record, with_kwargs=True)
    yield calls
    handle.remove()


def their_latents(model: Any, name: str, **arguments: Any) -> torch.Tensor:
    """What diffusers' pipeline makes of the noise."""
    model.pipeline.set_progress_bar_config(disable=True)
    given = noise(name) if name == "klein" else as_tokens(name, noise(name))
    size = {"height": 16, "width": 16, "output_type": "latent", "return_dict": False, "max_sequence_length": LENGTH}
    latents: torch.Tensor = model.pipeline(prompt=list(PROMPTS), latents=given, **size, **arguments)[0]
    return latents


@pytest.mark.parametrize("name", FLOW)
def test_predict_feeds_the_transformer_what_the_pipeline_does(models: dict[str, Any], name: str) -> None:
    model, alone = models[name], ALONE.get(name, {"guidance_scale": 3.5})
    with recorded(model.network) as calls, torch.no_grad():
        their_latents(model, name, num_inference_steps=1, sigmas=[1.0], **alone)
        prediction = model.predict(model.network, noise(name), torch.tensor([999, 999]), model.encode_prompts(PROMPTS))
    (theirs, answer), (ours, _) = calls
    for key, value in theirs.items():
        if isinstance(value, (torch.Tensor, list)) and key != "img_shapes":
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0)
        elif not key.endswith("attention_kwargs") and key != "return_dict":
            assert ours.get(key) == value, key
    answer = -torch.stack(answer).squeeze(2) if name == "z-image" else answer
    assert torch.equal(as_tokens(name, prediction), answer)


@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize("name", FLOW)
def test_our_sampling_is_that_of_the_pipeline(
    models: dict[str, Any], name: str, guided: bool, monkeypatch: Any
) -> None:
    """The same grid, the same network calls. Theirs keeps sigmas as float32: a few roundings of latents up to 4."""
    model, arguments = models[name], (GUIDED if guided else ALONE).get(name, {"guidance_scale": 3.5})
    monkeypatch.setattr("fastinvdpo.evaluation.sampling.philox.normal", lambda *arguments: noise(name))
    scale = arguments.get("true_cfg_scale", arguments.get("guidance_scale", 1.0))
    own = {} if name == "schnell" else {"guidance_scale": scale}
    ours = sample(model, model.network, PROMPTS, num_inference_steps=4, **own)
    theirs = their_latents(model, name, num_inference_steps=4, **arguments)
    ours = model._unnormalized(ours) if name == "klein" else as_tokens(name, ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-5 if guided else 2e-5)


@pytest.mark.parametrize("name", FLOW)
def test_shapes_schedule_and_conditioning(models: dict[str, Any], name: str) -> None:
    model = models[name]
    assert model.family == FAMILY.get(name, name)
    assert (model.latent_shape, model.image_size, model.size_factor) == (noise(name).shape[1:], (16, 16), 4)
    assert model.schedule.prediction_type == "flow"
    assert len(model.frozen_modules()) == {"sd3": 4, "flux": 3, "schnell": 3}.get(name, 2)
    assert not any(p.requires_grad for module in model.frozen_modules() for p in module.parameters())
    texts = ["a cat", "", "a longer prompt than that"]
    conditioning = model.encode_prompts(texts)
    width = {"sd3": 40, "qwen": 8, "z-image": 8}.get(name, 24)
    tokens = tiny.TOKENS + LENGTH if name == "sd3" else LENGTH
    assert conditioning["encoder_hidden_states"].shape == (3, tokens, width)
    assert conditioning.get("pooled_projections", torch.empty(3, 16)).shape == (3, 40 if name == "sd3" else 16)
    for number, text in enumerate(texts):
        for key, value in model.encode_prompts([text]).items():
            torch.testing.assert_close(conditioning[key][number], value[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match=r"images\[0\]\.size = \(18, 16\): is not a multiple of .*4"):
        model.encode_images([picture((18, 16))])


@pytest.mark.parametrize("name", FLOW)
def test_latents_are_those_of_the_pipeline_and_become_images_again(models: dict[str, Any], name: str) -> None:
    """A latent is what the VAE gives, normalized; decoding it is what the pipeline does with its own."""
    model = models[name]
    image = picture((16, 16))
    latents = model.encode_images([image])
    pixels = pixels_of([image], "RGB")
    with torch.no_grad():
        if name == "klein":
            expected = model.pipeline._encode_vae_image(pixels, None)
        elif name == "qwen":
            mean, std = (torch.tensor(model.pipeline.vae.config[key]).view(1, -1, 1, 1) for key in _STATISTICS)
            expected = (model.pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0] - mean) / std
        else:
            config = model.pipeline.vae.config
            mode = model.pipeline.vae.encode(pixels).latent_dist.mode()
            expected = (mode - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(latents, expected)
    model.pipeline.set_progress_bar_config(disable=True)
    start = noise(name) if name == "klein" else as_tokens(name, noise(name))
    size = {"height": 16, "width": 16, "max_sequence_length": LENGTH, "num_inference_steps": 2, "latents": start}
    guidance = ALONE.get(name, {"guidance_scale": 3.5})
    theirs = model.pipeline(prompt=list(PROMPTS), **size, **guidance).images
    last = their_latents(model, name, num_inference_steps=2, **guidance)
    ours = model.decode_latents(model._normalized(last) if name == "klein" else as_latents(name, last))
    assert [one.tobytes() for one in ours] == [one.tobytes() for one in theirs]


def test_prompts_do_not_see_what_pads_them(models: dict[str, Any]) -> None:
    """Beside a longer prompt, and of another maximal length, a prompt's prediction is the same."""
    prompts = ["zebra", "a longer prompt than that"]
    for name in ("qwen", "z-image"):
        model = models[name]
        longer = load_model("auto", model.origin.path, resolution=16, max_sequence_length=3 * LENGTH)
        times = torch.tensor([500, 500])
        with torch.no_grad():
            pair = model.predict(model.network, NOISE, times, model.encode_prompts(prompts))
            alone = model.predict(model.network, NOISE[:1], times[:1], model.encode_prompts(["zebra"]))
            wide = longer.predict(longer.network, NOISE[:1], times[:1], longer.encode_prompts(["zebra"]))
        torch.testing.assert_close(pair[:1], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wide, alone, rtol=1e-4, atol=1e-5)


def test_distilled_checkpoints_are_sampled_without_guidance(tmp_path: Path) -> None:
    tiny.flux2_pipeline(distilled=True).save_pretrained(tmp_path / "klein")
    tiny.z_image_pipeline(turbo=True).save_pretrained(tmp_path / "turbo")
    klein, turbo = (load_model("auto", tmp_path / name, **OPTIONS) for name in ("klein", "turbo"))
    assert (klein.own_guidance, klein.guidance(None)) == (1, (1, None))
    assert (turbo.own_guidance, turbo.guidance(None)) == (0, (1, None))
    for model, scale in ((klein, 1), (turbo, 0)):
        assert own_guidance(model.family, checkpoint_files(model.family, model.origin)) == scale
    with pytest.raises(InvalidInput, match=r"guidance_scale = 4\.0: means nothing to this transformer"):
        klein.guidance(4.0)


def test_a_family_that_diffusers_has_not_yet_is_refused(directories: dict[str, Path], monkeypatch: Any) -> None:
    monkeypatch.setattr("diffusers.__version__", "0.36.2")
    with pytest.raises(MissingExtra, match=r"qwen-image needs diffusers 0\.37 or later, and 0\.36\.2 is installed"):
        load_model("auto", directories["qwen"])
    load_model("auto", directories["z-image"], **OPTIONS)


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
