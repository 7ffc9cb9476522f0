"""Checkpoints that are kept or deleted, order of the draws."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastinvdpo.errors import InvalidInput
from fastinvdpo.io import sealed, unsealed
from fastinvdpo.trainer.batches import DrawOrder, drops_caption
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
from tests.trainer.tiny import complete_checkpoints


def _checkpoint(value: float, ema: bool = False) -> Checkpoint:
    weights = {"weight": torch.full((2, 3), value, dtype=torch.bfloat16)}
    return Checkpoint(weights, weights if ema else None, {"random": [random_state()]}, {"config": {}, "run": {}})


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 100):
        save_checkpoint(tmp_path, step, _checkpoint(step), keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert find_checkpoint("auto", tmp_path) == tmp_path / "step-00000100"
    assert find_checkpoint("auto", tmp_path / "other") is None


def test_copies_and_what_a_user_left_in_a_checkpoint_are_kept(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 2, _checkpoint(2), keep=1)
    shutil.copytree(first, tmp_path / "step-00000002-keep")
    (first / "notes.txt").write_text("mine")
    save_checkpoint(tmp_path, 4, _checkpoint(4), keep=1)
    newest = save_checkpoint(tmp_path, 6, _checkpoint(6), keep=1)
    assert [path.name for path in first.iterdir()] == ["notes.txt"]
    assert load_checkpoint(tmp_path / "step-00000002-keep").meta["step"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert complete_checkpoints(tmp_path) == [newest]
    (newest / "notes.txt").write_text("mine")
    (newest / "state.pt").write_bytes(b"")
    assert load_checkpoint(save_checkpoint(tmp_path, 6, _checkpoint(6), keep=1)).meta["step"] == 6
    assert (newest / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_reads_back_as_it_was(tmp_path: Path, ema: bool) -> None:
    stored = load_checkpoint(save_checkpoint(tmp_path, 3, _checkpoint(0.5, ema), keep=1))
    assert stored.meta["step"] == 3
    assert stored.meta["versions"] == versions()
    assert stored.trainable["weight"].dtype == torch.bfloat16
    assert torch.equal(stored.trainable["weight"], torch.full((2, 3), 0.5, dtype=torch.bfloat16))
    assert (stored.ema is not None) == ema


def test_damaged_checkpoints_count_for_nothing_and_copies_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, _checkpoint(step), keep=3)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000002-keep")
    flip(tmp_path / "step-00000006" / "trainable.safetensors", 300)
    with pytest.warns(UserWarning, match=r"step-00000006 is not used: the content of trainable\.safetensors"):
        assert find_checkpoint("auto", tmp_path) == tmp_path / "step-00000004"
    save_checkpoint(tmp_path, 5, _checkpoint(5), keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002-keep", "step-00000005", "step-00000006"}
    save_checkpoint(tmp_path, 8, _checkpoint(8), keep=2)
    assert complete_checkpoints(tmp_path) == [tmp_path / "step-00000005", tmp_path / "step-00000008"]


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    """Or it changes nothing of what is read."""
    path, other = (save_checkpoint(tmp_path / name, 3, _checkpoint(0.5, True), keep=1) for name in ("one", "other"))
    expected = load_checkpoint(path)
    draw = random.Random(0)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for bit in draw.sample(range(8 * len(content)), 40):
            flip(file, bit)
            try:
                stored = load_checkpoint(path)
            except InvalidInput as error:
                assert str(error).startswith(f"resume = '{path}'") and file.name in str(error)
            else:
                assert file.name == "meta.json"
                kept = {name: value for name, value in stored.meta.items() if name in expected.meta}
                assert kept == expected.meta
            file.write_bytes(content)
    other_ema = other / "ema.safetensors"
    other_ema.write_bytes((path / "trainable.safetensors").read_bytes()[:-1] + b"\0")
    with pytest.raises(InvalidInput, match=r"ema\.safetensors"):  # another run's
        load_checkpoint(other)


def test_changed_libraries_are_told(tmp_path: Path) -> None:
    meta = load_checkpoint(save_checkpoint(tmp_path, 3, _checkpoint(0.5), keep=1)).meta
    assert changes(meta["versions"], versions()) == ""
    assert changes({**meta["versions"], "torch": "1.0"}, versions()) == f"torch 1.0 → {versions()['torch']}"


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]

    random.gauss(0, 1)  # leaves a second number in store
    np.random.randn()
    state = load_checkpoint(save_checkpoint(tmp_path, 1, _checkpoint(0.0), keep=1)).state["random"][0]
    expected = draw()
    assert draw() != expected
    set_random_state(state)
    assert draw() == expected


def test_a_history_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_history(tmp_path / "history.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_history(tmp_path / "none") == []


@pytest.mark.parametrize(("batch", "accumulation", "processes"), [(12, 1, 1), (3, 4, 1), (2, 2, 3), (1, 3, 4)])
def test_a_step_has_the_same_draws_however_they_are_dealt(batch: int, accumulation: int, processes: int) -> None:
    for step in (0, 1, 7):
        draws = [
            draw
            for rank in range(processes)
            for micro in range(accumulation)
            for draw in DrawOrder(10, 0, batch, accumulation, processes, rank).micro_batch(step, micro)
        ]
        assert sorted(draws) == list(range(12 * step, 12 * step + 12))


def test_every_epoch_has_every_pair_once_in_another_order() -> None:
    order = DrawOrder(pairs=50, seed=3, batch_size=4, accumulation=1)
    epochs = [[order.pair_index(draw) for draw in range(50 * epoch, 50 * epoch + 50)] for epoch in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(50))
    assert epochs[0] != epochs[1] != epochs[2]
    again = DrawOrder(pairs=50, seed=3, batch_size=25, accumulation=2)
    assert [again.pair_index(draw) for draw in range(50)] == epochs[0]
    other = DrawOrder(pairs=50, seed=4, batch_size=4, accumulation=1)
    assert [other.pair_index(draw) for draw in range(50)] != epochs[0]


def test_caption_dropout_has_its_rate_and_depends_on_seed_and_draw_alone() -> None:
    dropped = [drops_caption(0, draw, 0.3) for draw in range(4000)]
    assert abs(np.mean(dropped) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 4000)
    assert dropped == [drops_caption(0, draw, 0.3) for draw in range(4000)]
    assert dropped != [drops_caption(1, draw, 0.3) for draw in range(4000)]
    assert not any(drops_caption(0, draw, 0.0) for draw in range(100))


def test_sealed_json_tells_when_it_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    content = {"rows": [1, 2.5, None], "nested": {"ü": True}}
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
