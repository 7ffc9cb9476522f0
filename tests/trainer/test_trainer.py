"""``PreferenceTrainer`` beside the command and a loop of one's own around the drop-in loss; callbacks; the notebook."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import fastinvdpo
from fastinvdpo import cli
from fastinvdpo._examples.emoji import run
from fastinvdpo.data import PairDataset
from fastinvdpo.diffusion.schedule import add_noise
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import DiffusionDPO, TimestepSampling
from fastinvdpo.methods.base import STREAM_NOISE, STREAM_TIMESTEP
from fastinvdpo.models import load_model
from fastinvdpo.ops import philox
from fastinvdpo.trainer import Callback, PreferenceTrainer, TrainResult
from fastinvdpo.trainer.batches import BatchBuilder, PairEncoder
from fastinvdpo.trainer.order import DrawOrder
from tests.layout import ROOT
from tests.models.tiny import sd_pipeline
from tests.trainer import tiny

STEPS, BETA, RATE = 3, 500.0, 1e-3


def settings(root: Path, name: str) -> dict[str, Any]:
    return {
        "optimizer": {"learning_rate": RATE, "lr_scheduler": "constant", "warmup_steps": 0},
        "training": {"steps": STEPS, "batch_size": 2},
        "output": {"directory": str(root / name), "tensorboard": False},
    }


def trainer_of(root: Path, folder: str, **options: Any) -> PreferenceTrainer:
    model, pairs = load_model("stable-diffusion", root / "model"), PairDataset(root / "pairs.parquet")
    return PreferenceTrainer(model, DiffusionDPO(beta=BETA), pairs, settings(root, folder), **options)


def own_loop(root: Path) -> dict[str, Tensor]:
    """What somebody writes who imports one function, with the random numbers of a run."""
    model, pairs = load_model("stable-diffusion", root / "model"), PairDataset(root / "pairs.parquet")
    policy = model.network.requires_grad_(True)
    reference = copy.deepcopy(policy).requires_grad_(False)
    builder = BatchBuilder(
        PairEncoder(model, pairs), model.device, DrawOrder(len(pairs), 0, 2, 1), with_unconditional=False
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    for step in range(STEPS):
        batch = builder.build(range(2 * step, 2 * step + 2))
        timesteps = TimestepSampling().draw(model.schedule, 0, STREAM_TIMESTEP, batch.sample_index).repeat(2)
        noise = philox.normal(0, STREAM_NOISE, batch.sample_index, tuple(batch.latents.shape[1:])).repeat(2, 1, 1, 1)
        noisy = add_noise(model.schedule, batch.latents, noise, timesteps)
        predicted = model.predict(policy, noisy, timesteps, batch.conditioning)
        with torch.no_grad():
            expected = model.predict(reference, noisy, timesteps, batch.conditioning)
        fastinvdpo.diffusion_dpo_loss(predicted, expected, noise, BETA).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in policy.state_dict().items()}


def test_the_command_the_trainer_and_the_drop_in_loss_give_the_same_weights(workspace: Path) -> None:
    given = settings(workspace, "command")
    whole = {
        **given,
        "method": {"name": "diffusion-dpo", "beta": BETA},
        "model": {"family": "stable-diffusion", "path": str(workspace / "model")},
        "data": {"path": str(workspace / "pairs.parquet")},
    }
    (workspace / "run.yaml").write_text(yaml.safe_dump(whole))
    assert cli.main(["train", str(workspace / "run.yaml"), "--no-progress"]) == 0

    result = trainer_of(workspace, "trainer", progress=False).train()

    one, third = tiny.weights(workspace / "command"), own_loop(workspace)
    tiny.assert_same(one, tiny.weights(result))
    assert one.keys() == third.keys()
    for name, value in one.items():
        torch.testing.assert_close(third[name], value, rtol=1e-6, atol=1e-7)
    assert tiny.moved(one) > RATE / 2


def test_callbacks_see_the_run_in_order(workspace: Path) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_init(self, trainer: Any) -> None:
            assert not (workspace / "run").exists()
            self.seen.append("init")

        def on_start(self, trainer: Any) -> None:
            self.seen.append(("start", trainer.first_step))

        def on_step(self, trainer: Any, step: int) -> None:
            self.seen.append(step)

        def on_log(self, trainer: Any, row: Mapping[str, Any]) -> None:
            self.seen.append(("log", row["step"]))

        def on_end(self, trainer: Any, result: TrainResult) -> None:
            self.seen.append("end")

        def card(self, step: int) -> list[str]:
            return [f"## Watched after {step}"]

        def close(self) -> None:
            self.seen.append("close")

    watch = Watch()
    result = trainer_of(workspace, "run", callbacks=[watch], progress=False).train()
    assert watch.seen == ["init", ("start", 0), ("log", 1), 1, 2, ("log", 3), 3, "end", "close"]
    card = (result.model_directory / "README.md").read_text()
    assert "## Watched after 3" in card and "from `" + str(workspace / "pairs.parquet") in card


def test_a_callback_that_refuses_leaves_nothing_behind(workspace: Path) -> None:
    class Refuse(Callback):
        def on_init(self, trainer: Any) -> None:
            raise InvalidInput("no")

    with pytest.raises(InvalidInput, match="no"):
        trainer_of(workspace, "run", callbacks=[Refuse()])
    assert not (workspace / "run").exists()


def test_the_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sd_pipeline().save_pretrained(tmp_path / "base", safe_serialization=True)
    monkeypatch.setattr(run, "BASE", tmp_path / "base")
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["result"].steps == 20
    assert "step 20: margin" in capsys.readouterr().out
    assert (names["folder"] / "run" / "model" / "unet").is_dir()
    assert not list((tmp_path / "place").iterdir())
