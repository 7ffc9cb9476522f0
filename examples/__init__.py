"""Applications of the library: installed as ``fastinvdpo._examples``, and run by ``fastinvdpo demo``."""

from __future__ import annotations

from typing import Any

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
"""The noise schedule of Stable Diffusion 1.x, on which the demos' base models are trained."""
