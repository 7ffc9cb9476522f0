"""The commands of docs/guides/data.md run, on files as it describes them; its examples are read."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fastinvdpo import cli
from fastinvdpo.data import LikedDataset, PairDataset, open_source
from tests import documentation
from tests.data.test_pairs import encoded, image, row, store
from tests.evaluation import tiny_clip as tiny

COMMANDS = documentation.commands("docs/guides/data.md")
EXAMPLES = documentation.blocks("docs/guides/data.md", "json")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def place(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the page names."""
    folder, ranked, likes, videos, structured = EXAMPLES
    for root in (tmp_path, tmp_path / "folder", tmp_path / "likes"):
        (root / "images").mkdir(parents=True)
        for name, shade in (("0-0", 0), ("0-1", 50), ("1-0", 100), ("1-1", 150)):
            (root / "images" / f"{name}.png").write_bytes(encoded(image(shade)))
    store(tmp_path / "pairs.parquet", [row(i) for i in range(3)])
    store(tmp_path / "masked.parquet", [row(i) | {"mask": encoded(image(i))} for i in range(3)])
    (tmp_path / "folder" / "pairs.jsonl").write_text(folder)
    (tmp_path / "likes" / "likes.jsonl").write_text(likes)
    for side in range(2):
        (frames := tmp_path / "videos" / "frames" / f"0-{side}").mkdir(parents=True)
        for number in range(18):
            (frames / f"{number}.png").write_bytes(encoded(image(100 * side + number)))
    (tmp_path / "videos" / "pairs.jsonl").write_text(videos)
    (tmp_path / "ranked.json").write_text(ranked)
    better = json.loads(structured)
    worse = better | {"image": "images/0-1.png", "scores": {"objects": 0.2, "relations": 0.1}}
    (tmp_path / "structured.jsonl").write_text(f"{json.dumps(better)}\n{json.dumps(worse)}\n")
    for name in ("pickscore-v1", "clip-l"):
        (tmp_path / name).symlink_to(clip)
    tiny.write_head(tmp_path / "head.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_commands_and_examples() -> None:
    assert len(COMMANDS) == 11 and len(EXAMPLES) == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(place: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    assert program == "fastinvdpo"
    assert cli.main(arguments) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    for name in re.findall(r"--output (\S+)", command):
        assert (place / name).exists() and name in shown


def test_the_examples_mean_what_the_page_says(place: Path) -> None:
    pairs = PairDataset(place / "folder" / "pairs.jsonl")
    assert [pair.winner.getpixel((0, 0)) for pair in pairs] == [50, 100]
    assert [pair.winner.getpixel((0, 0)) for pair in PairDataset(place / "ranked.json")] == [50, 0, 50]
    (video,) = PairDataset(open_source(place / "videos").with_frames(17))
    assert [frame.getpixel((0, 0)) for frame in video.sides[0].frames] == list(range(100, 117))
    (liked,) = LikedDataset(place / "likes")
    assert liked.liked and liked.side.image.getpixel((0, 0)) == 50
    assert cli.main(["data", "build", "structured.jsonl", "--output", "built.parquet"]) == 0
    built = PairDataset(place / "built.parquet")
    assert [pair.caption for pair in built] == ["a red cube left of a cat"]
    assert "| left of | 1 |" in (place / "built.md").read_text("utf-8")
