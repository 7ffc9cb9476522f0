"""`fastinvdpo evaluate`: numbers that follow from saved images, which are reused; what an aligned model may be."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from fastinvdpo import cli
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation import comparing, metrics
from fastinvdpo.evaluation.comparing import compare, parse_sampling
from fastinvdpo.evaluation.sampling import Sampling
from fastinvdpo.evaluation.scorers import FunctionScorer, check_scorers, open_scorers
from fastinvdpo.models.base import Origin
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.output import MARK
from fastinvdpo.trainer import train
from tests.cases import SD_SCHEDULER
from tests.evaluation import tiny, tiny_clip
from tests.evaluation.tiny import PROMPTS
from tests.models import tiny as tiny_models
from tests.trainer import tiny as tiny_training
from tests.trainer.test_files import flip

SAMPLING = Sampling(num_inference_steps=3, guidance_scale=1.0, batch_size=3)
SCORER = FunctionScorer(tiny.brightness, "brightness", batch_size=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.write_models(tmp_path_factory.mktemp("models"))


def evaluate(models: tuple[Path, Path], output: Path, sampling: Sampling = SAMPLING, **options: Any) -> dict[str, Any]:
    return compare(*models, PROMPTS, [SCORER], output, family="stable-diffusion", sampling=sampling, **options)


def pixels(root: Path, side: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted((root / side).iterdir())]).astype(int)


def test_equal_models_tie_everywhere(models: tuple[Path, Path], tmp_path: Path) -> None:
    summary = evaluate((models[0], models[0]), tmp_path)
    found = summary["scorers"]["brightness"]
    assert np.array_equal(pixels(tmp_path, "base"), pixels(tmp_path, "aligned"))
    assert (found["wins"], found["ties"], found["losses"]) == (0, len(PROMPTS), 0)
    assert found["win_rate"] == metrics.wilson_interval(len(PROMPTS) / 2, len(PROMPTS))._asdict()
    assert found["win_rate"]["mean"] == 0.5
    assert found["base"] == found["aligned"]
    (note,) = summary["notes"]
    assert note.startswith("Both sides have the same network") and note in (tmp_path / "report.html").read_text()


def test_a_brighter_model_wins_the_numbers_follow_from_the_images_and_these_are_sampled_once(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluate(models, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert found["notes"] == []
    base, aligned = (tiny.recomputed(tmp_path, side) for side in ("base", "aligned"))
    assert (aligned > base + 1).all()
    numbers = found["scorers"]["brightness"]
    for side, scores in (("base", base), ("aligned", aligned)):
        assert numbers[side] == pytest.approx({"mean": scores.mean(), "median": np.median(scores)}, rel=1e-12)
        assert [sample["scores"]["brightness"][side] for sample in found["samples"]] == scores.tolist()
    assert numbers["win_rate"] == metrics.wilson_interval(len(PROMPTS), len(PROMPTS))._asdict()
    assert (numbers["wins"], numbers["ties"], numbers["losses"]) == (len(PROMPTS), 0, 0)
    assert [sample["prompt"] for sample in found["samples"]] == PROMPTS
    assert [sample["aligned"] for sample in found["samples"]] == [f"aligned/{place:05d}.png" for place in range(7)]

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    monkeypatch.setattr(comparing, "load_model", refuse)
    monkeypatch.setattr(comparing, "open_aligned", refuse)
    assert evaluate(models, tmp_path) == found
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")} == stamps


def test_an_interrupted_evaluation_ends_with_the_same_images(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(models, tmp_path / "whole")
    decode, calls = StableDiffusionModel.decode_latents, []

    def interrupted(self: StableDiffusionModel, latents: torch.Tensor) -> list[Any]:
        calls.append(len(latents))
        if len(calls) == 5:  # the second batch of the aligned model
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(StableDiffusionModel, "decode_latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, tmp_path / "parts")
    assert not (tmp_path / "parts" / "evaluation.json").exists()
    assert len(list((tmp_path / "parts" / "aligned").iterdir())) == 3
    (tmp_path / "parts" / "base" / "00001.png").unlink()  # of a batch that was being written
    left = tmp_path / "parts" / "aligned" / ".fastinvdpo-abcdefgh.tmp"
    left.mkdir()
    (left / "lock").touch()
    damaged = tmp_path / "parts" / "base" / "00006.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.warns(UserWarning, match=r"00006\.png is damaged, and sampled again"):
        again = evaluate(models, tmp_path / "parts")
    assert calls == [3, 3, 1, 3, 3, 3, 1, 3, 1]
    assert again == whole
    for side in ("base", "aligned"):
        files = sorted((tmp_path / "parts" / side).iterdir())
        assert [file.name for file in files] == [f"{place:05d}.png" for place in range(len(PROMPTS))]
        assert np.array_equal(pixels(tmp_path / "parts", side), pixels(tmp_path / "whole", side))


def test_every_flipped_bit_of_an_image_is_found(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Or it changes no pixel."""
    evaluate(models, tmp_path / "run")
    file = tmp_path / "run" / "aligned" / "00001.png"
    whole, picture, found = file.read_bytes(), comparing.read_image(file).tobytes(), 0
    for bit in range(0, 8 * len(whole), 7):
        flip(file, bit)
        try:
            assert comparing.read_image(file).tobytes() == picture
        except InvalidInput as error:
            assert "00001.png" in str(error) and "delete it" in str(error)
            found += 1
        file.write_bytes(whole)
    assert found > len(whole)
    settings = tmp_path / "run" / "settings.json"
    settings.write_text(settings.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(InvalidInput, match=r"output = .*settings\.json cannot be read"):
        evaluate(models, tmp_path / "run")


def test_images_of_another_evaluation_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    evaluate(models, tmp_path)
    with pytest.raises(InvalidInput, match=r"different are num_inference_steps \(3 there, 4 here\), seed \(0 .*1 here"):
        evaluate(models, tmp_path, Sampling(num_inference_steps=4, guidance_scale=1.0, seed=1))
    with pytest.raises(InvalidInput, match=r"different are aligned unet \(sha256:.* there, sha256:.* here\)\. Remedy"):
        evaluate((models[0], models[0]), tmp_path)
    with pytest.raises(InvalidInput, match=r"different are prompts \(7 there, 6 here\), content of the prompts"):
        compare(*models, PROMPTS[:6], [SCORER], tmp_path, family="stable-diffusion", sampling=SAMPLING)
    assert evaluate(models, tmp_path, Sampling(3, 1.0, batch_size=7))["batch_size"] == 7  # speed alone
    (tmp_path / MARK).unlink()
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InvalidInput, match=r"is there, and was not written by fastinvdpo"):
        evaluate(models, tmp_path)


