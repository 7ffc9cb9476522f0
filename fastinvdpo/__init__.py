"""Fused kernels and a thin trainer for preference-aligning diffusion models by inversion-based DPO."""

from fastinvdpo._backend import use_backend
from fastinvdpo.errors import InvalidInput, MissingExtra, NonFiniteLoss
from fastinvdpo.inverse_scheduler import DDIMInverseScheduler
from fastinvdpo.objectives import Draws, PairBatch, build_objective
from fastinvdpo.ops import PreferenceLoss, affine_step, preference_loss
from fastinvdpo.schedule import NoiseSchedule

__version__ = "0.1.0"

__all__ = [
    "DDIMInverseScheduler",
    "Draws",
    "InvalidInput",
    "MissingExtra",
    "NoiseSchedule",
    "NonFiniteLoss",
    "PairBatch",
    "PreferenceLoss",
    "affine_step",
    "build_objective",
    "preference_loss",
    "use_backend",
]
