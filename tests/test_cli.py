"""The command line: from arguments to files and exit status, mistakes as one message without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fastinvdpo import cli
from fastinvdpo.models import load_model
from tests.trainer import tiny

ROOT = Path(__file__).parents[1]


def _run(*arguments: str, before: str = "pass", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``fastinvdpo ARGUMENTS`` in a process of its own, after the statements ``before``."""
    code = f"import sys; {before}; from fastinvdpo.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    tiny.write_model(tmp_path / "model")
    tiny.write_data(tmp_path / "pairs.parquet")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.mapping(tmp_path, "inpo")))
    return tmp_path


def test_train_end_to_end_and_resume(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["optimizer.learning_rate=1e-3", "training.mixed_precision=no", "output.tensorboard=true"]
    done = _run("train", str(workspace / "run.yaml"), "training.steps=3", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 steps in ")
    assert str(workspace / "run" / "model") in done.stdout
    assert "pairs/s" in done.stderr  # the progress bar
    assert "Traceback" not in done.stderr
    trained, base = load_model("digits", workspace / "run" / "model"), load_model("digits", workspace / "model")
    pairs = list(zip(trained.network.parameters(), base.network.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert list((workspace / "run" / "tensorboard").iterdir())

    assert cli.main(["train", str(workspace / "run.yaml"), "training.steps=5", *arguments, "--no-progress"]) == 0
    assert "pairs/s" not in capfd.readouterr().err
    rows = [json.loads(line) for line in (workspace / "run" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_precompute_then_train(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(workspace / "run.yaml"), f"cache.path={workspace / 'cache'}", "--no-progress"]
    assert cli.main(["precompute", *arguments]) == 0
    assert (
        f"10 pairs: 20 images, 4 captions, 0 network evaluations. Cache: {workspace / 'cache'}"
        in capfd.readouterr().out
    )
    assert cli.main(["train", *arguments]) == 0
    assert cli.main(["precompute", *arguments, "cache.dtype=bf16"]) == 2
    assert "cache.dtype ('fp32' there, 'bf16' here)" in capfd.readouterr().err
    assert cli.main(["precompute", str(workspace / "run.yaml")]) == 2
    assert "cache.path = None: names no directory to store into" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_status_1(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model("digits", workspace / "model")
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    shutil.rmtree(workspace / "model")
    model.save(workspace / "model")
    assert cli.main(["train", str(workspace / "run.yaml"), "--no-progress"]) == 1
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("error: The loss of step 1 is not finite: pair in data row ")
    assert "timestep" in message


MISTAKES = {
    "no configuration": (["train"], "CONFIG.yaml = None: is missing"),
    "no such file": (["train", "nowhere.yaml"], "config = 'nowhere.yaml': cannot be read"),
    "unknown key": (["train", "{config}", "training.step=3"], "did you mean training.steps?"),
    "unknown preset": (["train", "--preset", "inpo-sd14"], "did you mean inpo-sd15"),
    "preset without data": (["train", "--preset", "inpo-sd15"], "data.path = None: is missing"),
    "no such data": (["train", "{config}", "data.path=nowhere.parquet"], "nowhere.parquet"),
    "no such model": (["train", "{config}", "model.path=nowhere"], "nowhere"),
    "no such checkpoint": (["train", "{config}", "--resume", "nowhere"], "resume = 'nowhere'"),
    "unknown demo method": (["demo", "--method", "ppo"], "method = 'ppo': is not known"),
    "unknown model to invert": (["invert", "{image}", "--model", "nowhere", "--family", "digits"], "nowhere"),
    "no image to invert": (["invert", "nowhere.png", "--model", "{model}", "--family", "digits"], "nowhere.png"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_message(
    workspace: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(workspace / "image.png")
    places = {"config": workspace / "run.yaml", "image": workspace / "image.png", "model": workspace / "model"}
    template, message = MISTAKES[name]
    assert cli.main([part.format(**places) for part in template]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert "Remedy: " in shown.err
    assert not (workspace / "run" / "model").exists()


@pytest.mark.parametrize("arguments", [["train", "--frobnicate"], ["frobnicate"], []])
def test_usage_errors_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Usage: fastinvdpo" in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", ["train", "demo", "invert", "doctor"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert command in capsys.readouterr().out
    if command == "doctor":
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
    else:
        assert cli.main([command, "--help"]) == 0
    assert f"fastinvdpo {command}" in capsys.readouterr().out


def test_dry_run_prints_the_resolved_configuration(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(workspace / "run.yaml"), "method.eta=0.25", "--dry-run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["method"]["eta"] == 0.25
    assert resolved["training"]["ema_decay"] is None
    assert not (workspace / "run").exists()


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--preset", "list"]) == 0
    assert "smpo-sdxl" in capsys.readouterr().out.splitlines()


def test_doctor_needs_no_extra() -> None:
    packages = ("typer", "rich", "yaml", "pydantic", "diffusers", "transformers", "accelerate", "peft")
    absent = "; ".join(f"sys.modules[{name!r}] = None" for name in packages)
    done = _run("doctor", "--json", before=absent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["healthy"] is True
    refused = _run("train", "run.yaml", before=absent)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the command line needs the package 'typer'")
    assert "pip install 'fastinvdpo[train]'" in refused.stderr


def test_warnings_are_one_line(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [
        "method={name: inversion-dpo, num_inference_steps: 2, variant: distance}",
        "model.init_perturbation=0.01",
    ]
    arguments = ["training.steps=1", "optimizer.warmup_steps=0", "--no-progress"]
    assert cli.main(["train", str(workspace / "run.yaml"), *options, *arguments]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("warning: variant 'distance' scores the squared distance") for line in lines)


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastinvdpo._examples.digits import run

    received: dict[str, Any] = {}
    monkeypatch.setattr(run, "run_demo", lambda **options: received.update(options))
    options = ["--method", "smpo", "--preference", "bold", "--seed", "3", "--steps", "7", "--control", "shuffle"]
    assert cli.main(["demo", *options, "--output", "here", "--train-base", "--no-progress"]) == 0
    assert received == {
        "method": "smpo",
        "preference": "bold",
        "seed": 3,
        "steps": 7,
        "output": Path("here"),
        "control": "shuffle",
        "train_base": True,
        "progress": False,
    }


def test_invert_writes_its_report(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(workspace / "image.png")
    options = ["--model", str(workspace / "model"), "--family", "digits", "--num-inference-steps", "4"]
    output = workspace / "inverted"
    assert cli.main(["invert", str(workspace / "image.png"), *options, "--output", str(output)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((output / "report.json").read_text())
    assert report["num_inference_steps"] == 4
    assert report["network_evaluations"] == 8
    assert (output / "invert.png").is_file()