def test_an_adapter_a_network_and_a_whole_model_are_one(tmp_path: Path) -> None:
    """The adapter stands on the network that it was trained on."""
    base = tiny_training.write_model(tmp_path / "model")
    tiny_training.write_data(tmp_path / "pairs.parquet")
    tuned = tiny_models.unet()
    with torch.no_grad():
        tuned.conv_out.bias.add_(0.3)
    tuned.save_pretrained(tmp_path / "tuned" / "unet")
    for run, init in (("plain", {}), ("tuned", {"unet_init": str(tmp_path / "tuned")})):
        sections = {"model": {"lora": {"rank": 2, "alpha": 2.0}, **init}, "optimizer": {"learning_rate": 0.05}}
        sections |= {"output": {"directory": str(tmp_path / run)}}
        train(tiny_training.config(tmp_path, training={"steps": 2}, **sections), progress=False)
        sampled = {}
        for name in ("model", "model/unet", "adapter"):
            output = tmp_path / "evaluations" / run / name.replace("/", "-")
            found = evaluate((base, tmp_path / run / name), output)
            sampled[name] = pixels(output, "aligned")
        assert np.array_equal(sampled["model"], sampled["adapter"])
        assert np.array_equal(sampled["model"], sampled["model/unet"])
        assert not np.array_equal(sampled["model"], pixels(output, "base"))
    assert found["notes"] == [f"The adapter stands on the weights that it was trained on, {tmp_path / 'tuned'}."]
    other = tiny_models.write_model(tmp_path / "other", unet=tiny_models.unet())
    with pytest.raises(InvalidInput, match=r"aligned = .*adapter.*does not fit"):
        evaluate((other, tmp_path / "plain" / "adapter"), tmp_path / "evaluations" / "misfit")


