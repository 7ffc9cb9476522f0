"""Two designers' drawings of every emoji, as one parquet file of captioned 32x32 images.

    python -m fastinvdpo._examples.emoji.make_data --twemoji DIRECTORY --noto DIRECTORY [--output emoji.parquet]

The directories are the unpacked npm packages ``emoji-datasource-twitter`` and ``emoji-datasource-google``, version
16.0.0 (``npm pack NAME`` fetches one, ``tar xzf`` unpacks it into ``package/``). Both hold ``emoji.json`` and images of
64x64 pixels.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from fastinvdpo._extras import require
from fastinvdpo.errors import invalid

SIDE = 32
DESIGNERS = {"twemoji": "twitter", "noto": "google"}
"""Who drew an image, and how the packages call them."""
LICENSES = {
    "twemoji": "Twemoji, (c) Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); scaled to 32x32 on white",
    "noto": "Noto Emoji, (c) Google LLC, https://github.com/googlefonts/noto-emoji, Apache License 2.0 "
    "(https://www.apache.org/licenses/LICENSE-2.0); scaled to 32x32 on white",
    "names": "emoji-data, (c) Cal Henderson, https://github.com/iamcal/emoji-data, MIT license",
}


def read_package(directory: str | Path, designer: str) -> list[dict[str, Any]]:
    """One row an emoji from an unpacked package, in the order of Unicode's charts.

    ``image`` holds the bytes of a 32x32 RGB PNG on white, ``name`` the caption (lower case, unique in a package),
    ``keywords`` other names, ``category`` and ``subcategory`` Unicode's groups, ``designer`` the argument.

    Raises ``InvalidInput`` where the package's files are not there.
    """
    directory = Path(directory)
    listing = directory / "emoji.json"
    if not listing.is_file():
        raise invalid(designer, str(directory), "holds no emoji.json", "name an unpacked package, as described above")
    entries = sorted(json.loads(listing.read_text()), key=lambda entry: entry["sort_order"])
    named, rows = Counter(entry["name"] for entry in entries), []
    for entry in entries:
        file = directory / "img" / DESIGNERS[designer] / "64" / entry["image"]
        if not file.is_file():
            raise invalid(designer, str(file), "is missing", "unpack the whole package")
        short_names = [name.replace("_", " ") for name in entry["short_names"]]
        name = " ".join(entry["name"].lower().split())
        rows.append(
            {
                "image": shrink(file),
                "name": short_names[0] if named[entry["name"]] > 1 else name,
                "keywords": short_names,
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "designer": designer,
            }
        )
    return rows


def shrink(file: Path) -> bytes:
    """A 64x64 image with transparency on white, every 2x2 pixels averaged, as PNG.

    The PNG is stored, not compressed: parquet's zstd over many images needs less room than PNG's deflate over one.
    """
    image = Image.open(file).convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    encoded = io.BytesIO()
    paper.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).save(encoded, "PNG", compress_level=0)
    return encoded.getvalue()


def main(arguments: list[str] | None = None) -> None:
    """Write the parquet file; the licenses stand in its metadata."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for designer, package in DESIGNERS.items():
        parser.add_argument(f"--{designer}", required=True, help=f"unpacked emoji-datasource-{package}")
    parser.add_argument("--output", default=str(Path(__file__).with_name("emoji.parquet")))
    options = vars(parser.parse_args(arguments))
    pyarrow = require("pyarrow", extra="train", purpose="writing the images")
    parquet = require("pyarrow.parquet", extra="train", purpose="writing the images")
    rows = [row for designer in DESIGNERS for row in read_package(options[designer], designer)]
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(LICENSES)
    parquet.write_table(table, options["output"], compression="zstd", compression_level=19)
    print(f"{len(rows)} images in {options['output']}")


if __name__ == "__main__":
    main()
