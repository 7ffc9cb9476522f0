"""Every family from a saved checkpoint through training to a result that gives the same images in plain diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from fastinvdpo.data import write_pairs
from fastinvdpo.errors import InvalidInput
from fastinvdpo.trainer import TrainConfig, train
from fastinvdpo.trainer.opening import open_dataset, open_model
from tests.models import tiny as models
from tests.trainer import tiny

LENGTH = 10
LORA = {"rank": 2, "alpha": 8.0}  # alpha / rank is not 1, but a power of two: the file holds it without rounding
DIFFUSERS_LORA, KOHYA_LORA = "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"
# Every family and every method; tests/trainer/chain.py has each family with each.
RUNS = [
    *(("sd15", "inversion-dpo"), ("sdxl", "inpo"), ("sd3", "smpo"), ("flux", "inversion-dpo")),
    *(("klein", "inpo"), ("qwen", "inversion-dpo"), ("z-image", "smpo")),
    *((family, "diffusion-dpo") for family in ("sd21", "refiner", "schnell")),
]


def write_two_pairs(root: Path) -> None:
    """``pairs.parquet``: two pairs of pictures of 18 by 16 pixels, with scores."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 18, 3), dtype=np.uint8)) for _ in range(4)]
    rows = [
        {"jpg_0": pictures[2 * i], "jpg_1": pictures[2 * i + 1], "label_0": 1, "label_1": 0, "caption": "ab"[i],
         "score_0": 0.3, "score_1": 0.2}
        for i in range(2)
    ]  # fmt: skip
    write_pairs(root / "pairs.parquet", rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name, build in models.PIPELINES.items():
        build().save_pretrained(root / name, safe_serialization=True)
    write_two_pairs(root)
    return root


def _config(root: Path, output: Path, family: str, method: str, /, **sections: Any) -> TrainConfig:
    length = {"max_sequence_length": LENGTH} if family in models.FLOW else {}
    values = tiny.mapping(
        root,
        method,
        model={"family": "auto", "path": str(root / family), **length, **sections.pop("model", {})},
        data={"resolution": 16},
        training={"steps": 2, "batch_size": 1},
        optimizer={"warmup_steps": 0, "learning_rate": 1e-2},
        output={"directory": str(output), "log_every": 1, **sections.pop("output", {})},
    )
    return TrainConfig.from_mapping({**values, **sections})


def images(pipeline: Any, family: str) -> bytes:
    """Two pictures of two steps, or two videos."""
    pipeline.set_progress_bar_config(disable=True)
    start: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2}
    if family != "qwen":
        start["guidance_scale"] = 2.0
    if family in models.FLOW:
        start["max_sequence_length"] = LENGTH
    if family == "refiner":
        flat = Image.new("RGB", (16, 16), (90, 120, 200))
        start = {"image": [flat, flat], "strength": 0.9, "guidance_scale": 2.0, "num_inference_steps": 3}
    if family == "wan":
        start |= {"num_frames": 5, "output_type": "pil"}
    found = pipeline(prompt=["a cat", "zebra"], generator=torch.Generator().manual_seed(3), **start)
    drawn = [frame for video in found.frames for frame in video] if family == "wan" else found.images
    assert np.std([np.asarray(image) for image in drawn]) > 1
    return b"".join(image.tobytes() for image in drawn)


@pytest.mark.parametrize(("family", "method"), RUNS, ids=["-".join(run) for run in RUNS])
def test_full_fine_tuning_gives_the_images_of_plain_diffusers(
    root: Path, tmp_path: Path, family: str, method: str
) -> None:
    """Inversion-DPO trains from a cache, without text encoders and VAE."""
    cached = {"cache": {"path": str(tmp_path / "cache")}} if method == "inversion-dpo" else {}
    config = _config(root, tmp_path / "run", family, method, **cached)
    before: Any = open_model(config)
    theirs_before = images(before.pipeline, family)
    if cached:
        result = train(config, progress=False)
        ours = open_model(config.model_copy(update={"model": config.model.model_copy(
            update={"unet_init": str(result.model_directory)})}))  # fmt: skip
    else:
        ours = before
        result = tiny.train_model(config, ours, open_dataset(config))
    assert [row["step"] for row in result.history] == [1, 2]
    # With as many bits as float32 leaves to it, policy = reference gives ln 2 in the first step.
    assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    mine = images(ours.pipeline, family)
    theirs = images(DiffusionPipeline.from_pretrained(result.model_directory), family)
    assert mine == theirs
    assert mine != theirs_before


@pytest.mark.parametrize("family", list(models.PIPELINES))
def test_a_trained_adapter_gives_the_images_of_plain_diffusers(root: Path, tmp_path: Path, family: str) -> None:
    method = "inpo" if family == "sd3" else "smpo" if family == "flux" else "diffusion-dpo"
    formats = ["diffusers", "kohya"] if family in ("sdxl", "qwen") else ["diffusers"]
    config = _config(root, tmp_path / "run", family, method, model={"lora": LORA}, output={"formats": formats})
    ours: Any = open_model(config)
    before = images(ours.pipeline, family)
    result = tiny.train_model(config, ours, open_dataset(config))
    plain = DiffusionPipeline.from_pretrained(root / family)
    plain.load_lora_weights(result.directory / "adapter", weight_name=DIFFUSERS_LORA)
    mine = images(ours.pipeline, family)
    assert mine == images(plain, family)
    assert mine != before
    # The merged model is another sum: equal to the rounding of its weights, at most one step of a pixel.
    merged = images(DiffusionPipeline.from_pretrained(result.model_directory), family)
    assert max(abs(a - b) for a, b in zip(merged, mine, strict=True)) <= 1
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "base_model.json", DIFFUSERS_LORA}
    if "kohya" in formats:
        plain.unload_lora_weights()
        plain.load_lora_weights(result.directory / "adapter", weight_name=KOHYA_LORA)
        again = images(plain, family)
        assert max(abs(a - b) for a, b in zip(again, mine, strict=True)) <= 1
        assert KOHYA_LORA in (result.directory / "adapter" / "README.md").read_text()
        files.add(KOHYA_LORA)
    assert {file.name for file in (result.directory / "adapter").iterdir()} == files


