"""The demo on emoji: its data, the training of its base model, its judges, and a tiny run of everything."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastinvdpo import cli
from fastinvdpo._examples import compare_methods
from fastinvdpo._examples.emoji import fidelity, make_data, run, train_base
from fastinvdpo._examples.emoji import judge as judging
from fastinvdpo._examples.emoji.data import DESIGNERS, PREFERENCES, Emoji, load_emoji, make_pairs, saturation, split
from fastinvdpo.data import PairDataset
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import load_config, to_yaml
from fastinvdpo.trainer.dry_run import count_evaluations

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
        verdicts = {name: judge.judge(name, seen, held_out.names) for name in PREFERENCES}
        found = verdicts[DESIGNERS[side]].as_dict()
        assert found["top5"] >= 0.9 and found["top5"] >= found["top1"] >= 0.7
        assert verdicts["noto"].rewards.tolist() == (-verdicts["twemoji"].rewards).tolist()
        assert found["noto"] == pytest.approx(np.mean(verdicts["noto"].rewards > 0))
        assert verdicts["vivid"].rewards.mean() == found["saturation"]
        shifted = judge.judge("prompt", seen, held_out.names[1:] + held_out.names[:1]).as_dict()
        assert shifted["top5"] < 0.1 and shifted["reward"] < found["top1"]
    assert saturation(np.full((1, 2, 2, 3), 7, np.uint8)) == [0]
    assert saturation(np.array([[[[255, 0, 51]]], [[[0, 51, 0]]]], np.uint8)) == pytest.approx([1, 0.2])


@pytest.mark.parametrize("preference", PREFERENCES)
def test_pairs_follow_the_preference_and_shuffled_ones_do_not(preference: str, emoji: Emoji) -> None:
    part = emoji.take(np.arange(0, len(emoji), 6))
    rows = make_pairs(part, preference, seed=1)
    assert rows == make_pairs(part, preference, seed=1) != make_pairs(part, preference, seed=2)
    assert 0.4 < np.mean([row["label_0"] for row in rows]) < 0.6
    places = {name: place for place, name in enumerate(part.names)}

    def right(row: dict) -> bool:
        sides = [np.asarray(Image.open(io.BytesIO(row[name]))) for name in ("jpg_0", "jpg_1")]
        winner, loser = sides if row["label_0"] else sides[::-1]
        drawings = part.images[:, places[row["caption"]]]
        if preference == "vivid":
            return bool(np.subtract(*saturation(np.array([winner, loser]))) > 0)
        if preference == "prompt":
            return any((winner == drawing).all() for drawing in drawings)
        return bool((winner == drawings[DESIGNERS.index(preference)]).all())

    assert all(map(right, rows)) and all((row["score_0"] > row["score_1"]) == row["label_0"] for row in rows)
    assert 0.4 < np.mean([right(row) for row in make_pairs(part, preference, seed=1, shuffle=True)]) < 0.6


@pytest.mark.parametrize("method", run.METHODS)
def test_every_method_has_a_configuration_that_survives_its_file(method: str, base: Path, tmp_path: Path) -> None:
    demo = run.EmojiDemo(base)
    for preference in PREFERENCES:
        rows = [{"score_0": 0.0, "score_1": 0.5}]
        config = demo.config(run.Run(method, preference), tmp_path, rows)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_config(tmp_path / "config.yaml") == config
        assert config.training.steps == run.STEPS and (config.cache.path is not None) == (method == "inversion-dpo")
        if method == "smpo":
            # A sure preference weighs 1, as in the other methods.
            sure = config.method.preference_scale * (2 / (1 + math.exp(-1)) - 1)
            assert config.method.score_range == 0.5
            assert config.method.preference_scale == 10 if preference == "vivid" else sure == pytest.approx(1.0)


@pytest.fixture
def small(few: Emoji, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen pairs, eight prompts of one step each, and a rate at which two steps of training are seen."""
    for module in (run, judging):
        monkeypatch.setattr(module, "split", lambda: (np.arange(16), np.arange(16, 24)))
    monkeypatch.setattr(run, "load_emoji", lambda: few)
    monkeypatch.setattr(run, "NUM_INFERENCE_STEPS", 1)
    monkeypatch.setattr(run, "RECIPES", {name: replace(one, learning_rate=0.01) for name, one in run.RECIPES.items()})
    monkeypatch.setattr(judging, "WEIGHTS", weights)


