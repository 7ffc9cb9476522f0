"""Noise schedules, levels, grids and affine coefficients. Pure functions of the schedule; no network, no randomness.

A *level* is an index into the training schedule, ``0 … T_train − 1``; level ``-1`` is the clean end below it. At level
``t`` a latent is ``x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε``, or for flow matching ``x_t = (1 − σ_t) · x_0 + σ_t · ε``. Every
deterministic step between two levels is affine in the latent and the network's output (DDIM, arXiv 2010.02502, equation
12; for flow matching Euler's), and this module computes its two coefficients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.ops.affine_step import affine_step

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# diffusers' schedulers whose noise is that of their betas, however they sample.
_BETAS = frozenset(f"{name}Scheduler" for name in (
    "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
    "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
    "UniPCMultistep",
))  # fmt: skip
FLOWS = tuple(f"FlowMatch{name}Scheduler" for name in ("EulerDiscrete", "HeunDiscrete", "LCM"))
# Settings of UniPC for flow matching that give another noise, or other levels, than its shift.
_OTHER_FLOWS = ("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
                "use_beta_sigmas", "thresholding")  # fmt: skip
# Settings that give even those another noise, or another meaning of what the network predicts.
_FOREIGN = ("sigma_data", "sigma_schedule", "sigma_min", "sigma_max", "use_flow_sigmas", "snr_shift_scale",
            "thresholding")  # fmt: skip
FLOW = "flow"
"""The prediction type of flow matching: the velocity ``dx/dσ = ε − x_0``."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete noise schedule and what the network predicts under it.

    Attributes:
        alphas_cumprod: ``ᾱ_t``, float64 ``(T_train,)`` on the CPU, values in [0, 1], non-increasing; for flow matching
            the square of the signal's rate, ``(1 − σ_t)²``.
        prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"sample"``, or ``"flow"`` (see :meth:`flow`).
        steps_offset: the first level of an inversion grid (diffusers' "leading" spacing).
        set_alpha_to_one: what level ``-1`` means: ``ᾱ = 1`` when true, ``ᾱ_0`` when false (as Stable Diffusion is
            shipped).
        released_precision: hold ``ᾱ`` rounded to float32, and its roots too where a step uses them, as the released
            codes do.
        config: the scheduler configuration this schedule was read from, if any.
        sigmas: flow matching only: ``σ_t``, float64 ``(T_train,)`` on the CPU, in (0, 1], increasing.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    released_precision: bool = False
    config: Mapping[str, Any] | None = None
    sigmas: Tensor | None = None

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if not isinstance(table, Tensor) or table.ndim != 1 or table.numel() < 1 or not table.is_floating_point():
            shown = tuple(table.shape) if isinstance(table, Tensor) else table
            problem = "must be a floating-point tensor of shape (T_train,)"
            raise invalid("alphas_cumprod", shown, problem, "pass ᾱ_t per level")
        table = table.detach().to("cpu", torch.float64)
        if not bool(((table >= 0) & (table <= 1)).all() and (table.diff() <= 0).all()):
            ends, problem = [float(table[0]), float(table[-1])], "must lie in [0, 1] and never increase with the level"
            raise invalid("alphas_cumprod", ends, problem, "pass the cumulative product of 1 − β_t")
        if self.prediction_type not in (known := (*PREDICTION_TYPES, FLOW)):
            raise invalid("prediction_type", self.prediction_type, "is not known", f"use one of {known}")
        if (self.prediction_type == FLOW) != (self.sigmas is not None):
            problem = f"does not go with prediction_type {self.prediction_type!r}"
            raise invalid("sigmas", self.sigmas, problem, "build flow schedules with from_config or flow")
        if not 0 <= self.steps_offset < table.numel():
            raise invalid("steps_offset", self.steps_offset, "is not a level of the schedule", "use 0 or 1")
        object.__setattr__(self, "alphas_cumprod", table.float().double() if self.released_precision else table)

    @classmethod
    def flow(cls, sigmas: Tensor, config: Mapping[str, Any] | None = None) -> NoiseSchedule:
        """The schedule of flow matching: ``x_t = (1 − σ_t)·x_0 + σ_t·ε``, and the network predicts ``ε − x_0``.

        ``sigmas``: floating-point ``(T_train,)`` in (0, 1], increasing. Level ``-1`` is ``σ = 0``.
        """
        table = sigmas.detach().to("cpu", torch.float64)
        if table.ndim != 1 or not bool(((table > 0) & (table <= 1)).all()) or not bool((table.diff() > 0).all()):
            raise invalid("sigmas", tuple(sigmas.shape), "must increase within (0, 1]", "pass σ_t per level")
        return cls((1 - table) ** 2, FLOW, set_alpha_to_one=True, config=config, sigmas=table)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, released_precision: bool = False, image_seq_len: int | None = None
    ) -> NoiseSchedule:
        """Read a diffusers scheduler configuration (``scheduler.config`` or the parsed ``scheduler_config.json``).

        ``image_seq_len``: tokens of an image, which the shift of some flow schedules depends on
        (``use_dynamic_shifting``).

        Raises:
            InvalidInput: a scheduler of other noise than betas or flow matching give, such as EDM's.
        """
        kind = config.get("_class_name")
        if kind is not None and kind not in (*_BETAS, *FLOWS):
            remedy = "use a checkpoint whose scheduler has betas (DDIM, Euler, …) or is FlowMatchEulerDiscreteScheduler"
            raise invalid("scheduler", kind, "has noise that is not known here", remedy)
        if kind == "UniPCMultistepScheduler" and config.get("prediction_type") == "flow_prediction":
            for name in (name for name in _OTHER_FLOWS if config.get(name)):
                raise invalid(f"scheduler.{name}", config[name], "is not computed here", "use a checkpoint without it")
            if not config.get("use_flow_sigmas"):
                raise invalid("scheduler.use_flow_sigmas", False, "contradicts flow_prediction", "set it to true")
            return cls.flow(_shifted_sigmas({**config, "shift": config.get("flow_shift", 1.0)}, None), dict(config))
        if kind in FLOWS:
            return cls.flow(_shifted_sigmas(config, image_seq_len), dict(config))
        foreign = [name for name in _FOREIGN if config.get(name)]
        if config.get("timestep_type") == "continuous" or foreign:
            name, remedy = [*foreign, "timestep_type"][0], "use a checkpoint of noise that follows from betas"
            raise invalid(f"scheduler.{name}", config[name], "is not computed here", remedy)
        try:
            return cls(
                alphas_cumprod=_alphas_cumprod(config, torch.float32 if released_precision else torch.float64),
                prediction_type=config.get("prediction_type", "epsilon"),
                steps_offset=int(config.get("steps_offset", 0)),
                set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
                released_precision=released_precision,
                config=dict(config),
            )
        except InvalidInput:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise invalid("scheduler", kind, f"has unusable settings ({error})", "correct its configuration") from None

    def released(self) -> NoiseSchedule:
        """This schedule in the float32 precision of the released research codes."""
        if self.config is not None:
            released = NoiseSchedule.from_config(self.config, released_precision=True)
            return dataclasses.replace(released, prediction_type=self.prediction_type, steps_offset=self.steps_offset)
        return dataclasses.replace(self, released_precision=True)

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.numel()

    def rates(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """``(√ᾱ, √(1 − ᾱ))`` at int64 ``levels`` (any shape, ``-1`` for the clean end): two float64 tensors of that
        shape. Floating-point levels of flow matching lie on the lines between whole ones.
        """
        signal, noise = self._tables(levels.device)
        if not levels.is_floating_point():
            return signal[levels + 1], noise[levels + 1]
        below = levels.floor().long().clamp(max=self.num_train_timesteps - 2)
        return tuple(torch.lerp(t[below + 1], t[below + 2], levels.double() - below) for t in (signal, noise))  # type: ignore[return-value]

    def alpha_bar(self, levels: Tensor) -> Tensor:
        """``ᾱ`` at int64 ``levels`` (any shape, ``-1`` for the clean end), float64."""
        clean = torch.ones(1, dtype=torch.float64) if self.set_alpha_to_one else self.alphas_cumprod[:1]
        return torch.cat([clean, self.alphas_cumprod]).to(levels.device)[levels + 1]

    def model_times(self, levels: Tensor) -> Tensor:
        """A network's times at int64 ``levels``: the levels, or for flow matching ``σ·T_train`` in float32."""
        if self.sigmas is None:
            return levels
        return (self.rates(levels)[1] * self.num_train_timesteps).float()

    @functools.lru_cache(maxsize=8)  # noqa: B019 - schedules are few and live as long as the run
    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.sigmas is not None:
            noise = torch.cat([self.sigmas.new_zeros(1), self.sigmas])
            return (1 - noise).to(device), noise.to(device)
        alpha_bar = self.alpha_bar(torch.arange(-1, self.num_train_timesteps))
        return alpha_bar.sqrt().to(device), (1 - alpha_bar).sqrt().to(device)


def _alphas_cumprod(config: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    steps = int(config.get("num_train_timesteps", 1000))
    beta_start, beta_end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=dtype)
    elif kind == "linear":
        betas = torch.linspace(beta_start, beta_end, steps, dtype=dtype)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps, dtype=dtype) ** 2
    elif kind == "squaredcos_cap_v2":

        def survival(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        ratios = [survival((step + 1) / steps) / survival(step / steps) for step in range(steps)]
        betas = torch.tensor([min(1 - ratio, 0.999) for ratio in ratios], dtype=dtype)
    else:
        known = "linear, scaled_linear or squaredcos_cap_v2"
        raise invalid("beta_schedule", kind, "is not known", f"use {known}, or give trained_betas")
    if not bool(((betas >= 0) & (betas < 1)).all()):
        ends = [float(betas[0]), float(betas[-1])]
        raise invalid("betas", ends, "must lie in [0, 1)", "check beta_start and beta_end")
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    if not config.get("rescale_betas_zero_snr"):
        return alphas_cumprod
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _shifted_sigmas(config: Mapping[str, Any], image_seq_len: int | None) -> Tensor:
    """``σ_t`` of diffusers' FlowMatchEulerDiscreteScheduler: ``s = (t + 1)/T_train``, shifted towards noise by
    ``s·shift/(1 + (shift − 1)·s)``, or by ``e^μ`` (or ``μ``) in the place of ``shift``, with μ linear in the number of
    an image's tokens.
    """
    if config.get("invert_sigmas"):
        raise invalid("invert_sigmas", True, "is not supported", "use a scheduler whose last step ends at the image")
    steps, shift = int(config.get("num_train_timesteps", 1000)), float(config.get("shift", 1.0))
    if config.get("use_dynamic_shifting"):
        if image_seq_len is None:
            problem = "is needed, since this schedule is shifted by the size of the image"
            raise invalid("image_seq_len", None, problem, "pass the number of tokens of an image")
        mu = dynamic_shift(config, image_seq_len)
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    if not shift > 0:
        raise invalid("shift", shift, "must be positive", "use 1 for none")
    share = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return shift * share / (1 + (shift - 1) * share)


def dynamic_shift(config: Mapping[str, Any], image_seq_len: int) -> float:
    """μ of an image of so many tokens (``use_dynamic_shifting``)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(base + (top - base) * (image_seq_len - low) / (high - low))


def inversion_levels(schedule: NoiseSchedule, num_inference_steps: int) -> Tensor:
    """The grid of an N-step inversion, ascending: ``offset + kΔ`` with ``Δ = T_train // N``, int64 ``(N,)``.

    This is diffusers' "leading" spacing; the level below the first one is ``-1``. For flow matching the grid is
    ``(k + 1)·T_train/N − 1``, rounded: pure noise at the top, as FLUX samples.
    """
    steps = schedule.num_train_timesteps
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= steps:
        remedy = f"use a whole number from 1 to {steps}"
        raise invalid("num_inference_steps", num_inference_steps, "out of range", remedy)
    if schedule.prediction_type == FLOW:
        numbers = torch.arange(1, num_inference_steps + 1)
        return (2 * numbers * steps + num_inference_steps) // (2 * num_inference_steps) - 1
    levels = torch.arange(num_inference_steps) * (steps // num_inference_steps) + schedule.steps_offset
    return levels.clamp_(max=steps - 1)


def check_levels(schedule: NoiseSchedule, levels: Tensor) -> None:
    """Raise unless ``levels``, on the host, are int64 within ``[0, T_train)``."""
    if levels.dtype != torch.int64:
        raise invalid("levels", levels.dtype, "must be int64 levels", "pass levels.long()")
    if levels.numel() and not 0 <= (low := int(levels.min())) <= (high := int(levels.max())) < len(
        schedule.alphas_cumprod
    ):
        remedy = f"use levels from 0 to {schedule.num_train_timesteps - 1}"
        raise invalid("levels", [low, high], "outside of the schedule", remedy)


def affine_coefficients(schedule: NoiseSchedule, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``(A, B)`` of the deterministic DDIM step ``x_t = A·x_s + B·o`` from level ``source`` to level ``target``.

    ``source`` and ``target`` are int64 levels of one shape (``-1``: the clean end), in either order; the results are
    float64 of that shape. With signal ``a = √ᾱ`` and noise ``b = √(1 − ᾱ)``, the two rates of a level:

    ============= ======================= ===========================
    prediction    A                       B
    ============= ======================= ===========================
    epsilon       ``a_t / a_s``           ``b_t − a_t·b_s / a_s``
    v_prediction  ``a_t·a_s + b_t·b_s``   ``b_t·a_s − a_t·b_s``
    sample        ``b_t / b_s``           ``a_t − a_s·b_t / b_s``
    flow          ``1``                   ``b_t − b_s``
    ============= ======================= ===========================

    (flow: Euler's step along ``dx/dσ``, with ``a = 1 − σ`` and ``b = σ``.)

    An epsilon step cannot leave a level with ``ᾱ = 0`` (zero terminal SNR), nor a sample step one with ``ᾱ = 1``: there
    the coefficients are not finite.
    """
    rates = _float32_rates if schedule.released_precision else NoiseSchedule.rates
    a_s, b_s = rates(schedule, source)
    a_t, b_t = rates(schedule, target)
    if schedule.prediction_type == "epsilon":
        ratio = a_t / a_s
        return ratio, b_t - ratio * b_s
    if schedule.prediction_type == "v_prediction":
        return a_t * a_s + b_t * b_s, b_t * a_s - a_t * b_s
    if schedule.prediction_type == FLOW:
        return torch.ones_like(b_s), b_t - b_s
    ratio = b_t / b_s
    return ratio, a_t - ratio * a_s


def _float32_rates(schedule: NoiseSchedule, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The rates in float32 arithmetic. A float64 root, rounded, is the correctly rounded float32 root on every CPU."""
    alpha_bar = schedule.alpha_bar(levels).float()
    return alpha_bar.double().sqrt().float().double(), (1 - alpha_bar).double().sqrt().float().double()


def ancestral_variance(schedule: NoiseSchedule, lower: Tensor, upper: Tensor) -> Tensor:
    """``V = (1−ᾱ_g)/(1−ᾱ_{g'}) · (1−ᾱ_{g'}/ᾱ_g)`` of the interval ``lower`` g → ``upper`` g' (DDIM, equation 16 at η =
    1), float64: the variance of ``x_g`` where ``x_0`` and ``x_{g'}`` are known. For flow matching, whose rates are not
    those of ᾱ, the same variance is ``b²/b'²·(b'² − (a'/a)²·b²)``.
    """
    if schedule.prediction_type == FLOW:
        (a, b), (a_up, b_up) = schedule.rates(lower), schedule.rates(upper)
        ratio = torch.where(a_up == 0, a_up, a_up / a)  # 0/0 from the top to itself, a step nobody makes
        return (b**2 / b_up**2 * (b_up**2 - ratio**2 * b**2)).clamp(min=0)
    below, above = schedule.alpha_bar(lower), schedule.alpha_bar(upper)
    return ((1 - below) / (1 - above) * (1 - above / below)).clamp(min=0)


def predicted_clean_and_noise(
    schedule: NoiseSchedule, latents: Tensor, prediction: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """``(x̂_0, ε̂)`` that a ``prediction`` at ``latents`` ``(n, …)`` of int64 ``levels`` ``(n,)`` stands for."""
    a, b = schedule.rates(levels.to(latents.device))
    if schedule.prediction_type == "epsilon":
        return combine(latents, 1 / a, prediction, -b / a), prediction
    if schedule.prediction_type == "v_prediction":
        return combine(latents, a, prediction, -b), combine(latents, b, prediction, a)
    if schedule.prediction_type == FLOW:
        one = torch.ones_like(a)
        return combine(latents, one, prediction, -b), combine(latents, one, prediction, a)
    return prediction, combine(latents, 1 / b, prediction, -a / b)


def add_noise(schedule: NoiseSchedule, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """``√ᾱ_t·x_0 + √(1 − ᾱ_t)·ε``, or ``(1 − σ_t)·x_0 + σ_t·ε``, of tensors ``(n, …)`` at int64 ``levels`` ``(n,)``."""
    a, b = schedule.rates(levels.to(clean.device))
    return combine(clean, a, noise, b)


def recover_noise(schedule: NoiseSchedule, noisy: Tensor, clean: Tensor, levels: Tensor) -> Tensor:
    """The noise in ``noisy``: ``(x_t − √ᾱ_t·x_0) / √(1 − ᾱ_t)``, or ``(x_t − (1 − σ_t)·x_0) / σ_t`` of a flow."""
    a, b = schedule.rates(levels.to(noisy.device))
    return combine(noisy, 1 / b, clean, -a / b)


def prediction_target(schedule: NoiseSchedule, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """What a perfect network predicts: ``ε``, ``v = √ᾱ·ε − √(1 − ᾱ)·x_0``, ``x_0`` or the velocity ``ε − x_0``."""
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return clean
    a, b = schedule.rates(levels.to(clean.device))
    if schedule.prediction_type == FLOW:
        a = b = torch.ones_like(a)
    return combine(noise, a, clean, -b)


def combine(first: Tensor, first_scale: Tensor, second: Tensor, second_scale: Tensor) -> Tensor:
    """``first_scale_i·first_i + second_scale_i·second_i`` per sample, through :func:`fastinvdpo.ops.affine_step`."""
    return affine_step(first, [second], stack_coefficients(first, first_scale, second_scale))


def stack_coefficients(sample: Tensor, *columns: Tensor) -> Tensor:
    """The columns ``(n,)`` as ``affine_step``'s table: float32, or float64 for a float64 ``sample``."""
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    return torch.stack(columns, dim=1).to(sample.device, dtype)
