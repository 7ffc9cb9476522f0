"""The HTML report: it parses, holds every value and picture, and a browser would fetch nothing for it."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fastinvdpo.evaluation.comparing import compare
from fastinvdpo.evaluation.page import _encoded
from fastinvdpo.evaluation.sampling import Sampling
from fastinvdpo.evaluation.scorers import FunctionScorer
from tests.evaluation import tiny

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = 'a <script src="https://example.org/x.js"></script> & "cat" <img src=http://example.org/y.png>'


class Page(HTMLParser):
    """Collects text, tags and attributes, and insists that what is opened is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def images(page: Page) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in page.tags if tag == "img"]


def data_of(image: dict[str, str | None]) -> bytes:
    kind, _, data = str(image["src"]).partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return base64.b64decode(data, validate=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    base, brighter = tiny.write_models(root)
    scorers = [
        FunctionScorer(tiny.brightness, "brightness"),
        FunctionScorer(lambda images, captions: [1 / 3] * len(images), "same"),
    ]
    prompts = [*tiny.PROMPTS[:3], HOSTILE]
    sampling = Sampling(num_inference_steps=2, guidance_scale=1.0)
    compare(base, brighter, prompts, scorers, root / "out", family="stable-diffusion", sampling=sampling, shown=4)
    compare(base, brighter, prompts, scorers, root / "few", family="stable-diffusion", sampling=sampling, shown=1)
    return root


def test_the_report_holds_every_value_and_image(root: Path) -> None:
    summary = json.loads((root / "out" / "evaluation.json").read_text())
    page = Page((root / "out" / "report.html").read_text("utf-8"))
    rows = [page.cells[start : start + 7] for start in range(0, len(page.cells), 7)]
    assert [row[0] for row in rows] == ["scorer", *summary["scorers"]]
    for row, found in zip(rows[1:], summary["scorers"].values(), strict=True):
        shown = [found[side][kind] for kind in ("mean", "median") for side in ("base", "aligned")]
        assert [float(cell) for cell in row[1:5]] == pytest.approx(shown, rel=1e-4)
        assert [float(number) for number in re.findall(r"[\d.]+", row[5])] == pytest.approx(
            list(found["win_rate"].values()), abs=5e-4
        )
        assert int(row[6]) == found["ties"]
    pictures = [image for image in images(page) if image["alt"] in ("base", "aligned")]
    plots = [image for image in images(page) if "scores of" in str(image["alt"])]
    assert [data_of(picture) for picture in pictures] == [
        (root / "out" / entry[side]).read_bytes() for entry in summary["samples"] for side in ("base", "aligned")
    ]
    assert [plot["alt"] for plot in plots] == ["scores of brightness", "scores of same"]
    for plot in plots:
        assert Image.open(io.BytesIO(data_of(plot))).size[0] > 500
    for entry in summary["samples"]:
        assert entry["prompt"] in page.text
        assert f"{entry['scores']['brightness']['aligned']:.5g}" in page.text


def test_a_browser_fetches_nothing(root: Path) -> None:
    text = (root / "out" / "report.html").read_text("utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "a")
        for name, value in attributes.items():
            assert not re.search(r"https?:|//", str(value)) or str(value).startswith("data:image/"), (tag, name)
    assert not re.search(r"url\(|@import", text)
    assert HOSTILE in page.text  # shown as it is, not obeyed
    few = Page((root / "few" / "report.html").read_text("utf-8"))  # the first are shown
    assert "1 of 4" in few.text and [image["alt"] for image in images(few)][2:] == ["base", "aligned"]
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy is not None and "default-src 'none'" in policy and "img-src data:" in policy


def test_a_large_image_is_scaled_down(tmp_path: Path) -> None:
    Image.effect_noise((1024, 768), 40).convert("RGB").save(tmp_path / "large.png")
    kind, data, small = _encoded(tmp_path / "large.png")
    assert (kind, small) == ("image/jpeg", False)
    assert Image.open(io.BytesIO(data)).size == (512, 384)
