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


def test_the_report_holds_every_value_and_image_and_a_browser_fetches_nothing(tmp_path: Path) -> None:
    models = tiny.write_models(tmp_path)
    same = FunctionScorer(lambda images, captions: [1 / 3] * len(images), "same")
    scorers = [FunctionScorer(tiny.brightness, "brightness"), same]
    sampling, out = Sampling(num_inference_steps=2, guidance_scale=1.0), tmp_path / "out"

    def report(shown: int) -> Page:
        compare(
            *models,
            [*tiny.PROMPTS[:3], HOSTILE],
            scorers,
            out,
            family="stable-diffusion",
            sampling=sampling,
            shown=shown,
        )
        return Page((out / "report.html").read_text("utf-8"))

    few = report(shown=1)  # the first are shown
    assert "1 of 4" in few.text and [image["alt"] for image in images(few)][2:] == ["base", "aligned"]
    page, text = report(shown=4), (out / "report.html").read_text("utf-8")
    summary = json.loads((out / "evaluation.json").read_text())
    rows = [page.cells[start : start + 7] for start in range(0, len(page.cells), 7)]
    assert [row[0] for row in rows] == ["scorer", *summary["scorers"]]
    for row, found in zip(rows[1:], summary["scorers"].values(), strict=True):
        values = [found[side][kind] for kind in ("mean", "median") for side in ("base", "aligned")]
        assert [float(cell) for cell in row[1:5]] == pytest.approx(values, rel=1e-4)
        rates = [float(number) for number in re.findall(r"[\d.]+", row[5])]
        assert rates == pytest.approx(list(found["win_rate"].values()), abs=5e-4)
        assert int(row[6]) == found["ties"]
    pictures = [image for image in images(page) if image["alt"] in ("base", "aligned")]
    stored = [(out / entry[side]).read_bytes() for entry in summary["samples"] for side in ("base", "aligned")]
    assert [data_of(picture) for picture in pictures] == stored
    plots = [image for image in images(page) if "scores of" in str(image["alt"])]
    assert [plot["alt"] for plot in plots] == ["scores of brightness", "scores of same"]
    assert all(Image.open(io.BytesIO(data_of(plot))).size[0] > 500 for plot in plots)
    for entry in summary["samples"]:
        assert entry["prompt"] in page.text  # the hostile one is shown as it is, not obeyed
        assert f"{entry['scores']['brightness']['aligned']:.5g}" in page.text
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "a")
        for name, value in attributes.items():
            assert not re.search(r"https?:|//", str(value)) or str(value).startswith("data:image/"), (tag, name)
    assert not re.search(r"url\(|@import", text)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy is not None and "default-src 'none'" in policy and "img-src data:" in policy


def test_a_large_image_is_scaled_down(tmp_path: Path) -> None:
    Image.effect_noise((1024, 768), 40).convert("RGB").save(tmp_path / "large.png")
    kind, data, small = _encoded(tmp_path / "large.png")
    assert (kind, small) == ("image/jpeg", False)
    assert Image.open(io.BytesIO(data)).size == (512, 384)
