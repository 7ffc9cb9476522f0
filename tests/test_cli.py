"""The command line: from arguments to files and exit status, mistakes as one message, and no other package speaks."""

from __future__ import annotations

import importlib.util
import json
import logging
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
from tests.models.tiny import sd_pipeline
from tests.trainer import tiny
from tests.trainer.test_families import write_two_pairs

ROOT = Path(__file__).parents[1]


def _python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)


def _run(*arguments: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """``fastinvdpo ARGUMENTS`` in a process of its own, after the statements ``before``."""
    code = f"import sys; {before}; from fastinvdpo.cli import main; sys.exit(main(sys.argv[1:]))"
    return _python("-c", code, *arguments)


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
    trained, base = load_model("auto", workspace / "run" / "model"), load_model("auto", workspace / "model")
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
    model = load_model("auto", workspace / "model")
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
    "no such model": (["train", "{config}", "model.path=./nowhere"], "./nowhere': does not exist"),
    "no such checkpoint": (["train", "{config}", "--resume", "nowhere"], "resume = 'nowhere'"),
    "unknown demo method": (["demo", "--method", "ppo"], "method = 'ppo': is not known"),
    "unknown model to invert": (["invert", "{image}", "--model", "./nowhere"], "./nowhere': does not exist"),
    "no image to invert": (["invert", "nowhere.png", "--model", "{model}"], "nowhere.png"),
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


def test_help_a_dry_run_and_presets(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("train", "precompute", "data", "score", "evaluate", "invert", "demo", "doctor", "bench"):
        assert name in listed
    for name in ("train", "demo", "invert", "evaluate"):
        assert cli.main([name, "--help"]) == 0
        assert f"fastinvdpo {name}" in capsys.readouterr().out
    assert cli.main(["train", str(workspace / "run.yaml"), "method.eta=0.25", "--dry-run"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["method"]["eta"] == 0.25 and resolved["training"]["ema_decay"] is None
    assert not (workspace / "run").exists()
    assert cli.main(["train", "--preset", "list"]) == 0
    assert "smpo-sdxl" in capsys.readouterr().out.splitlines()


def test_the_command_line_without_its_extra_says_so() -> None:
    refused = _run("train", "run.yaml", before="sys.modules['typer'] = None")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the command line needs the package 'typer'")
    assert "pip install 'fastinvdpo[train]'" in refused.stderr and "Traceback" not in refused.stderr


def test_warnings_are_one_line(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [
        "method={name: inversion-dpo, num_inference_steps: 2, variant: distance}",
        "model.init_perturbation=0.01",
    ]
    arguments = ["training.steps=1", "optimizer.warmup_steps=0", "--no-progress"]
    assert cli.main(["train", str(workspace / "run.yaml"), *options, *arguments]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("warning: variant 'distance' scores the squared distance") for line in lines)


def test_invert_writes_its_report(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(workspace / "image.png")
    options = ["--model", str(workspace / "model"), "--num-inference-steps", "4"]
    output = workspace / "inverted"
    assert cli.main(["invert", str(workspace / "image.png"), *options, "--output", str(output)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((output / "report.json").read_text())
    assert report["num_inference_steps"] == 4
    assert report["network_evaluations"] == 8
    assert (output / "invert.png").is_file()


# As bitsandbytes does on CPUs with bf16 instructions; the others speak for themselves.
BITSANDBYTES = (
    "bitsandbytes.backends.cpu.ops",
    "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you already `pip install`",
)

COMMANDS = f"""
import logging, sys
class Says:
    def find_spec(self, name, path=None, target=None):
        if name == {BITSANDBYTES[0]!r}:
            print("bitsandbytes speaks")
            logging.getLogger(name).warning({BITSANDBYTES[1]!r}, "No module named 'kernels'")
sys.meta_path.insert(0, Says())
from fastinvdpo.cli import main
for words in sys.argv[1:]:
    status = main(words.split("|"))
    assert status == 0, (words, status)
"""


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """Files of a run of all weights, and of one with an adapter on quantized ones."""
    sections: dict[str, Any] = {
        "whole": {},
        "sd15": {"model": {"family": "auto", "lora": {"rank": 2}, "quantization": "nf4"}, "data": {"resolution": 16}},
    }
    for name, own in sections.items():
        (tmp_path / name).mkdir()
        short = {"training": {"steps": 1, "batch_size": 1}, "optimizer": {"warmup_steps": 0}}
        values = tiny.mapping(tmp_path / name, "diffusion-dpo", **short, **own)
        (tmp_path / name / "run.yaml").write_text(yaml.safe_dump(values))
    tiny.write_model(tmp_path / "whole" / "model")
    tiny.write_data(tmp_path / "whole" / "pairs.parquet")
    sd_pipeline().save_pretrained(tmp_path / "sd15" / "model", safe_serialization=True)
    write_two_pairs(tmp_path / "sd15")
    (tmp_path / "prompts.txt").write_text("a one\na two\n")
    (tmp_path / "mine.py").write_text("def score(images, captions):\n    return [0.0 for _ in images]\n")
    return tmp_path


def test_commands_say_nothing_foreign(both: Path) -> None:
    commands = [
        "--help",
        "train|--help",
        "doctor",
        "train|--preset|list",
        "train|whole/run.yaml|--dry-run",
        "train|whole/run.yaml|--no-progress|output.tensorboard=true",
        "train|sd15/run.yaml|--no-progress",
        "evaluate|--base|whole/model|--aligned|whole/run/model|--prompts|prompts.txt|--scorer|mine:score"
        "|--output|evaluated|num_inference_steps=2",
        "demo|--help",
        "data|inspect|whole/pairs.parquet|--output|inspected",
    ]
    done = _python("-c", COMMANDS, *commands, cwd=both)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ("bitsandbytes speaks" in done.stdout) == (importlib.util.find_spec("bitsandbytes") is not None)


def test_other_words_of_those_packages_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main(["--help"]) == cli.main(["--help"]) == 0
    logger = logging.getLogger(BITSANDBYTES[0])
    assert sum(type(one) is cli._Without for one in logger.filters) == 1
    logger.warning(BITSANDBYTES[1], "reason")
    assert caplog.messages == []
    logger.warning("the library %s cannot be loaded", "libbitsandbytes_cpu.so")
    assert caplog.messages == ["the library libbitsandbytes_cpu.so cannot be loaded"]


def test_the_package_is_a_command(tmp_path: Path) -> None:
    for words, status in ((["--help"], 0), (["train", "nowhere.yaml"], 2)):
        done = _python("-m", "fastinvdpo", *words, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        assert ("Usage: fastinvdpo" in done.stdout) == (status == 0)
    assert done.stderr.startswith("error: config = 'nowhere.yaml': cannot be read")
