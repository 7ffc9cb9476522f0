"""Videos in the place of images: the frames of a folder, an MP4 file, or a single image, a video of one frame."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from fastinvdpo._extras import require
from fastinvdpo.data.broken import broken
from fastinvdpo.data.images import DAMAGED, FRAME, REMEDY, check_pixels, decode, probe

Size = tuple[int, int]  # (height, width) in pixels


def decode_video(data: memoryview, where: str, frames: int) -> list[Image.Image]:
    """The first frames, of one size, each as :func:`decode` gives an image. Raises ``BrokenRow`` for bytes that are no
    intact video, or one of fewer frames.
    """
    found = list(_mp4(data, where, frames)) if _is_mp4(data) else [decode(*one) for one in _stored(data, where, frames)]
    _check(where, [(image.height, image.width) for image in found], frames)
    return found


def probe_video(data: memoryview, where: str, frames: int) -> Size:
    """``(height, width)``: of images from the headers, of MP4 from the first frame, the others being counted."""
    if _is_mp4(data):
        sizes = [(image.height, image.width) for image in _mp4(data, where, 1)] * _packets(data, where, frames)
    else:
        sizes = [probe(*one) for one in _stored(data, where, frames)]
    return _check(where, sizes, frames)


def _check(where: str, sizes: list[Size], frames: int) -> Size:
    if len(sizes) < frames:
        problem = f"are fewer frames than data.frames = {frames}"
        raise broken("short video", where, len(sizes), problem, "lower data.frames, or leave the row out")
    for number, size in enumerate(sizes):
        if size != sizes[0]:
            problem = f"is the (height, width) of frame {number}, and {sizes[0]} that of the first"
            raise broken("corrupt image", where, size, problem, REMEDY)
    return sizes[0]


def _stored(data: memoryview, where: str, frames: int) -> Iterator[tuple[memoryview, str]]:
    """Every image of a folder, with the place of it; or the image that there is."""
    if data and bytes(data[: len(FRAME)]) != FRAME:  # nothing at all is of an empty folder
        yield data, where
        return
    start = 0
    for number in range(frames):
        if start >= len(data):
            return
        head = start + len(FRAME) + 8
        size = int.from_bytes(data[head - 8 : head], "big")
        if bytes(data[start : start + len(FRAME)]) != FRAME or head + size > len(data):
            raise broken("corrupt image", where, f"{len(data)} bytes", f"ends within frame {number}", REMEDY)
        yield data[head : head + size], f"{where}, frame {number}"
        start = head + size


def _is_mp4(data: memoryview) -> bool:
    return bytes(data[4:8]) == b"ftyp" and bytes(data[8:11]) not in (b"avi", b"hei", b"hev", b"mif", b"msf")


def _mp4(data: memoryview, where: str, frames: int) -> Iterator[Image.Image]:
    """The first frames, upright."""
    with _opened(data, where) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            image = frame.to_image()
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
            if number + 1 == frames:
                return


def _packets(data: memoryview, where: str, most: int) -> int:
    """How many frames are shown, at most ``most``, without decoding them."""
    count = 0
    with _opened(data, where) as (container, stream):
        for packet in container.demux(stream):
            count += bool(packet.size) and not packet.is_discard
            if count == most:
                break
    return count


@contextmanager
def _opened(data: memoryview, where: str) -> Iterator[tuple[Any, Any]]:
    """The container and the stream of an MP4. Its format is fixed, so that nothing but these bytes is read. Raises
    ``BrokenRow`` for what the decoder refuses, inside of it too.
    """
    av: Any = require("av", extra="video", purpose="reading MP4 files")
    try:
        with av.open(io.BytesIO(data), format="mp4", metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ValueError("it holds no video")
            stream = container.streams.video[0]
            check_pixels(stream.height, stream.width)
            yield container, stream
    except (av.error.FFmpegError, *DAMAGED) as error:
        problem = f"is not an intact MP4 ({type(error).__name__}: {error})"
        raise broken("corrupt image", where, f"{len(data)} bytes", problem, REMEDY) from error
