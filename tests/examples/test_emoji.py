"""The demo on emoji: its data, the training of its base model, its judges, and a tiny run of everything."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastinvdpo._examples import demonstration
from fastinvdpo._examples.emoji import fidelity, make_data, run, train_base
from fastinvdpo._examples.emoji import judge as judging
from fastinvdpo._examples.emoji.data import DESIGNERS, Emoji, load_emoji, split
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.trainer import load_config, to_yaml

STAGES = (
    train_base.Stage("autoencoder", 2, 4, 1e-3, decay=1),
    train_base.Stage("diffusion", 2, 4, 1e-3, decay=1),
)


@pytest.fixture(scope="module")
def emoji() -> Emoji:
    return load_emoji()


@pytest.fixture(scope="module")
def few(emoji: Emoji) -> Emoji:
    """One emoji in eighty."""
    return emoji.take(np.arange(0, len(emoji), 80))


@pytest.fixture(scope="module")
def base(few: Emoji, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two steps of training."""
    return train_base.train_base(few, tmp_path_factory.mktemp("base"), *STAGES)


@pytest.fixture(scope="module")
def weights(few: Emoji, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judges after two steps of training."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file(judging.train_judges(few, np.arange(20), steps=2, batch_size=8), path)
    return path


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An unpacked package of two emoji with one name: the left half a transparent red, the right half nothing."""
    for designer in make_data.DESIGNERS.values():
        folder = tmp_path / "package" / "img" / designer / "64"
        folder.mkdir(parents=True)
        pixels = np.zeros((64, 64, 4), dtype=np.uint8)
        pixels[:, :31] = (255, 0, 0, 128)
        for name in ("a.png", "b.png"):
            Image.fromarray(pixels).save(folder / name)
    common = {"name": "RED SIGN", "category": "Symbols", "subcategory": "other"}
    entries = [
        {**common, "image": "b.png", "short_names": ["other_red", "o"], "sort_order": 2},
        {**common, "image": "a.png", "short_names": ["red"], "sort_order": 1},
    ]
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(entries))
    return tmp_path / "package"


def test_packages_become_captioned_images_on_white(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "emoji.parquet"
    make_data.main(["--twemoji", str(package), "--noto", str(package), "--output", str(file)])
    made = load_emoji(file)
    assert made.names == ["red", "other red"] and made.categories == ["Symbols", "Symbols"]
    assert made.images.shape == (2, 2, 32, 32, 3)
    row = made.images[1, 0, 7]
    # Half red on white; where a 2x2 block lies across the edge, half of that.
    assert row[14].tolist() == [255, 127, 127] and row[15].tolist() == [255, 191, 191] and row[16].tolist() == [255] * 3
    (package / "img" / "google" / "64" / "b.png").unlink()
    for directory, problem in ((package, "b.png"), (tmp_path, "holds no emoji.json")):
        with pytest.raises(InvalidInput, match=problem):
            make_data.read_package(directory, "noto")


def test_shipped_images_are_two_drawings_of_every_emoji_with_their_licenses(emoji: Emoji) -> None:
    import pyarrow.parquet

    from fastinvdpo._examples.emoji.data import IMAGES

    assert IMAGES.stat().st_size < 4_000_000
    metadata = pyarrow.parquet.read_schema(IMAGES).metadata
    assert b"CC-BY 4.0" in metadata[b"twemoji"] and b"Apache License 2.0" in metadata[b"noto"]
    assert len(emoji) == len(set(emoji.names)) == 1911 and emoji.images.shape == (2, 1911, 32, 32, 3)
    assert "red apple" in emoji.names and "bolivia flag" in emoji.names
    train, held_out = split()
    assert len(held_out) == 300 and sorted([*train, *held_out]) == list(range(1911))
    assert hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()[:8] == "82b062cb"


def test_interrupted_and_extended_training_are_those_that_never_stopped(tmp_path: Path) -> None:
    """Six steps at once; two and then six, where the rate had fallen at the end of the first run."""
    plan = train_base.Stage("line", 6, 3, 0.1, decay=2, warmup=2, average=0.5)
    assert [plan.rate(step) for step in range(6)] == [0.5, 1, 1, 1, 1, 0.5]

    def trained(folder: str, *stages: train_base.Stage) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        for stage in stages:
            torch.manual_seed(0)
            networks = torch.nn.ModuleDict({"line": torch.nn.Linear(2, 1)})

            def loss(places: torch.Tensor, draws: torch.Generator, line: torch.nn.Module = networks["line"]) -> object:
                return (line(torch.randn(3, 2, generator=draws)) - places.view(-1, 1)).square().mean()

            average = train_base.train_stage(stage, networks, loss, 5, tmp_path / folder)
        return average.state_dict()

    whole = trained("whole", plan)
    extended = trained("extended", replace(plan, steps=3, decay=1), plan)
    assert all(torch.equal(whole[name], value) for name, value in extended.items())
    assert all(torch.equal(whole[name], value) for name, value in trained("whole", plan).items())
    assert json.loads((tmp_path / "whole" / "line.jsonl").read_text().splitlines()[-1])["step"] == 6
    batches = [train_base.batch_places(step, 3, 5, seed=1).tolist() for step in range(5)]
    assert sorted(place for batch in batches for place in batch) == sorted([*range(5)] * 3)


def test_the_base_is_a_stable_diffusion_pipeline(base: Path, few: Emoji) -> None:
    from diffusers import StableDiffusionPipeline

    assert sum(file.stat().st_size for file in base.rglob("*")) < 12_000_000
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    assert pipeline.safety_checker is None and pipeline.vae.config.scaling_factor != 0.18215
    tokens = pipeline.tokenizer(few.names[3]).input_ids
    words = len(re.findall(r"[a-z]+|\d|[^a-z\d\s]+", few.names[3]))
    assert tokens[0] == pipeline.tokenizer.bos_token_id and tokens[-1] == pipeline.tokenizer.eos_token_id
    assert len(tokens) == words + 2
    assert pipeline.tokenizer.tokenize("zq") == ["z", "q</w>"]  # letters, where nobody drew it
    model = load_model("stable-diffusion", base)
    assert (model.latent_shape, model.image_size) == ((4, 8, 8), (32, 32))
    latents = train_base.encode(pipeline.vae, judging.to_tensor(few.images[0])) * pipeline.vae.config.scaling_factor
    assert latents.shape == (len(few), 4, 8, 8) and 0.5 < latents.std() < 2


def test_judges_tell_designers_and_find_emoji(emoji: Emoji) -> None:
    judge = judging.Judge(emoji)
    assert judge.held_out_accuracy >= 0.85
    held_out = emoji.take(split()[1])
    generator = torch.Generator().manual_seed(0)
    for side, images in enumerate(held_out.images):
        changed = judging.augment(judging.to_tensor(images), generator).clamp(-1, 1)
        seen = ((changed + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        verdicts = {name: judge.judge(name, seen, held_out.names) for name in run.PREFERENCES}
        found = verdicts[DESIGNERS[side]].as_dict()
        assert found["top5"] >= 0.9 and found["top5"] >= found["top1"] >= 0.7
        assert verdicts["noto"].rewards.tolist() == (-verdicts["twemoji"].rewards).tolist()
        assert found["noto"] == pytest.approx(np.mean(verdicts["noto"].rewards > 0))
        assert verdicts["vivid"].rewards.mean() == found["saturation"]
        shifted = judge.judge("prompt", seen, held_out.names[1:] + held_out.names[:1]).as_dict()
        assert shifted["top5"] < 0.1 and shifted["reward"] < found["top1"]
    assert judging.saturation(np.full((1, 2, 2, 3), 7, np.uint8)) == [0]
    assert judging.saturation(np.array([[[[255, 0, 51]]], [[[0, 51, 0]]]], np.uint8)) == pytest.approx([1, 0.2])


@pytest.mark.parametrize("preference", run.PREFERENCES)
def test_pairs_follow_the_preference_and_shuffled_ones_do_not(preference: str, emoji: Emoji) -> None:
    part = emoji.take(np.arange(0, len(emoji), 6))
    rows = run.make_pairs(part, preference, seed=1)
    assert rows == run.make_pairs(part, preference, seed=1) != run.make_pairs(part, preference, seed=2)
    assert 0.4 < np.mean([row["label_0"] for row in rows]) < 0.6
    places = {name: place for place, name in enumerate(part.names)}

    def right(row: dict) -> bool:
        sides = [np.asarray(Image.open(io.BytesIO(row[name]))) for name in ("jpg_0", "jpg_1")]
        winner, loser = sides if row["label_0"] else sides[::-1]
        drawings = part.images[:, places[row["caption"]]]
        if preference == "vivid":
            return bool(np.subtract(*judging.saturation(np.array([winner, loser]))) > 0)
        if preference == "prompt":
            return any((winner == drawing).all() for drawing in drawings)
        return bool((winner == drawings[DESIGNERS.index(preference)]).all())

    assert all(map(right, rows)) and all((row["score_0"] > row["score_1"]) == row["label_0"] for row in rows)
    assert 0.4 < np.mean([right(row) for row in run.make_pairs(part, preference, seed=1, shuffle=True)]) < 0.6


@pytest.mark.parametrize("method", demonstration.METHODS)
def test_every_method_has_a_configuration_that_survives_its_file(method: str, base: Path, tmp_path: Path) -> None:
    demo = run.EmojiDemo(base)
    for preference in run.PREFERENCES:
        rows = [{"score_0": 0.0, "score_1": 0.5}]
        config = demo.config(demonstration.Run(method, preference), tmp_path, rows)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_config(tmp_path / "config.yaml") == config
        assert config.training.steps == run.STEPS and (config.cache.path is not None) == (method == "inversion-dpo")


def test_a_tiny_demo_leaves_everything(
    base: Path,
    few: Emoji,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for module in (run, judging):
        monkeypatch.setattr(module, "split", lambda: (np.arange(16), np.arange(16, 24)))
    monkeypatch.setattr(run, "load_emoji", lambda: few)
    monkeypatch.setattr(run, "NUM_INFERENCE_STEPS", 1)
    monkeypatch.setattr(run, "LEARNING_RATE", 0.01)  # seen after two steps
    monkeypatch.setattr(judging, "WEIGHTS", weights)
    demo = run.EmojiDemo(base)
    summary = demonstration.run_demo(demo, demonstration.Run("inversion-dpo", "noto", 3, 2), output=tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["status"] == "ok" and summary["steps"] == 2
    for side in ("before", "after"):
        assert set(summary[side]) == {"reward", *demo.measures} and 0 <= summary[side]["top1"] <= summary[side]["top5"]
    assert summary["before"] != summary["after"]
    for name in ("before_after.png", "curves.png"):
        assert Image.open(tmp_path / name).width > 600
    assert load_model("stable-diffusion", tmp_path / "training" / "model").image_size == (32, 32)
    assert "prompted emoji among five nearest" in capsys.readouterr().out
    fidelity.main(["--base", str(base), "--grid", str(tmp_path / "grid.png")])
    found = json.loads(capsys.readouterr().out)
    assert found["samples"].keys() == found["autoencoder"][0].keys() == found["autoencoder"][1].keys()
    assert Image.open(tmp_path / "grid.png").width > 600


def test_mistakes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(InvalidInput, match=r"judge = .*run the demo in a checkout"),
    ):
        patch.setattr(judging, "WEIGHTS", tmp_path / "judge.safetensors")
        run.EmojiDemo(base)
    with pytest.raises(SystemExit, match="2"):
        run.main(["--base", str(tmp_path)])
    assert "holds no pipeline. Remedy: train one" in capsys.readouterr().err
    for argument, value in (("method", "ppo"), ("preference", "apple"), ("steps", "0"), ("control", "none")):
        with pytest.raises(SystemExit, match="2"):
            run.main(["--base", str(base), f"--{argument}", value, "--output", str(tmp_path / "out")])
        assert f"{argument} = " in capsys.readouterr().err and not (tmp_path / "out").exists()
