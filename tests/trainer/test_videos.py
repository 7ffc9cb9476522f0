"""Training on pairs of videos: through cache, training, resume and evaluation to the frames of plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image

from fastinvdpo.config.sections import EvaluationSection
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.comparing import compare, read_image
from fastinvdpo.evaluation.in_training import EvaluationCallback
from fastinvdpo.evaluation.sampling import Sampling, initial_noise, sample_images
from fastinvdpo.evaluation.scorers import FunctionScorer
from fastinvdpo.models import load_model
from fastinvdpo.trainer import TrainConfig, train
from fastinvdpo.trainer.cache_writing import precompute
from fastinvdpo.trainer.opening import open_dataset, open_model
from tests.evaluation.tiny import brightness
from tests.models import tiny as models
from tests.trainer import tiny
from tests.trainer.test_families import DIFFUSERS_LORA, LENGTH, LORA, images

FRAMES = 5
PROMPTS = ["a cat", "zebra"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of videos of six frames of 16 by 16 pixels, with scores, masks and noise; in ``shapes.jsonl`` the second is
    of a wide pair.
    """
    root = tmp_path_factory.mktemp("videos")
    models.wan_pipeline().save_pretrained(root / "wan", safe_serialization=True)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    rng, lines = np.random.default_rng(0), []
    for row, width in enumerate((16, 16, 28)):
        mask = np.repeat([[0, 255]], width // 2, axis=1).repeat(16, axis=0)
        Image.fromarray(mask.astype(np.uint8)).save(root / f"{row}.png")
        line = {"mask": f"{row}.png", "label": row % 2, "caption": "abc"[row], "score_0": 0.3 - row, "score_1": 0.2}
        for side in range(2):
            (root / f"{row}-{side}").mkdir()
            for frame in range(FRAMES + 1):
                pixels = rng.integers(0, 256, (16, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / f"{row}-{side}" / f"{frame}.png")
            np.save(root / f"{row}-{side}.npy", rng.standard_normal((4, 2, 4, 4), dtype=np.float32))
            line |= {f"image_{side}": f"{row}-{side}", f"noise_{side}": f"{row}-{side}.npy"}
        lines.append(json.dumps(line) + "\n")
    (root / "pairs.jsonl").write_text("".join(lines[:2]))
    (root / "shapes.jsonl").write_text("".join(lines[1:]))
    return root


def _config(root: Path, output: Path, method: str, /, **sections: Any) -> TrainConfig:
    data = {"path": str(root / "pairs.jsonl"), "resolution": 16, "frames": FRAMES, **sections.pop("data", {})}
    training = {"steps": 2, "batch_size": 1, **sections.pop("training", {})}
    values = tiny.mapping(
        root,
        method,
        model={"family": "auto", "path": str(root / "wan"), "max_sequence_length": LENGTH, **sections.pop("model", {})},
        data=data,
        training=training,
        optimizer={"warmup_steps": 0, "learning_rate": 1e-2},
        output={"directory": str(output), "log_every": 1, "checkpoint_every": 1},
    )
    return TrainConfig.from_mapping({**values, **sections})


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a frozen part is loaded")


@pytest.mark.parametrize(("method", "lora"), [("inversion-dpo", None), ("diffusion-dpo", LORA)], ids=["full", "lora"])
def test_a_pair_of_videos_from_the_cache_to_plain_diffusers(
    root: Path, tmp_path: Path, method: str, lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"cache": {"path": str(tmp_path / "cache")}, "model": {"lora": lora}}
    config = _config(root, tmp_path / "run", method, **cache)
    ours: Any = open_model(config)
    before = images(ours.pipeline, "wan")
    stored = precompute(config, progress=False).fetch(0, 0)
    latents = ours.encode_images([list(open_dataset(config)[0].sides[side].frames) for side in range(2)])
    assert torch.equal(torch.stack([side["latents"] for side in stored.sides]), latents)

    with monkeypatch.context() as patched:  # with the cache, neither the VAE nor the text encoder is loaded
        patched.setattr(diffusers.AutoencoderKLWan, "from_pretrained", refuse)
        patched.setattr(transformers.UMT5EncoderModel, "from_pretrained", refuse)
        result = train(config, progress=False)
        for steps in (1, 2):
            train(_config(root, tmp_path / "resumed", method, **cache, training={"steps": steps}), progress=False)
    assert [row["step"] for row in result.history] == [1, 2]
    assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    ends = [tiny.stored(tmp_path / name, 2) for name in ("run", "resumed")]
    for part in ("trainable", "state"):
        tiny.assert_same(getattr(ends[0], part), getattr(ends[1], part))

    # Plain diffusers makes the frames of the network that was trained, from the pipeline or from base and adapter.
    plain = DiffusionPipeline.from_pretrained(result.model_directory if lora is None else root / "wan")
    if lora is None:
        trained = {"model": {**config.model.model_dump(), "unet_init": str(result.model_directory)}}
        ours = open_model(_config(root, tmp_path / "again", method, **trained))
    else:
        plain.load_lora_weights(result.directory / "adapter", weight_name=DIFFUSERS_LORA)
        plain.fuse_lora()
        ours = load_model("auto", result.model_directory)
    assert images(plain, "wan") == images(ours.pipeline, "wan") != before

    sampling = Sampling(num_inference_steps=3, resolution=16, frames=FRAMES, noise=True, batch_size=1)
    scorer = FunctionScorer(brightness, "brightness", batch_size=3)
    aligned = result.directory / ("model" if lora is None else "adapter")
    summary = compare(root / "wan", aligned, PROMPTS, [scorer], tmp_path / "out", sampling=sampling)
    assert (summary["frames"], summary["guidance_scale"]) == (FRAMES, 5.0)
    names = [f"{place:05d}-{frame:03d}.png" for place in range(2) for frame in range(FRAMES)]
    assert sorted(file.name for file in (tmp_path / "out" / "aligned").iterdir()) == names
    shown = [read_image(tmp_path / "out" / "aligned" / name) for name in names]
    scores = brightness(shown, [])
    found = [sample["scores"]["brightness"]["aligned"] for sample in summary["samples"]]
    assert found == pytest.approx([fmean(scores[:FRAMES]), fmean(scores[FRAMES:])])
    noise = initial_noise(load_model("auto", root / "wan", **sampling.size), 0, [0, 1])
    assert np.array_equal(np.load(tmp_path / "out" / "noise" / "00001.npy"), noise[1].numpy())
    size = {"height": 16, "width": 16, "num_frames": FRAMES, "num_inference_steps": 3, "output_type": "pil"}
    theirs = plain(prompt=PROMPTS, latents=noise, **size).frames
    pixels, expected = (np.stack([np.asarray(i, np.int16) for i in one]) for one in (shown, theirs[0] + theirs[1]))
    assert np.abs(pixels - expected).max() <= 1 and (pixels != expected).mean() < 0.01


@pytest.mark.parametrize("method", ["inpo", "smpo", "pnapo", "kto"])
def test_every_kind_of_method_takes_videos(root: Path, tmp_path: Path, method: str) -> None:
    """With one mask for all frames, buckets, the noise of a video, and an evaluation that scores the mean of frames."""
    options: dict[str, Any] = {"name": method}
    options |= {"num_inference_steps": 2} if method in ("inpo", "smpo") else {"beta": 500.0}
    data: dict[str, Any] = {"latents": "sampled", "masks": method in ("inpo", "pnapo")}
    if method == "smpo":
        data |= {"path": str(root / "shapes.jsonl"), "resolution": 32, "buckets": {"multiple": 8}}
    base = _config(root, tmp_path / "run", "diffusion-dpo", data=data).as_dict()
    config = TrainConfig.from_mapping({**base, "method": options})
    scorer = FunctionScorer(brightness, "brightness")
    section = EvaluationSection(every=1, prompts=str(root / "prompts.txt"), scorers=["of:own"], num_inference_steps=2)
    callbacks = [EvaluationCallback(section, [scorer])] if method == "kto" else []
    model = open_model(config)
    expected = brightness(sample_images(model, model.network, PROMPTS, [0, 1], section), [])
    shapes: list[tuple[int, ...]] = []
    model.network.register_forward_pre_hook(lambda _, __, given: shapes.append(given["hidden_states"].shape[1:]),
                                            with_kwargs=True)  # fmt: skip
    result = tiny.train_model(config, model, open_dataset(config), callbacks=callbacks)
    assert all(np.isfinite(row["loss"]) for row in result.history) and len(result.history) == 2
    assert set(shapes) == ({(4, 2, 4, 4)} if method != "smpo" else {(4, 2, 8, 8), (4, 2, 6, 10)})
    before, after = (tiny.stored(result.directory, step).trainable for step in (1, 2))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    if callbacks:
        assert [row["step"] for row in result.evaluation] == [0, 1, 2]
        assert result.evaluation[0]["brightness"] == pytest.approx(fmean(expected))
        assert len(expected) == 2 * FRAMES


def test_frames_that_do_not_fit_are_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^data\.frames = 6: is not 4k \+ 1 frames.*use 5 or 9"):
        _config(root, tmp_path / "run", "diffusion-dpo", data={"frames": 6})
    models.sd3_pipeline().save_pretrained(tmp_path / "sd3")
    cache = {"cache": {"path": str(tmp_path / "cache")}, "model": {"path": str(tmp_path / "sd3")}}
    with pytest.raises(InvalidInput, match=r"data\.frames = 5: means nothing for a model of the family stable-diff"):
        precompute(_config(root, tmp_path / "run", "diffusion-dpo", **cache), progress=False)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InvalidInput, match="is a folder, as the frames of a video are in"):
        open_dataset(_config(root, tmp_path / "run", "diffusion-dpo", data={"frames": None}))
    cached = {"cache": {"path": str(tmp_path / "cache")}}
    precompute(_config(root, tmp_path / "run", "diffusion-dpo", data={"frames": 1}, **cached), progress=False)
    with pytest.raises(InvalidInput, match=r"data\.frames"):
        precompute(_config(root, tmp_path / "run", "diffusion-dpo", **cached), progress=False)
