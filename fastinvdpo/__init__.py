"""Fused kernels and a thin trainer for preference-aligning diffusion models by inversion-based DPO."""

from fastinvdpo._backend import use_backend
from fastinvdpo.errors import InvalidInput, MissingExtra, NonFiniteLoss
from fastinvdpo.inverse_scheduler import DDIMInverseScheduler
from fastinvdpo.losses import DiffusionDPOLoss, diffusion_dpo_loss
from fastinvdpo.objectives import Draws, PairBatch, build_objective
from fastinvdpo.ops import PreferenceLoss, affine_step, preference_loss
from fastinvdpo.schedule import NoiseSchedule

__version__ = "0.1.0"

__all__ = [
    "DDIMInverseScheduler",
    "DiffusionDPOLoss",
    "Draws",
    "InvalidInput",
    "MissingExtra",
    "NoiseSchedule",
    "NonFiniteLoss",
    "PairBatch",
    "PreferenceLoss",
    "affine_step",
    "build_objective",
    "diffusion_dpo_loss",
    "preference_loss",
    "use_backend",
]
