"""The published methods: each is one composition of trajectory, target, weights and utility.

:func:`build_objective` makes an objective by the method's name; calling it on a batch of pairs gives a loss to
differentiate. Every random draw is keyed by the run's seed and the pair's number in the run, never by its place in a
batch.
"""

from fastinvdpo.methods.base import METHODS, Objective, build_objective
from fastinvdpo.methods.inversion_dpo import VARIANTS, InversionDPO, inversion_dpo
from fastinvdpo.methods.pairs import (
    STREAM_INVERSION,
    STREAM_NOISE,
    STREAM_STRATUM,
    STREAM_TIMESTEP,
    Draws,
    ObjectiveOutput,
    PairBatch,
    Preference,
)
from fastinvdpo.methods.single_timestep import SingleTimestepObjective, diffusion_dpo, inpo, smpo
from fastinvdpo.methods.timesteps import TimestepSampling

__all__ = [
    "METHODS",
    "STREAM_INVERSION",
    "STREAM_NOISE",
    "STREAM_STRATUM",
    "STREAM_TIMESTEP",
    "VARIANTS",
    "Draws",
    "InversionDPO",
    "Objective",
    "ObjectiveOutput",
    "PairBatch",
    "Preference",
    "SingleTimestepObjective",
    "TimestepSampling",
    "build_objective",
    "diffusion_dpo",
    "inpo",
    "inversion_dpo",
    "smpo",
]
