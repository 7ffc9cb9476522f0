"""What every test starts from: one thread, known seeds, no network, no backend chosen from outside."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Read by huggingface_hub and matplotlib when they are imported, so before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

from fastinvdpo.ops import triton_kernels
from fastinvdpo.ops.dispatch import VARIABLE
from tests import interpreter


def pytest_configure() -> None:
    torch.set_num_threads(1)
    # Where a test says float32 on a GPU it means it: cuDNN may use TF32, and algorithms that round more and vary.
    torch.backends.cudnn.enabled = False
    if triton_kernels.interpreted():
        interpreter.mend()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty holds NaN, so that an element that no kernel writes shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
