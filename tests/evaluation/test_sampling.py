"""Images are sampled as the checkpoint's own scheduler and pipeline would: levels, noise and guidance."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.inversion import invert_images
from fastinvdpo.evaluation.sampling import STREAM_SAMPLING, sample
from fastinvdpo.models import DiffusionModel, load_model
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.ops import philox
from tests.cases import SD_SCHEDULER
from tests.models import tiny
from tests.models.test_stable_diffusion import picture

V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "leading": ("DDIM", {}),
    "trailing": ("DDIM", {"timestep_spacing": "trailing"}),
    "linspace": ("EulerDiscrete", {"timestep_spacing": "linspace"}),
    "zero terminal SNR": ("DDIM", {"timestep_spacing": "trailing", **V}),
    "turbo": ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
    "Karras": ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    "PNDM": ("PNDM", {"skip_prk_steps": True}),
    "LCM": ("LCM", {}),
    "second order": ("HeunDiscrete", {}),
    "second order, between": ("KDPM2Discrete", {}),
}
PROMPTS = ["a three", "a seven", "", "a zero", "a one"]


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return StableDiffusionModel(tiny.pixel_pipeline())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampling_equals_diffusers_ddim(model: DiffusionModel, guidance_scale: float) -> None:
    ours = sample(model, model.network, PROMPTS, num_inference_steps=10, guidance_scale=guidance_scale, seed=4)
    scheduler = diffusers.DDIMScheduler(**SD_SCHEDULER)
    scheduler.set_timesteps(10)
    latents = philox.normal(4, STREAM_SAMPLING, torch.arange(len(PROMPTS)), model.latent_shape)
    conditional, unconditional = model.encode_prompts(PROMPTS), model.encode_prompts([""] * len(PROMPTS))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            times = timestep.expand(len(PROMPTS))
            noise = model.predict(model.network, latents, times, conditional)
            if guidance_scale != 1:
                empty = model.predict(model.network, latents, times, unconditional)
                noise = empty + guidance_scale * (noise - empty)
            latents = scheduler.step(noise, timestep, latents).prev_sample
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_the_batch(model: DiffusionModel) -> None:
    whole = sample(model, model.network, PROMPTS, num_inference_steps=4, seed=1)
    split = sample(model, model.network, PROMPTS, num_inference_steps=4, seed=1, batch_size=2)
    torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-5)
    other = sample(model, model.network, PROMPTS, num_inference_steps=4, seed=2)
    assert (whole - other).abs().mean() > 0.1


class Oracle(nn.Module):
    """Predicts what leads to one known image, in any prediction type, and counts the samples of its forward passes."""

    def __init__(self, schedule: Any, clean: Tensor, fail: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.schedule, self.clean, self.fail = schedule, clean, fail
        self.seen: list[int] = []

    def forward(self, latents: Tensor, timesteps: Tensor, **options: Any) -> tuple[Tensor]:
        if self.fail or self.training:
            raise RuntimeError("a forward pass while failing or in training mode")
        self.seen.append(len(latents))
        signal, noise = (rate.float().view(-1, 1, 1, 1) for rate in self.schedule.rates(timesteps))
        epsilon = (latents - signal * self.clean) / noise
        if self.schedule.prediction_type == "epsilon":
            return (epsilon,)
        if self.schedule.prediction_type == "v_prediction":
            return (signal * epsilon - noise * self.clean,)
        return (self.clean.expand_as(latents),)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_an_oracle_is_followed_to_its_image(prediction_type: str) -> None:
    configuration = {**SD_SCHEDULER, "prediction_type": prediction_type, "set_alpha_to_one": True}
    clean = torch.linspace(-1, 1, 256).view(4, 8, 8)
    model = StableDiffusionModel(tiny.pixel_pipeline(scheduler=diffusers.DDIMScheduler(**configuration)))
    oracle = model.network = Oracle(model.schedule, clean).eval()
    sampled = sample(model, oracle, PROMPTS, num_inference_steps=7, guidance_scale=2.0, batch_size=3)
    torch.testing.assert_close(sampled, clean.expand(5, 4, 8, 8), rtol=1e-5, atol=2e-5)
    assert sum(oracle.seen) == 5 * 7 * 2
    for training, fail in ((True, False), (True, True), (False, True)):
        oracle.fail = fail
        with pytest.raises(RuntimeError) if fail else nullcontext():
            sample(model, oracle.train(training), PROMPTS, num_inference_steps=2)
        assert oracle.training is training, "its mode is restored even after an error"


def test_bad_sampling_arguments(model: DiffusionModel) -> None:
    scales = [("guidance_scale", -1.0), ("guidance_scale", float("nan"))]
    for argument, value in [("prompts", []), ("batch_size", 0), ("num_inference_steps", 0), *scales]:
        with pytest.raises(InvalidInput, match=argument):
            sample(model, model.network, **{"prompts": PROMPTS, argument: value})


def opened(folder: Path, scheduler: str, config: dict[str, Any]) -> Any:
    kind = getattr(diffusers, f"{scheduler}Scheduler")
    tiny.sd_pipeline(scheduler=kind.from_config({**SD_SCHEDULER, **config})).save_pretrained(folder)
    return load_model("auto", folder)


def levels_seen(model: Any, call: Any) -> list[int]:
    seen: list[int] = []
    handle = model.network.register_forward_pre_hook(lambda module, given: seen.append(int(given[1].flatten()[0])))
    call()
    handle.remove()
    return seen


@pytest.mark.parametrize(("scheduler", "config"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_network_is_called_at_the_levels_of_the_checkpoints_scheduler(
    tmp_path: Path, scheduler: str, config: dict[str, Any]
) -> None:
    model = opened(tmp_path, scheduler, config)
    theirs = model.pipeline.scheduler
    for steps in (1, 4):
        latents: list[torch.Tensor] = []
        seen = levels_seen(
            model,
            lambda steps=steps, latents=latents: latents.append(
                sample(model, model.network, ["a"], num_inference_steps=steps, guidance_scale=1.0)
            ),
        )
        theirs.set_timesteps(steps)
        expected = theirs.timesteps[:: theirs.order].double().round().long().unique().flip(0)
        assert seen == expected.tolist()
        assert bool(latents[0].isfinite().all())
    up = levels_seen(model, lambda: invert_images(model, [picture()], ["a"], num_inference_steps=4))
    assert up[: len(seen)] == seen[::-1] and up[len(seen) :] == seen


def test_models_that_cannot_start_from_noise_are_refused_and_a_refiner_inverts_within_its_levels(
    tmp_path: Path,
) -> None:
    model = opened(tmp_path / "zero", "DDIM", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True})
    with pytest.raises(InvalidInput, match=r"rescale_betas_zero_snr = True: leaves no signal at the last level"):
        sample(model, model.network, ["a"], num_inference_steps=4)
    tiny.refiner_pipeline().save_pretrained(tmp_path / "refiner")
    model = load_model("auto", tmp_path / "refiner")
    with pytest.raises(InvalidInput, match=r"model\.path = .*is a refiner, which starts from another model's images"):
        sample(model, model.network, ["a"], num_inference_steps=4)
    seen = levels_seen(model, lambda: invert_images(model, [picture()], ["a"], num_inference_steps=4))
    assert max(seen) < 200


def test_a_schedule_that_training_rescales_is_sampled_as_the_checkpoint_says(tmp_path: Path) -> None:
    tiny.turbo_pipeline().save_pretrained(tmp_path)
    trained, own = (load_model("auto", tmp_path, zero_terminal_snr=value) for value in (True, None))
    drawn = [sample(model, model.network, ["a"], num_inference_steps=2) for model in (trained, own)]
    assert torch.equal(*drawn) and bool(drawn[0].isfinite().all())


@pytest.mark.parametrize(
    ("name", "told", "evaluations"),
    [
        *(("sd15", 7.5, 2), ("sdxl", 5.0, 2), ("sd3", 7.0, 2), ("klein", 4.0, 2), ("qwen", 4.0, 2)),
        *(("z-image", 5.0, 2), ("wan", 5.0, 2), ("flux", 3.5, 1), ("schnell", 1.0, 1), ("turbo", 1.0, 1)),
    ],
)
def test_guidance_is_by_default_that_of_the_pipeline(tmp_path: Path, name: str, told: float, evaluations: int) -> None:
    pipeline = tiny.turbo_pipeline() if name == "turbo" else tiny.PIPELINES[name]()
    pipeline.save_pretrained(tmp_path)
    flow = {"resolution": 16, "max_sequence_length": 6} if name in tiny.FLOW else {}
    model: Any = load_model("auto", tmp_path, **flow)
    assert model.own_guidance == told
    calls: list[dict[str, Any]] = []
    rows: list[int] = []

    def record(module: Any, given: Any, named: dict[str, Any]) -> None:
        calls.append(named)
        rows.append(len(given[0] if given else named["hidden_states"]))

    model.network.register_forward_pre_hook(record, with_kwargs=True)
    sample(model, model.network, ["a"], num_inference_steps=2)
    assert sum(rows) == 2 * evaluations
    if name == "flux":
        sample(model, model.network, ["a"], num_inference_steps=1, guidance_scale=2.0)
        assert [float(call["guidance"]) for call in calls] == [3.5, 3.5, 2.0]
    if name == "schnell":
        with pytest.raises(InvalidInput, match=r"guidance_scale = 3\.5: means nothing to this transformer"):
            sample(model, model.network, ["a"], num_inference_steps=1, guidance_scale=3.5)


def test_a_scale_up_to_one_is_no_guidance(tmp_path: Path) -> None:
    model = opened(tmp_path, "DDIM", {})
    drawn = [sample(model, model.network, ["a"], num_inference_steps=2, guidance_scale=g) for g in (0.0, 0.5, 1.0)]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[2])
