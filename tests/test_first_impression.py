"""What a new user sees: the command line says what it has to say, and no other package says anything."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastinvdpo import cli
from tests.models.tiny import sd_pipeline
from tests.trainer import tiny
from tests.trainer.test_families import write_two_pairs

ROOT = Path(__file__).parents[1]
# As bitsandbytes does on CPUs with bf16 instructions; the others speak for themselves.
BITSANDBYTES = (
    "bitsandbytes.backends.cpu.ops",
    "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you already `pip install`",
)

SHORT = {"training": {"steps": 1, "batch_size": 1}, "optimizer": {"warmup_steps": 0}}
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
def workspace(tmp_path: Path) -> Path:
    for name in ("digits", "sd15"):
        (tmp_path / name).mkdir()
    tiny.write_model(tmp_path / "digits" / "model")
    tiny.write_data(tmp_path / "digits" / "pairs.parquet")
    sd_pipeline().save_pretrained(tmp_path / "sd15" / "model", safe_serialization=True)
    write_two_pairs(tmp_path / "sd15")
    for name, sections in {
        "digits": {},
        "sd15": {"model": {"family": "auto", "lora": {"rank": 2}, "quantization": "nf4"}, "data": {"resolution": 16}},
    }.items():
        values = tiny.mapping(tmp_path / name, "diffusion-dpo", **SHORT, **sections)
        (tmp_path / name / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "prompts.txt").write_text("a one\na two\n")
    (tmp_path / "mine.py").write_text("def score(images, captions):\n    return [0.0 for _ in images]\n")
    return tmp_path


def test_commands_say_nothing_foreign(workspace: Path) -> None:
    commands = [
        "--help",
        "train|--help",
        "doctor",
        "train|--preset|list",
        "train|digits/run.yaml|--dry-run",
        "train|digits/run.yaml|--no-progress|output.tensorboard=true",
        "train|sd15/run.yaml|--no-progress",
        "evaluate|--base|digits/model|--aligned|digits/run/model|--prompts|prompts.txt|--scorer|mine:score"
        "|--output|evaluated|num_inference_steps=2",
        "demo|--help",
        "data|inspect|digits/pairs.parquet|--output|inspected",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMANDS, *commands]
    done = subprocess.run(command, env=environment, cwd=workspace, capture_output=True, text=True, timeout=600)
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
    command = [sys.executable, "-m", "fastinvdpo"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words, status in ((["--help"], 0), (["train", "nowhere.yaml"], 2)):
        done = subprocess.run(
            [*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stderr
        assert ("Usage: fastinvdpo" in done.stdout) == (status == 0)
    assert done.stderr.startswith("error: config = 'nowhere.yaml': cannot be read")
