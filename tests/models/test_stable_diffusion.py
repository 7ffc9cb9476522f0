"""Stable Diffusion and SDXL through the real loading, encoding, predicting and saving code, at tiny widths."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from PIL import Image

from fastinvdpo.data import ImageGeometry
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.methods import PairBatch, build_objective
from fastinvdpo.models import checkpoint_files, load_model
from fastinvdpo.ops import philox
from fastinvdpo.output import OutputDirectory
from tests.cases import SD_SCHEDULER
from tests.models import tiny

TIMES = torch.tensor([20, 800])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    pipelines = {
        "sd": tiny.sd_pipeline(),
        "sd-v": tiny.sd_pipeline(prediction_type="v_prediction"),
        "sdxl": tiny.sdxl_pipeline(),
        "sdxl-encoded-empty": tiny.sdxl_pipeline(force_zeros=False),
        "refiner": tiny.refiner_pipeline(),
        "turbo": tiny.turbo_pipeline(),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name, safe_serialization=True)
    return {name: root / name for name in pipelines}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, Any]:
    return {name: load_model("auto", path) for name, path in directories.items()}


def picture(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    count = 3 * size[0] * size[1]
    values = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes("RGB", size, bytes(values.tolist()))


def tokens(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    found: torch.Tensor = tokenizer(
        prompts, padding="max_length", max_length=tiny.TOKENS, return_tensors="pt"
    ).input_ids
    return found


def difference(one: Image.Image, other: Image.Image) -> int:
    return max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


@pytest.mark.parametrize("name", ["sd", "sd-v", "sdxl"])
def test_shapes_and_schedule(models: dict[str, Any], name: str) -> None:
    model = models[name]
    assert model.family == models["refiner"].family == models["turbo"].family == "stable-diffusion"
    assert (model.latent_shape, model.image_size) == ((4, 8, 8), (16, 16))
    assert model.schedule.prediction_type == ("v_prediction" if name == "sd-v" else "epsilon")
    assert (model.schedule.steps_offset, model.schedule.set_alpha_to_one) == (1, False)
    assert model.schedule.alphas_cumprod.dtype == torch.float64
    expected = DDIMScheduler(**SD_SCHEDULER).alphas_cumprod
    torch.testing.assert_close(model.schedule.alphas_cumprod.float(), expected, rtol=1e-4, atol=0)
    frozen = [parameter for module in model.frozen_modules() for parameter in module.parameters()]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    assert len(model.frozen_modules()) == (3 if name == "sdxl" else 2)
    with pytest.raises(InvalidInput, match=r"images\[1\].size = \(32, 16\): differs"):
        model.encode_images([picture(), picture((32, 16))])
    with pytest.raises(InvalidInput, match="not a multiple of the VAE's factor 2"):
        model.encode_images([picture((17, 16))])


def test_encoded_images_are_the_scaled_posterior_mean_and_come_back(models: dict[str, Any]) -> None:
    model = models["sd"]
    vae, processor = model.pipeline.vae, model.pipeline.image_processor
    images = [picture(seed=seed) for seed in range(6)]  # more than the VAE takes at once
    latents = model.encode_images(images)
    assert (latents.shape, latents.dtype, latents.requires_grad) == ((6, 4, 8, 8), torch.float32, False)
    expected = vae.encode(processor.preprocess(images)).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    # Convolutions sum in another order for another batch size: equal to float32 rounding, not to the bit.
    torch.testing.assert_close(latents[4:5], model.encode_images(images[4:5]), rtol=1e-5, atol=1e-6)
    assert torch.equal(latents, model.encode_images(images)), "the same image must have the same latent every time"
    raw = vae.decode(latents / vae.config.scaling_factor).sample.detach()
    for got, wanted in zip(model.decode_latents(latents), processor.postprocess(raw, output_type="pil"), strict=True):
        assert got.size == (16, 16) and difference(got, wanted) <= 1


def test_a_sample_of_the_posterior_follows_from_its_number(models: dict[str, Any]) -> None:
    model = models["sd"]
    images = [picture(seed=seed) for seed in (*range(5), 0)]
    numbers = torch.tensor([7, 7, 2**59 + 1, 9, 10, 7])
    latents, mean = model.encode_images(images, numbers), model.encode_images(images)
    posterior = model.pipeline.vae.encode(model.pipeline.image_processor.preprocess(images)).latent_dist
    noise = (latents - mean) / (posterior.std * model.pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(noise, philox.normal(0, 1 << 21, numbers, (4, 8, 8)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latents[5], latents[0], rtol=1e-5, atol=1e-6)
    alone = model.encode_images(images[4:5], numbers[4:5])
    torch.testing.assert_close(latents[4:5], alone, rtol=1e-5, atol=1e-6)


def test_shift_factor_and_channel_statistics(tmp_path: Path) -> None:
    plain = tiny.sd_pipeline()
    plain.save_pretrained(tmp_path / "base")
    base: Any = load_model("stable-diffusion", tmp_path / "base")
    raw = base.encode_images([picture()]) / base.pipeline.vae.config.scaling_factor
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    shift, spread = (torch.tensor(values).reshape(1, 4, 1, 1) for values in (mean, std))
    statistics = {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}
    for name, config, expected in (
        ("shift", {"shift_factor": 0.25, "scaling_factor": 2.0}, (raw - 0.25) * 2.0),
        ("statistics", statistics, (raw - shift) * 0.5 / spread),
    ):
        vae = tiny.vae(**config)
        vae.load_state_dict(plain.vae.state_dict())
        vae.save_pretrained(tmp_path / name)
        model = load_model("stable-diffusion", tmp_path / "base", vae=tmp_path / name)
        latents = model.encode_images([picture()])
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
        same, again = base.decode_latents(raw * base.pipeline.vae.config.scaling_factor), model.decode_latents(latents)
        assert difference(same[0], again[0]) <= 1


def test_another_vae_without_loading_it(directories: dict[str, Path], tmp_path: Path) -> None:
    base, vae = directories["sd"], tmp_path / "vae"
    tiny.vae(scaling_factor=0.5).save_pretrained(vae, safe_serialization=True)
    whole, light = (load_model("auto", base, vae=vae, frozen_parts=whole) for whole in (True, False))
    assert light.latent_shape == whole.latent_shape and light.frozen_modules() == ()
    light.save(tmp_path / "saved")
    saved = load_model("auto", tmp_path / "saved")
    assert torch.equal(saved.encode_images([picture()]), whole.encode_images([picture()]))
    files = checkpoint_files("auto", base, vae=vae)
    assert {file.parent for file in files["vae"]} == {vae}
    assert {file.parent for file in files["unet"]} == {base / "unet"}


def test_prompt_embeddings_are_those_of_the_text_encoders(models: dict[str, Any]) -> None:
    sd, sdxl, refiner = models["sd"], models["sdxl"], models["refiner"]
    conditioning = sd.encode_prompts(["a cat", "", "a much longer prompt than twelve tokens can hold"])
    assert set(conditioning) == {"encoder_hidden_states"}
    expected = sd.pipeline.text_encoder(tokens(sd.pipeline.tokenizer, ["a cat", ""]))[0]
    torch.testing.assert_close(conditioning["encoder_hidden_states"][:2], expected)
    assert conditioning["encoder_hidden_states"].shape == (3, tiny.TOKENS, 16)
    assert not conditioning["encoder_hidden_states"].requires_grad
    prompts = ["a cat", "a dog"]
    for model, parts in ((sdxl, ("text_encoder", "text_encoder_2")), (refiner, ("text_encoder_2",))):
        ids = tokens(model.pipeline.tokenizer_2, prompts)
        encoded = [getattr(model.pipeline, part)(ids, output_hidden_states=True) for part in parts]
        found = model.encode_prompts(prompts)
        expected = torch.cat([one.hidden_states[-2] for one in encoded], dim=-1)
        torch.testing.assert_close(found["encoder_hidden_states"], expected)
        torch.testing.assert_close(found["text_embeds"], encoded[-1].text_embeds)
        own = [16, 16, 0, 0, 16, 16] if model is sdxl else [16, 16, 0, 0, 6.0]
        assert found["time_ids"].tolist() == [own] * 2
    zeros, other = sdxl.encode_prompts(["", "a cat"]), models["sdxl-encoded-empty"].encode_prompts(["", "a cat"])
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not zeros[name][0].any() and zeros[name][1].any() and other[name][0].any()
    assert zeros["time_ids"][0].tolist() == [16, 16, 0, 0, 16, 16]


def test_time_ids_follow_the_image(models: dict[str, Any]) -> None:
    model, refiner = models["sdxl"], models["refiner"]
    geometry = [ImageGeometry((480, 640), (0, 7), (16, 16)), ImageGeometry((16, 16), (0, 0), (16, 16))]
    conditioning = model.encode_prompts(["a", "a"], geometry=geometry)
    assert conditioning["time_ids"].tolist() == [[480, 640, 0, 7, 16, 16], [16, 16, 0, 0, 16, 16]]
    latents = model.encode_images([picture()] * 2)
    outputs = model.predict(model.network, latents, torch.tensor([20, 20]), conditioning)
    assert not torch.allclose(outputs[0], outputs[1]), "size and crop must reach the network"
    with pytest.raises(InvalidInput, match="geometry = 1: has not one entry for each of 2 prompts"):
        model.encode_prompts(["a", "a"], geometry=geometry[:1])
    # The refiner, as diffusers' pipeline and Diffusion-DPO's script: 6.0 in the place of the target size.
    found = refiner.encode_prompts(["a"], geometry=geometry[:1])["time_ids"]
    theirs, _ = refiner.pipeline._get_add_time_ids(
        (480, 640), (0, 7), (16, 16), 6.0, 2.5, (480, 640), (0, 7), (16, 16), torch.float32, 24
    )
    assert torch.equal(found, theirs) and torch.equal(refiner.encode_geometry(geometry[:1])["time_ids"], theirs)
    assert refiner.encode_geometry([])["time_ids"].shape == (0, 5)


@pytest.mark.parametrize("name", ["sd", "sdxl", "refiner"])
def test_predict_is_the_unet(models: dict[str, Any], name: str) -> None:
    model = models[name]
    latents, conditioning = model.encode_images([picture(), picture(seed=1)]), model.encode_prompts(["a cat", "b"])
    prediction = model.predict(model.network, latents, TIMES, conditioning)
    added = {key: value for key, value in conditioning.items() if key != "encoder_hidden_states"}
    expected = model.network(
        latents, TIMES, conditioning["encoder_hidden_states"], added_cond_kwargs=added or None
    ).sample
    assert torch.equal(prediction, expected) and prediction.requires_grad
    one = model.predict(model.network, latents[1:], TIMES[1:], {key: value[1:] for key, value in conditioning.items()})
    torch.testing.assert_close(one, prediction[1:], rtol=1e-4, atol=1e-5)
    if name == "sdxl":
        del conditioning["time_ids"]
        with pytest.raises(InvalidInput, match="lacks 'time_ids'"):
            model.predict(model.network, latents, TIMES, conditioning)


def test_bf16_keeps_vae_schedule_and_sizes_exact(directories: dict[str, Path]) -> None:
    model: Any = load_model("stable-diffusion", directories["sdxl"], dtype=torch.bfloat16)
    parts = (model.network, model.pipeline.text_encoder_2, model.pipeline.vae)
    types = [{parameter.dtype for parameter in part.parameters()} for part in parts]
    assert types == [{torch.bfloat16}, {torch.bfloat16}, {torch.float32}]
    assert model.schedule.alphas_cumprod.dtype == torch.float64
    conditioning = model.encode_prompts(["a"], geometry=[ImageGeometry((1023, 1021), (0, 0), (16, 16))])
    latents = model.encode_images([picture()])
    assert latents.dtype == torch.float32
    seen: list[torch.Tensor] = []
    handle = model.network.add_time_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    prediction = model.predict(model.network, latents, TIMES[:1], conditioning)
    handle.remove()
    assert prediction.dtype == torch.bfloat16
    assert seen[0].tolist()[:2] == [1023, 1021]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_without_frozen_parts_it_predicts_and_saves_the_whole(tmp_path: Path, variant: str | None) -> None:
    source = tmp_path / "source"
    tiny.sdxl_pipeline().save_pretrained(source, safe_serialization=True, variant=variant)
    for file in ("vae/diffusion_pytorch_model.bf16.safetensors", "vae/diffusion_pytorch_model.bin"):
        (source / file).write_bytes(b"not asked for")
    whole = load_model("stable-diffusion", source, variant=variant)
    model = load_model("stable-diffusion", source, variant=variant, frozen_parts=False)
    assert model.frozen_modules() == ()
    assert (model.latent_shape, model.image_size) == (whole.latent_shape, whole.image_size)
    for encode in (lambda: model.encode_images([picture()]), lambda: model.encode_prompts(["a"])):
        with pytest.raises(InvalidInput, match=r"frozen_parts = False: left text encoders and VAE out"):
            encode()
    prompts, latents = whole.encode_prompts(["a", "b c"]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = whole.predict(whole.network, latents, TIMES, prompts)
        assert torch.equal(model.predict(model.network, latents, TIMES, prompts), expected)
        next(model.network.parameters()).add_(1.0)
    model.save(tmp_path / "saved")
    saved = load_model("stable-diffusion", tmp_path / "saved")
    assert torch.equal(saved.encode_images([picture()]), whole.encode_images([picture()]))
    assert torch.equal(saved.encode_prompts(["a"])["text_embeds"], whole.encode_prompts(["a"])["text_embeds"])
    assert all(map(torch.equal, saved.network.parameters(), model.network.parameters()))
    assert not list((tmp_path / "saved").rglob("*.bin"))
    DiffusionPipeline.from_pretrained(tmp_path / "saved")


def test_unet_init(directories: dict[str, Path], tmp_path: Path) -> None:
    other = tiny.unet()
    with torch.no_grad():
        other.conv_in.weight.fill_(0.125)
    other.save_pretrained(tmp_path / "repository" / "unet")
    model = load_model("stable-diffusion", directories["sd"], unet_init=tmp_path / "repository")
    assert torch.equal(model.network.conv_in.weight, other.conv_in.weight)
    tiny.unet(cross_attention_dim=24).save_pretrained(tmp_path / "wide")
    with pytest.raises(InvalidInput, match=r"model.unet_init.*cross_attention_dim is 24.*own 16"):
        load_model("stable-diffusion", directories["sd"], unet_init=tmp_path / "wide")


def test_paths_that_cannot_be_loaded(directories: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    unets = {"inpainting": tiny.unet(in_channels=9), "consistency": tiny.unet(time_cond_proj_dim=8)}
    for name, unet in unets.items():
        tiny.sd_pipeline(unet=unet).save_pretrained(tmp_path / name)
    tiny.sd_pipeline().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    cases = {
        tmp_path / "missing": "does not exist",
        tmp_path / "model.safetensors": "is a single file",
        tmp_path / "empty": "holds no model_index.json",
        tmp_path / "other": "is a FluxPipeline",
        "nobody/no-such-model": "cannot be loaded",
        tmp_path / "inpainting": "takes 9 channels, the VAE gives 4",
        tmp_path / "consistency": "extra conditioning",
        tmp_path / "pickled": "cannot be loaded",
    }
    for path, problem in cases.items():
        with pytest.raises(InvalidInput, match=f"model.path = .*{problem}.*Remedy"):
            load_model("stable-diffusion", path)
    for argument in ("unet_init", "vae"):
        for path in (tmp_path / "missing", tmp_path / "empty", "nobody/no-such-part"):
            with pytest.raises(InvalidInput, match=f"model.{argument}"):
                load_model("stable-diffusion", directories["sd"], **{argument: path})
    with pytest.raises(InvalidInput, match=r"model\.max_sequence_length = 3: means nothing for a model of the family"):
        load_model("auto", directories["turbo"], max_sequence_length=3)
    with pytest.raises(InvalidInput, match=r"model\.family = 'gan'.*stable-diffusion, "):
        load_model("gan", directories["sd"])
    with pytest.raises(InvalidInput, match=r"dtype = torch\.int8"):
        load_model("auto", directories["sd"], dtype=torch.int8)


@pytest.mark.parametrize("family", ["stable-diffusion", "auto"])
def test_the_directory_of_a_run_is_no_model_and_names_those_in_it(
    directories: dict[str, Path], tmp_path: Path, family: str
) -> None:
    run = tmp_path / "run"
    with OutputDirectory(run) as output, output.directory("best") as best:
        shutil.copytree(directories["sd"], best / "model")
    with pytest.raises(InvalidInput, match=r"run': is the output directory of a run\. Remedy: name .*run/best/model\."):
        load_model(family, run)
    assert load_model("auto", run / "best" / "model").schedule.num_train_timesteps == 1000


BAD_CALLS: list[tuple[str, Any, str]] = [
    ("encode_images", [], r"images = \[\]: is empty"),
    ("encode_images", ["three.png"], r"images\[0\] = 'three.png': is not a PIL image"),
    ("decode_latents", torch.zeros(1, 1, 8, 8), "wrong shape or dtype"),
    ("decode_latents", torch.zeros(1, 4, 8, 8, dtype=torch.int64), "wrong shape or dtype"),
    ("decode_latents", torch.full((1, 4, 8, 8), float("nan")), "NaN"),
    ("encode_prompts", "three", "is one string"),
    ("encode_prompts", [], "is empty"),
    ("encode_prompts", ["a", None], r"prompts\[1\] = None"),
]


def test_bad_calls(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["sd"]
    for method, argument, message in BAD_CALLS:
        with pytest.raises(InvalidInput, match=message):
            getattr(model, method)(argument)
    network = tiny.unet()
    network.add_adapter(peft.LoraConfig(r=2, target_modules=list(model.default_lora_targets)))
    with pytest.raises(InvalidInput, match="LoRA layers that are not merged"):
        model.save(tmp_path, network=network)


def test_turbo_trains_on_pure_noise(directories: dict[str, Path], models: dict[str, Any]) -> None:
    model = load_model("auto", directories["turbo"], zero_terminal_snr=True)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(model.schedule.alphas_cumprod, expected, rtol=0, atol=1e-12)
    assert float(model.schedule.alphas_cumprod[-1]) == 0.0 < float(models["turbo"].schedule.alphas_cumprod[-1])
    assert model.scheduler_config["timestep_spacing"] == "trailing"
    latents, prompts = torch.randn(8, 4, 8, 8), model.encode_prompts(["a"] * 8)
    batch = PairBatch(latents, prompts, torch.arange(4), scores=torch.linspace(1, 0, 8))
    for method in ("diffusion-dpo", "inpo", "smpo"):
        grid = {} if method == "diffusion-dpo" else {"num_inference_steps": 3}
        objective = build_objective(method, model.schedule, timesteps={"values": [249, 499, 749, 999]}, **grid)

        def network(latents: Any, times: Any, prompts: Any) -> Any:
            return model.predict(model.network, latents, times, prompts)

        out = objective(network, network, batch, seed=2)
        assert 999 in out.timesteps.tolist() and set(out.timesteps.tolist()) <= {249, 499, 749, 999}
        assert bool(out.loss.isfinite()) and bool(out.noisy_latents.isfinite().all())


def test_our_ddim_sampling_is_that_of_the_pipeline(directories: dict[str, Path], monkeypatch: Any) -> None:
    """Theirs rounds its coefficients to float32: latents stay below 8, and four steps multiply by less than 4."""
    model: Any = load_model("auto", directories["sd"])
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("fastinvdpo.evaluation.sampling.philox.normal", lambda *arguments: noise)
    told = {"num_inference_steps": 4, "guidance_scale": 1.0}
    ours = sample(model, model.network, ["a cat", "zebra"], **told)
    model.pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "output_type": "latent"}
    theirs = model.pipeline(["a cat", "zebra"], latents=noise, **told, **size).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
