"""``fastinvdpo train --dry-run``: the configuration as it is read back, and the count of network evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastinvdpo import cli
from fastinvdpo.trainer import load_config, presets
from fastinvdpo.trainer.dry_run import count_evaluations
from tests.trainer import tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusion-dpo": ("diffusion-dpo", {"training": {"gradient_accumulation_steps": 2}}),
    "inpo": ("inpo", {}),
    "inpo-static": ("inpo", {"method": {"static_shapes": True}}),
    "inpo-released": ("inpo", {"method": {"compat": "released"}}),
    "smpo": ("smpo", {"method": {"renoise_iterations": 2, "score_range": "auto"}}),
    "whole-chain": ("inversion-dpo", {}),
    "some-levels": ("inversion-dpo", {"method": {"timesteps_per_step": 2}}),
    "two-passes": ("inversion-dpo", {"training": {"max_batch": 4, "gradient_passes": 2}}),
    "cached": ("inversion-dpo", {"cache": {"path": "cache"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_count_is_what_the_run_counts(workspace: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("fastinvdpo.trainer.dry_run._PAIRS", 6)
    name, sections = CASES[case]
    sections = {**sections, "training": {"steps": 3, **sections.get("training", {})}, "optimizer": {"warmup_steps": 0}}
    config = tiny.config(workspace, name, **sections)
    counted = count_evaluations(config)
    if case == "smpo":  # which cannot train with a range that is not stored
        sections["method"] = {"renoise_iterations": 2}
    row = tiny.trained(workspace, "run", name, **sections).history[-1]
    pairs = 3 * config.effective_batch()
    assert row["network_evaluations_with_gradient"] == pairs * counted.with_gradient
    if config.training.gradient_accumulation_steps == 1:  # exactly the pairs that were counted
        assert row["network_evaluations_without_gradient"] == pairs * counted.without_gradient


@pytest.mark.parametrize("name", presets())
def test_a_dry_run_of_every_preset(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--preset", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(out)
    assert load_config("printed.yaml") == load_config(None, ["data.path=path/to/pairs"], preset=name)
    assert "# Network evaluations a pair: " in out
    assert not list(tmp_path.glob("runs"))
