"""Encoded image bytes: reading, checking and decoding them, with errors that name the place they came from.

Images look as in a viewer: turned upright by their EXIF entry, 16-bit gray scaled to 8 bits, colors converted to sRGB
through their profile, transparency composited on white, of several frames the first.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
from PIL import Image, ImageChops, ImageCms, ImageOps

from fastinvdpo.data.broken import BrokenRow, broken
from fastinvdpo.io import read_bounded

# What PIL may open: no format that starts another program or reads other files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MOST_PIXELS = 2**26  # of one image, as stored and as scaled
_MOST_BYTES = 2**28  # of one file
_HEIC = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_HEADER_BYTES = 64 * 1024
_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 0x0102, 0x0106  # tags of EXIF and TIFF
_TURN_MARKS = (b"eXIf", b"exif", b"Orientation")  # in a PNG, before or after the pixels
_TIFF_STARTS = (b"II*\0", b"MM\0*")  # some versions of PIL turn these when they state the size, others do not
_BACKGROUND = (255, 255, 255, 255)
FRAME = b"fastinvdpo frame\0"
_NUMBER = re.compile(r"(\d+)")
REMEDY = "re-encode or remove the row, or allow some broken rows with data.max_broken"
# All that PIL's parsers and decoders raise for damaged data; UnidentifiedImageError is an OSError.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, Image.DecompressionBombError)


def image_bytes(cell: Any, where: str, roots: Sequence[Path] | None = None, frames: int | None = None) -> memoryview:
    """The encoded bytes of one table cell, not copied: binary, or the ``{bytes, path}`` of an image feature.

    ``cell`` is a pyarrow scalar; ``where`` names row and column in errors. With ``roots`` the file at ``path`` is read
    where ``bytes`` is null, as in data sets made from image folders, if it lies below one of them; see
    :func:`placed_bytes`.
    """
    shown = cell
    if isinstance(cell, arrow.StructScalar) and "bytes" in cell:
        path = cell["path"].as_py() if "path" in cell else None
        cell = cell["bytes"]
        if roots is not None and path and not cell.is_valid:
            return placed_bytes(roots, path, where, frames)
    binary = arrow.BinaryScalar | arrow.LargeBinaryScalar
    if isinstance(cell, binary) and not isinstance(cell, arrow.StringScalar):
        data = cell.as_buffer()
        if data is not None and data.size:
            return memoryview(data).cast("B")
    raise broken("missing image", where, shown.as_py(), "holds no encoded image bytes", REMEDY)


def file_below(roots: Sequence[Path], place: str, where: str) -> Path:
    """The image file at ``place``, a path relative to the first of ``roots``, or an absolute one.

    Data may come from anywhere, and what it names may not lie anywhere: raises ``BrokenRow`` where the file, links
    followed, lies below none of ``roots``.
    """
    try:
        path = roots[0] / place
        found = path.resolve()
        if any(found.is_relative_to(root.resolve()) for root in roots):
            return path
    except (OSError, ValueError, RuntimeError) as error:  # NUL, or links that go round
        raise broken("missing image", where, place, f"is no path ({error})", REMEDY) from None
    remedy = "if you trust the data, name a directory above the images with data.image_root"
    raise broken("missing image", where, place, "lies outside the folder of the data", remedy)


def placed_bytes(roots: Sequence[Path], place: str, where: str, frames: int | None = None) -> memoryview:
    """The content of the file at ``place``, below ``roots``, or of a folder there the first ``frames`` files, joined.

    Each of these stands behind :data:`FRAME` and its size in 8 bytes. Raises ``BrokenRow`` where something is not
    there, or a folder where no videos are read.
    """
    path = file_below(roots, place, where)
    if not os.path.isdir(path):  # unlike Path.is_dir, of names that are too long as well
        return file_bytes(path, where)
    if frames is None:
        problem = "is a folder, as the frames of a video are in"
        raise broken("missing image", where, place, problem, "set data.frames for videos, or name an image")
    found = [file_bytes(file_below(roots, f"{place}/{file.name}", where), where) for file in frames_in(path)[:frames]]
    return memoryview(b"".join(part for one in found for part in (FRAME, len(one).to_bytes(8, "big"), one)))


def frames_in(folder: Path) -> list[Path]:
    """What is not hidden in a folder, by name, the numbers in it by their value: ``10.png`` after ``9.png``."""
    try:
        found = [file for file in folder.iterdir() if not file.name.startswith(".")]
    except OSError:  # reported as a video without frames
        return []
    return sorted(found, key=lambda file: (_by_value(file.name), file.name))


def _by_value(name: str) -> list[int | str]:
    return [int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(name))]


def file_bytes(path: Path, where: str, offset: int = 0, size: int = -1) -> memoryview:
    """The content of an image file, or ``size`` bytes of it. Raises ``BrokenRow`` where there is none."""
    try:
        data = read_bounded(path, _MOST_BYTES, offset, size)
        problem = "is an empty file"
    except (OSError, OverflowError) as error:
        data, problem = b"", f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if not data:
        raise broken("missing image", where, str(path), problem, "restore the file, " + REMEDY)
    return memoryview(data)


def decode(data: memoryview, where: str) -> Image.Image:
    """The whole image, as RGB or 8-bit gray. Raises ``BrokenRow`` for bytes that are not an intact image."""
    try:
        if bytes(data[: len(_PNG_START)]) == _PNG_START:
            # PIL decodes PNGs with damaged or missing data without complaint; only verify() looks at their checksums.
            with _open(data) as opened:
                opened.verify()
        with _open(data) as opened:
            check_pixels(opened.height, opened.width)
            opened.load()
            return _as_seen(opened)
    except DAMAGED as error:
        raise _broken(data, where, error) from error


def decode_mask(data: memoryview, where: str, size: tuple[int, int]) -> Image.Image:
    """The mask of an image of ``size`` ``(height, width)`` as 8-bit gray: what is white counts, what is black does not.
    Raises ``BrokenRow`` for one of another size, with colors, or where nothing counts.
    """
    image, remedy = decode(data, where), "store a gray image as large as the one it belongs to, 255 where it counts"
    gray = image.convert("L")
    if image.size[::-1] != size:
        raise broken("malformed mask", where, image.size[::-1], f"is not the size of its image, {size}", remedy)
    if image.mode != "L" and ImageChops.difference(image, gray.convert("RGB")).getbbox() is not None:
        raise broken("malformed mask", where, image.mode, "has colors", remedy)
    if most_of(gray) < 2:  # 1: of a mask in zeros and ones
        raise broken("malformed mask", where, f"0 to {most_of(gray)}", "is black, so that nothing counts", remedy)
    return gray


def most_of(mask: Image.Image) -> int:
    """The lightest gray of a mask."""
    return int(mask.getextrema()[1])  # type: ignore[arg-type]  # a pair of numbers, as there is one channel


def _as_seen(image: Any) -> Image.Image:
    """A copy of a loaded image as a viewer shows it, in the mode RGB or L.

    Raises ``ValueError`` where its pixels have no known black and white, or its inks no known colors.
    """
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    tags = getattr(image, "tag_v2", {})  # of a TIFF, which may have 12 bits, or 0 for white
    scale = 255 / (2 ** tags.get(_BITS, (16,))[0] - 1)
    scale, offset = (-scale, 255.5) if tags.get(_PHOTOMETRIC) == 0 else (scale, 0.5)
    profile, image = image.info.get("icc_profile"), ImageOps.exif_transpose(image)
    if deep:
        image = image.convert("I").point(lambda value: value * scale + offset).convert("L")
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise ValueError(f"its pixels, of the mode {image.mode}, are numbers without a known black and white")
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        gray = image.mode in ("LA", "La")
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("L" if gray else "RGB")
    elif image.mode not in ("L", "CMYK"):
        image = image.convert("L" if image.mode == "1" and profile else "RGB")
    image = _through_profile(image, profile) if profile else image
    if alpha is None:
        return image.convert("RGB") if image.mode == "CMYK" else image.copy()
    image.putalpha(alpha)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image).convert("RGB")


def _through_profile(image: Image.Image, data: bytes) -> Image.Image:
    """The image in sRGB. One of three colors or of gray whose profile cannot be used stays as it is."""
    spaces = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        name = (profile.profile.profile_description or "").lower()
        if profile.profile.xcolor_space == spaces[image.mode] and "srgb" in name:
            return image
        converted: Any = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        if image.mode == "CMYK":
            raise ValueError(f"its color profile cannot be used ({error})") from error
        return image
    return converted.convert("L") if image.mode == "L" else converted


def probe(data: memoryview, where: str) -> tuple[int, int]:
    """``(height, width)`` from the header alone; images that look cut off are decoded to make sure.

    Reads the ends of ``data`` only, so that opening a large memory-mapped set does not read all of it.
    """
    head, tail = bytes(data[:_HEADER_BYTES]), bytes(data[-_HEADER_BYTES:])
    is_png = head.startswith(_PNG_START)
    cut_off = (is_png and _PNG_END not in tail[-16:]) or (head.startswith(_JPEG_START) and _JPEG_END not in tail[-16:])
    may_turn = is_png and any(mark in part for mark in _TURN_MARKS for part in (head, tail))
    if cut_off or may_turn or head.startswith(_TIFF_STARTS):
        image = decode(data, where)
        return image.height, image.width
    try:
        try:
            return _stated_size(head)
        except DAMAGED:
            if len(data) <= _HEADER_BYTES:
                raise
            return _stated_size(data)  # a long preamble, or a format that states its size at the end
    except DAMAGED as error:
        raise _broken(data, where, error) from error


def _stated_size(data: bytes | memoryview) -> tuple[int, int]:
    with _open(data) as opened:
        size = int(opened.height), int(opened.width)
        check_pixels(*size)
        lies = opened.format != "PNG" and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return size[::-1] if lies else size


def _open(data: bytes | memoryview) -> Any:
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_pixels is stricter
        return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def check_pixels(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise ValueError(f"{width:,} x {height:,} pixels are more than {MOST_PIXELS:,}")


def _broken(data: memoryview, where: str, error: BaseException) -> BrokenRow:
    cause = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))  # the same words in every process
    if bytes(data[4:8]) == b"ftyp" and bytes(data[8:12]) in _HEIC:
        cause = "it is HEIC, which is not read: convert it to JPEG or PNG"
    return broken("corrupt image", where, f"{len(data)} bytes", f"is not an intact image ({cause})", REMEDY)
