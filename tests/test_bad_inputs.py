"""Bad input ends in an error that names the argument, shows the value and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastinvdpo
from fastinvdpo import DDIMInverseScheduler, InvalidInput, NoiseSchedule, build_objective
from fastinvdpo.diffusion.inversion import InversionSettings, plan_inversion
from fastinvdpo.diffusion.prompt import Prompt
from fastinvdpo.diffusion.schedule import inversion_levels
from fastinvdpo.methods import PairBatch
from fastinvdpo.methods.smpo import preference_probability, smoothed_pair_weight
from fastinvdpo.ops import philox
from tests.cases import SD_SCHEDULER, sd_schedule

X = torch.zeros(4, 2, 3)
SCHEDULE = sd_schedule()
TABLE = torch.zeros(4, 2)
SHIFTED, STACK, SQUARE = torch.zeros(25), torch.zeros(4, 3, 3), torch.zeros(4, 2, 2)


def loss(
    policy: Any = X, reference: Any = X, target: Any = X, beta: Any = 10.0, **options: Any
) -> Callable[[], object]:
    return lambda: fastinvdpo.preference_loss(policy, reference, target, beta=beta, **options)


def step(sample: Any = X, outputs: Any = (X,), table: Any = TABLE, **options: Any) -> Callable[[], object]:
    return lambda: fastinvdpo.affine_step(sample, outputs, table, **options)


def sums(
    policy: Any = X, reference: Any = X, target: Any = X, mask: Any = None, **options: Any
) -> Callable[[], object]:
    return lambda: fastinvdpo.pair_statistics(policy, reference, target, mask, **options)


def objective(method: str = "inpo", **options: Any) -> Callable[[], object]:
    return lambda: build_objective(method, SCHEDULE, **options)


def call(method: str, **changes: Any) -> Callable[[], object]:
    batch = {
        "latents": torch.zeros(4, 1, 2, 2),
        "conditioning": {"prompt": torch.zeros(4)},
        "sample_index": torch.arange(2),
        **changes,
    }
    return lambda: build_objective(method, SCHEDULE)(lambda x, t, c: x, lambda x, t, c: x, PairBatch(**batch), seed=0)


def stepped(level: int) -> Callable[[], object]:
    scheduler = DDIMInverseScheduler.from_config(SD_SCHEDULER)
    scheduler.set_timesteps(10)
    return lambda: scheduler.step(X, level, X)


# ruff: noqa: E501
# (name of the case, what is called, what the message must name); tests/ops/test_checks.py has dtypes, layouts and devices
CASES: list[tuple[str, Callable[[], object], str]] = [
    ("odd batch", loss(*[torch.zeros(3, 2)] * 3), "policy_pred.shape = (3, 2)"),
    ("outputs as a tensor", step(outputs=X), "outputs = 'a tensor'"),
    ("empty batch", loss(*[torch.zeros(0, 2)] * 3), "policy_pred.shape = (0, 2)"),
    ("no elements", loss(*[torch.zeros(2, 0)] * 3), "policy_pred.shape = (2, 0)"),
    ("one dimension", loss(*[torch.zeros(2)] * 3), "policy_pred.shape = (2,)"),
    ("no reference", loss(reference=None), "reference_pred = None"),
    ("beta zero", loss(beta=0.0), "beta = 0.0"),
    ("beta negative", loss(beta=-5), "beta = -5"),
    ("beta not a number", loss(beta=math.nan), "beta = nan"),
    ("beta infinite", loss(beta=math.inf), "beta = inf"),
    ("beta as text", loss(beta="5000"), "beta = '5000'"),
    ("beta as a tensor", loss(beta=torch.ones(1)), "beta = tensor"),
    ("weight per sample, not per pair", loss(pair_weight=torch.ones(4)), "pair_weight.shape = (4,)"),
    ("timestep weight of another length", loss(timestep_weight=torch.ones(3)), "timestep_weight.shape = (3,)"),
    ("timestep weight without timesteps", loss(*[torch.zeros(4, 2)] * 3, timestep_weight=torch.ones(2)), "policy_pred.shape = (4, 2)"),
    ("unknown utility", loss(utility="logistic"), "utility = 'logistic'"),
    ("smoothing of one half", loss(utility="robust", label_smoothing=0.5), "label_smoothing = 0.5"),
    ("smoothing that is not used", loss(label_smoothing=0.1), "label_smoothing = 0.1"),
    ("sums of an odd batch", sums(*[torch.zeros(3, 2)] * 3), "policy_pred.shape = (3, 2): must hold as many losers as winners"),
    ("sums of nothing", sums(*[torch.zeros(0, 2)] * 3, paired=False), "policy_pred.shape = (0, 2)"),
    ("sums without a target", sums(target=None), "target = None"),
    ("sums of a reference of another shape", sums(reference=torch.zeros(4, 2)), "reference_pred.shape = (4, 2)"),
    ("sums of a reference with gradient", sums(reference=X.clone().requires_grad_()), "reference_pred.requires_grad = True"),
    ("integer mask", sums(mask=torch.ones(4, 1, 3).long()), "mask.dtype = torch.int64"),
    ("mask with gradient", sums(mask=torch.ones(4, 1, 3, requires_grad=True)), "mask.requires_grad = True"),
    ("mask without channels", sums(mask=torch.ones(4, 3)), "mask.shape = (4, 3): does not fit samples (4, 2, 3). Remedy: pass (4, 1, 3) or (2, 1, 3) or (1, 1, 3)"),
    ("mask of three samples", sums(mask=torch.ones(3, 2, 3)), "mask.shape = (3, 2, 3)"),
    ("mask of pairs for unpaired samples", sums(mask=torch.ones(2, 1, 3), paired=False), "mask.shape = (2, 1, 3)"),
    ("five outputs", step(outputs=[X] * 5, table=torch.zeros(4, 6)), "outputs = '5 tensors'"),
    ("sample without batch", step(sample=torch.zeros(()), outputs=[]), "sample.shape = ()"),
    ("noise index without noise", step(noise_index=torch.arange(4)), "noise_index"),
    ("out of another dtype", step(out=X.half()), "out.dtype = torch.float16"),
    ("out while gradients are recorded", step(X.clone().requires_grad_(), out=X.clone()), "sample.requires_grad = True"),
    ("trajectory while gradients are recorded", step(outputs=[X.clone().requires_grad_()], trajectory=X.clone()), "outputs[0].requires_grad = True"),
    ("out that records gradients", step(out=X.clone().requires_grad_()), "out.requires_grad = True"),
    ("out that was expanded", step(out=torch.zeros(1, 2, 3).expand(4, 2, 3)), "out = 'strides (0, 3, 1)': has elements that share"),
    ("trajectory that was expanded", step(trajectory=torch.zeros(4, 2, 1).expand(4, 2, 3)), "trajectory = 'strides (2, 1, 0)'"),
    ("out that begins inside the sample", step(SHIFTED[:24].view(4, 2, 3), out=SHIFTED[1:].view(4, 2, 3)), "out = 'strides (6, 3, 1)': shares memory with sample"),
    ("out that begins inside an output", step(outputs=[SHIFTED[:24].view(4, 2, 3)], out=SHIFTED[1:].view(4, 2, 3)), "out = 'strides (6, 3, 1)': shares memory with outputs[0]"),
    ("samples of a stack that are shared", step(STACK[:, :2], out=STACK[:, 1:]), "out = 'strides (9, 3, 1)': shares memory with sample"),
    ("the sample's memory in another order", step(SQUARE, [], TABLE[:, :1], out=SQUARE.mT), "out = 'strides (4, 1, 2)': shares memory with sample"),
    ("trajectory in place", step(trajectory=X), "trajectory = 'strides (6, 3, 1)': shares memory with sample"),
    ("trajectory in the memory of out", step(out=(own := X.clone()), trajectory=own), "trajectory = 'strides (6, 3, 1)': shares memory with out"),
    ("negative seed", step(noise_scale=torch.ones(4), seed=-1), "seed = -1"),
    ("offset of 33 bits", lambda: philox.normal(0, 2**32, torch.arange(1), (2,)), "offset = 4294967296"),
    ("alphas out of range", lambda: NoiseSchedule(torch.tensor([0.5, 1.5])), "alphas_cumprod = [0.5, 1.5]"),
    ("alphas that increase", lambda: NoiseSchedule(torch.tensor([0.1, 0.9])), "alphas_cumprod"),
    ("integer alphas", lambda: NoiseSchedule(torch.tensor([1, 0])), "alphas_cumprod = (2,)"),
    ("unknown prediction type", lambda: sd_schedule(prediction_type="eps"), "prediction_type = 'eps'"),
    ("unknown beta schedule", lambda: sd_schedule(beta_schedule="cosine"), "beta_schedule = 'cosine'"),
    ("betas above one", lambda: sd_schedule(beta_end=1.2), "betas = "),
    ("offset beyond the schedule", lambda: sd_schedule(steps_offset=1000), "steps_offset = 1000"),
    ("no steps", lambda: inversion_levels(SCHEDULE, 0), "num_inference_steps = 0"),
    ("more steps than levels", lambda: inversion_levels(SCHEDULE, 1001), "num_inference_steps = 1001"),
    ("half a step", lambda: inversion_levels(SCHEDULE, 2.5), "num_inference_steps = 2.5"),  # type: ignore[arg-type]
    ("level beyond the schedule", lambda: plan_inversion(SCHEDULE, torch.tensor([1000]), 10), "levels = [1000, 1000]"),
    ("levels as floats", lambda: plan_inversion(SCHEDULE, torch.tensor([1.0]), 10), "levels = torch.float32"),
    ("unknown model time", lambda: InversionSettings(model_time="target"), "model_time = 'target'"),
    ("eta above one", lambda: InversionSettings(eta=1.5), "eta = 1.5"),
    ("negative renoise", lambda: InversionSettings(renoise_iterations=-1), "renoise_iterations = -1"),
    ("guidance without the empty prompt", lambda: Prompt({}, None, 2.0), "guidance_scale = 2.0"),
    ("unknown method", objective("dpo"), "method = 'dpo'"),
    ("unknown option", objective("diffusion-dpo", eta=0.1), "eta = 0.1"),
    ("unknown compatibility", objective(compat="old"), "compat = 'old'"),
    ("unknown variant", objective("inversion-dpo", variant="chain"), "variant = 'chain'"),
    ("corrected variant of the released code", objective("inversion-dpo", variant="step", compat="released"), "variant = 'step'"),
    ("more sampled timesteps than steps", objective("inversion-dpo", timesteps_per_step=81), "timesteps_per_step = 81"),
    ("negative guidance", objective("inversion-dpo", guidance_scale=-1.0), "guidance_scale = -1.0"),
    ("score range of zero", objective("smpo", score_range=0.0), "score_range = 0.0"),
    ("negative preference scale", objective("smpo", preference_scale=-1.0), "preference_scale = -1.0"),
    ("scores of different lengths", lambda: preference_probability(torch.ones(2), torch.ones(3)), "loser_scores.shape = (3,)"),
    ("scale that is not a number", lambda: smoothed_pair_weight(torch.ones(2), math.nan), "preference_scale = nan"),
    ("smpo without scores", call("smpo"), "batch.scores = None"),
    ("inversion-dpo without the empty prompt", call("inversion-dpo"), "guidance_scale = 2.0"),
    ("odd batch of latents", call("inpo", latents=torch.zeros(3, 1, 2, 2)), "batch.latents.shape = (3, 1, 2, 2)"),
    ("draws of another length", call("inpo", sample_index=torch.arange(4)), "batch.sample_index"),
    ("prompts of another length", call("inpo", conditioning={"prompt": torch.zeros(2)}), "batch.conditioning['prompt'].shape = (2,)"),
    ("scheduler without timesteps", lambda: DDIMInverseScheduler().step(X, 1, X), "num_inference_steps = None"),
    ("scheduler beyond its levels", stepped(1000), "timestep = 1000"),
    ("scheduler with unknown spacing", lambda: DDIMInverseScheduler(timestep_spacing="even"), "timestep_spacing = 'even'"),
    ("scheduler from a number", lambda: DDIMInverseScheduler.from_config(3), "config = 'int'"),
    ("unknown backend", lambda: fastinvdpo.use_backend("gpu").__enter__(), "name = 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "names"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_error_names_argument_value_and_remedy(bad: Callable[[], object], names: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        bad()
    message = str(caught.value)
    assert message.startswith(names), message
    assert "Remedy: " in message


def test_a_backend_that_cannot_run_says_why() -> None:
    with fastinvdpo.use_backend("cuda"), pytest.raises(InvalidInput, match="cuda") as caught:
        fastinvdpo.preference_loss(X, X, X, beta=1.0)
    assert "Remedy: " in str(caught.value)
