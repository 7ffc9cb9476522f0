"""Fused kernels and a thin trainer for preference-aligning diffusion models by inversion-based DPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastinvdpo import losses
from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.errors import InvalidInput, MissingExtra, NonFiniteLoss
from fastinvdpo.methods import Draws, PairBatch, build_objective
from fastinvdpo.methods.diffusion_dpo import DiffusionDPOLoss, diffusion_dpo_loss
from fastinvdpo.ops import (
    PairStatistics,
    PreferenceLoss,
    affine_step,
    pair_statistics,
    preference_loss,
    token_log_probs,
)
from fastinvdpo.ops.dispatch import use_backend

if TYPE_CHECKING:
    from fastinvdpo.diffusion.inverse_scheduler import DDIMInverseScheduler as DDIMInverseScheduler

__version__ = "0.1.0"

# Without DDIMInverseScheduler: importing all of these works with torch alone.
__all__ = [
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
    "token_log_probs",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Import the scheduler, which needs diffusers, when it is used."""
    if name != "DDIMInverseScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastinvdpo.diffusion.inverse_scheduler import DDIMInverseScheduler

    return DDIMInverseScheduler
