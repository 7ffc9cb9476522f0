"""Videos as folders of frames, MP4 files and single images; each frame is read as an image is."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastinvdpo.data import PairDataset, open_source, write_pairs
from fastinvdpo.data.content import content_of
from fastinvdpo.errors import InvalidInput, MissingExtra
from fastinvdpo.io import Digests

SIZE = (20, 16)  # width, height


def shade(value: int) -> Image.Image:
    """Gray of a value, white in the left half."""
    image = Image.new("RGB", SIZE, (value,) * 3)
    image.paste((255, 255, 255), (0, 0, SIZE[0] // 2, SIZE[1]))
    return image


def write_video(folder: Path, values: list[int], first: int = 8) -> None:
    """Frames ``8.png``, ``9.png``, ``10.png`` and so on, which sorted as text would begin with the third."""
    folder.mkdir(parents=True)
    for number, value in enumerate(values, first):
        shade(value).save(folder / f"{number}.png")
    (folder / ".DS_Store").write_bytes(b"x")


def write_rows(root: Path, *rows: dict[str, Any]) -> Path:
    (root / "pairs.jsonl").write_text("".join(json.dumps({"caption": "a", **row}) + "\n" for row in rows))
    return root / "pairs.jsonl"


def open_videos(path: Path, frames: int = 5, **options: Any) -> PairDataset:
    return PairDataset(open_source(path).with_frames(frames), **options)


def grays(frames: tuple[Image.Image, ...]) -> list[int]:
    return [image.getpixel((image.width - 1, 0))[0] for image in frames]  # type: ignore[index]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_video(tmp_path / "a", [10, 20, 30, 40, 50, 60])
    write_video(tmp_path / "b", [15, 25, 35, 45, 55])
    return tmp_path


ROW = {"winner": "a", "loser": "b"}


def test_a_folder_gives_its_first_frames_by_the_numbers_in_their_names(root: Path) -> None:
    turned = shade(20).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "a" / "9.png", exif=exif)  # upright it is as the others
    shade(10).convert("RGBA").save(root / "a" / "8.png")
    dataset = open_videos(write_rows(root, ROW), resolution=16)
    pair = dataset[0]
    assert [grays(side.frames) for side in pair.sides] == [[10, 20, 30, 40, 50], [15, 25, 35, 45, 55]]
    assert pair.winner is pair.sides[0].frames[0] and pair.winner.size == (16, 16)
    assert all(np.array_equal(np.asarray(frame)[:, :8], np.full((16, 8, 3), 255)) for frame in pair.sides[0].frames)
    assert pair.winner_geometry.crop_top_left == (0, 2)
    flipped = open_videos(write_rows(root, ROW), resolution=16, random_flip=True, seed=1)
    sides = [flipped.pair(0, draw).sides[0].frames for draw in range(8)]
    assert {len({frame.getpixel((0, 0)) == (255,) * 3 for frame in frames}) for frames in sides} == {1}
    assert {frames[0].getpixel((0, 0)) == (255,) * 3 for frames in sides} == {True, False}


def test_what_a_frame_is_counts_for_the_content_and_nothing_behind_the_last(root: Path) -> None:
    def digest(frames: int | None = 5) -> Any:
        source = open_source(path).with_frames(frames)
        source.resolve(("jpg_0", "jpg_1", "caption"))
        return content_of(source, Digests())["data images"]

    path = write_rows(root, ROW)
    before, key = digest(), open_videos(path)[0].winner_key
    shade(99).save(root / "a" / "13.png")
    assert digest() == before and open_videos(path)[0].winner_key == key
    shade(99).save(root / "a" / "12.png")
    assert digest() != before and open_videos(path)[0].winner_key != key


def test_an_image_is_a_video_of_one_frame(root: Path) -> None:
    rows = [{"jpg_0": shade(1), "jpg_1": shade(2), "label_0": 1, "label_1": 0, "caption": "a"}]
    write_pairs(root / "pairs.parquet", rows)
    pair, plain = open_videos(root / "pairs.parquet", 1)[0], PairDataset(root / "pairs.parquet")[0]
    assert [grays(side.frames) for side in pair.sides] == [[1], [2]]
    assert plain.sides[0].frames == () and plain.winner_key == pair.winner_key
    assert plain.winner.tobytes() == pair.winner.tobytes()


@pytest.mark.parametrize("decoded", [0, 1], ids=["headers", "decoded"])
def test_what_is_no_video_of_so_many_frames_is_a_broken_row(root: Path, decoded: int) -> None:
    """Found when the data is opened, from headers alone too."""
    write_video(root / "short", [1, 2, 3, 4])
    write_video(root / "sizes", [1, 2, 3, 4, 5])
    Image.new("RGB", (8, 8)).save(root / "sizes" / "10.png")
    write_video(root / "text", [1, 2, 3, 4, 5])
    (root / "text" / "9.png").write_text("none")
    write_video(root / "outside", [1, 2, 3, 4, 5])
    (root / "outside" / "9.png").unlink()
    (root / "outside" / "9.png").symlink_to("/etc/hostname")
    (root / "empty").mkdir()
    causes = {"short": "4: are fewer frames than data.frames = 5", "sizes": r"\(8, 8\): is the .* of frame 2",
              "text": "frame 1.* is not an intact image", "outside": "lies outside the folder", "empty": "0: are fewer",
              "nothing": "cannot be read"}  # fmt: skip
    for name, problem in causes.items():
        with pytest.raises(InvalidInput, match=problem):
            open_videos(write_rows(root, ROW, {"winner": "a", "loser": name}), resolution=16)
    if decoded:
        path = write_rows(root, ROW, *({"winner": "a", "loser": name} for name in causes))
        with pytest.warns(UserWarning, match="left out 6 broken rows"):
            found = open_videos(path, resolution=16, max_broken=6)
        counts = {"missing image": 2, "corrupt image": 2, "short video": 2}
        assert (len(found), found.summary.broken) == (1, counts)


def test_images_are_read_as_before_and_a_folder_says_what_it_wants(root: Path) -> None:
    with pytest.raises(InvalidInput, match=r"is a folder, as the frames of a video are in.*set data\.frames"):
        PairDataset(write_rows(root, ROW))
    with pytest.raises(InvalidInput, match=r"data\.frames = 0: is no number of frames"):
        open_source(root / "pairs.jsonl").with_frames(0)


def mp4(values: list[int], rotation: int = 0) -> bytes:
    """Made losslessly enough that a gray is itself to a few steps."""
    av: Any = pytest.importorskip("av", reason="MP4 files are read by av (extra video), which is not installed")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *SIZE, "yuv420p", 4_000_000
        for value in values:
            container.mux(stream.encode(av.VideoFrame.from_image(shade(value))))
        container.mux(stream.encode())
    data = buffer.getvalue()
    if rotation:  # the matrix of the track's header, which is one as it was written
        place = data.index(b"tkhd") + 4 + 40
        assert data[place : place + 4] == (1 << 16).to_bytes(4, "big")
        signs = {90: (0, 1, -1, 0), 270: (0, -1, 1, 0)}[rotation]
        a, b, c, d = ((sign << 16).to_bytes(4, "big", signed=True) for sign in signs)
        zero = bytes(4)
        data = data[:place] + a + b + zero + c + d + zero + data[place + 24 :]
    return data


def test_an_mp4_gives_its_first_frames_upright(root: Path) -> None:
    (root / "c.mp4").write_bytes(mp4([10, 70, 130, 190, 250, 30]))
    path = write_rows(root, {"winner": "c.mp4", "loser": "b"})
    for broken in (0, 1):  # counted, and decoded
        pair = open_videos(path, max_broken=broken)[0]
        assert np.abs(np.subtract(grays(pair.sides[0].frames), [10, 70, 130, 190, 250])).max() < 8
        assert pair.winner.size == SIZE
        with pytest.raises(InvalidInput, match=r"6: are fewer frames than data\.frames = 9|every row that is no tie"):
            open_videos(path, 9, max_broken=broken)
    (root / "c.mp4").write_bytes(mp4([10] * 5, rotation=90))
    frames = open_videos(write_rows(root, {"winner": "c.mp4", "loser": "c.mp4"}))[0].sides[0].frames
    assert frames[0].size == SIZE[::-1]
    top, bottom = (frames[0].getpixel((8, y))[0] for y in (1, 18))  # type: ignore[index]
    assert top > 240 and bottom < 20, "turned clockwise, as the matrix says, its left is at the top"
    (root / "c.mp4").write_bytes(mp4([10] * 5)[:400])
    with pytest.raises(InvalidInput, match="is not an intact MP4"):
        open_videos(write_rows(root, {"winner": "c.mp4", "loser": "b"}))


def test_without_its_reader_an_mp4_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (root / "c.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(64))
    with pytest.raises(MissingExtra, match=r"reading MP4 files needs the package 'av'.*fastinvdpo\[video\]"):
        open_videos(write_rows(root, {"winner": "c.mp4", "loser": "b"}))
    assert len(open_videos(write_rows(root, ROW), resolution=16)) == 1
