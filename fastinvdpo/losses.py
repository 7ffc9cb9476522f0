"""Loss blocks of the training scripts of preference methods, for people who bring their own loop.

Each takes predictions and gives what its script computes and logs, forward and backward over the predictions in one op
each; ``docs/guides/losses.md`` says which script's block it replaces.
"""

from __future__ import annotations

from fastinvdpo.methods.alpha_dpo import AlphaDPOLoss, alpha_dpo
from fastinvdpo.methods.diffusion_dpo import DiffusionDPOLoss, diffusion_dpo_loss
from fastinvdpo.methods.dmpo import dmpo
from fastinvdpo.methods.dspo import dspo
from fastinvdpo.methods.flow_dpo import FlowDPOLoss, flow_dpo, latent_mask
from fastinvdpo.methods.kto import HALOS, KTO, KTOLoss, kto, mean_reward
from fastinvdpo.methods.linear_dpo import LinearDPOLoss, linear_dpo, update_reference
from fastinvdpo.methods.mapo import MaPOLoss, mapo
from fastinvdpo.methods.pnapo import pnapo
from fastinvdpo.methods.poly_dpo import poly_dpo
from fastinvdpo.methods.sdpo import SafeguardedLoss, sdpo
from fastinvdpo.methods.snpo import snpo
from fastinvdpo.methods.statistics import AutoBeta

diffusion_dpo = diffusion_dpo_loss

__all__ = [
    "HALOS", "KTO", "AlphaDPOLoss", "AutoBeta", "DiffusionDPOLoss", "FlowDPOLoss", "KTOLoss", "LinearDPOLoss",
    "MaPOLoss", "SafeguardedLoss", "alpha_dpo", "diffusion_dpo", "diffusion_dpo_loss", "dmpo", "dspo", "flow_dpo",
    "kto", "latent_mask", "linear_dpo", "mapo", "mean_reward", "pnapo", "poly_dpo", "sdpo", "snpo", "update_reference",
]  # fmt: skip