def test_kohyas_format_is_refused_before_a_run_that_could_not_write_it(root: Path, tmp_path: Path) -> None:
    output = {"formats": ["kohya"]}
    with pytest.raises(InvalidInput, match=r"output\.formats = 'kohya': is a format of adapters"):
        _config(root, tmp_path / "run", "sd15", "diffusion-dpo", output=output)
    for family, lora, problem in (
        ("z-image", LORA, "has no names for the family z-image"),
        ("flux", {**LORA, "target_modules": ["x_embedder"]}, "has no name for the layer x_embedder"),
    ):
        config = _config(root, tmp_path / "run", family, "diffusion-dpo", model={"lora": lora}, output=output)
        with pytest.raises(InvalidInput, match=problem):
            train(config, progress=False)


@pytest.mark.parametrize(("family", "kind"), [("sdxl", "nf4"), ("sd3", "int8"), ("flux", "nf4"), ("wan", "nf4")])
def test_an_adapter_on_quantized_weights_loads_in_plain_diffusers(
    root: Path, tmp_path: Path, family: str, kind: str
) -> None:
    """And the whole model is the original with the adapter merged: the images are equal to the rounding of weights."""
    config = _config(root, tmp_path / "run", family, "diffusion-dpo", model={"lora": LORA, "quantization": kind})
    result = train(config, progress=False)
    assert result.history[0]["margin"] == 0
    plain = DiffusionPipeline.from_pretrained(root / family)
    before = images(plain, family)
    plain.load_lora_weights(result.directory / "adapter", weight_name=DIFFUSERS_LORA)
    adapted = images(plain, family)
    assert adapted != before
    merged = images(DiffusionPipeline.from_pretrained(result.model_directory), family)
    assert max(abs(a - b) for a, b in zip(merged, adapted, strict=True)) <= 1


def test_a_sequence_of_4096_tokens_trains(root: Path, tmp_path: Path) -> None:
    """FLUX.1 at 1024 by 1024 pixels, by the count; with activations recomputed."""
    config = _config(
        root, tmp_path / "run", "flux", "diffusion-dpo", model={"lora": LORA},
        data={"path": str(root / "pairs.parquet"), "resolution": 256},
        training={"steps": 1, "batch_size": 1, "gradient_checkpointing": True},
    )  # fmt: skip
    model: Any = open_model(config)
    lengths = set()
    model.network.register_forward_pre_hook(
        lambda _, arguments, given: lengths.add(given["hidden_states"].shape[1]), with_kwargs=True
    )
    result = tiny.train_model(config, model, open_dataset(config))
    assert lengths == {4096}
    assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and result.history[0]["margin"] == 0


def test_the_network_alone_is_written_on_demand(root: Path, tmp_path: Path) -> None:
    config = _config(root, tmp_path / "run", "sd3", "diffusion-dpo", output={"pipeline": False})
    ours: Any = open_model(config)
    result = tiny.train_model(config, ours, open_dataset(config))
    assert sorted(file.name for file in result.model_directory.iterdir()) == ["README.md", "transformer"]
    kind = type(ours.network)
    theirs = kind.from_pretrained(result.model_directory, subfolder="transformer")
    plain = DiffusionPipeline.from_pretrained(root / "sd3", transformer=theirs)
    assert images(plain, "sd3") == images(ours.pipeline, "sd3")
    assert f"{kind.__name__}.from_pretrained" in (result.model_directory / "README.md").read_text()


def test_another_vae_is_part_of_result_and_cache_and_the_card_tells_what_was_done(root: Path, tmp_path: Path) -> None:
    vae = models.vae()
    vae.save_pretrained(tmp_path / "vae", safe_serialization=True)
    cache = {"cache": {"path": str(tmp_path / "cache")}}
    config = _config(root, tmp_path / "run", "sd15", "inpo", model={"vae": str(tmp_path / "vae")}, **cache)
    result = train(config, progress=False)
    written = DiffusionPipeline.from_pretrained(result.model_directory).vae.state_dict()
    tiny.assert_same(dict(written), dict(vae.state_dict()))
    with pytest.raises(InvalidInput, match="different are model vae"):
        train(_config(root, tmp_path / "other", "sd15", "inpo", **cache), progress=False)
    card = (result.model_directory / "README.md").read_text()
    front, body = card.split("---\n")[1], card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    assert TrainConfig.from_mapping(yaml.safe_load(body)) == config, "the card holds the exact configuration"
    assert re.search(rf"2 pairs from `{root / 'pairs.parquet'}`. Content: sha256:[0-9a-f]{{64}}\n", card)
    assert f"| loss | {result.history[-1]['loss']:.6g} |" in card
