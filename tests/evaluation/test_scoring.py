"""``fastinvdpo score``: every format, resuming (kills: interrupted.py), broken rows, labels from scores, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastinvdpo import cli
from fastinvdpo.config.files import load_data_section
from fastinvdpo.data import PairDataset, open_source
from fastinvdpo.data.score_range import METADATA, stored_range
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation import scoring
from fastinvdpo.evaluation.scorers import FunctionScorer
from fastinvdpo.evaluation.scoring import list_of_broken, open_to_score, score_pairs
from fastinvdpo.output import OutputDirectory
from tests.data import test_masks as masks
from tests.data.test_pairs import encoded, image, row, store
from tests.data.test_sources import FORMATS, rows, write_images, write_lines
from tests.evaluation import tiny_clip as tiny

SCORED: list[str] = []
"""The captions of all images that :func:`shade` has scored in a test."""


def shade(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
    """A score that is known: a quarter of the first pixel, an eighth of the caption's length."""
    SCORED.extend(captions)
    corners = [picture.convert("L").getpixel((0, 0)) for picture in images]
    return [corner / 4 + len(caption) / 8 for corner, caption in zip(corners, captions, strict=True)]


def scorer(name: str = "shade", function: Callable[..., Any] = shade, **key: Any) -> FunctionScorer:
    return FunctionScorer(function, name, 3, key)


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(scoring, "ROWS_PER_PART", 4)
    SCORED.clear()


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Ten rows: image 0 has shade i, image 1 shade i + 100; in row 4 the two are equal, row 7 repeats row 2."""
    rows = [row(i, 1.0, uid=f"id-{i}", extra=i) for i in range(10)]
    rows[4] |= {"jpg_1": encoded(image(4))}
    rows[7] |= {"jpg_0": rows[2]["jpg_0"], "caption": "caption 2"}
    return store(tmp_path / "pairs.parquet", rows)


SHADES = [(2 if i == 7 else i, 4 if i == 4 else i + 100) for i in range(10)]
EXPECTED = [(first / 4 + 9 / 8, second / 4 + 9 / 8) for first, second in SHADES]  # of those ten rows


def read(path: Path) -> dict[str, list[Any]]:
    return pq.read_table(path).to_pydict()


def test_scores_stand_beside_the_original_columns(ten: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored.parquet"
    result = score_pairs(open_source(ten), [scorer()], output)
    before, after = read(ten), read(output)
    assert list(after) == [*before, "score_0", "score_1"]
    assert {name: after[name] for name in before} == before
    assert list(zip(after["score_0"], after["score_1"], strict=True)) == EXPECTED
    assert pq.read_schema(output).field("score_0").type == pa.float32()
    assert (result.rows, result.pairs, result.broken) == (10, 10, {})
    assert not output.with_name("scored.parquet.parts").exists() and not list_of_broken(output).exists()
    dataset = PairDataset(output)
    assert (dataset[0].winner_score, dataset[0].loser_score) == EXPECTED[0]
    numbers, columns = [score for pair in EXPECTED for score in pair], ("score_0", "score_1")
    assert result.ranges["shade"].value == max(numbers) - min(numbers) == 109 / 4
    for streaming in (False, True):
        assert stored_range(open_source(output, streaming=streaming), columns) == result.ranges["shade"]
    assert stored_range(open_source(output), ("score_shade_0", "score_shade_1")) is None
    assert stored_range(open_source(ten), columns) is None
    assert json.loads(pq.read_schema(output).metadata[METADATA])["key"]["scorers"] == ["shade"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    write, kind = FORMATS[name]
    path = write(tmp_path / "set", rows())
    source = open_to_score(load_data_section(str(path), []))
    assert source.format == kind
    output = tmp_path / "scored.parquet"
    result = score_pairs(source, [scorer()], output, named=True)  # these sets have scores already
    after = read(output)
    assert after["score_shade_0"] == [i / 4 + 9 / 8 for i in range(6)]
    assert after["score_shade_1"] == [(i + 100) / 4 + 9 / 8 for i in range(6)]
    assert after["caption"] == [f"caption {i}" for i in range(6)]
    assert after["label_0"] == [1.0, 0.0, 0.5, 1.0, 0.0, 1.0]
    assert result.pairs == 6
    shades = [(pair.winner.getpixel((0, 0)), pair.loser.getpixel((0, 0))) for pair in PairDataset(output)]
    assert shades == [(0, 100), (101, 1), (3, 103), (104, 4), (5, 105)]


@pytest.mark.parametrize("kind", ["folder", "webdataset", "saved"])
def test_masks_are_kept(tmp_path: Path, kind: str) -> None:
    (tmp_path / "set").mkdir()
    path, output = FORMATS[kind][0](tmp_path / "set", masks.rows(shared=False)), tmp_path / "scored.parquet"

    def score() -> None:
        score_pairs(open_to_score(load_data_section(str(path), [])), [scorer()], output)

    score()
    for pair in masks.opened(output):
        assert pair.winner_mask.tobytes() == pair.winner.tobytes() and pair.loser_mask.tobytes() == pair.loser.tobytes()
    score()  # is there
    if kind == "folder":
        (path / "white.png").write_bytes(encoded(Image.new("L", (8, 8), 255)))
        listing = (path / "pairs.jsonl").read_text()
        (path / "pairs.jsonl").write_text(listing.replace('"2.mask_1"', '"white.png"'))
        with pytest.raises(InvalidInput, match="different are data columns"):
            score()


def test_an_image_that_pairs_of_a_caption_share_is_scored_once(tmp_path: Path) -> None:
    write_images(tmp_path)
    entry = {"prompt": "p", "rank": [2, 1, 3], "image_path": [f"images/{i}-0.png" for i in range(3)]}
    output = tmp_path / "out" / "scored.parquet"
    score_pairs(open_source(write_lines(tmp_path / "ranked.jsonl", [entry])), [scorer()], output)
    after = read(output)
    assert list(zip(after["score_0"], after["score_1"], strict=True)) == [
        (0.125, 0.375),
        (0.125, 0.625),
        (0.375, 0.625),
    ]
    assert SCORED == ["p"] * 3  # three images in three pairs


def test_what_datasets_stored_of_the_columns_is_completed(ten: Path, tmp_path: Path) -> None:
    import datasets

    rows = [{**one, "jpg_0": one["jpg_0"], "label_0": int(one["label_0"])} for one in pq.read_table(ten).to_pylist()]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "made.parquet")
    assert b"huggingface" in pq.read_schema(tmp_path / "made.parquet").metadata
    output = tmp_path / "scored.parquet"
    score_pairs(open_source(tmp_path / "made.parquet"), [scorer()], output, relabel="shade")
    loaded = datasets.load_dataset("parquet", data_files=str(output), split="train")
    assert loaded.features["score_0"].dtype == "float32" and loaded.features["label_0"].dtype == "float64"
    assert loaded["original_label_0"][:] == [1] * 10


def test_several_scorers_and_labels_from_one_of_them(ten: Path, tmp_path: Path) -> None:
    darker = scorer("darker", lambda images, captions: [-s for s in shade(images, captions)])
    output, named = tmp_path / "scored.parquet", tmp_path / "named-scored.parquet"
    score_pairs(open_source(ten), [scorer(), darker], output, relabel="shade")
    after = read(output)
    names = [name for name in after if "score" in name]
    assert names == ["score_shade_0", "score_shade_1", "score_darker_0", "score_darker_1"]
    assert after["score_darker_1"] == [-score for score in after["score_shade_1"]]
    assert after["label_0"] == [0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]  # row 4 is a tie
    assert after["original_label_0"] == [1.0] * 10
    # The same labels as in training from the columns of scores.
    columns = {"score_0": "score_shade_0", "score_1": "score_shade_1"}
    by_score, by_label = (PairDataset(output, columns=columns, relabel_by_score=by) for by in (True, False))
    assert [(p.row, p.winner.tobytes()) for p in by_score] == [(p.row, p.winner.tobytes()) for p in by_label]
    assert len(by_label) == 9
    # New labels do not meet the old name of the winner.
    rows = [{k: v for k, v in one.items() if k != "label_1"} | {"winner": 0} for one in pq.read_table(ten).to_pylist()]
    score_pairs(open_source(store(tmp_path / "named.parquet", rows)), [scorer()], named, relabel="shade")
    assert read(named)["original_winner"] == [0] * 10 and read(named)["original_label_0"] == [1.0] * 10
    assert PairDataset(named)[0].winner.getpixel((0, 0)) == 100


def vote(name: str, signs: str) -> FunctionScorer:
    """Image 0 of ``row(i)`` wins where ``signs[i]`` is +, and ties where it is =."""

    def function(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        shades = [int(picture.convert("L").getpixel((0, 0))) for picture in images]
        return [{"+": -1.0, "-": 1.0, "=": 0.0}[signs[shade % 100]] * (shade // 100) for shade in shades]

    return FunctionScorer(function, name, 3, {})


@pytest.mark.parametrize(
    ("agree", "votes", "kept", "dissent"),
    [(2, 2, [0, 2, 5], {"a": 2, "b": 4, "c": 4}), ("all", 3, [0, 5], {"a": 2, "b": 4, "c": 5})],
)
def test_only_labels_that_scorers_agree_on_are_kept(
    tmp_path: Path, agree: int | str, votes: int, kept: list[int], dissent: dict[str, int]
) -> None:
    path, output = store(tmp_path / "pairs.parquet", [row(i, 0.0) for i in range(7)]), tmp_path / "scored.parquet"
    scorers = [vote("a", "++-=--="), vote("b", "+---+-+"), vote("c", "+-=++-=")]
    result = score_pairs(open_source(path), scorers, output, relabel="a", agree=agree)
    after = read(output)
    assert after["caption"] == [f"caption {i}" for i in kept]
    assert after["label_0"] == [float("++-=--="[i] == "+") for i in kept]
    assert (result.rows, result.pairs, result.disagreed, result.dissent) == (7, len(kept), 7 - len(kept), dissent)
    words = ", ".join(f"{count} {name}" for name, count in dissent.items())
    assert f"{7 - len(kept)} without agreement left out (other winner or tie: {words})" in str(result)
    assert score_pairs(open_source(path), scorers, output, relabel="a", agree=agree) == result
    with pytest.raises(InvalidInput, match=rf"different are agree \({votes} there"):
        score_pairs(open_source(path), scorers, output, relabel="a")
    with pytest.raises(InvalidInput, match=r"agree = 2: is more than agree on any of 7 pairs"):
        no = [vote("a", "+++++++"), vote("b", "-=-=-=-")]
        score_pairs(open_source(path), no, tmp_path / "none.parquet", relabel="a", agree=2)


def test_broken_rows_are_counted_listed_and_left_out(ten: Path, tmp_path: Path) -> None:
    rows = pq.read_table(ten).to_pylist()
    rows[1]["jpg_0"] = b"no image"
    rows[5]["jpg_1"] = None
    rows[8]["caption"] = None
    rows[9]["jpg_1"] = rows[9]["jpg_1"][:60]
    data = store(tmp_path / "broken.parquet", rows)
    output = tmp_path / "scored.parquet"
    with pytest.raises(InvalidInput, match=r"row 1, column 'jpg_0'"):
        score_pairs(open_source(data), [scorer()], output)
    with pytest.raises(InvalidInput, match="more rows than that are broken"):
        score_pairs(open_source(data), [scorer()], output, max_broken=0.2)
    SCORED.clear()
    result = score_pairs(open_source(data), [scorer()], output, max_broken=4)
    assert result.broken == {"missing caption": 1, "missing image": 1, "corrupt image": 2}
    assert SCORED == []  # the second call had scored them all
    assert read(output)["extra"] == [0, 2, 3, 4, 6, 7]
    assert read(output)["score_0"] == [EXPECTED[i][0] for i in (0, 2, 3, 4, 6, 7)]
    listed = [json.loads(line) for line in list_of_broken(output).read_text().splitlines()]
    assert [(line["row"], line["cause"]) for line in listed] == [
        *((1, "corrupt image"), (5, "missing image"), (8, "missing caption"), (9, "corrupt image"))
    ]
    assert not any("object at" in line["problem"] for line in listed)  # the same words in every run
    assert len(PairDataset(output)) == 6
    data = store(tmp_path / "nothing.parquet", [row(0, jpg_0=b"x"), row(1, jpg_1=b"x")])
    with pytest.raises(InvalidInput, match="no row that can be scored"):
        score_pairs(open_source(data), [scorer()], tmp_path / "none.parquet", max_broken=2)


def test_finished_parts_are_not_computed_again(ten: Path, tmp_path: Path) -> None:
    output, calls = tmp_path / "scored.parquet", []

    def failing(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        calls.append(len(images))
        if sum(calls) > 15:  # the third part
            raise RuntimeError("out of memory, says the test")
        return shade(images, captions)

    with pytest.raises(InvalidInput, match="out of memory, says the test"):
        score_pairs(open_source(ten), [scorer(function=failing)], output)
    assert not output.exists()
    parts, whole = tmp_path / "scored.parquet.parts", tmp_path / "whole.parquet"
    part = parts / "part-000000.json"
    part.write_text(part.read_text().replace('"rows": [0', '"rows": [3', 1))  # damaged: it is computed again
    (parts / "part-000002.json").write_text("{")
    SCORED.clear()
    result = score_pairs(open_source(ten), [scorer()], output)
    assert {caption[-1] for caption in SCORED} == {"0", "1", "2", "3", "8", "9"}
    score_pairs(open_source(ten), [scorer()], whole)
    assert output.read_bytes() == whole.read_bytes()
    # Killed while it deleted the parts.
    with OutputDirectory(parts) as place:
        place.claim(files=["part-??????.json"])
        (parts / "part-000002.json").write_text("{}")
        (parts / "notes.txt").write_text("mine")
    SCORED.clear()
    assert score_pairs(open_source(ten), [scorer()], output) == result and SCORED == []
    assert [file.name for file in parts.iterdir()] == ["notes.txt"]
    left = tmp_path / ".fastinvdpo-abcdefgh.tmp"
    left.mkdir()
    (left / "lock").touch()
    (parts / "notes.txt").unlink()
    assert score_pairs(open_source(ten), [scorer()], output) == result and not left.exists() and not parts.exists()


def test_parts_and_outputs_of_something_else_are_refused(ten: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored.parquet"
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patched:  # all parts are there, and no output
        patched.setattr(scoring, "write_scored", lambda *arguments: (_ for _ in ()).throw(RuntimeError))
        score_pairs(open_source(ten), [scorer(weights=1)], output)
    with pytest.raises(InvalidInput, match=r"parts'.*different are shade weights \(1 there, 2 here\)"):
        score_pairs(open_source(ten), [scorer(weights=2)], output)
    other = store(tmp_path / "other.parquet", [row(i + 1) for i in range(10)])
    with pytest.raises(InvalidInput, match=r"different are data captions \(sha256:"):
        score_pairs(open_source(other), [scorer(weights=1)], output)
    columns = store(tmp_path / "columns.parquet", [{**one, "extra": 7} for one in pq.read_table(ten).to_pylist()])
    with pytest.raises(InvalidInput, match=r"different are data columns \(sha256:\w+… there, sha256:\w+… here\)\."):
        score_pairs(open_source(columns), [scorer(weights=1)], output)
    score_pairs(open_source(ten), [scorer(weights=1)], output)
    with pytest.raises(InvalidInput, match=r"scored.parquet'.*different are relabel \(None there, 'shade' here\)"):
        score_pairs(open_source(ten), [scorer(weights=1)], output, relabel="shade")
    with pytest.raises(InvalidInput, match="did not write it"):
        score_pairs(open_source(ten), [scorer()], other)


def test_bad_options_and_columns_and_files_that_are_there(ten: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "out" / "first.parquet", tmp_path / "out" / "second.parquet"
    score_pairs(open_source(ten), [scorer()], first)
    two = {"scorers": [scorer(), scorer("b")]}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"scorers": []}, "names no scorer"),
        ({"scorers": [scorer("a b")]}, "cannot name columns"),
        ({"scorers": [scorer("a"), scorer("a")]}, "names a twice"),
        ({"relabel": "other"}, "relabel = 'other'"),
        ({**two, "agree": 2}, "agree = 2: keeps labels .* with relabel"),
        ({"relabel": "shade", "agree": "all"}, "agree = 'all': is no number .*several scorers"),
        *(
            ({**two, "relabel": "b", "agree": wrong}, r"of shade, b\. Remedy: use 2 to")
            for wrong in (1, 3, "two", True)
        ),
        ({"source": open_source(first)}, "has a column 'score_0' already"),
        ({"output": tmp_path / "third.txt"}, r"third\.txt': is not the name of a parquet file"),
        ({"source": open_source(ten.parent), "output": ten.parent / "x.parquet"}, "lies among the files that are read"),
    ]
    for options, match in refused:
        given = {"source": open_source(ten), "scorers": [scorer()], "output": second, **options}
        with pytest.raises(InvalidInput, match=match):
            score_pairs(**given)
    assert [file.name for file in ten.parent.glob("*.parquet*")] == ["pairs.parquet"]
    score_pairs(open_source(first), [scorer()], second, named=True)
    assert read(second)["score_shade_0"] == read(second)["score_0"]


def test_two_at_once_are_refused(ten: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored.parquet"

    def meeting(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        with pytest.raises(InvalidInput, match="another process is writing there"):
            score_pairs(open_source(ten), [scorer()], output)
        return shade(images, captions)

    assert score_pairs(open_source(ten), [scorer(function=meeting)], output).pairs == 10


def test_the_command(ten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = tiny.write_clip(tmp_path / "clip")
    head = tiny.write_head(tmp_path / "head.safetensors")
    rows = pq.read_table(ten).to_pylist()
    rows[3]["jpg_0"] = b"no image"
    data = store(
        tmp_path / "mine.parquet", [{("text" if k == "caption" else k): v for k, v in r.items()} for r in rows]
    )
    output = tmp_path / "out" / "scored.parquet"
    output.parent.mkdir()
    command = ["score", str(data), "columns.caption=text", "max_broken=1", "--output", str(output), "--no-progress"]
    command += ["--scorer", f"hps={clip}", "--scorer", f"aesthetic={head},clip={clip},name=looks", "--device", "cpu"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "10 rows: 9 pairs scored, 1 broken rows left out (1 corrupt image)" in shown
    assert f"Listed in {list_of_broken(output)}." in shown and "looks: score_looks_0, score_looks_1" in shown
    assert {"score_hps_0", "score_hps_1", "score_looks_0", "score_looks_1"} < set(read(output))
    for extra, match in (
        (["resolution=512"], "data.resolution = 512: changes nothing"),
        (["--device", "abacus"], "device = 'abacus': cannot be used"),
        (["--relabel", "looks", "--agree", "3"], "agree = 3: is no number of scorers that can agree, of hps, looks"),
    ):
        assert cli.main([*command, *extra]) == 2
        assert match in capsys.readouterr().err
