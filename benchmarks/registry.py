"""What there is to measure: ops, the providers that compute them, shapes and dtypes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from fastinvdpo import use_backend
from fastinvdpo.ops import dispatch

from .bench_affine_step import AffineStepProblem
from .bench_pair_statistics import PairStatisticsProblem
from .bench_preference_loss import PreferenceLossProblem
from .bench_token_log_probs import SHAPES as TOKENS
from .bench_token_log_probs import TokenLogProbsProblem
from .problem import MODES, Case, Problem

OPS: dict[str, type[Problem]] = {
    "affine_step": AffineStepProblem,
    "pair_statistics": PairStatisticsProblem,
    "preference_loss": PreferenceLossProblem,
    "token_log_probs": TokenLogProbsProblem,
}
PROVIDERS = ("eager", "compile", "reference", "native", "triton", "cuda")
"""``eager``: the released codes' order of operations; ``compile``: torch.compile of it; others: backends of the op."""
BASELINES = ("eager", "compile")
"""What the other providers' speed-ups are over."""

SHAPES = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128), "flux": (16, 128, 128), "video": (16, 21, 90, 160)}
PAIRS = (1, 2, 8, 16, 32, 64)
TIMESTEPS = {"affine_step": (1,), "pair_statistics": (1,), "preference_loss": (1, 10, 80), "token_log_probs": (1,)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def everything() -> Iterator[tuple[Case, str]]:
    """Every case and mode, small ones first within an op and a model."""
    for op in sorted(OPS):
        for model, shape in (TOKENS if op == "token_log_probs" else SHAPES).items():
            for timesteps in TIMESTEPS[op]:
                for pairs in PAIRS:
                    for dtype in DTYPES:
                        yield from ((Case(op, model, shape, pairs, timesteps, dtype), mode) for mode in MODES)


QUICK = {
    "cpu": ["(sd15|sdxl) pairs=(1|8) K=1 (float32|bfloat16) full"],
    "cuda": [
        "preference_loss sdxl pairs=64 K=10 bfloat16 (forward|full)",
        "affine_step video pairs=16 bfloat16 (forward|full)",
        "preference_loss video pairs=16 K=1 (bfloat16|float32) (forward|full)",
        "pair_statistics video pairs=16 bfloat16 full",
        "preference_loss sd15 pairs=1 K=1 bfloat16 (forward|full)",
        "affine_step sd15 pairs=1 bfloat16 full",
        "(affine_step|preference_loss) sdxl pairs=8 K=1 bfloat16 full",
        "preference_loss sdxl pairs=64 K=80 bfloat16 full",
        "affine_step video pairs=16 float32 full",
        "token_log_probs vocab152k pairs=8 bfloat16 full",
    ],
}
"""Filters by device. CPU: a minute's worth of image latents. GPU: the most telling first, most of them with tensors of
256 MB and more; single pairs show what a call costs on the host.
"""


def quick(device_type: str) -> Iterator[tuple[Case, str]]:
    """A part of everything, in the order of :data:`QUICK`."""
    for pattern in QUICK[device_type]:
        yield from ((case, mode) for case, mode in everything() if matches(case, mode, pattern))


def matches(case: Case, mode: str, pattern: str) -> bool:
    """Whether each of the pattern's expressions fits a whole word of the case, such as ``sdxl pairs=(1|8) full``."""
    words = (*case.words, mode)
    return all(any(re.fullmatch(part, word) for word in words) for part in pattern.split())


def unavailable(provider: str, op: str, device: torch.device) -> str | None:
    """Why a provider cannot run an op there; None when it can, or when only a trial shows it."""
    return None if provider in BASELINES else dispatch.unavailable(op, provider, device.type)


def forward(provider: str, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """The call that computes the problem's outputs, inside the provider's :func:`context`."""
    if provider == "eager":
        return lambda: problem.released(*problem.arguments)
    if provider == "compile":
        compiled = _compiled(problem.released)
        return lambda: compiled(*problem.arguments)
    return problem.fused


@cache
def _compiled(formula: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """One for all inputs: they share its code."""
    return torch.compile(formula, dynamic=False)


def context(provider: str) -> AbstractContextManager[None]:
    """Where a provider's forward and backward run."""
    return nullcontext() if provider in BASELINES else use_backend(provider)
