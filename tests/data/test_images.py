"""Images look as in a viewer: upright, in 8 bits, on white below transparency, in the colors of their profile."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastinvdpo.data.broken import BrokenRow
from fastinvdpo.data.images import decode, probe
from fastinvdpo.data.transforms import scaled


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> memoryview:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return memoryview(buffer.getvalue())


def seen(image: Image.Image, kind: str = "PNG", **options: Any) -> Image.Image:
    return decode(saved(image, kind, **options), "row 0")


def half_white(width: int = 32, height: int = 16) -> Image.Image:
    """White on the left, black on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "white"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_images_are_turned_upright(kind: str, orientation: int, white: str) -> None:
    stored = half_white()
    exif = stored.getexif()
    exif[0x0112] = orientation
    data = saved(stored, kind, exif=exif.tobytes())
    upright = decode(data, "row 0").convert("L")
    assert upright.size == ((32, 16) if orientation < 5 else (16, 32))
    assert probe(data, "row 0") == (upright.height, upright.width), "what the header tells is what is trained on"
    x, y = {"left": (2, 8), "right": (29, 8), "top": (8, 2), "bottom": (8, 29)}[white]
    assert upright.getpixel((x, y)) > 200 and upright.getpixel((upright.width - 1 - x, upright.height - 1 - y)) < 55


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_gray_of_16_bits_is_scaled_to_8(kind: str) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = np.asarray(seen(Image.fromarray(values), kind))
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.round(values / 257).astype(np.uint8))


def test_deep_gray_of_a_tiff_is_as_bright_as_its_tags_tell() -> None:
    for bits, white, data in ((16, 1, "0000 ffff 0180"), (16, 0, "ffff 0000 fe7f"), (12, 1, "000fff801000")):
        pixels = bytes.fromhex(data)
        tags = {256: 3, 257: 1, 258: bits, 259: 1, 262: white, 273: 122, 277: 1, 278: 1, 279: len(pixels)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels  # the pixels begin at 122
        assert np.asarray(decode(memoryview(file), "row 0")).tolist() == [[0, 255, 128]]
    for values in (np.float32([[0.0, 1.0]]), np.int32([[0, 70000]])):
        with pytest.raises(BrokenRow, match="without a known black and white"):
            seen(Image.fromarray(values), "TIFF")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_colors_below_transparency_are_not_seen(mode: str) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    colors[..., 3] = 0
    colors[4:12, 4:12] = (0, 128, 0, 255)
    image = Image.fromarray(colors)
    found = np.asarray(seen(image.quantize(64) if mode == "P" else image.convert(mode)))
    assert found.shape == (16, 16, 3)
    assert (found[:4] == 255).all() and (found[:, 12:] == 255).all(), "the background is white"
    assert (found[4:12, 4:12] < 200).any(-1).all()


def test_half_transparent_pixels_are_composited_and_opaque_ones_stay() -> None:
    found = seen(Image.new("RGBA", (4, 4), (200, 0, 100, 51)))
    expected = [value * 0.2 + 255 * 0.8 for value in (200, 0, 100)]
    assert all(abs(a - b) <= 1 for a, b in zip(found.getpixel((0, 0)), expected, strict=True))  # rounding of 8 bits
    keyed = seen(Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9))
    assert keyed.getpixel((0, 0)) == (255, 255, 255)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for mode in ("RGB", "RGBA"):
        assert np.array_equal(np.asarray(seen(Image.fromarray(pixels).convert(mode))), pixels)


def test_cmyk_goes_through_its_profile() -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert seen(image, "JPEG").getpixel((0, 0))[0] < 30, "plain conversion without a profile"
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of another color space
    with pytest.raises(BrokenRow, match="color profile cannot be used"):
        seen(image, "JPEG", icc_profile=rgb)


def profile_of_display_p3() -> bytes:
    """The profile of sRGB with other primaries and another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
    for tag, values in zip(("rXYZ", "gXYZ", "bXYZ"), primaries, strict=True):
        entry = data.index(tag.encode(), 128)
        place = int.from_bytes(data[entry + 4 : entry + 8], "big") + 8
        for i, value in enumerate(values):
            data[place + 4 * i : place + 4 * i + 4] = round(value * 65536).to_bytes(4, "big", signed=True)
    return bytes(data).replace("sRGB".encode("utf-16-be"), "P3  ".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_go_through_their_profile_to_srgb(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (200, 100, 100))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    linear = [((value / 255 + 0.055) / 1.055) ** 2.4 for value in (200, 100, 100)]
    # Display P3 to sRGB, as in CSS Color Module Level 4.
    red = 1.2249401 * linear[0] - 0.2249402 * linear[1]
    expected = 255 * (1.055 * red ** (1 / 2.4) - 0.055)
    found = seen(image, icc_profile=profile_of_display_p3()).getpixel((0, 0))
    assert abs(found[0] - expected) <= 1.5 and found[0] > 205
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for unused in (srgb, b"no profile"):
        assert seen(image, icc_profile=unused).getpixel((0, 0)) == (200, 100, 100)


def test_of_several_frames_the_first_is_seen() -> None:
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4))
        red, *others = seen(first, kind, save_all=True, append_images=[second]).getpixel((0, 0))
        assert red > 250 and max(others) < 5, kind


def test_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastinvdpo.data.images.MOST_PIXELS", 100)
    for read in (decode, probe):
        with pytest.raises(BrokenRow, match=r"11 x 10 pixels are more than 100"):
            read(saved(Image.new("L", (11, 10))), "row 0")
    with pytest.raises(BrokenRow, match=r"becomes \(262144, 512\) at data.resolution"):
        scaled((512000, 1000), (512, 512), "row 0")


def test_heic_is_named_and_formats_that_start_other_programs_are_not_opened() -> None:
    with pytest.raises(BrokenRow, match="it is HEIC, which is not read"):
        decode(memoryview(b"\0\0\0\x18ftypheic" + bytes(50)), "row 0")
    with pytest.raises(BrokenRow, match="is not an intact image"):
        seen(half_white(), "EPS")
