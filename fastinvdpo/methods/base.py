"""From a method's name to its objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastinvdpo.diffusion.schedule import FLOW, NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.methods.inversion_dpo import InversionDPO, inversion_dpo
from fastinvdpo.methods.single_timestep import SingleTimestepObjective, diffusion_dpo, inpo, smpo

Objective = SingleTimestepObjective | InversionDPO

METHODS: dict[str, Callable[..., Objective]] = {
    "diffusion-dpo": diffusion_dpo,
    "inpo": inpo,
    "smpo": smpo,
    "inversion-dpo": inversion_dpo,
}


def build_objective(method: str, schedule: NoiseSchedule, *, compat: str | None = None, **options: Any) -> Objective:
    """The objective of a published method.

    Args:
        method: ``diffusion-dpo``, ``inpo``, ``smpo`` or ``inversion-dpo``.
        schedule: the model's noise schedule.
        compat: ``"released"`` reproduces the released code's grid, levels, model time, weighting and float32 schedule.
        options: ``beta``, ``utility``, ``label_smoothing``, and the arguments of the method's own function.

    Raises:
        InvalidInput: an unknown method or option, or a value out of range.
    """
    if method not in METHODS:
        raise invalid("method", method, "is not known", f"use one of {', '.join(METHODS)}")
    if compat not in (None, "released"):
        raise invalid("compat", compat, "is not known", 'use "released" or null')
    if compat and schedule.prediction_type == FLOW:
        problem = "is the code of diffusion models, and knows no flow matching"
        raise invalid("compat", compat, problem, "set it to null")
    return METHODS[method](schedule.released() if compat else schedule, compat=compat, **options)
