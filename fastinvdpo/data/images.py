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
_REMEDY = "re-encode or remove the row, or allow some broken rows with data.max_broken"


def image_bytes(cell: Any, row: int, column: str) -> bytes:
    """The encoded bytes of one cell: binary, or the ``{"bytes": …, "path": …}`` of an image feature."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if not isinstance(cell, bytes | bytearray | memoryview) or len(cell) == 0:
        shown = None if cell is None else type(cell).__name__
        raise invalid(f"row {row}, column {column!r}", shown, "holds no encoded image bytes", _REMEDY)
    return bytes(cell)


def decode(data: bytes, row: int, column: str) -> Image:
    """The whole picture, as RGB or 8-bit grey. Raises ``InvalidInput`` for bytes that are not an intact image."""
    image_module = require("PIL.Image", extra="train", purpose="decoding images")
    try:
        with image_module.open(io.BytesIO(data)) as opened:
            opened.load()
            image: Image = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
    except _broken_image_errors(image_module) as error:
        raise _broken(data, row, column, error) from error
    return image.copy()


def probe(data: bytes, row: int, column: str) -> tuple[int, int]:
    """``(height, width)`` from the header alone; files that look cut off are decoded to make sure."""
    if _looks_cut_off(data):
        image = decode(data, row, column)
        return image.height, image.width
    image_module = require("PIL.Image", extra="train", purpose="decoding images")
    try:
        with image_module.open(io.BytesIO(data)) as opened:
            return int(opened.height), int(opened.width)
    except _broken_image_errors(image_module) as error:
        raise _broken(data, row, column, error) from error


def _looks_cut_off(data: bytes) -> bool:
    tail = data[-16:]
    if data.startswith(_JPEG_START):
        return _JPEG_END not in tail
    return data.startswith(_PNG_START) and _PNG_END not in tail


def _broken_image_errors(image_module: Any) -> tuple[type[BaseException], ...]:
    # What PIL's decoders raise for damaged data; UnidentifiedImageError and zlib's errors come as OSError/SyntaxError.
    return (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, image_module.DecompressionBombError)


def _broken(data: bytes, row: int, column: str, error: BaseException) -> InvalidInput:
    shown = f"{len(data)} bytes starting with {data[:8]!r}"
    return invalid(f"row {row}, column {column!r}", shown, f"is not an intact image ({error})", _REMEDY)
