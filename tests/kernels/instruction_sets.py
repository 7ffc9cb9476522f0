"""The C++ kernels for the CPU with the lesser instruction sets too, and what FASTINVDPO_ISA refuses.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastinvdpo.ops import native
from tests.kernels.native_run import INSTRUCTION_SETS, instruction_sets, run_tests
from tests.layout import ROOT

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS[:-1])
def test_a_lesser_set_than_the_best(instructions: str) -> None:
    """The best one is what the tests in this process use."""
    *lesser, best = instruction_sets()
    if instructions not in lesser:
        pytest.skip(f"{instructions} is not below {best}, with which this process runs the same tests")
    extension = native._load()[0]
    assert extension is not None and extension.__file__ is not None
    files = ["test_native.py", "test_native_lengths.py", "../ops/test_pair_statistics.py"]
    run_tests(Path(extension.__file__), instructions, files, {})


@pytest.mark.parametrize("asked", ["sse9", "AVX2", "avx512"])
def test_a_set_that_cannot_be_had_is_refused_by_every_call(asked: str) -> None:
    if asked in instruction_sets():
        pytest.skip(f"this CPU has {asked}")
    code = """
import torch, fastinvdpo
for call in (
    lambda: fastinvdpo.affine_step(torch.ones(1, 1), [], torch.ones(1, 1)),
    lambda: fastinvdpo.preference_loss(torch.ones(2, 1), torch.ones(2, 1), None, beta=1.0),
) * 2:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    options = {"timeout": 120, "cwd": ROOT, "env": {**os.environ, "FASTINVDPO_ISA": asked}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    problem = f"FASTINVDPO_ISA = '{asked}': this CPU has no such instruction set. Remedy: use one of baseline"
    assert done.returncode == 0, done.stderr
    assert [line[: len(problem)] for line in done.stdout.splitlines()] == [problem] * 4
