"""No command deletes or replaces a file that no run wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastinvdpo import cli
from fastinvdpo._examples.digits.run import WRITTEN
from tests import commands

NAMES = ["train", "precompute", "score", "build", "inspect", "evaluate", "invert"]
DEMO = ["demo", "--method", "diffusion-dpo", "--steps", "1", "--output", "out", "--no-progress"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return commands.write_inputs(tmp_path_factory.mktemp("inputs"))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if not path.is_dir()}


def refused(root: Path, names: list[str], command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``command`` among files of a user with these names: it says so, and everything is as before."""
    for name in names:
        (root / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "out" / name).write_text("mine")
    before = files(root)
    monkeypatch.chdir(root)
    assert cli.main(command) == 2, names
    assert files(root) == before


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_a_user_is_replaced(
    words: dict[str, list[str]], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the command writes: there may be one of that name, a directory's name on a file, or all of them."""
    (tmp_path / "fresh").mkdir()
    monkeypatch.chdir(tmp_path / "fresh")
    assert cli.main(words[name]) == 0
    written = sorted(files(tmp_path / "fresh" / "out"))
    first = {path.rsplit("/", 1)[0]: path for path in written}  # one of each directory
    single = [path for path in written if path in first.values() or "/" not in path]
    above = {path.split("/")[0] for path in written if "/" in path}
    for number, names in enumerate([*([path] for path in [*single, *sorted(above)]), written]):
        refused(tmp_path / str(number), names, words[name], monkeypatch)


def test_no_file_of_a_user_is_replaced_by_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [*WRITTEN, "training/model/unet/config.json", "training/history.jsonl", "training/data.json"]
    for number, names in enumerate([["summary.json"], [written[-3]], [written[-1]], written]):
        refused(tmp_path / str(number), names, DEMO, monkeypatch)


def test_other_files_stay_where_they_are(
    words: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the results, in them, and in a checkpoint that is deleted."""
    monkeypatch.chdir(tmp_path)
    mine = ["notes.txt", "checkpoints/step-00000004/notes.txt", "model/unet/notes.txt", "checkpoints/step-4-keep/notes"]
    for command in ("train", "evaluate", "inspect", "invert"):
        assert cli.main(words[command]) == 0
        for name in mine:
            (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name).write_text("mine")
        assert cli.main([*words[command], *(["training.steps=6"] if command == "train" else [])]) == 0
    found = files(tmp_path / "out")
    assert all(found[name] == b"mine" for name in mine)
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints" / "step-00000004").iterdir()) == ["notes.txt"]


def test_a_disk_that_is_full_or_not_to_be_written_is_told_in_one_line(
    words: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file where a directory is wanted")
    monkeypatch.chdir(tmp_path)
    for name, command in [*words.items(), ("demo", DEMO)]:
        assert cli.main(command) == 2, name
        told = capsys.readouterr().err
        assert told.startswith("error: ") and "out" in told and len(told.splitlines()) == 1, name
