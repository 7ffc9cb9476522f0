"""The CUDA kernels as nvcc compiles them for one architecture: nothing spills, and rows move in 128-bit accesses.

``make test-deep`` runs this file, by name; ``python -m benchmarks.compiled_cuda`` compiles for all of them.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import compiled_cuda

OBSTACLE = compiled_cuda.obstacle()
pytestmark = [
    pytest.mark.skipif(OBSTACLE is not None, reason=f"CUDA kernels not compiled: {OBSTACLE}"),
    pytest.mark.xdist_group("compiled"),  # once
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return compiled_cuda.table(["sm_90a"])


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    spilling = [r["kernel"] for r in rows if r["spill_store_bytes"] or r["spill_load_bytes"] or r["stack_bytes"]]
    assert spilling == []


def test_registers_let_several_blocks_run_at_a_time(rows: list[dict[str, Any]]) -> None:
    """On one multiprocessor, which has 65536; the loads of 768 to 1024 threads hide the latency of memory."""
    blocks = {"preference_loss.cu": 4, "affine_step.cu": 3, "pair_statistics.cu": 2}  # of 256 threads
    assert [row["kernel"] for row in rows if row["registers"] * 256 * blocks[row["file"]] > 65536] == []


def test_rows_move_in_128_bits(rows: list[dict[str, Any]]) -> None:
    assert [row["kernel"] for row in rows if compiled_cuda.widest(row["loads"]) < 128] == []
    sums = ("preference_loss_forward", "pair_statistics_forward")
    writers = [row for row in rows if row["kernel"].partition("<")[0] not in sums]
    assert writers
    assert [row["kernel"] for row in writers if compiled_cuda.widest(row["stores"]) < 128] == []


def test_every_kernel_is_in_the_committed_table(rows: list[dict[str, Any]]) -> None:
    committed = json.loads(compiled_cuda.RESULTS.read_text())["kernels"]
    names = {row["kernel"] for row in rows}
    assert len(names) == len(rows) == 68
    for architecture in compiled_cuda.ARCHITECTURES:
        there = {row["kernel"] for row in committed if row["architecture"] == architecture}
        assert there == {name for name in names if architecture != "sm_80" or ", cluster>" not in name}
    assert all(row["spill_store_bytes"] == row["spill_load_bytes"] == 0 for row in committed)
    assert all(compiled_cuda.widest(row["loads"]) >= 128 for row in committed)
