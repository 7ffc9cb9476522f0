"""The Triton kernels under Triton's interpreter, in processes of their own: triton reads TRITON_INTERPRET once, when it
is imported, and whoever else imports it here must not find it set. ``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.layout import ROOT

CASES = ROOT / "tests/kernels/triton_cases.py"
OPS = tuple(
    f"tests/ops/test_{name}.py"
    for name in ("autograd", "backends", "pair_statistics", "token_log_probs", "training_step")
)
PARTS = set(re.findall(r"^class (Test\w+)", CASES.read_text(), re.MULTILINE)) - {"TestBeyond32Bits"}  # on a GPU only

pytest.importorskip("triton", reason="Triton is not installed")


def interpret(tests: str) -> str:
    """What pytest says of these tests, none of which may fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    return done.stdout


@pytest.mark.parametrize("part", sorted(PARTS))
def test_interpreted(part: str) -> None:
    interpret(f"{CASES}::{part}")


@pytest.mark.parametrize("tests", OPS)
def test_through_the_public_ops(tests: str) -> None:
    assert "skipped" not in interpret(str(ROOT / tests))
