"""The comparison of methods: equal network evaluations, the choice of a learning rate, runs that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastinvdpo._examples import compare_methods
from fastinvdpo._examples.digits import digits
from fastinvdpo.errors import InvalidInput
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer.dry_run import count_evaluations


@pytest.mark.parametrize("method", compare_methods.METHODS)
def test_every_method_gets_as_many_evaluations_up_to_half_a_step(method: str, tmp_path: Path) -> None:
    config = compare_methods.method_config(method, 20_000, 1e-5, 0, tmp_path, 2.0)
    found = count_evaluations(config)
    step = config.training.batch_size * (found.with_gradient + found.without_gradient)
    assert abs(config.training.steps * step - 20_000) <= step / 2
    assert config.method.name == method and config.optimizer.learning_rate == 1e-5


def test_the_best_run_is_the_one_with_the_highest_gain_that_still_shows_the_digits() -> None:
    rows = [{"gain": 0.1, "accuracy": 0.97}, {"gain": 0.2, "accuracy": 0.95}, {"gain": 0.4, "accuracy": 0.6}]
    assert compare_methods._best(rows) is rows[1]
    assert compare_methods._best(rows[2:]) is rows[2]


def test_runs_are_kept_and_the_table_and_plot_come_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "HELD_OUT", 20)
    arguments = {"evaluations": 300, "learning_rates": (1e-5,), "seeds": (0,)}
    with OutputDirectory(tmp_path / "found") as output:
        first = compare_methods.compare(output, ["mapo"], **arguments)
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "found" / "runs").iterdir()}
    with OutputDirectory(tmp_path / "found") as output:
        second = compare_methods.compare(output, ["mapo"], **arguments)
    assert first == second == json.loads((tmp_path / "found" / "comparison.json").read_text())
    assert len(runs) == 2 and {path: path.stat().st_mtime_ns for path in runs} == runs
    (run,) = first["methods"]["mapo"]["runs"]
    assert run["steps"] == 5 and run["network_evaluations"] == 320  # two a pair, 32 pairs a step
    table = (tmp_path / "found" / "comparison.md").read_text().splitlines()
    assert len(table) == 4 and table[3].startswith("| mapo | 1e-05 |")
    assert (tmp_path / "found" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_methods.main(["--output", str(tmp_path), "--methods", "ppo"]) == 2
    assert "--methods = 'ppo': is not known" in capsys.readouterr().err
    with pytest.raises(InvalidInput, match="less than one step of mapo"):
        compare_methods.method_config("mapo", 3, 1e-5, 0, tmp_path, 2.0)
