"""Evaluation in the course of a run: it changes nothing of the training, and its numbers are those of the models."""

from __future__ import annotations

import io
import json
import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation import EvaluationCallback, in_training
from fastinvdpo.evaluation.scorers import FunctionScorer
from fastinvdpo.models import load_model
from fastinvdpo.trainer import TrainConfig, TrainResult, train
from fastinvdpo.trainer import trainer as loop
from fastinvdpo.trainer.checkpoint import load_checkpoint
from tests.evaluation.tiny import PROMPTS, brightness
from tests.trainer import tiny
from tests.trainer.forked import Server
from tests.trainer.test_resume import _assert_same

SECTION: dict[str, Any] = {
    "every": 2,
    "samples": 5,
    "scorers": ["tests.evaluation.tiny:brightness"],
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "batch_size": 3,
}


def mapping(root: Path, name: str, evaluation: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """Six steps, evaluated after 2, 4 and 6, at a learning rate that moves the pictures."""
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    optimizer = {"learning_rate": 1e-2, **sections.pop("optimizer", {})}
    output = {"directory": str(root / name), "keep_checkpoints": 3, **sections.pop("output", {})}
    run = tiny.mapping(root, optimizer=optimizer, output=output, **sections)
    return {**run, "evaluation": {**SECTION, "prompts": str(root / "prompts.txt"), **(evaluation or {})}}


def run(root: Path, name: str, scorer: Any = brightness, **sections: Any) -> TrainResult:
    config = TrainConfig.from_mapping(mapping(root, name, **sections))
    assert config.evaluation is not None
    callback = EvaluationCallback(config.evaluation, [FunctionScorer(scorer, "brightness")])
    return train(config, progress=False, callbacks=[callback])


def scores_of(root: Path, model: Path, section: dict[str, Any] | None = None) -> list[float]:
    """What the evaluation finds for a model on the disk."""
    config = TrainConfig.from_mapping(mapping(root, "unused", section))
    assert config.evaluation is not None
    loaded = load_model("stable-diffusion", model)
    return EvaluationCallback(config.evaluation).scores(loaded, loaded.network, range(5))["brightness"]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "unet" / "diffusion_pytorch_model.safetensors")


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "evaluation" / "history.jsonl").read_text().splitlines()]


class Planned:
    """Gives all pictures of an evaluation one planned score: of the base, then after each evaluated step."""

    def __init__(self, *plan: float) -> None:
        self._plan, self._calls = plan, 0

    def __call__(self, images: Sequence[Any], captions: Sequence[str]) -> list[float]:
        number, self._calls = self._calls // 2, self._calls + 1  # five samples are two batches
        return [self._plan[number]] * len(images)


def test_training_does_not_notice(workspace: Path) -> None:
    def noisy(images: Sequence[Any], captions: Sequence[str]) -> list[float]:
        return [random.random() + float(np.random.rand()) + float(torch.rand(1)) for _ in images]

    plain = {"data": {"caption_dropout": 0.3}, "training": {"ema_decay": 0.9}}
    whole = mapping(workspace, "plain", **plain) | {"evaluation": None}
    one = train(TrainConfig.from_mapping(whole), progress=False)
    other = run(workspace, "evaluated", noisy, **plain)
    _assert_same(weights(other.model_directory), weights(one.model_directory))
    checkpoints = [load_checkpoint(result.directory / "checkpoints" / "step-00000006") for result in (one, other)]
    for part in ("trainable", "ema", "state"):
        _assert_same(getattr(checkpoints[0], part), getattr(checkpoints[1], part))
    assert one.network_evaluations == other.network_evaluations
    assert (one.evaluation, one.best_model_directory) == ([], None)
    assert [row["step"] for row in other.evaluation] == [0, 2, 4, 6]


