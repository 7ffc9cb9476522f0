"""The benchmark of training steps: what it says of evaluations, memory and gradients is true.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the networks to measure are diffusers' UNet: pip install '.[train]'")

from benchmarks import bench_step, results, step_measure, step_models
from benchmarks.live_memory import LiveMemory
from benchmarks.step_providers import (
    OTHER_OBJECTIVE,
    OURS,
    PEERS,
    Ours,
    Released,
    ReleasedNetworks,
    build_case,
)

LEVELS = 3
MICRO = step_models.Size(
    {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    (4, 8, 8),
    (3, 8),
)


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_models.SIZES, "tiny", MICRO)
    monkeypatch.setattr(step_measure, "PEAK_SIZE", {"cpu": 64, "cuda": 64})


def measured(folder: Path, method: str, *overrides: str, **options: Any) -> dict[str, dict[str, Any]]:
    settings = {"pairs": 2, "rounds": 1, "levels": LEVELS, "providers": [*PEERS, *OURS[method]], **options}
    case = build_case("tiny", method, settings["pairs"], overrides, folder, settings["levels"])
    rows = step_measure.measure(case, settings["providers"], settings["rounds"])
    return {row["provider"]: row for row in rows}


def test_live_memory_counts_what_lives_at_once() -> None:
    weight = torch.randn(100, requires_grad=True)
    with LiveMemory() as live:
        one = torch.ones(1000)
        two = one + 1
        view = two.view(10, 100)
        one += 1  # in place: nothing new
        assert (live.held, live.peak) == (8000, 8000)
        del one, two
        assert live.held == 4000  # the view keeps it
        (weight * view).sum().backward()
        # The view and the product; then the gradients of the sum and of the product's two factors, one of them a row.
        assert 8000 < live.peak < 3 * 4000
        del view
        assert live.held == 400  # the gradient; the weight was there before
    assert weight.grad is not None


def test_memory_of_our_step_does_not_grow_with_the_chain_and_the_released_one_does(tmp_path: Path) -> None:
    def peak(levels: int) -> dict[str, int]:
        options = {"pairs": 1, "rounds": 0, "levels": levels, "providers": ["released", "ours-cached"]}
        rows = measured(tmp_path / str(levels), "inversion-dpo", "training.max_batch=2", **options)
        return {name: row["peak_bytes"] for name, row in rows.items()}

    short, long = peak(2), peak(8)
    assert long["ours-cached"] < 1.1 * short["ours-cached"]
    assert long["released"] > 3 * short["released"]


@pytest.mark.parametrize("method", OURS)
def test_gradients_agree_with_the_released_order(method: str, tmp_path: Path) -> None:
    rows = measured(tmp_path, method)
    assert list(rows) == [*PEERS, *OURS[method]]
    for name, row in rows.items():
        assert row["correct"], row
        assert row["same_objective"] == (name not in OTHER_OBJECTIVE)
        if name in OTHER_OBJECTIVE:
            assert row["speedup"] is None and row["memory_ratio"] is None and row["gradient_error"] is None
        elif name not in PEERS:
            assert row["gradient_error"] < step_measure.ALLOWED
            assert set(row["speedup"]) == set(PEERS) == set(row["memory_ratio"])
    json.dumps(rows, allow_nan=False)


def test_evaluations_and_flops_per_pair(tmp_path: Path) -> None:
    """Both sides of a pair at every level, guided: 2·N·2 evaluations for the policy, and as many for an inversion."""
    rows, each = measured(tmp_path, "inversion-dpo", "training.max_batch=2"), 2 * LEVELS * 2
    expected = {
        "released": (each, each),
        "released-checkpointed": (each, each),  # the second forward of a checkpoint runs inside the network
        "ours": (each, each),  # the inversion tells what the reference predicts
        "ours-two-passes": (each, 2 * each),
        "ours-cached": (each, 0),
        "ours-cached-endpoint": (each, 0),
    }
    for name, counts in expected.items():
        row = rows[name]
        found = row["evaluations_per_pair_with_gradient"], row["evaluations_per_pair_without_gradient"]
        assert found == counts, name
    one = rows["released"]["model_flops_per_pair"] / (3 * each + each)
    assert rows["released-checkpointed"]["model_flops_per_pair"] == pytest.approx((4 * each + each) * one)
    assert rows["ours-cached"]["model_flops_per_pair"] == pytest.approx(3 * each * one)


def test_a_wrong_gradient_gets_no_speedup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ours.gradient
    monkeypatch.setattr(Ours, "gradient", lambda self, prepared: [1.01 * g for g in right(self, prepared)])
    rows = measured(tmp_path, "diffusion-dpo", rounds=0)
    assert not rows["ours"]["correct"] and rows["ours"]["memory_ratio"] is None
    assert rows["released-checkpointed"]["correct"]
    assert "wrong: 1e-02" in bench_step.table(list(rows.values()))
    one, other = [torch.tensor([3.0, 4.0]), torch.tensor([0.0])], [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    assert step_measure.relative(one, one) == 0 and step_measure.relative(other, one) == pytest.approx(0.2)
    assert step_measure.relative([one[0], torch.tensor([math.nan])], one) == math.inf
    assert step_measure.relative(one[:1], one) is None


def runs_out(*arguments: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nand a paragraph")


@pytest.mark.parametrize("where", ["gradient", "step"])
def test_a_provider_that_runs_out_of_memory_is_told_and_the_others_go_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(Released, where)

    def first_only(self: Released, prepared: Any) -> Any:
        if self.name == "released":
            self.parameters[0].grad = torch.ones_like(self.parameters[0])  # what a backward leaves half-way
            runs_out()
        assert all(parameter.grad is None for parameter in self.parameters)
        return right(self, prepared)

    monkeypatch.setattr(Released, where, first_only)
    rows = measured(tmp_path, "diffusion-dpo")
    failed = rows["released"]
    assert (
        failed["failure"].endswith(": CUDA out of memory. Tried to allocate 1.00 GiB.") and where in failed["failure"]
    )
    assert failed["correct"] is None and "milliseconds" not in failed and failed["peak_bytes"] is None
    assert rows["ours"]["correct"] and set(rows["ours"]["speedup"]) == {"released-checkpointed"}
    shown = bench_step.table(list(rows.values()))
    assert [line.split()[-3:] for line in shown.splitlines() if line.startswith("released ")] == [
        ["out", "of", "memory"]
    ]
    assert results.compare({"results": list(rows.values())}, {"results": list(rows.values())})
    json.dumps(rows, allow_nan=False)


def test_one_side_at_a_time_and_without_a_gradient_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where both sides do not fit into memory, and the float32 gradient neither: nothing is called right."""
    monkeypatch.setitem(step_models.SIZES, "tiny", dataclasses.replace(MICRO, in_turn=False))
    arguments = ["--method", "diffusion-dpo", "--pairs", "1", "--rounds", "1", "--output", str(tmp_path)]
    assert bench_step.main(arguments) == 0
    assert "sides one at a time" in capsys.readouterr().out
    monkeypatch.setattr(ReleasedNetworks, "float32_gradient", runs_out)
    assert bench_step.main([*arguments, "--override", "training.mixed_precision=bf16"]) == 1
    rows = results.read(max(tmp_path.rglob("step-*.json"), key=lambda path: path.stat().st_mtime_ns))["results"]
    assert [row["provider"] for row in rows] == [*PEERS, *OURS["diffusion-dpo"]]
    for row in rows:
        assert row["correct"] is (True if row["provider"] in OTHER_OBJECTIVE else None) and row["speedup"] is None
        assert row["milliseconds"]["median"] > 0 and row["failure"] is None
    told = capsys.readouterr()
    assert "not compared" in told.out and "out of memory in the float32 gradient" in told.err


def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "inversion-dpo", "--num-inference-steps", str(LEVELS), "--rounds", "1"]
    arguments += ["--providers", "released,ours-cached", "--override", "training.max_batch=4"]
    assert bench_step.main([*arguments, "--output", str(tmp_path)]) == 0
    (written,) = tmp_path.rglob("step-*.json")
    result = results.read(written)
    assert [row["provider"] for row in result["results"]] == ["released", "ours-cached"]
    assert result["results"][1]["max_batch"] == 4 and result["settings"]["overrides"] == ["training.max_batch=4"]
    assert {"device", "versions", "commit", "date"} <= set(result)
    assert bench_step.main([*arguments, "--output", str(tmp_path), "--compare", str(written)]) == 0
    assert "geometric means" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "huge"], "--size = 'huge': is not known"),
        pytest.param(
            ["--size", "sd15"],
            "takes hours a step on a CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--method", "ppo"], "--method = 'ppo': is not known"),
        (["--providers", "ours"], "has nothing to compare with"),
        (["--override", "training.max_bach=1"], "max_bach"),
        (["--override", "training.batch_size=3"], "use --method and --pairs"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_step.main(["--method", "diffusion-dpo", *arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
