"""Folders, ranked images and shards, in any encoding that names itself; bad rows are counted by line or member."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastinvdpo.data import PairDataset, open_source, records
from fastinvdpo.data.sources import detect_format
from fastinvdpo.errors import InvalidInput
from tests.data.test_pairs import encoded, image
from tests.data.test_sources import captions, write_images, write_lines, write_tar


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with images."""
    write_images(tmp_path / "set")
    return tmp_path / "set"


PNGS = {"winner.png": encoded(image(0)), "loser.png": encoded(image(1))}
GOOD = {"image_0": "images/0-0.png", "image_1": "images/0-1.png", "label": 0, "caption": "a"}


def opened(path: Path, *causes: str) -> PairDataset:
    """The pairs of a set some of whose rows are broken for these causes, in their order."""
    with pytest.warns(UserWarning, match=rf"left out {len(causes)} broken rows"):
        dataset = PairDataset(path, max_broken=len(causes))
    assert [line["cause"] for line in dataset.broken.lines()] == list(causes)
    return dataset


def test_a_folder_names_winner_and_loser_or_has_other_names_and_images_elsewhere(root: Path, tmp_path: Path) -> None:
    write_lines(root / "pairs.jsonl", [{"winner": "images/1-1.png", "loser": "images/1-0.png", "prompt": "one"}])
    pair = PairDataset(root)[0]
    assert (pair.winner.getpixel((0, 0)), pair.loser.getpixel((0, 0)), pair.caption) == (101, 1, "one")
    record = {"left": "2-0.png", "right": "2-1.png", "label": 1, "text": "two"}
    path = write_lines(tmp_path / "mine.jsonl", [record])
    names = {"jpg_0": "left", "jpg_1": "right", "caption": "text"}
    dataset = PairDataset(open_source(path, columns=names, image_root=root / "images"))
    assert (dataset[0].winner.getpixel((0, 0)), dataset[0].caption) == (102, "two")


RANKED = {"prompt": "p", "image_path": ["images/0-0.png", "images/1-0.png", "images/2-0.png"]}


@pytest.mark.parametrize(
    ("entry", "choice", "expected"),
    [
        ({"rank": [2, 1, 3]}, "all", [(1, 0), (0, 2), (1, 2)]),
        ({"rank": [2, 1, 3]}, "best", [(1, 0), (1, 2)]),
        ({"rank": [1, 2, 1]}, "all", [(0, 1), "tie", (2, 1)]),
        ({"human_preference": [0, 0, 1]}, "best", [(2, 0), (2, 1)]),
    ],
)
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_ranked_images_become_pairs(
    root: Path, entry: dict[str, Any], choice: str, expected: list[Any], lines: bool
) -> None:
    path = root / ("ranked.jsonl" if lines else "ranked.json")
    write_lines(path, [RANKED | entry]) if lines else path.write_text(json.dumps([RANKED | entry]))
    assert detect_format(path) == "hpd"
    dataset = PairDataset(open_source(path, rank_pairs=choice), ties="keep")
    found = ["tie" if p.tie else (p.winner.getpixel((0, 0)), p.loser.getpixel((0, 0))) for p in dataset]
    assert found == expected


@pytest.mark.parametrize("text", ["un café noir".encode("utf-8-sig"), "un café noir".encode("utf-16")])
def test_encodings_that_tell_themselves_are_read(root: Path, text: bytes) -> None:
    assert captions(write_tar(root / "s.tar", [{**PNGS, "txt": text}])) == ["un café noir"]
    line = json.dumps({"winner": "images/0-0.png", "loser": "images/0-1.png", "caption": "un café noir"}) + "\n"
    encoding = "utf-16" if text.startswith(b"\xff\xfe") else "utf-8-sig"
    (root / "pairs.jsonl").write_bytes((2 * line.replace("\\u00e9", "é")).encode(encoding))
    assert captions(root / "pairs.jsonl") == ["un café noir"] * 2


def test_encodings_that_cannot_be_told_are_broken_rows(root: Path) -> None:
    texts = ("café".encode("latin-1"), "cafe".encode("utf-16-le"), b"a")
    shard = write_tar(root / "s.tar", [{**PNGS, "txt": text} for text in texts])
    assert len(opened(shard, *["malformed caption"] * 2)) == 1
    line = '{"winner": "images/0-0.png", "loser": "images/0-1.png", "caption": "%s"}\n'
    lines = [(line % "café").encode("latin-1"), (line % "a \\ud83d").encode(), b"[" * 10**5, (line % "a").encode()]
    (root / "pairs.jsonl").write_bytes(b"\n".join(lines))
    assert len(opened(root / "pairs.jsonl", "malformed row", "malformed caption", "malformed row")) == 1


def test_rows_that_cannot_be_used_are_told_by_line_or_entry(root: Path) -> None:
    changes = ({"label": 2}, {"caption": None}, {"image_1": "images/no.png"})
    records = [GOOD, "{not json", *(GOOD | change for change in changes), []]
    path = write_lines(root / "pairs.jsonl", [*records, {k: v for k, v in GOOD.items() if k != "image_0"}])
    first = ("malformed row", "malformed label", "missing caption", "missing image", "malformed row", "missing image")
    assert opened(path, *first).broken.lines()[1]["place"] == "row 2 (pairs.jsonl, line 3)"
    with pytest.raises(InvalidInput, match=r"pairs.jsonl, line 2 = '10 bytes': is not valid JSON"):
        PairDataset(path)
    entries = [RANKED | {"rank": [1, 2]}, RANKED | {"rank": [1, 2, 3]}, {"prompt": "p", "rank": [1]}, 7]
    (root / "r.json").write_text(json.dumps(entries))
    assert len(opened(root / "r.json", "malformed label", "malformed row", "malformed row")) == 3


