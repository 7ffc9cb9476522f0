"""Encoded image bytes: checking and decoding them, with errors that name row and column."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from fastinvdpo._extras import require
from fastinvdpo.errors import InvalidInput, invalid

if TYPE_CHECKING:
    from PIL.Image import Image

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_HEADER_BYTES = 64 * 1024
_REMEDY = "re-encode or remove the row, or allow some broken rows with data.max_broken"


def image_bytes(cell: Any, row: int, column: str) -> memoryview:
    """The encoded bytes of one table cell, not copied: binary, or the ``{bytes, path}`` of an image feature.

    ``cell`` is a pyarrow scalar.
    """
    arrow = require("pyarrow", extra="train", purpose="reading preference pairs")
    if isinstance(cell, arrow.StructScalar) and "bytes" in cell:
        cell = cell["bytes"]
    if not isinstance(cell, arrow.BinaryScalar | arrow.LargeBinaryScalar) or isinstance(cell, arrow.StringScalar):
        raise invalid(f"row {row}, column {column!r}", cell.as_py(), "holds no encoded image bytes", _REMEDY)
    data = cell.as_buffer()
    if data is None or data.size == 0:
        raise invalid(f"row {row}, column {column!r}", cell.as_py(), "holds no encoded image bytes", _REMEDY)
    return memoryview(data).cast("B")


def decode(data: memoryview, row: int, column: str) -> Image:
    """The whole picture, as RGB or 8-bit grey. Raises ``InvalidInput`` for bytes that are not an intact image."""
    image_module = require("PIL.Image", extra="train", purpose="decoding images")
    try:
        if bytes(data[: len(_PNG_START)]) == _PNG_START:
            # PIL decodes PNGs with damaged or missing data without complaint; only verify() looks at their checksums.
            with image_module.open(io.BytesIO(data)) as opened:
                opened.verify()
        with image_module.open(io.BytesIO(data)) as opened:
            opened.load()
            image: Image = opened.copy() if opened.mode in ("L", "RGB") else opened.convert("RGB")
    except _broken_image_errors(image_module) as error:
        raise _broken(data, row, column, error) from error
    return image


def probe(data: memoryview, row: int, column: str) -> tuple[int, int]:
    """``(height, width)`` from the header alone; images that look cut off are decoded to make sure.

    Reads the ends of ``data`` only, so that opening a large memory-mapped set does not read all of it.
    """
    image_module = require("PIL.Image", extra="train", purpose="decoding images")
    if _looks_cut_off(data):
        image = decode(data, row, column)
        return image.height, image.width
    try:
        return _stated_size(image_module, data[:_HEADER_BYTES])
    except _broken_image_errors(image_module) as header_error:
        if len(data) <= _HEADER_BYTES:
            raise _broken(data, row, column, header_error) from header_error
    try:
        return _stated_size(image_module, data)  # a long preamble, or a format that states its size at the end
    except _broken_image_errors(image_module) as error:
        raise _broken(data, row, column, error) from error


def _stated_size(image_module: Any, data: memoryview) -> tuple[int, int]:
    with image_module.open(io.BytesIO(data)) as opened:
        return int(opened.height), int(opened.width)


def _looks_cut_off(data: memoryview) -> bool:
    head, tail = bytes(data[:16]), bytes(data[-16:])
    if head.startswith(_JPEG_START):
        return _JPEG_END not in tail
    return head.startswith(_PNG_START) and _PNG_END not in tail


def _broken_image_errors(image_module: Any) -> tuple[type[BaseException], ...]:
    # All that PIL's parsers and decoders raise for damaged data; UnidentifiedImageError is an OSError.
    return (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, image_module.DecompressionBombError)


def _broken(data: memoryview, row: int, column: str, error: BaseException) -> InvalidInput:
    shown = f"{len(data)} bytes starting with {bytes(data[:8])!r}"
    return invalid(f"row {row}, column {column!r}", shown, f"is not an intact image ({error})", _REMEDY)
