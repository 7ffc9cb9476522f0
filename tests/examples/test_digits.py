"""The digits family: pixels and latents, prompts, loading and saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import DiffusionModel, load_model
from tests.cases import SD_SCHEDULER


def unet(channels: int = 1) -> UNet2DConditionModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1, "norm_num_groups": 8}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (16, 32)}
    sizes = {"sample_size": 8, "in_channels": channels, "out_channels": channels}
    return UNet2DConditionModel(**blocks, **sizes, attention_head_dim=2, cross_attention_dim=32)


def write(directory: Path, channels: int = 1) -> Path:
    unet(channels).save_pretrained(directory / "unet", safe_serialization=True)
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD_SCHEDULER))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def model(directory: Path) -> DiffusionModel:
    return load_model("digits", directory)


def pictures(count: int = 4) -> list[Image.Image]:
    values = torch.randint(0, 256, (count, 64), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return [Image.frombytes("L", (8, 8), bytes(row.tolist())) for row in values]


def test_pixels_and_latents(model: DiffusionModel) -> None:
    images = [Image.frombytes("L", (8, 8), bytes(range(start, start + 64))) for start in range(0, 256, 64)]
    latents = model.encode_images(images)
    assert latents.shape == (4, *model.latent_shape)
    assert latents.dtype == torch.float32
    assert latents.flatten()[[0, -1]].tolist() == [-1.0, 1.0]
    assert [image.tobytes() for image in model.decode_latents(latents)] == [image.tobytes() for image in images]
    image = Image.new("L", (8, 8))
    image.putpixel((5, 2), 255)  # column 5, row 2
    latents = model.encode_images([image])
    assert latents[0, 0, 2, 5] == 1.0 and (latents == 1.0).sum() == 1
    clipped = model.decode_latents(torch.tensor([-3.0, 3.0]).repeat(32).reshape(1, 1, 8, 8))[0]
    assert clipped.tobytes() == bytes([0, 255] * 32)


class Wrapped(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


def test_predict_uses_prompt_and_time_in_any_precision_and_wrapper(directory: Path, model: DiffusionModel) -> None:
    latents, times = model.encode_images(pictures(2))[:1].repeat(3, 1, 1, 1), torch.tensor([10, 10, 700])
    conditioning = model.encode_prompts(["a handwritten three", "", "a handwritten three"])
    assert conditioning["encoder_hidden_states"].shape == (3, 4, 32)
    assert not conditioning["encoder_hidden_states"][1].any()
    found = model.predict(model.network, latents, times, conditioning)
    one, empty, later = found
    assert one.shape == model.latent_shape
    assert not torch.allclose(one, empty) and not torch.allclose(one, later)
    assert torch.equal(model.predict(Wrapped(model.network), latents, times, conditioning), found)
    half = load_model("digits", directory, dtype=torch.bfloat16)
    got = half.predict(half.network, latents, times, conditioning)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), found, atol=0.05, rtol=0.05)


def test_a_saved_model_and_another_unet_load_with_the_given_weights(model: DiffusionModel, tmp_path: Path) -> None:
    other = unet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.25
    model.save(tmp_path / "out", network=other)
    other.save_pretrained(tmp_path / "plain", safe_serialization=True)
    assert model.origin is not None
    places: list[dict[str, Any]] = [{"path": tmp_path / "out"}]
    places += [{"path": model.origin.path, "unet_init": tmp_path / name} for name in ("plain", "out")]
    for place in places:
        again = load_model("digits", **place)
        assert all(map(torch.equal, again.network.parameters(), other.parameters()))
        assert again.scheduler_config == model.scheduler_config
        assert torch.equal(again.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    assert sorted(file.suffix for file in (tmp_path / "out" / "unet").iterdir()) == [".json", ".safetensors"]
    network = unet()
    network.add_adapter(peft.LoraConfig(r=2, target_modules=list(model.default_lora_targets)))
    with pytest.raises(InvalidInput, match="LoRA layers that are not merged"):
        model.save(tmp_path, network=network)


EIGHT = Image.new("L", (8, 8))
BAD_CALLS: list[tuple[str, Any, str]] = [
    ("encode_images", [], r"images = \[\]: is empty"),
    ("encode_images", [EIGHT, Image.new("L", (9, 8))], r"images\[1\].size = \(9, 8\): digit models need 8x8"),
    ("encode_images", ["three.png"], r"images\[0\] = 'three.png': is not a PIL image"),
    ("decode_latents", torch.zeros(1, 4, 8, 8), "wrong shape or dtype"),
    ("decode_latents", torch.zeros(8, 8), "wrong shape or dtype"),
    ("decode_latents", torch.zeros(1, 1, 8, 8, dtype=torch.int64), "wrong shape or dtype"),
    ("decode_latents", torch.full((1, 1, 8, 8), float("nan")), "NaN"),
    ("encode_prompts", "three", "is one string"),
    ("encode_prompts", [], "is empty"),
    ("encode_prompts", ["a", None], r"prompts\[1\] = None"),
]


def test_bad_calls(model: DiffusionModel) -> None:
    for method, argument, message in BAD_CALLS:
        with pytest.raises(InvalidInput, match=message):
            getattr(model, method)(argument)
    with pytest.raises(InvalidInput, match="lacks 'encoder_hidden_states'"):
        model.predict(model.network, torch.zeros(1, 1, 8, 8), torch.tensor([1]), {"text": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nowhere"}, "model.path = 'nowhere': holds no scheduler"),
        ({"path": ""}, "model.path = '': is empty"),
        ({"revision": "main"}, "model.revision = 'main'"),
        ({"unet_init": "nowhere"}, "model.unet_init = 'nowhere': holds no unet"),
        ({"vae": "x"}, "model.vae = 'x': means nothing for a model of the family digits"),
    ],
)
def test_bad_loads(directory: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_model(**{"family": "digits", "path": directory, **change})


def test_damaged_models_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "model")
    for text, message in {
        "{": r"scheduler_config\.json': is not valid JSON",
        "[]": "holds no JSON object",
        '{"beta_start": null}': "has unusable settings",
        '{"num_train_timesteps": "x"}': "scheduler = None: has unusable settings",
    }.items():
        (directory / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(InvalidInput, match=message):
            load_model("digits", directory)
    color = write(tmp_path / "color", channels=3)
    with pytest.raises(InvalidInput, match="3 input channels"):
        load_model("digits", color)
    pickled = write(tmp_path / "pickled")
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet().state_dict(), pickled / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"cannot be loaded.*Remedy"):
        load_model("digits", pickled)
