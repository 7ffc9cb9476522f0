"""Fused kernels and a thin trainer for preference-aligning diffusion models by inversion-based DPO."""

from fastinvdpo import losses
from fastinvdpo.diffusion.inverse_scheduler import DDIMInverseScheduler
from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import InvalidInput, MissingExtra, NonFiniteLoss
from fastinvdpo.methods import Draws, PairBatch, build_objective
from fastinvdpo.methods.losses import DiffusionDPOLoss, diffusion_dpo_loss
from fastinvdpo.ops import PairStatistics, PreferenceLoss, affine_step, pair_statistics, preference_loss
from fastinvdpo.ops.dispatch import use_backend

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
    "PairStatistics",
    "PreferenceLoss",
    "affine_step",
    "build_objective",
    "diffusion_dpo_loss",
    "losses",
    "pair_statistics",
    "preference_loss",
    "use_backend",
]