def test_rows_are_the_scores_of_the_averaged_models(workspace: Path) -> None:
    result = run(workspace, "run", training={"ema_decay": 0.5}, output={"tensorboard": True})
    base, final = (scores_of(workspace, model) for model in (workspace / "model", result.model_directory))
    first, last = result.evaluation[0], result.evaluation[-1]
    assert first == {"step": 0, "brightness": np.mean(base), "brightness_win_rate": 0.5}
    wins = np.mean([(new > old) + (new == old) / 2 for new, old in zip(final, base, strict=True)])
    assert last == {"step": 6, "brightness": np.mean(final), "brightness_win_rate": wins}
    assert rows(result.directory) == result.evaluation
    assert json.loads((result.directory / "evaluation" / "base.json").read_text())["scores"] == {"brightness": base}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.directory / "tensorboard" / "fastinvdpo"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("evaluation/brightness")]
    assert found == [(row["step"], pytest.approx(row["brightness"], rel=1e-6)) for row in result.evaluation]
    for name in ("samples", "brightness_histogram"):
        assert [image.step for image in events.Images(f"evaluation/{name}")] == [0, 2, 4, 6]
    first, *_, last = (
        np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) for image in events.Images("evaluation/samples")
    )
    assert first.shape == (16, 32, 3)  # five samples of 8 x 8
    tiles = [Image.fromarray(first[8 * (i // 4) :, 8 * (i % 4) :][:8, :8]) for i in range(5)]
    assert brightness(tiles, PROMPTS) == pytest.approx(base) and (first[8:, 8:] == 255).all()
    assert not np.array_equal(first, last)


def test_the_first_of_equally_good_models_is_kept(workspace: Path) -> None:
    result = run(workspace, "run", Planned(0.0, 5.0, 5.0, 5.0))
    best = json.loads((result.directory / "best" / "best.json").read_text())
    assert best == {"step": 2, "scorer": "brightness", "mean": 5.0}
    assert result.best_model_directory == result.directory / "best" / "model"
    kept = weights(result.best_model_directory)
    _assert_same(kept, load_checkpoint(result.directory / "checkpoints" / "step-00000002").trainable)
    assert any(not torch.equal(value, weights(result.model_directory)[name]) for name, value in kept.items())


def test_every_model_has_a_card_of_its_own_step(workspace: Path) -> None:
    """The best one after each of two steps, and the last."""
    result = run(workspace, "run", Planned(9.0, 1.0, 3.0, 2.0), model={"lora": {"rank": 2}})
    assert [row["brightness"] for row in result.evaluation] == [9.0, 1.0, 3.0, 2.0]
    folders = result.directory / "best", result.directory
    assert json.loads((folders[0] / "best.json").read_text())["step"] == 4  # of those after a step
    best, last = ((folder / "model" / "README.md").read_text() for folder in folders)
    for card, step, score, logged in ((best, 4, 3, 4), (last, 6, 2, 6)):
        assert f"after {step} steps of diffusion-dpo" in card
        assert "Up to 5 prompts of `" in card and "in 2 steps with guidance 1 and seed 0." in card
        assert f"| brightness | 9 | {score} |\n| brightness_win_rate | 0.5 | 0 |" in card
        assert f"| step | {logged} |" in card
    found = [re.search(r"10 pairs from .* Content: sha256:[0-9a-f]{64}", card) for card in (best, last)]
    assert found[0] and found[1] and found[0][0] == found[1][0]
    body = best.split("```yaml\n")[1].split("```")[0]
    config = TrainConfig.from_mapping(mapping(workspace, "run", model={"lora": {"rank": 2}}))
    assert TrainConfig.from_mapping(yaml.safe_load(body)) == config
    for folder, card in zip(folders, (best, last), strict=True):
        assert (folder / "adapter" / "README.md").read_text() == card


def test_lora_in_bf16(workspace: Path) -> None:
    # Accelerate wraps such a network's forward in something that cannot be copied, and an adapter is merged in a copy.
    sections = {"model": {"lora": {"rank": 2}}, "training": {"mixed_precision": "bf16"}}
    result = run(workspace, "run", Planned(0.0, 1.0, 2.0, 3.0), **sections)
    assert [row["step"] for row in result.history] == [1, 2, 4, 6]
    assert (result.directory / "best" / "adapter" / "adapter_config.json").is_file()
    assert result.best_model_directory is not None
    _assert_same(weights(result.best_model_directory), weights(result.model_directory))
    plain = mapping(workspace, "plain", **sections) | {"evaluation": None}
    _assert_same(
        weights(train(TrainConfig.from_mapping(plain), progress=False).model_directory), weights(result.model_directory)
    )


# Five samples are two batches: 1 and 2 of the base, 3 and 4 after step 2, 5 and 6 after step 4.
@pytest.mark.parametrize(("what", "fatal", "left"), [("sample_images", 6, [0, 2]), ("save_checkpoint", 2, [0, 2, 4])])
def test_interrupted_and_resumed(
    workspace: Path, what: str, fatal: int, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(workspace, "whole")
    module = in_training if what == "sample_images" else loop
    function, count = getattr(module, what), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == fatal:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, what, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, "parts")
    parts = workspace / "parts"
    assert [row["step"] for row in rows(parts)] == left
    again = run(workspace, "parts")
    assert again.evaluation == rows(parts) == whole.evaluation
    _assert_same(weights(again.model_directory), weights(whole.model_directory))
    for file in ("best/best.json", "evaluation/base.json"):
        assert (parts / file).read_text() == (workspace / "whole" / file).read_text()
    assert again.best_model_directory is not None and whole.best_model_directory is not None
    _assert_same(weights(again.best_model_directory), weights(whole.best_model_directory))


def test_another_evaluation_starts_over_and_a_damaged_list_of_scores_is_refused(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(workspace, "run", Planned(0.25, 9.0, 9.0), training={"steps": 4})
    file, section = workspace / "run" / "evaluation" / "base.json", {"seed": 1}
    whole = file.read_text()
    file.write_text(whole.replace("0.25", "0.75", 1))
    with pytest.raises(InvalidInput, match=r"evaluation = .*base\.json': cannot be read \(it was changed"):
        run(workspace, "run")
    file.write_text(whole)
    with caplog.at_level(logging.INFO, "fastinvdpo.trainer"):
        result = run(workspace, "run", evaluation=section)
    assert "its rows and the best model start over" in caplog.text
    # The base is the model before the first step, although the run continues after the fourth.
    base = scores_of(workspace, workspace / "model", section)
    assert [row["step"] for row in result.evaluation] == [0, 6]
    assert result.evaluation[0]["brightness"] == np.mean(base)
    assert json.loads((result.directory / "best" / "best.json").read_text())["step"] == 6


def test_a_run_without_evaluation_may_continue_with_one_that_keeps_no_model(workspace: Path) -> None:
    plain = mapping(workspace, "run", training={"steps": 2}) | {"evaluation": None}
    train(TrainConfig.from_mapping(plain), progress=False)
    result = run(workspace, "run", evaluation={"keep_best": False})
    assert [row["step"] for row in result.evaluation] == [0, 4, 6]
    assert result.best_model_directory is None and not (result.directory / "best").exists()


def test_the_section_needs_a_callback(workspace: Path) -> None:
    config = TrainConfig.from_mapping(mapping(workspace, "run"))
    with pytest.raises(InvalidInput, match=r"pass callbacks=\[fastinvdpo\.evaluation\.EvaluationCallback"):
        train(config, progress=False)
    assert not (workspace / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, r"evaluation\.every = 0"),
        ({"scorers": []}, r"evaluation\.scorers"),
        ({"guidance_scale": -1.0}, r"evaluation\.guidance_scale = -1\.0"),
        ({"evry": 1}, r"evaluation\.evry = 1: is not a known key.*evaluation\.every"),
    ],
)
def test_bad_sections(workspace: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        TrainConfig.from_mapping(mapping(workspace, "run", change))


def run_as_configured(values: dict[str, Any]) -> None:
    config = TrainConfig.from_mapping(values)
    assert config.evaluation is not None
    train(config, progress=False, callbacks=[EvaluationCallback(config.evaluation)])


def test_two_processes_share_the_prompts(workspace: Path, forks: Server) -> None:
    steps = {"steps": 2, "batch_size": 1}
    alone = run(workspace, "alone", training={"steps": 2, "batch_size": 2})
    forks.together(run_as_configured, mapping(workspace, "together", training=steps))
    together = rows(workspace / "together")
    assert [row["step"] for row in together] == [0, 2]
    bases = [
        json.loads((workspace / name / "evaluation" / "base.json").read_text())["scores"]["brightness"]
        for name in ("alone", "together")
    ]
    # Batches of other prompts: a pixel near a half may be rounded to its other side.
    assert bases[0] == pytest.approx(bases[1], abs=1 / 64 + 1e-6)
    assert len(set(bases[1])) == 5
    # The gradient differs in its rounding, which Adam's first steps turn into a part of a step.
    assert together[1]["brightness"] == pytest.approx(alone.evaluation[1]["brightness"], abs=1.0)
    assert (workspace / "together" / "best" / "model").is_dir()
