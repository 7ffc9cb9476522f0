"""``DDIMInverseScheduler`` against diffusers' class of that name."""

from __future__ import annotations

import json

import pytest
import torch

from fastinvdpo import DDIMInverseScheduler, InvalidInput
from tests.cases import SD_SCHEDULER

diffusers = pytest.importorskip("diffusers", reason="compares with diffusers: pip install '.[train]'")

CONFIGS = [
    {},
    SD_SCHEDULER,
    {**SD_SCHEDULER, "prediction_type": "v_prediction"},
    {**SD_SCHEDULER, "prediction_type": "sample"},
    {**SD_SCHEDULER, "clip_sample": True, "clip_sample_range": 0.8},
    {**SD_SCHEDULER, "prediction_type": "v_prediction", "clip_sample": True},
    {**SD_SCHEDULER, "timestep_spacing": "trailing"},
    {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("steps", [1, 50])
def test_every_step(config: dict, steps: int) -> None:
    ours, theirs = DDIMInverseScheduler.from_config(config), diffusers.DDIMInverseScheduler.from_config(config)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    # The same formula on the same ᾱ agrees to the last digits; that the two tables agree is test_schedule's matter.
    theirs.alphas_cumprod = ours.schedule.alphas_cumprod
    theirs.initial_alpha_cumprod = ours.schedule.alpha_bar(torch.tensor(-1))
    generator = torch.Generator().manual_seed(steps)
    for t in ours.timesteps[:10]:
        sample, output = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
        expected = theirs.step(output, t, sample)
        if not expected.prev_sample.isfinite().all():
            continue  # an x_0 step from a level without noise has no answer, theirs or ours
        result = ours.step(output, t, sample)
        torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample, rtol=1e-9, atol=1e-9)
        previous, clean = ours.step(output, int(t), sample, return_dict=False)
        assert torch.equal(previous, result.prev_sample) and torch.equal(clean, result.pred_original_sample)


def test_configuration_round_trip(tmp_path) -> None:
    source = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    ours = DDIMInverseScheduler.from_config(source.config, clip_sample=False)
    assert (
        ours.config.steps_offset == 1
        and ours.config["beta_schedule"] == "scaled_linear"
        and not ours.config.clip_sample
    )
    assert DDIMInverseScheduler.from_config(ours.config).config == ours.config
    assert DDIMInverseScheduler.from_config(source).config.steps_offset == 1
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({**ours.config, "_class_name": "X"}))
    assert DDIMInverseScheduler.from_pretrained(tmp_path, subfolder="scheduler").config == ours.config
    with pytest.raises(InvalidInput, match=r"holds no scheduler_config\.json"):
        DDIMInverseScheduler.from_pretrained(tmp_path)


def test_half_precision_steps_in_float32() -> None:
    scheduler = DDIMInverseScheduler.from_config(SD_SCHEDULER)
    scheduler.set_timesteps(50)
    sample, output = torch.randn(2, 1, 4, 8, 8)
    wide = scheduler.step(output.half().float(), 501, sample.half().float()).prev_sample
    assert torch.equal(scheduler.step(output.half(), 501, sample.half()).prev_sample, wide.half())
