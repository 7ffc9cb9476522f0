"""Where the ops are tested through their public functions: every backend on every device that it runs on."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from fastinvdpo.ops import dispatch, triton_kernels


class Place(NamedTuple):
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def parameters(*places: Place) -> list[Any]:
    """The places as parameters of a test, each with the reason to skip it if there is one."""
    found = []
    for place in places:
        reason = dispatch.unavailable("preference_loss", place.backend, place.device)
        mark = pytest.mark.skipif(reason is not None, reason=f"{place} not run: {reason}")
        found.append(pytest.param(place, id=str(place), marks=mark))
    return found


def on_gpu(*backends: str) -> list[Any]:
    """These backends on a GPU, as parameters."""
    places = [Place(backend, "cuda") for backend in backends]
    if torch.cuda.is_available():
        return parameters(*places)
    reason = f"{', '.join(map(str, places))} not run: there is no GPU"  # once for all of them
    return [pytest.param(places[0], id="cuda", marks=pytest.mark.skip(reason=reason))]


# Triton's kernels run on the CPU in an interpreter only; tests/kernels/interpreted.py starts the tests there.
_INTERPRETED = triton_kernels.interpreted()
CPU = parameters(*(Place(backend, "cpu") for backend in (("triton",) if _INTERPRETED else ("reference", "native"))))
GPU = on_gpu("reference", "triton", "cuda")
EVERYWHERE = CPU if _INTERPRETED else [*CPU, *GPU]
