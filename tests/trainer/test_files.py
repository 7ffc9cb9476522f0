"""Files of a run: checkpoints that are kept, deleted or refused; random generators; history.jsonl; sealed JSON."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastinvdpo.errors import InvalidInput
from fastinvdpo.io import sealed, unsealed
from fastinvdpo.trainer.callbacks import read_history
from fastinvdpo.trainer.checkpoint import (
    Checkpoint,
    changes,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    versions,
)
from fastinvdpo.trainer.state import random_state, set_random_state


def save(folder: Path, step: int, keep: int = 1, *, ema: bool = False) -> Path:
    weights = {"weight": torch.full((2, 3), step / 2, dtype=torch.bfloat16)}
    state = {"random": [random_state()]}
    return save_checkpoint(folder, step, Checkpoint(weights, weights if ema else None, state, {"config": {}}), keep)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoints_are_kept_and_read_back_as_they_were(tmp_path: Path) -> None:
    for step in (2, 4, 10, 100):
        save(tmp_path, step, keep=2, ema=step == 100)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    newest = find_checkpoint("auto", tmp_path)
    assert newest == tmp_path / "step-00000100" and find_checkpoint("auto", tmp_path / "other") is None
    with_average, without = load_checkpoint(newest), load_checkpoint(tmp_path / "step-00000010")
    assert (with_average.ema is not None) and without.ema is None
    assert without.meta["step"] == 10 and without.meta["versions"] == versions()
    assert without.trainable["weight"].dtype == torch.bfloat16
    assert torch.equal(without.trainable["weight"], torch.full((2, 3), 5.0, dtype=torch.bfloat16))


def test_copies_and_what_a_user_left_in_a_checkpoint_are_kept(tmp_path: Path) -> None:
    first = save(tmp_path, 2)
    shutil.copytree(first, tmp_path / "step-00000002-keep")
    (first / "notes.txt").write_text("mine")
    save(tmp_path, 4)
    newest = save(tmp_path, 6)
    assert names(first) == ["notes.txt"]
    assert load_checkpoint(tmp_path / "step-00000002-keep").meta["step"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint("auto", tmp_path) == newest
    (newest / "notes.txt").write_text("mine")
    (newest / "state.pt").write_bytes(b"")
    assert load_checkpoint(save(tmp_path, 6)).meta["step"] == 6
    assert (newest / "notes.txt").read_text() == "mine"


def test_damaged_checkpoints_count_for_nothing(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    flip(tmp_path / "step-00000006" / "trainable.safetensors", 300)
    with pytest.warns(UserWarning, match=r"step-00000006 is not used: the content of trainable\.safetensors"):
        assert find_checkpoint("auto", tmp_path) == tmp_path / "step-00000004"
    save(tmp_path, 5)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]
    save(tmp_path, 8, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006", "step-00000008"]
    with (tmp_path / "step-00000008" / "state.pt").open("r+b") as file:
        file.truncate(100)
    (tmp_path / "step-00000005" / "meta.json").unlink()
    with pytest.warns(UserWarning) as told, pytest.raises(InvalidInput, match=r"all 3 checkpoints in .* are damaged"):
        find_checkpoint("auto", tmp_path)
    assert "step-00000008 is not used: state.pt has 100 bytes instead of" in str(told[0].message)
    assert "its meta.json cannot be read" in str(told[2].message)


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    """Or it changes nothing of what is read."""
    path, other = (save(tmp_path / name, 3, ema=True) for name in ("one", "other"))
    expected, draw = load_checkpoint(path), random.Random(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for bit in draw.sample(range(8 * len(content)), 40):
            flip(file, bit)
            try:
                found = load_checkpoint(path).meta
            except InvalidInput as error:
                assert str(error).startswith(f"resume = '{path}'") and file.name in str(error)
            else:
                assert file.name == "meta.json"
                assert {name: value for name, value in found.items() if name in expected.meta} == expected.meta
            file.write_bytes(content)
    (other / "ema.safetensors").write_bytes((path / "trainable.safetensors").read_bytes()[:-1] + b"\0")
    with pytest.raises(InvalidInput, match=r"ema\.safetensors"):  # another run's
        load_checkpoint(other)


def test_changed_libraries_are_told(tmp_path: Path) -> None:
    before = load_checkpoint(save(tmp_path, 3)).meta["versions"]
    assert changes(before, versions()) == ""
    assert changes({**before, "torch": "1.0"}, versions()) == f"torch 1.0 → {versions()['torch']}"


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]

    random.gauss(0, 1)  # leaves a second number in store
    np.random.randn()
    state = load_checkpoint(save(tmp_path, 1)).state["random"][0]
    expected = draw()
    assert draw() != expected
    set_random_state(state)
    assert draw() == expected


def test_a_history_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_history(tmp_path / "history.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_history(tmp_path / "none") == []


def test_sealed_json_tells_when_it_was_changed(tmp_path: Path) -> None:
    path, content = tmp_path / "manifest.json", {"rows": [1, 2.5, None], "nested": {"ü": True}}
    path.write_text(json.dumps(sealed(content)))
    assert unsealed(path) == content
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match="changed"):
        unsealed(path)
    path.write_text(json.dumps(content))  # of an earlier version
    assert unsealed(path) == content
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no object"):
        unsealed(path)