def test_two_values_of_one_key_are_a_broken_row_unless_they_agree(root: Path) -> None:
    records = [GOOD | {"prompt": "a"}, GOOD | {"prompt": "b"}, GOOD | {"jpg_1": "images/1-1.png"}]
    path = write_lines(root / "pairs.jsonl", records)
    assert [pair.caption for pair in opened(root, *["malformed row"] * 2)] == ["a"]
    with pytest.raises(InvalidInput, match=r"line 2, prompt = 'b': is another caption than 'a'.*caption=prompt"):
        PairDataset(root)
    write_lines(path, records[:2])
    assert captions(root, columns={"caption": "prompt"}) == ["a", "b"]
    texts = [{"json": b'{"caption": " a"}', "txt": b"a\n"}, {"json": b'{"caption": "a"}', "txt": b"b"}]
    shard = write_tar(root / "s.tar", [PNGS | text for text in texts])
    assert opened(shard, "malformed caption").caption(0) == " a"


def test_a_listing_is_read_line_by_line_and_a_line_has_a_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_LARGEST_LISTING", 10)
    write_lines(root / "pairs.jsonl", [GOOD] * 3)
    assert len(PairDataset(root)) == 3
    monkeypatch.setattr(records, "_LARGEST_TEXT", 50)
    with pytest.raises(InvalidInput, match=r"pairs.jsonl'?: cannot be read \(a line has more than 50 bytes\)"):
        PairDataset(root)


def test_broken_members_of_shards(root: Path) -> None:
    whole = {**PNGS, "txt": b"text\n"}
    others = [{"json": b"{"}, {"json": b'{"label": 1}'}, {"json": b'{"a":1,"a":2}'}, {"0.jpg": encoded(image(5))}]
    missing = {"winner.png": encoded(image(0)), "txt": b"t"}
    write_tar(root / "s.tar", [whole, whole | others[0], missing, *(whole | more for more in others[1:])])
    with tarfile.open(root / "s.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("2.txt"))
    rows = ["malformed row"] * 2 + ["malformed label"] + ["malformed row"] * 2
    dataset = opened(root / "s.tar", *rows)
    assert dataset[0].caption == "text"
    assert "'2.txt': is the name of two members" in dataset.broken.lines()[1]["problem"]


@pytest.fixture
def outside(root: Path, tmp_path: Path) -> Path:
    """An image outside the folder of the data, and what is none."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").write_bytes(encoded(image(7)))
    (root / "link").symlink_to(tmp_path / "other")
    os.mkfifo(root / "pipe")
    return tmp_path / "other" / "a.png"


def test_images_of_a_folder_lie_in_it_or_where_the_user_says(root: Path, outside: Path) -> None:
    bad = [str(outside), "../other/a.png", "link/a.png", "pipe", "images", "/dev/zero", "a\0b", "x" * 5000, "~/a.png"]
    absolute = GOOD | {"image_1": str(root / "images" / "0-1.png")}
    write_lines(root / "pairs.jsonl", [absolute, *(GOOD | {"image_1": place} for place in bad)])
    dataset = opened(root, *["missing image"] * len(bad))
    assert not any(file.is_relative_to(outside.parent) for file in dataset.source.files())
    with pytest.raises(InvalidInput, match=r"line 2.* lies outside the folder.*data\.image_root"):
        PairDataset(root)
    named = [{"image_0": "other/a.png", "image_1": "set/images/0-1.png", "label": 1, "caption": "a"}]
    source = open_source(write_lines(root / "pairs.jsonl", named), image_root=root.parent)
    assert PairDataset(source)[0].loser.getpixel((0, 0)) == 7


def test_images_of_a_repository_lie_in_it_or_where_the_user_says(root: Path, outside: Path) -> None:
    near, far = ({"bytes": None, "path": str(path)} for path in (root / "images" / "0-0.png", outside))
    rows = [{"jpg_0": near, "jpg_1": other, "label_0": 0.0, "caption": "a"} for other in (near, far)]
    (root / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "train.parquet")
    with pytest.raises(InvalidInput, match=r"row 1.* lies outside the folder.*data\.image_root"):
        PairDataset(open_source(root, format="datasets"))
    dataset = PairDataset(open_source(root, format="datasets", image_root=root.parent))
    assert dataset[1].winner.getpixel((0, 0)) == 7


def test_members_that_are_no_files_or_lie_about_their_size(root: Path) -> None:
    good = {"json": b'{"label": 0, "caption": "a"}', "0.png": encoded(image(1)), "1.png": encoded(image(2))}
    path = write_tar(root / "0.tar", [good])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("1.0.png", tarfile.SYMTYPE), ("1.1.png", tarfile.LNKTYPE), ("1.json", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert len(PairDataset(path)) == 1
    for size in (b"\xff" * 12, b"77777777777\0"):
        header = bytearray(path.read_bytes())
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
        (root / "1.tar").write_bytes(header)
        with pytest.raises(InvalidInput, match=r"1\.tar"):
            open_source(root / "1.tar")


def test_shards_that_end_early_are_refused(root: Path) -> None:
    whole = {**PNGS, "txt": b"text\n"}
    data = write_tar(root / "s.tar", [whole, whole]).read_bytes()
    end = max(i for i in range(0, len(data), 512) if any(data[i : i + 512])) + 512
    for kept in (*range(512, end, 512), 700, end):
        (root / "s.tar").write_bytes(data[:kept])
        with pytest.raises(InvalidInput, match=r"s.tar.*(ends early|cannot be read as an uncompressed tar file)"):
            open_source(root / "s.tar")
    (root / "s.tar").write_bytes(data + data)
    with pytest.raises(InvalidInput, match="holds more after its end"):
        open_source(root / "s.tar")