def test_a_tiny_demo_leaves_everything_and_replaces_an_earlier_one(
    base: Path, small: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["demo", "--seed", "3", "--steps", "2", "--base", str(base), "--output", str(tmp_path)]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert cli.main([*words, "--method", "smpo", "--control", "shuffle", "--no-progress"]) == 0
        control = json.loads((tmp_path / "summary.json").read_text())
        assert capsys.readouterr().out == ""
        assert cli.main(words) == 0
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = {"method": "diffusion-dpo", "preference": "noto", "seed": 3, "steps": 2, "control": None, "status": "ok"}
    assert {key: summary[key] for key in expected} == expected
    assert (control["method"], control["control"]) == ("smpo", "shuffle")
    assert control["before"] == summary["before"] != summary["after"] != control["after"]
    for side in ("before", "after"):
        assert set(summary[side]) == set(run.MEASURES) and 0 <= summary[side]["top1"] <= summary[side]["top5"]
    assert set(summary["win_rate"]) == {"mean", "ci_low", "ci_high"}
    assert 0 < summary["seconds_training"] < summary["seconds"]
    # Two steps of 32 pairs: policy and reference on both sides.
    assert summary["network_evaluations"] == 2 * 32 * 2 * 2
    for name in ("before_after.png", "curves.png"):
        assert Image.open(tmp_path / name).width > 600
    assert len(PairDataset(tmp_path / "pairs.parquet")) == 16
    assert load_model("stable-diffusion", tmp_path / "training" / "model").image_size == (32, 32)
    printed = capsys.readouterr().out
    assert "prompted emoji among five nearest" in printed and f"{summary['network_evaluations']:,}" in printed
    fidelity.main(["--base", str(base), "--grid", str(tmp_path / "grid.png")])
    found = json.loads(capsys.readouterr().out)
    assert found["samples"].keys() == found["autoencoder"][0].keys() == found["autoencoder"][1].keys()
    assert Image.open(tmp_path / "grid.png").width > 600


def test_frechet_distance_equals_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    random = np.random.RandomState(1)
    a, b = random.randn(80, 5) @ random.randn(5, 5), random.randn(60, 5) @ random.randn(5, 5) + 1
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert judging.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9) == judging.frechet_distance(b, a)
    flat = a @ np.diag([1, 2, 3, 1, 0])  # a feature without variance
    assert judging.frechet_distance(flat, flat + np.array([1, 0, 0, 2, 0])) == pytest.approx(5, abs=1e-6)


def test_mistakes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["demo", "--output", str(tmp_path / "out")]

    def told(*options: str) -> str:
        assert cli.main([*words, *options]) == 2 and not (tmp_path / "out").exists()
        return str(capsys.readouterr().err)

    for argument, value in (("method", "pnapo"), ("preference", "apple"), ("steps", "0"), ("control", "none")):
        assert f"error: {argument} = " in told("--base", str(base), f"--{argument}", value)
    assert "holds no pipeline. Remedy: train one" in told("--base", str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "BASE", tmp_path)
        assert "holds no pipeline. Remedy: run the demo in a checkout of the repository" in told()
        patch.setattr(judging, "WEIGHTS", tmp_path / "judge.safetensors")
        assert re.search(r"judge = .*is missing. Remedy: run the demo in a checkout", told("--base", str(base)))


# The comparison of methods


@pytest.mark.parametrize("method", compare_methods.METHODS)
def test_every_method_gets_as_many_evaluations_up_to_half_a_step(method: str, base: Path, tmp_path: Path) -> None:
    rows, given = [{"score_0": 0.0, "score_1": 0.5}], run.Run(method)
    demo = run.EmojiDemo(base)
    config = compare_methods.method_config(demo, given, 20_000, 1e-5, tmp_path, rows)
    found = count_evaluations(config)
    step = config.training.batch_size * (found.with_gradient + found.without_gradient)
    assert abs(config.training.steps * step - 20_000) <= step / 2
    assert config.method.name == method and config.optimizer.learning_rate == 1e-5
    with pytest.raises(InvalidInput, match=f"less than one step of {method}"):
        compare_methods.method_config(demo, given, 3, 1e-5, tmp_path, rows)


def test_the_best_run_is_the_one_with_the_highest_gain_that_still_shows_the_prompted_emoji() -> None:
    rows = [
        {"gain": gain, "top5": top5, "before": {"top5": 0.7}} for gain, top5 in ((0.1, 0.7), (0.2, 0.64), (0.4, 0.6))
    ]
    assert compare_methods._best(rows) is rows[1]
    assert compare_methods._best(rows[2:]) is rows[2]


def test_runs_are_kept_and_the_table_and_plot_come_from_them(
    base: Path, small: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = tmp_path / "found"
    arguments = {"evaluations": 100, "learning_rates": (1e-2,), "seeds": (0,)}
    results = []
    for _ in range(2):
        with OutputDirectory(found) as output:
            results.append(compare_methods.compare(run.EmojiDemo(base), output, ["mapo"], **arguments))
        results.append({path: path.stat().st_mtime_ns for path in (found / "runs").iterdir()})
    first, runs, second, again = results
    assert first == second == json.loads((found / "comparison.json").read_text())
    assert runs == again and len(runs) == 2
    (one,) = first["methods"]["mapo"]["runs"]
    assert one["steps"] == 2 and one["network_evaluations"] == 128  # two a pair, 32 pairs a step
    assert one["gain"] != first["methods"]["mapo"]["control"]["gain"]
    table = (found / "comparison.md").read_text().splitlines()
    assert len(table) == 4 and table[3].startswith("| mapo | 1e-02 |")
    assert (found / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert compare_methods.main(["--output", str(found), "--methods", "ppo"]) == 2
    assert "--methods = 'ppo': is not known" in capsys.readouterr().err
