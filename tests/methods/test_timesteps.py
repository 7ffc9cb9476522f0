"""Which timestep a pair is scored at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import build_objective
from fastinvdpo.methods.single_timestep import TimestepSampling
from fastinvdpo.ops import philox
from tests.cases import sd_schedule
from tests.diffusion.test_schedule import sd3

INDEX = torch.arange(4000)


def draw(schedule: Any = None, **options: Any) -> torch.Tensor:
    return TimestepSampling(**options).draw(schedule or sd_schedule(), 7, 0, INDEX)


def test_the_default_of_a_diffusion_schedule_is_every_level_uniformly() -> None:
    assert torch.equal(draw(), philox.integers(7, 0, INDEX, 1000))


def test_a_range_is_inclusive_and_uniform() -> None:
    """The refiner's range in Diffusion-DPO: every one of 200 levels, 20 times on average."""
    counts = torch.bincount(draw(range=[0, 199]), minlength=1000)
    assert int(counts[200:].sum()) == 0
    # Poisson with mean 20: nothing beyond 20 ± 7·√20 in 200 levels, short of 1e-9.
    assert int(counts[:200].min()) >= 1 and int(counts[:200].max()) <= 52
    assert set(draw(range=[5, 5]).tolist()) == {5}


def test_a_list_gives_its_values() -> None:
    """SDXL-Turbo's four, each a quarter of the draws: within 6 standard deviations."""
    counts = torch.bincount(draw(values=[999, 249, 749, 499]), minlength=1000)
    assert counts.nonzero().flatten().tolist() == [249, 499, 749, 999]
    assert all(abs(int(counts[level]) - 1000) < 6 * math.sqrt(750) for level in (249, 499, 749, 999))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_is_the_density_of_sd3(mean: float, std: float) -> None:
    levels = draw(sd3(), logit_mean=mean, logit_std=std)
    logits = torch.logit((levels.double() + 0.5) / 1000)
    # 4000 numbers: six standard errors, and less than 0.005 from the width of a level.
    assert float(logits.mean()) == pytest.approx(mean, abs=6 * std / math.sqrt(4000) + 5e-3)
    assert float(logits.std()) == pytest.approx(std, abs=6 * std / math.sqrt(8000) + 5e-3)
    assert torch.equal(draw(sd_schedule(), density="logit-normal", logit_mean=mean, logit_std=std), levels)
    assert torch.equal(draw(sd3(), density="uniform"), draw())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range": [0, 1000]}, r"timesteps\.range = \[0, 1000\].*from 0 to 999"),
        ({"range": [9, 3]}, r"timesteps\.range"),
        ({"values": [1000]}, r"timesteps\.values"),
        ({"values": []}, r"timesteps\.values"),
        ({"values": [1], "range": [0, 1]}, "drop one of them"),
        ({"density": "normal"}, r"timesteps\.density"),
        ({"logit_std": 0.0}, r"timesteps\.logit_std"),
        ({"ranges": [0, 1]}, "ranges"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build_objective("diffusion-dpo", sd_schedule(), timesteps=options)
