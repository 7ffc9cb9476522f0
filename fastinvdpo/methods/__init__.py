"""The published methods. Each is a frozen dataclass of options, which are at once its constructor's arguments and its
section of a training configuration::

    objective = InPO(beta=2000.0, num_inference_steps=10).objective(schedule)
    loss = objective(policy, reference, batch, seed=0).loss

Random numbers are keyed by the run's seed and the pair's number in the run, never by its place in a batch.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from typing import Any

from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import invalid
from fastinvdpo.methods.alpha_dpo import AlphaDPO
from fastinvdpo.methods.base import (
    Draws,
    Follows,
    Method,
    Objective,
    ObjectiveOutput,
    PairBatch,
    PreferenceMethod,
    TrainingMethod,
)
from fastinvdpo.methods.diffusion_dpo import DiffusionDPO
from fastinvdpo.methods.dmpo import DMPO
from fastinvdpo.methods.dspo import DSPO
from fastinvdpo.methods.inpo import InPO
from fastinvdpo.methods.inversion_dpo import VARIANTS, ChainObjective, InversionDPO
from fastinvdpo.methods.kto import KTO, KTOOutput
from fastinvdpo.methods.linear_dpo import LinearDPO
from fastinvdpo.methods.mapo import MaPO
from fastinvdpo.methods.mars import (
    MarsDPO,
    MarsStage1,
    MarsStage2,
    MarsStage3,
    TokenMethod,
    TokenObjective,
    TokenOutput,
)
from fastinvdpo.methods.pnapo import PNAPO
from fastinvdpo.methods.poly_dpo import PolyDPO
from fastinvdpo.methods.sdpo import SDPO
from fastinvdpo.methods.single_timestep import SingleTimestepObjective, TimestepSampling
from fastinvdpo.methods.smpo import SmPO
from fastinvdpo.methods.snpo import SNPO

__all__ = [
    "ALL_METHODS", "DMPO", "DSPO", "KTO", "METHODS", "PNAPO", "SDPO", "SNPO", "TOKEN_METHODS", "VARIANTS", "AlphaDPO",
    "ChainObjective", "DiffusionDPO", "Draws", "Follows", "InPO", "InversionDPO", "KTOOutput", "LinearDPO", "MaPO",
    "MarsDPO", "MarsStage1", "MarsStage2", "MarsStage3", "Method", "Objective", "ObjectiveOutput", "PairBatch",
    "PolyDPO", "PreferenceMethod", "SingleTimestepObjective", "SmPO", "TimestepSampling", "TokenMethod",
    "TokenObjective", "TokenOutput", "TrainingMethod", "build_objective",
]  # fmt: skip

_ALL = (DiffusionDPO, InPO, SmPO, InversionDPO, SDPO, DMPO, DSPO, LinearDPO, AlphaDPO, PolyDPO, SNPO, MaPO, KTO, PNAPO)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
"""The one table of methods for diffusion models: demo and benchmarks take their names from it."""
TOKEN_METHODS: dict[str, type[TokenMethod]] = {
    method.name: method for method in (MarsStage1, MarsStage2, MarsStage3, MarsDPO)
}
"""Those for models of image tokens."""
ALL_METHODS: ChainMap[str, Any] = ChainMap(TOKEN_METHODS, METHODS)
"""Both tables: configurations and the command line take their names from it."""


def build_objective(method: str, schedule: NoiseSchedule, **options: Any) -> Objective:
    """The objective of a published method: ``METHODS[method](**options).objective(schedule)``.

    Raises:
        InvalidInput: an unknown method or option, or a value out of range.
    """
    if method not in METHODS:
        raise invalid("method", method, "is not known", f"use one of {', '.join(METHODS)}")
    known = [field.name for field in dataclasses.fields(METHODS[method])]
    for name, value in options.items():
        if name not in known:
            raise invalid(name, value, f"is not an option of {method}", f"its options are {', '.join(known)}")
    return METHODS[method](**options).objective(schedule)
