"""Images are sampled as the checkpoint's own scheduler and pipeline would: levels, noise and guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.inversion import invert_images
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.models import load_model
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


def test_a_network_of_noise_cannot_start_without_signal(tmp_path: Path) -> None:
    model = opened(tmp_path, "DDIM", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True})
    with pytest.raises(InvalidInput, match=r"rescale_betas_zero_snr = True: leaves no signal at the last level"):
        sample(model, model.network, ["a"], num_inference_steps=4)


def test_a_schedule_that_training_rescales_is_sampled_as_the_checkpoint_says(tmp_path: Path) -> None:
    tiny.turbo_pipeline().save_pretrained(tmp_path)
    trained, own = (load_model("auto", tmp_path, zero_terminal_snr=value) for value in (True, None))
    drawn = [sample(model, model.network, ["a"], num_inference_steps=2) for model in (trained, own)]
    assert torch.equal(*drawn) and bool(drawn[0].isfinite().all())


def test_a_refiner_inverts_within_its_levels_and_does_not_draw_from_noise(tmp_path: Path) -> None:
    tiny.refiner_pipeline().save_pretrained(tmp_path)
    model = load_model("auto", tmp_path)
    with pytest.raises(InvalidInput, match=r"model\.path = .*is a refiner, which starts from another model's images"):
        sample(model, model.network, ["a"], num_inference_steps=4)
    seen = levels_seen(model, lambda: invert_images(model, [picture()], ["a"], num_inference_steps=4))
    assert max(seen) < 200


@pytest.mark.parametrize(
    ("name", "told", "evaluations"),
    [("sd15", 7.5, 2), ("sdxl", 5.0, 2), ("sd3", 7.0, 2), ("flux", 3.5, 1), ("schnell", 1.0, 1), ("turbo", 1.0, 1)],
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
