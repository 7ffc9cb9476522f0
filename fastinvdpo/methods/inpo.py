"""DDIM-InPO: Diffusion-DPO along the policy's own inversion."""

from __future__ import annotations

from dataclasses import dataclass

from fastinvdpo.diffusion.inversion import (
    InversionSettings,
)
from fastinvdpo.methods.base import STREAM_INVERSION
from fastinvdpo.methods.inverting import InvertingMethod


@dataclass(frozen=True, kw_only=True)
class InPO(InvertingMethod):
    """DDIM-InPO (arXiv 2503.18454).

    Attributes:
        eta: in [0, 1], the noise added after each step of the inversion; 0 is deterministic.
    """

    name = "inpo"
    draw_options = (*InvertingMethod.draw_options, "eta")

    beta: float = 2000.0
    num_inference_steps: int = 10
    eta: float = 0.1

    def settings(self, seed: int = 0) -> InversionSettings:
        return InversionSettings(
            eta=self.eta,
            model_time=self.model_time,
            seed=seed,
            noise_offset=STREAM_INVERSION,
            static_shapes=self.static_shapes,
        )