def test_what_else_the_sides_differ_in_is_noted(tmp_path: Path) -> None:
    for name, pipeline in {
        "base": tiny_models.sd_pipeline(),
        "other": tiny_models.sd_pipeline(
            vae=tiny_models.vae(norm_num_groups=8),
            scheduler=DDIMScheduler(**{**SD_SCHEDULER, "timestep_spacing": "trailing"}),
        ),
    }.items():
        pipeline.save_pretrained(tmp_path / name, safe_serialization=True)
    sampling = Sampling(num_inference_steps=1, guidance_scale=1.0)
    sides = (tmp_path / "base", tmp_path / "other")
    notes = "\n".join(compare(*sides, ["a cat"], [SCORER], tmp_path / "sd", sampling=sampling)["notes"])
    assert "they differ in timestep_spacing" in notes and "different weights of vae" in notes


def test_weights_that_are_there_as_a_variant_and_guidance_by_default(tmp_path: Path) -> None:
    tiny_models.sdxl_pipeline().save_pretrained(tmp_path / "base", safe_serialization=True, variant="fp16")
    shutil.copytree(tmp_path / "base", tmp_path / "same")
    stored = tmp_path / "same" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copyfile(stored, stored.with_name("diffusion_pytorch_model.bf16.safetensors"))
    base = Origin(tmp_path / "base", variant="fp16")
    command = ["a cat"], [SCORER], tmp_path / "out"
    with pytest.raises(InvalidInput, match=r"variants bf16, fp16, not plain ones.*--variant of a command"):
        compare(base, tmp_path / "same", *command, sampling=Sampling(num_inference_steps=1))
    aligned = Origin(tmp_path / "same", variant="fp16")
    found = compare(base, aligned, *command, sampling=Sampling(num_inference_steps=1))
    assert found["guidance_scale"] == 5.0


