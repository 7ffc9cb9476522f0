"""The demo: its data, its text encoder, its shipped base models, and a tiny run of everything."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from PIL import Image

from fastinvdpo._examples.digits import base, digits, run
from fastinvdpo._examples.digits.judge import Judge
from fastinvdpo._examples.judging import frechet_distance
from fastinvdpo._examples.pairs import score_range
from fastinvdpo.data import PairDataset, write_pairs
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.models.digits import embed_prompts, word_vector
from fastinvdpo.trainer import load_config, to_yaml

Splits: TypeAlias = tuple[digits.Digits, digits.Digits]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return digits.load_splits()


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def test_word_vectors_are_sums_of_uniform_integers_of_the_hash() -> None:
    digest = hashlib.sha256(b"three:1").digest()
    uniforms = [int.from_bytes(digest[i : i + 2], "little") for i in range(0, 24, 2)]
    assert word_vector("three")[1] == sum(uniform - 65535 / 2 for uniform in uniforms) / 65536
    assert word_vector("three")[0] == 1.6139068603515625


def test_prompts_become_padded_and_cut_rows_of_word_vectors() -> None:
    embedded = embed_prompts(["", "A handwritten three", "one two three four five"])
    assert embedded.shape == (3, 4, 32)
    assert embedded.dtype == torch.float32
    assert not embedded[0].any()
    assert embedded[1, 2].tolist() == list(word_vector("three"))
    assert not embedded[1, 3].any()
    assert embedded[2, 3].tolist() == list(word_vector("four"))
    assert torch.equal(embedded[1:2], embed_prompts(["a  handwritten\tTHREE"]))
    for wrong in ("a handwritten three", ["fine", None]):
        with pytest.raises(InvalidInput, match="prompts"):
            embed_prompts(wrong)  # type: ignore[arg-type]


def test_split_is_the_same_everywhere_and_holds_every_scan_once(splits: Splits) -> None:
    from sklearn.datasets import load_digits

    found = [hashlib.sha256(part.images.tobytes() + part.labels.tobytes()).hexdigest()[:16] for part in splits]
    assert found == ["26d20a1da569b0c5", "efe39e17b739b9fe"]
    scans = load_digits()
    rounded = np.round(scans.images * 255 / 16).astype(np.uint8)
    train, held_out = splits
    assert (len(train.labels), len(held_out.labels)) == (1497, 300)
    images = np.concatenate([train.images, held_out.images])
    labels = np.concatenate([train.labels, held_out.labels])
    assert labeled(images, labels) == labeled(rounded, scans.target)


def labeled(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def stroke(*cells: tuple[int, int]) -> np.ndarray:
    image = np.zeros((1, 8, 8), dtype=np.uint8)
    for row, column in cells:
        image[0, row, column] = 255
    return image


def test_slant_is_the_slope_of_a_stroke_and_boldness_the_share_of_ink(splits: Splits) -> None:
    # One column to the right for every row up: slope 1. A column for two rows: about a half.
    assert digits.slant(stroke(*((row, 7 - row) for row in range(8)))) == pytest.approx(1)
    assert digits.slant(stroke(*((row, (7 - row) // 2) for row in range(8)))) == pytest.approx(0.5, abs=0.03)
    assert digits.slant(stroke(*((row, 3) for row in range(8)))) == pytest.approx(0)
    assert digits.slant(stroke()) == digits.slant(stroke((3, 1), (3, 2), (3, 6))) == 0  # no vertical extent
    images = splits[1].images
    np.testing.assert_allclose(digits.slant(images[:, :, ::-1]), -digits.slant(images), atol=1e-12)
    assert digits.boldness(stroke(*((row, column) for row in range(4) for column in range(8)))) == pytest.approx(0.5)


@pytest.mark.parametrize("preference", digits.PREFERENCES)
def test_pairs_follow_the_preference(preference: str, splits: Splits, tmp_path: Path) -> None:
    rows = digits.make_pairs(splits[0], preference, 200, seed=3)
    assert rows == digits.make_pairs(splits[0], preference, 200, seed=3)
    assert rows != digits.make_pairs(splits[0], preference, 200, seed=4)
    assert 70 < sum(row["label_0"] for row in rows) < 130
    write_pairs(tmp_path / "pairs.parquet", rows)
    pairs = PairDataset(tmp_path / "pairs.parquet")
    assert len(pairs) == 200
    known = dict(labeled(splits[0].images, splits[0].labels))
    for pair in (pairs[place] for place in range(200)):
        winner, loser = np.asarray(pair.winner), np.asarray(pair.loser)
        # PNG keeps the pixels, so every picture is one of the training scans.
        labels = known[winner.tobytes()], known[loser.tobytes()]
        prompted = digits.NAMES.index(pair.caption.removeprefix("a handwritten "))
        assert labels[0] == prompted
        assert (labels[1] == prompted) == (preference != "digit")
        if preference == "digit":
            assert (pair.winner_score, pair.loser_score) == (1.0, 0.0)
        else:
            measure = digits.slant if preference == "slant" else digits.boldness
            assert pair.winner_score == measure(winner[None])[0] > pair.loser_score == measure(loser[None])[0]


@pytest.mark.parametrize("preference", digits.PREFERENCES)
def test_shuffled_pairs_tell_nothing(preference: str, splits: Splits) -> None:
    shuffled = digits.make_pairs(splits[0], preference, 400, seed=0, shuffle=True)
    assert all(row["label_0"] == (row["score_0"] > row["score_1"]) for row in shuffled)
    known = dict(labeled(splits[0].images, splits[0].labels))
    right = []
    for row in shuffled:
        winner, loser = (pixels(row[name]) for name in (("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")))
        if preference == "digit":
            right.append(digits.NAMES[known[winner.tobytes()]] in row["caption"])
        else:
            measure = digits.slant if preference == "slant" else digits.boldness
            right.append(measure(winner)[0] > measure(loser)[0])
    assert 0.42 < np.mean(right) < 0.58


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))[None]


@pytest.mark.parametrize(("preference", "count", "argument"), [("tilt", 5, "preference"), ("slant", 0, "count")])
def test_impossible_pairs(preference: str, count: int, argument: str, splits: Splits) -> None:
    with pytest.raises(InvalidInput, match=argument):
        digits.make_pairs(splits[0], preference, count, seed=0)
    rows = [{"score_0": 0.5, "score_1": -1.0}, {"score_0": 0.0, "score_1": 2.0}]
    assert score_range(rows) == 3.0


def test_judge_reads_real_scans(judge: Judge, splits: Splits) -> None:
    assert judge.held_out_accuracy >= 0.98
    held_out = splits[1]
    verdict = judge.judge("digit", held_out.images, held_out.labels)
    assert verdict.accuracy == judge.held_out_accuracy == verdict.rewards.mean()
    wrong = judge.judge("digit", held_out.images, (held_out.labels + 1) % 10)
    assert wrong.accuracy <= 0.02
    noise = np.random.RandomState(0).randint(0, 256, (300, 8, 8)).astype(np.uint8)
    assert judge.judge("slant", noise, held_out.labels).frechet > 10 * verdict.frechet


def test_frechet_distance_equals_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    random = np.random.RandomState(1)
    a, b = random.randn(80, 5) @ random.randn(5, 5), random.randn(60, 5) @ random.randn(5, 5) + 1
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9) == frechet_distance(b, a)
    flat = a @ np.diag([1, 2, 3, 1, 0])  # a feature without variance
    assert frechet_distance(flat, flat + np.array([1, 0, 0, 2, 0])) == pytest.approx(5, abs=1e-6)


@pytest.mark.parametrize(("name", "low", "high"), [("clean", 0.95, 1.0), ("noisy", 0.35, 0.65)])
def test_shipped_base_models(name: str, low: float, high: float, judge: Judge, splits: Splits) -> None:
    directory = base.WEIGHTS / name
    assert sum(file.stat().st_size for file in directory.rglob("*.safetensors")) < 2_100_000
    model = load_model("digits", directory)
    assert sum(parameter.numel() for parameter in model.network.parameters()) == 983_713
    assert all(model.scheduler_config[key] == value for key, value in base.SCHEDULER.items())
    drawn = run.as_array(run.draw_images(directory, splits[1].prompts[:120], seed=11))
    assert low <= judge.judge("digit", drawn, splits[1].labels[:120]).accuracy <= high


def test_base_training_reduces_the_loss_and_saves_half_precision(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    losses: list[float] = []
    base.train_base("noisy", tmp_path, steps=100, batch_size=8, report=lambda step, loss: losses.append(loss))
    assert len(losses) == 1
    # An untrained network predicts no noise at all: a loss of 1.
    assert losses[0] < 0.8
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert load_model("digits", tmp_path).network.dtype == torch.float32


def test_noisy_captions_name_another_digit(splits: Splits, tmp_path: Path) -> None:
    labels = splits[0].labels
    captions = base._captions(labels, 0.42, 0)
    right = [caption == digits.prompt_of(label) for caption, label in zip(captions, labels, strict=True)]
    assert np.mean(right) == pytest.approx(0.58, abs=0.03)
    assert base._captions(labels, 0.0, 0) == splits[0].prompts
    with pytest.raises(InvalidInput, match="captions"):
        base.train_base("dirty", tmp_path)


@pytest.mark.parametrize("method", run.METHODS)
@pytest.mark.parametrize("preference", digits.PREFERENCES)
def test_configuration_survives_its_file(method: str, preference: str, tmp_path: Path) -> None:
    config = run.build_config(method, preference, 1, None, tmp_path, base.WEIGHTS / "clean", 0.7)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    inverts = method in ("inpo", "smpo")
    assert config.method.beta == ((500 if inverts else 200) if preference == "digit" else 1000)
    if method == "smpo":
        # A sure preference weighs 1 under `digit`, as in the other methods.
        sure = config.method.preference_scale * (2 / (1 + math.exp(-1)) - 1)
        assert sure == pytest.approx(1.0) if preference == "digit" else config.method.preference_scale == 10
    assert config.training.steps == {"slant": 200, "bold": 100, "digit": 300}[preference]
    assert (config.cache.path is not None) == (method == "inversion-dpo")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("method", "ppo"), ("preference", "tilt"), ("steps", 0), ("control", "none"), ("output", __file__)],
)
def test_bad_arguments_are_refused_before_any_work(argument: str, value: Any, tmp_path: Path) -> None:
    arguments = {"output": tmp_path / "demo", "progress": False, argument: value}
    with pytest.raises(InvalidInput, match=argument):
        run.run_demo(**arguments)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("method", run.METHODS)
def test_a_tiny_demo_leaves_everything(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "PAIRS", 40)
    monkeypatch.setattr(run, "NUM_INFERENCE_STEPS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        summary = run.run_demo(method=method, steps=2, seed=5, output=tmp_path)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {key: summary[key] for key in ("method", "preference", "seed", "steps", "status")} == {
        "method": method, "preference": "slant", "seed": 5, "steps": 2, "status": "ok",
    }  # fmt: skip
    for side in ("before", "after"):
        assert set(summary[side]) == {"accuracy", "reward", "frechet"}
    assert summary["before"] != summary["after"]
    assert set(summary["win_rate"]) == {"mean", "ci_low", "ci_high"}
    assert 0 < summary["seconds_training"] < summary["seconds"]
    # Two steps of 32 pairs, policy and reference on both sides; the methods that invert need more.
    forward_only = 2 * 32 * 2 * 2
    assert (summary["network_evaluations"] > forward_only) == (method != "diffusion-dpo")
    assert summary["network_evaluations"] >= forward_only
    for name in ("before_after.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert load_model("digits", tmp_path / "training" / "model").family == "digits"
    printed = capsys.readouterr().out
    assert "win rate" in printed
    assert f"{summary['network_evaluations']:,}" in printed


def test_a_second_demo_replaces_the_first_and_uses_a_retrained_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def quick(name: str, directory: Path, **options: Any) -> Path:
        calls.append((name, directory))
        load_model("digits", base.WEIGHTS / "noisy").save(directory)
        return directory

    monkeypatch.setattr(base, "train_base", quick)
    monkeypatch.setattr(run, "PAIRS", 40)
    monkeypatch.setattr(run, "NUM_INFERENCE_STEPS", 2)
    # Warm-up starts from zero: the first step alone would change nothing.
    common: dict[str, Any] = {"preference": "digit", "steps": 2, "output": tmp_path, "progress": False}
    control = run.run_demo(control="shuffle", **common)
    assert not calls
    real = run.run_demo(train_base=True, **common)
    assert [(name, directory.name) for name, directory in calls] == [("noisy", "base")]
    assert load_config(tmp_path / "config.yaml").model.path == str(tmp_path / "base")
    assert (control["control"], real["control"]) == ("shuffle", None)
    assert control["before"] == real["before"]
    assert control["after"] != real["after"]
    assert json.loads((tmp_path / "summary.json").read_text()) == real
