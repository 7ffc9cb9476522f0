"""``DDIMInverseScheduler`` against diffusers' class of that name."""

from __future__ import annotations

import pytest
import torch

from fastinvdpo import DDIMInverseScheduler, InvalidInput
from tests.cases import SD_SCHEDULER
from tests.models import tiny

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


def settings_of(scheduler) -> dict:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def test_it_is_a_scheduler_of_diffusers(tmp_path) -> None:
    """Configured, saved, loaded and indexed as theirs."""
    source = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    ours = DDIMInverseScheduler.from_config(source.config, clip_sample=False)
    assert isinstance(ours, diffusers.SchedulerMixin) and isinstance(ours, diffusers.ConfigMixin)
    assert ours.compatibles == diffusers.DDIMInverseScheduler().compatibles
    theirs = settings_of(diffusers.DDIMInverseScheduler.from_config(source.config, clip_sample=False))
    assert settings_of(ours) == theirs
    assert settings_of(DDIMInverseScheduler.from_config(source, clip_sample=False)) == theirs
    assert settings_of(DDIMInverseScheduler(**theirs, thresholding=True)) == theirs
    ours.save_pretrained(tmp_path / "scheduler")
    for loading in (DDIMInverseScheduler, diffusers.DDIMInverseScheduler):
        assert settings_of(loading.from_pretrained(tmp_path, subfolder="scheduler")) == theirs
    assert not DDIMInverseScheduler(set_alpha_to_zero=False).config.set_alpha_to_one
    ours.set_timesteps(5)
    output = ours.step(torch.zeros(1, 2), 1, torch.ones(1, 2))
    assert output[0] is output.prev_sample and output["pred_original_sample"] is output[1] and len(output) == 2


def test_a_pipeline_holds_it(tmp_path) -> None:
    """DiffEdit inverts with it, and finds it again after a save."""
    parts = {name: part for name, part in tiny.sd_pipeline().components.items() if name != "image_encoder"}
    inverse = DDIMInverseScheduler.from_config(parts["scheduler"].config)
    made = diffusers.StableDiffusionDiffEditPipeline(**parts, inverse_scheduler=inverse, requires_safety_checker=False)
    made.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(tmp_path)
    assert type(loaded.inverse_scheduler) is DDIMInverseScheduler
    assert settings_of(loaded.inverse_scheduler) == settings_of(inverse)
    image, found = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), []
    loaded.set_progress_bar_config(disable=True)
    for scheduler in (loaded.inverse_scheduler, diffusers.DDIMInverseScheduler.from_config(inverse.config)):
        loaded.inverse_scheduler = scheduler
        options = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        found.append(loaded.invert(prompt="a cat", image=image, **options)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_schedule_without_alphas_is_refused(name: str) -> None:
    for config in (getattr(diffusers, name)().config, {"_class_name": name}):
        with pytest.raises(InvalidInput, match=r"config = .* has no ᾱ"):
            DDIMInverseScheduler.from_config(config)


def test_half_precision_steps_in_float32() -> None:
    scheduler = DDIMInverseScheduler.from_config(SD_SCHEDULER)
    scheduler.set_timesteps(50)
    sample, output = torch.randn(2, 1, 4, 8, 8)
    wide = scheduler.step(output.half().float(), 501, sample.half().float()).prev_sample
    assert torch.equal(scheduler.step(output.half(), 501, sample.half()).prev_sample, wide.half())