def test_the_command(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "own_scorers.py").write_text("from tests.evaluation.tiny import brightness\n")
    clip = tiny_clip.write_clip(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--base", str(models[0]), "--aligned", str(models[1]), "--prompts", "prompts.txt"]
    scorers = ["--scorer", "own_scorers:brightness", "--scorer", f"clip={clip}"]
    command += ["--family", "stable-diffusion", *scorers, "--output", "out"]
    command += ["--max-prompts", "4", "num_inference_steps=2", "guidance_scale=1.5", "batch_size=4"]
    path = list(sys.path)
    assert cli.main(command) == 0, capsys.readouterr().err
    assert sys.path == path
    shown = capsys.readouterr().out
    assert f"Report: {os.path.join('out', 'report.html')}" in shown
    assert "brightness: win rate 1.000 [0.510, 1.000], 0 ties of 4; mean" in shown
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["prompts"], found["num_inference_steps"], found["guidance_scale"]) == (4, 2, 1.5)
    assert list(found["scorers"]) == ["brightness", "clip"]
    assert set(found["scorers"]["clip"]["key"]) >= {"kind", "weights"}
    (scorer,) = open_scorers([f"clip={clip}"], device="cpu")
    expected = scorer([Image.open(tmp_path / "out/base/00002.png")], [PROMPTS[2]]).item()
    # The same picture in another batch: float32 rounding of a sum of a few hundred products, times 100.
    assert found["samples"][2]["scores"]["clip"]["base"] == pytest.approx(expected, abs=1e-3)
    assert cli.main([*command, "steps=3"]) == 2
    assert "option = 'steps=3': is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": Sampling(num_inference_steps=0)}, "num_inference_steps = 0"),
        ({"sampling": Sampling(batch_size=0)}, "batch_size = 0"),
        ({"sampling": Sampling(seed=-1)}, "seed = -1"),
        ({"sampling": Sampling(dtype="fp8")}, "dtype = 'fp8'"),
        ({"sampling": Sampling(guidance_scale=float("nan"))}, "guidance_scale = nan"),
        ({"shown": -1}, "shown = -1"),
        ({"prompts": []}, "prompts"),
        ({"scorers": []}, "names no scorer"),
        ({"scorers": [SCORER, SCORER]}, "names brightness twice"),
        ({"base": "nowhere"}, "model.path"),
        ({"aligned": "nowhere"}, "model.path"),
        ({"scorers": [FunctionScorer(lambda images, captions: [1.0], "one", batch_size=2)]}, "gives scores of shape"),
    ],
)
def test_bad_arguments(models: tuple[Path, Path], tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"base": models[0], "aligned": models[1], "prompts": PROMPTS, "scorers": [SCORER], "sampling": SAMPLING}
    with pytest.raises(InvalidInput, match=message):
        compare(output=tmp_path / "out", family="stable-diffusion", **{**given, **arguments})
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_options_of_sampling() -> None:
    assert parse_sampling([]) == Sampling()
    options = ["seed=3", "guidance_scale=2", "dtype=bf16"]
    assert parse_sampling(options) == Sampling(seed=3, guidance_scale=2.0, dtype="bf16")
    for wrong in ("seed=x", "guidance_scale=", "seed", "num_inference_steps=2.5"):
        with pytest.raises(InvalidInput):
            parse_sampling([wrong])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "names no scorer"),
        (["nothing"], "describes no scorer"),
        (["no_such_module_here:scorer"], "cannot be imported"),
        (["tests.evaluation.tiny:nothing"], "cannot be imported"),
        (["tests.evaluation.tiny:PROMPTS"], "cannot be called"),
        (["tests.evaluation.tiny:brightness"] * 2, "names brightness twice"),
    ],
)
def test_bad_scorers(specs: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        open_scorers(specs)


def test_a_scorer_of_ones_own_is_taken_as_it_is() -> None:
    assert check_scorers([SCORER]) == open_scorers(["tests.evaluation.test_comparing:SCORER"]) == [SCORER]


@pytest.mark.parametrize(("wins", "trials"), [(0, 7), (7, 7), (300, 300), (1, 300), (150, 300), (271, 300)])
def test_wilson_interval_equals_scipy(wins: int, trials: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(wins, trials).proportion_ci(0.95, method="wilson")
    found = metrics.wilson_interval(wins, trials)
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.mean == wins / trials
    assert 0 <= found.ci_low <= found.mean <= found.ci_high <= 1


def test_win_rate_counts_ties_half_and_is_antisymmetric() -> None:
    before, after = [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 4.0]
    there, back = metrics.win_rate(after, before), metrics.win_rate(before, after)
    assert there.mean == (2 + 0.5) / 4
    assert tuple(there) == pytest.approx((1 - back.mean, 1 - back.ci_high, 1 - back.ci_low))
    found = metrics.statistics(base=before, aligned=after)
    assert (found["wins"], found["ties"], found["losses"], found["win_rate"]) == (2, 1, 1, there._asdict())
    assert found["base"] == {"mean": 1.5, "median": 1.5} and found["aligned"] == {"mean": 1.75, "median": 1.0}


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: metrics.wilson_interval(3, 0), "successes"),
        (lambda: metrics.wilson_interval(4, 3), "successes"),
        (lambda: metrics.win_rate([1.0, 2.0], [1.0]), "after"),
        (lambda: metrics.win_rate([], []), "after"),
        (lambda: metrics.win_rate([float("nan")], [1.0]), "after"),
    ],
)
def test_bad_statistics(call: Any, argument: str) -> None:
    with pytest.raises(InvalidInput, match=argument):
        call()
