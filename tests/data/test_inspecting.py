"""``fastinvdpo data inspect``: what it counts, and what the sheet shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fastinvdpo import cli
from fastinvdpo.data import PairDataset
from fastinvdpo.data.inspecting import sheet
from tests.data.test_pairs import encoded, image, row, store


def test_the_summary_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = {"score_0": 0.5, "score_1": 0.25}
    rows = [row(0, **scored), row(1, 0.0, **scored), row(2, 0.5, **scored), row(3, caption="", **scored)]
    rows += [row(4, jpg_0=b"text", **scored), row(5, caption=None, **scored), row(6, jpg_1=None, **scored)]
    path = store(tmp_path / "p.parquet", rows)
    assert cli.main(["data", "inspect", str(path), "--output", str(tmp_path / "out"), "--pairs", "2"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["rows"] == "7" and shown["pairs"] == "3" and shown["ties"] == "1 (dropped)"
    assert shown["broken"] == "1 missing caption, 1 missing image, 1 corrupt image"
    assert shown["images"] == "8 x 8 (6)"
    assert shown["captions"] == "3 distinct, 1 empty, 0 to 9 characters, median 9"
    assert "winners 0.4167, losers 0.3333" in shown["scores"] and "66.7%" in shown["scores"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "broken.jsonl").read_text().splitlines()]
    broken = [(4, "corrupt image"), (5, "missing caption"), (6, "missing image")]
    assert [(line["row"], line["cause"]) for line in lines] == broken
    with Image.open(tmp_path / "out" / "pairs.png") as drawn:
        assert drawn.size == (2 * 176 + 360, 2 * 176)


def test_options_are_those_of_the_section_and_masks_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(0, 0.5, text="mapped"), row(1, text=None)]
    rows = [one | {"mask_0": one["jpg_0"], "mask_1": one["jpg_1"]} for one in rows]
    rows[1]["mask_1"] = encoded(Image.new("L", (8, 8)))
    command = ["data", "inspect", str(store(tmp_path / "p.parquet", rows)), "--output", str(tmp_path / "out")]
    for options, expected in (
        ([], {"ties": "1 (dropped)", "masks": "mask_0, mask_1, not read (data.masks)", "broken": "none"}),
        (["ties=keep", "data.columns.caption=text"], {"ties": "1 (kept)", "broken": "1 missing caption"}),
        (["masks=true", "ties=keep"], {"masks": "mask_0, mask_1", "broken": "1 malformed mask"}),
    ):
        assert cli.main([*command, *options]) == 0
        shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert {name: shown[name] for name in expected} == expected
    assert cli.main([*command, "tie=keep"]) == 2
    assert "did you mean data.ties?" in capsys.readouterr().err


def test_the_sheet_frames_winners_green_and_losers_red(tmp_path: Path) -> None:
    wide = {"jpg_0": encoded(image(200, (32, 8))), "jpg_1": encoded(image(30, (8, 32)))}
    path = store(tmp_path / "p.parquet", [row(0), row(1, 0.5), row(2, **wide)])
    page = sheet(list(PairDataset(path, resolution=8, ties="keep")))
    assert page.size == (2 * 176 + 360, 3 * 176)
    frames = [page.getpixel(place) for place in ((6, 88), (182, 88), (6, 264), (182, 264))]
    assert frames == [(46, 125, 50), (198, 40, 40), (117, 117, 117), (117, 117, 117)]
    assert page.getpixel((8, 8)) == (0, 0, 0) and page.getpixel((184, 8)) == (100, 100, 100)


def test_files_that_are_no_reports_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path / "p.parquet", [row(0), row(1, jpg_0=b"text")])
    command = ["data", "inspect", str(path), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0 == cli.main(command), "its own reports are replaced"
    for name in ("data.json", "broken.jsonl", "pairs.png"):
        written = (tmp_path / "out" / name).read_bytes()
        for mine in (b'[{"rank": [1, 2]}]', encoded(image(0)), b"{}"):
            (tmp_path / "out" / name).write_bytes(mine)
            assert cli.main(command) == 2
            assert f"{name}': is there, and was not written by fastinvdpo" in capsys.readouterr().err
            assert (tmp_path / "out" / name).read_bytes() == mine
        (tmp_path / "out" / name).write_bytes(written)
    assert cli.main([*command[:-1], str(path / "below")]) == 2
    assert "cannot be written" in capsys.readouterr().err
