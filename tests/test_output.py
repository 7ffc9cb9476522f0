"""Output directories: one process at a time, and nothing is replaced that no run wrote, by no command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fastinvdpo import cli
from fastinvdpo._examples.emoji.run import WRITTEN
from fastinvdpo.errors import InvalidInput
from fastinvdpo.output import MARK, OutputDirectory
from tests import commands


def write_results(path: Path, content: str = "1") -> None:
    with OutputDirectory(path) as output:
        output.claim("report.json", "model", files=["log", "parts/*"])
        output.write("report.json", {"content": content})
        with output.directory("model") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "weights").write_text(content)
        (path / "log").write_text(content)


def test_own_results_are_replaced_also_in_a_copy(tmp_path: Path) -> None:
    write_results(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    for name in ("run", "copy"):
        write_results(tmp_path / name, "22")
        assert json.loads((tmp_path / name / "report.json").read_text()) == {"content": "22"}
        assert (tmp_path / name / "model" / "sub" / "weights").read_text() == "22"


@pytest.mark.parametrize("name", ["report.json", "model/weights", "log", "parts/1", "parts", MARK, "model"])
def test_what_no_run_wrote_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidInput, match=f"output = .*{name.split('/')[0]}.*: is there, and was not written"):
        write_results(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [name]


@pytest.mark.parametrize("name", ["report.json", "model/sub/weights"])
def test_a_result_that_a_user_changed_or_put_in_is_refused(tmp_path: Path, name: str) -> None:
    write_results(tmp_path)
    for content in ("mine", "9" if name != "report.json" else '{\n  "content": "9"\n}\n'):  # the latter of equal size
        (tmp_path / name).write_text(content)
        with pytest.raises(InvalidInput, match=f"{name}.*not written by fastinvdpo as it is now"):
            write_results(tmp_path)
        assert (tmp_path / name).read_text() == content


def test_files_of_the_user_in_a_result_are_kept_when_it_is_replaced_or_removed(tmp_path: Path) -> None:
    write_results(tmp_path)
    (tmp_path / "model" / "sub" / "notes.txt").write_text("mine")
    write_results(tmp_path, "2")
    assert (tmp_path / "model" / "sub" / "notes.txt").read_text() == "mine"
    with OutputDirectory(tmp_path) as output:
        output.remove("model")
        output.claim("model")
    assert [path.name for path in (tmp_path / "model").rglob("*")] == ["sub", "notes.txt"]
    with OutputDirectory(tmp_path) as output:
        output.remove()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "a" / "b") as output:
        output.claim("model", files=["log"])
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "run") as output:
        with pytest.raises(InvalidInput, match=r"directory = .*run': another process is writing there"):
            OutputDirectory(tmp_path / "run", "directory")
        output.write("report.json", {})
    write_results(tmp_path / "run")


def test_a_directory_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "log").write_text("1")
    with OutputDirectory(tmp_path, earlier=lambda path: (path / "log").is_file()) as output:
        output.claim("report.json", files=["log"])
        output.write("report.json", {"content": 1})
    write_results(tmp_path)


def test_killed_between_record_and_result_it_goes_on(tmp_path: Path) -> None:
    write_results(tmp_path)
    with OutputDirectory(tmp_path) as output, pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with output.directory("model") as partial:
            (partial / "other").write_text("2")
    with (tmp_path / MARK).open("a") as mark:
        mark.write('{"wrote": {"mod')
    write_results(tmp_path, "3")
    (tmp_path / "model" / "other").write_text("mine")
    with pytest.raises(InvalidInput, match="model/other"):
        write_results(tmp_path)


def test_places_that_cannot_be_written_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "there" / "report.json").mkdir(parents=True)
    with pytest.raises(InvalidInput, match=r"report\.json': is there"), OutputDirectory(tmp_path / "there") as output:
        output.claim("report.json")
    for place, problem in (("file", "is a file"), ("file/run", "cannot be written"), ("loop", "cannot be written")):
        with pytest.raises(InvalidInput, match=f"output = .*{place}'.*{problem}"):
            OutputDirectory(tmp_path / place)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "run")
    write_results(tmp_path / "link")
    assert (tmp_path / "elsewhere" / "run" / "report.json").is_file() and (tmp_path / "link").is_symlink()
    with pytest.raises(InvalidInput, match="is what the run reads"):
        OutputDirectory(tmp_path / "link", reads=[None, tmp_path / "elsewhere" / "run"])


@pytest.mark.parametrize("text", ['{"fastinvdpo": 1}\nno json\n', '{"fastinvdpo": 1}\n[]\n'])
def test_a_damaged_mark_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / MARK).write_text(text)
    with pytest.raises(InvalidInput, match=rf"{MARK}': is damaged"):
        OutputDirectory(tmp_path)
    assert (tmp_path / MARK).read_text() == text
    assert os.listdir(tmp_path) == [MARK]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path) as output:
        output.write("summary.json", {"seed": 1})
        with pytest.raises(InvalidInput, match="summary"):
            output.write("summary.json", {"seed": float("nan")})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"seed": 1}
    assert sorted(os.listdir(tmp_path)) == [MARK, "summary.json"]


# No command deletes or replaces a file that no run wrote.

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


def test_no_file_of_a_user_is_replaced_by_the_demo(
    words: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = [*DEMO, *words["evaluate"][1:3]]  # --base
    written = [*WRITTEN, "training/model/unet/config.json", "training/history.jsonl", "training/data.json"]
    for number, names in enumerate([["summary.json"], [written[-3]], [written[-1]], written]):
        refused(tmp_path / str(number), names, demo, monkeypatch)


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
    for name, command in [*words.items(), ("demo", [*DEMO, *words["evaluate"][1:3]])]:
        assert cli.main(command) == 2, name
        told = capsys.readouterr().err
        assert told.startswith("error: ") and "out" in told and len(told.splitlines()) == 1, name
