"""The commands of docs/guides/evaluation.md run, with its training configuration, on a tiny checkpoint."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fastinvdpo import cli
from tests import documentation

COMMANDS = documentation.commands("docs/guides/evaluation.md")
(SECTION,) = documentation.blocks("docs/guides/evaluation.md", "yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A cache leaves VAE and text encoders on the disk; the evaluation needs them.
    sections = {"method": {"name": "diffusion-dpo"}, "cache": {"path": "cache"}, **yaml.safe_load(SECTION)}
    return documentation.write_place(tmp_path_factory.mktemp("documentation"), **sections)


def test_commands_run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    assert len(COMMANDS) == 4
    for command in sorted(COMMANDS, key=lambda command: "train" not in command):  # what the others evaluate comes first
        program, *arguments = shlex.split(command)
        assert program == "fastinvdpo"
        assert cli.main([*arguments, *(["--no-progress"] if "train" in command else [])]) == 0, capsys.readouterr().err
        shown = capsys.readouterr().out
        for name in re.findall(r"--output (\S+)", command):
            assert f"{name}/report.html" in shown
            assert json.loads((place / name / "evaluation.json").read_text())["scorers"]
        if "train" in command:
            assert "Best model: run/best/model" in shown
    best = json.loads((place / "run" / "best" / "best.json").read_text())
    assert best["step"] == 2 and (place / "run" / "best" / "adapter").is_dir()
    # With as many steps and prompts, the trainer's numbers are those of the command, up to the rounding of pixels
    # where other batches or a merged adapter round otherwise.
    rows = [json.loads(line) for line in (place / "run" / "evaluation" / "history.jsonl").read_text().splitlines()]
    found = json.loads((place / "runs" / "best" / "evaluation.json").read_text())["scorers"]["brightness"]
    assert [row["step"] for row in rows] == [0, 2]
    assert [row["brightness"] for row in rows] == pytest.approx(
        [found[side]["mean"] for side in ("base", "aligned")], abs=1
    )
