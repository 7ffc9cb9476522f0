"""A loss that is not finite stops the run, is traced to its pair and timestep, and leaves the last good checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from fastinvdpo.data import PairDataset
from fastinvdpo.errors import NonFiniteLoss
from fastinvdpo.models.base import Origin
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.ops import philox
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.order import DrawOrder
from fastinvdpo.trainer.step import FiniteGuard
from tests.trainer import tiny

# The pair of draw 5, so that two good steps of two pairs come before it.
BAD_DRAW, BAD_STEP, SEED = 5, 3, 0
BAD_ROW = DrawOrder(10, SEED, 2, 1).pair_index(BAD_DRAW)


class Broken(StableDiffusionModel):
    """A model that cannot cope with the pair in ``BAD_ROW``: its latents, a network's prediction, also at one timestep
    alone, or the gradient are not finite.
    """

    broken_stage = "policy prediction"
    marker: Tensor

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        latents = super().encode_images(images)
        if self.broken_stage == "latents":
            same = (latents == self.marker).flatten(1).all(1)
            latents[same, 0, 3, 3] = float("nan")
        return latents

    def encode_prompts(self, prompts: Sequence[str], **geometry: Any) -> dict[str, Tensor]:
        encoded = super().encode_prompts(prompts, **geometry)
        # Carry the caption through the network, which alone knows which pair a sample belongs to.
        encoded["bad"] = torch.tensor([prompt == "bad" for prompt in prompts])
        return encoded

    def predict(self, network: Any, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        prediction = super().predict(network, latents, timesteps, conditioning)
        bad, stage = conditioning["bad"].view(-1, 1, 1, 1), self.broken_stage
        of_policy = next(network.parameters()).requires_grad
        if stage == ("policy prediction" if of_policy else "reference prediction"):
            prediction = torch.where(bad, float("nan"), prediction)
        elif stage == "timestep" and of_policy:
            prediction = torch.where(bad & (timesteps == 334).view(-1, 1, 1, 1), float("inf"), prediction)
        elif stage == "gradient" and prediction.requires_grad and bool(bad.any()):
            prediction.register_hook(lambda gradient: gradient * float("inf"))
        return prediction


@pytest.fixture
def broken(workspace: Path) -> tuple[Broken, PairDataset]:
    path = workspace / "pairs.parquet"
    table = pyarrow.parquet.read_table(path)
    captions = table.column("caption").to_pylist()
    captions[BAD_ROW] = "bad"
    index = table.schema.get_field_index("caption")
    pyarrow.parquet.write_table(table.set_column(index, "caption", [captions]), path)
    model, dataset = Broken.load(Origin(workspace / "model")), PairDataset(path)
    assert isinstance(model, Broken)
    model.marker = StableDiffusionModel.encode_images(model, [dataset[BAD_ROW].winner])[0]
    return model, dataset


@pytest.mark.parametrize("stage", ["policy prediction", "reference prediction", "latents"])
def test_the_message_names_pair_timestep_and_origin(
    workspace: Path, broken: tuple[Broken, PairDataset], stage: str
) -> None:
    model, dataset = broken
    model.broken_stage = stage
    timestep = int(philox.integers(SEED, 0, torch.tensor([BAD_DRAW]), 1000))
    config = tiny.config(workspace, output={"log_every": 100, "checkpoint_every": 100})
    with pytest.raises(NonFiniteLoss) as caught:
        tiny.train_model(config, model, dataset)
    message = str(caught.value)
    pair = f"pair in data row {BAD_ROW} (draw {BAD_DRAW}), timestep {timestep}, first in the {stage} of the winner."
    assert message.startswith(f"The loss of step {BAD_STEP} is not finite: {pair}")
    assert "No checkpoint was due yet. Remedy:" in message
    assert not (workspace / "run" / "model").exists()


def test_one_bad_timestep_of_many_and_a_bad_gradient_are_told_apart(
    workspace: Path, broken: tuple[Broken, PairDataset]
) -> None:
    model, dataset = broken
    model.broken_stage = "timestep"
    config = tiny.config(workspace, "inversion-dpo", method={"guidance_scale": 1.0})
    with pytest.raises(NonFiniteLoss, match=rf"data row {BAD_ROW} .*timestep 334, first in the policy prediction"):
        tiny.train_model(config, model, dataset)
    other = Broken.load(Origin(workspace / "model"))
    assert isinstance(other, Broken)
    other.broken_stage = "gradient"
    order = DrawOrder(pairs=10, seed=0, batch_size=2, accumulation=1)
    rows = ", ".join(str(order.pair_index(draw)) for draw in order.micro_batch(BAD_STEP - 1, 0))
    expected = (
        rf"The gradient of step {BAD_STEP} is not finite although its loss is; its pairs are in data rows {rows}\."
    )
    with pytest.raises(NonFiniteLoss, match=expected):
        tiny.train_model(tiny.config(workspace, output={"directory": str(workspace / "other")}), other, dataset)


@pytest.mark.parametrize("fused", [True, False])
def test_the_last_good_checkpoint_stays_and_no_bad_update_is_made(
    workspace: Path, broken: tuple[Broken, PairDataset], monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, **options: adamw(*given, **{**options, "fused": fused}))
    final: dict[str, Any] = {}
    collect = Networks.trainable

    def remember(self: Networks) -> dict[str, Any]:
        final["networks"] = self
        return collect(self)

    monkeypatch.setattr(Networks, "trainable", remember)
    changes: dict[str, Any] = {"optimizer": {"warmup_steps": 0}, "training": {"steps": 20}}
    # Looked at only at the checkpoint after step 20, when many steps have followed the bad one.
    config = tiny.config(workspace, output={"log_every": 100, "checkpoint_every": BAD_STEP - 1}, **changes)
    rarely = {"log_every": 100, "checkpoint_every": 100}
    late = tiny.config(workspace, output={**rarely, "directory": str(workspace / "late")}, **changes)
    with pytest.raises(NonFiniteLoss, match=rf"The last good checkpoint is .*step-{BAD_STEP - 1:08d}\."):
        tiny.train_model(config, *broken)
    assert [path.name for path in (workspace / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    good = tiny.stored(workspace / "run", BAD_STEP - 1).trainable
    assert all(torch.isfinite(value).all() for value in good.values())
    with pytest.raises(NonFiniteLoss, match=f"The loss of step {BAD_STEP} is not finite"):
        tiny.train_model(late, Broken.load(Origin(workspace / "model")), broken[1])
    held = {name: parameter.detach() for name, parameter in collect(final["networks"]).items()}
    for name, value in good.items():
        assert torch.equal(held[name], value)


def test_fp16_is_held_back_through_the_loss() -> None:
    """The gradient scaler skips a step whose gradient is not finite; from the first bad pair on, every gradient is."""
    guard = FiniteGuard(torch.device("cpu"))
    weight = torch.ones((), requires_grad=True)
    guard.poison(weight * 2).backward()
    assert weight.grad == 2
    guard.watch_gradient(torch.tensor(float("inf")), first_draw=4)
    guard.watch_gradient(torch.tensor(1.0), first_draw=8)
    assert guard.raised() == ("gradient", 4)
    weight.grad = None
    guard.poison(weight * 2).backward()
    assert not torch.isfinite(weight.grad)
