"""What accelerate's launcher was told is used where the configuration is silent, and refused where they disagree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastinvdpo import cli
from fastinvdpo.errors import InvalidInput
from fastinvdpo.trainer.opening import check_launch, open_accelerator, with_launcher
from tests.trainer import tiny


def test_flags_are_used_where_the_configuration_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(tmp_path)
    assert with_launcher(config) is config
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = with_launcher(config)
    assert (found.training.mixed_precision, found.training.gradient_accumulation_steps) == ("bf16", 4)
    assert with_launcher(found) is found
    changed = {"mixed_precision": "bf16", "gradient_accumulation_steps": 4}
    assert found == tiny.config(tmp_path, training=changed)
    # The loop divides by it; accelerate must not once more.
    assert open_accelerator(found).gradient_accumulation_steps == 1
    (tmp_path / "run.yaml").write_text(json.dumps(tiny.mapping(tmp_path)))
    assert cli.main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    assert "mixed_precision: bf16" in capsys.readouterr().out


def test_what_the_launcher_exports_unasked_is_no_contradiction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    config = tiny.config(tmp_path, training={"mixed_precision": "bf16"}, performance={"compile": False})
    assert with_launcher(config) is config


@pytest.mark.parametrize(
    ("variable", "value", "sections", "message"),
    [
        ("MIXED_PRECISION", "bf16", {"training": {"mixed_precision": "no"}}, "training.mixed_precision = 'no': contra"),
        ("MIXED_PRECISION", "fp8", {}, "training.mixed_precision = 'fp8'"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", {"training": {"gradient_accumulation_steps": 2}}, "--gradient_accumulat"),
        ("GRADIENT_ACCUMULATION_STEPS", "auto", {}, "training.gradient_accumulation_steps = 'auto'"),
        ("DYNAMO_BACKEND", "INDUCTOR", {"performance": {"compile": False}}, "performance.compile = False"),
        ("USE_DEEPSPEED", "true", {}, "--use_deepspeed = True"),
        ("USE_MEGATRON_LM", "true", {}, "--use_megatron_lm = True"),
        ("USE_PARALLELISM_CONFIG", "true", {}, "--use_parallelism_config = True"),
    ],
)
def test_contradictions_and_what_is_not_supported_are_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    sections: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
        with_launcher(tiny.config(tmp_path, **sections))
    assert "Remedy: " in str(caught.value)


def test_shards_that_accelerate_does_not_make_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator: Any = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"))
    with pytest.raises(InvalidInput, match=r"--use_fsdp = True: has no effect here, where accelerate chose NO"):
        check_launch(tiny.config(tmp_path), accelerator)
