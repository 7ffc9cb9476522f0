"""Every Triton kernel compiled for sm_80, sm_90 and sm_100: no spills, 128-bit accesses, and the table kept of it.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.layout import ROOT

pytestmark = pytest.mark.xdist_group("triton compiled")  # once
triton = pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = ROOT / "benchmarks/compiled_triton.py"
TABLE = ROOT / "benchmarks/results/compiled_triton.md"


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.fixture(scope="module")
def table() -> str:
    """In a process of its own: the script puts itself in the place of Triton's driver."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_no_spills(table: str) -> None:
    rows = rows_of(table)
    assert {row[1] for row in rows} == {"80", "90", "100"} and len(rows) > 150
    assert [row for row in rows if row[3] != "0"] == []


def test_wide_accesses(table: str) -> None:
    """Every access to a large tensor has 128 bits, where rows start at 16 bytes."""
    reads = {(row[0], row[1]): row[4].split("/") for row in rows_of(table)}
    wide = [case for case, (made, possible) in reads.items() if made == possible != "0"]
    assert len(wide) > 130
    narrow = {name for name, _ in set(reads) - set(wide)}
    assert all(
        any(mark in name for mark in ("3×33×35", "4×2×3", "unaligned", "one number", "token_log_probs"))
        for name in narrow
    ), narrow


def test_the_kept_table_lists_the_same_launches(table: str) -> None:
    kept = TABLE.read_text()
    remedy = "run: python benchmarks/compiled_triton.py --write"
    assert [row[:2] for row in rows_of(kept)] == [row[:2] for row in rows_of(table)], remedy
    if f"Triton {triton.__version__};" in kept:
        assert rows_of(kept) == rows_of(table), remedy
