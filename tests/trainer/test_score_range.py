"""SmPO's κ: fitted when pairs are scored, read in training, and refused where it is not there or of another unit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from fastinvdpo.data import open_source, write_pairs
from fastinvdpo.data.score_range import ScoreRange, stored_range
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.scorers import FunctionScorer
from fastinvdpo.evaluation.scoring import score_pairs
from fastinvdpo.methods.smpo import PICKSCORE_RANGE, preference_probability
from fastinvdpo.trainer.opening import open_dataset, open_model
from tests.trainer import tiny


def brightness(images: Any, captions: Any) -> list[float]:
    """The first pixel, on a scale like that of a cosine."""
    return [picture.convert("L").getpixel((0, 0)) / 1024 for picture in images]


@pytest.fixture
def scored(workspace: Path) -> Path:
    """The workspace with pairs that ``fastinvdpo score`` has scored, without other scores."""
    tiny.write_data(workspace / "bare.parquet", scores=False)
    score_pairs(open_source(workspace / "bare.parquet"), [FunctionScorer(brightness, "b")], workspace / "b.parquet")
    return workspace


def trained(root: Path, name: str, score_range: float | str, **sections: Any) -> dict[str, torch.Tensor]:
    data = {"path": str(root / "b.parquet"), "relabel_by_score": True, **sections.pop("data", {})}
    sections |= {"method": {"score_range": score_range}, "training": {"steps": 2}, "data": data}
    return tiny.weights(tiny.trained(root, name, "smpo", **sections))


def test_the_definition_is_that_of_the_released_code() -> None:
    # The extremes of PickScore's cosine over Pick-a-Pic v2 in the released train.py, and what it does with them: scores
    # scaled to [0, 1], and the softmax of the two.
    published = ScoreRange(0.11543526500463486, 0.28201571106910706)
    assert abs(published.value - PICKSCORE_RANGE) < 5e-6  # published to five digits
    winner, loser = torch.tensor([0.21, 0.25], dtype=torch.float64), torch.tensor([0.2, 0.12], dtype=torch.float64)
    scaled = [(scores - published.low) / published.value for scores in (winner, loser)]
    released = scaled[0].exp() / (scaled[0].exp() + scaled[1].exp())
    torch.testing.assert_close(preference_probability(winner, loser, published.value), released, rtol=1e-14, atol=0)
    # The same preference in another unit.
    in_hundreds = preference_probability(100 * winner, 100 * loser, 100 * published.value)
    torch.testing.assert_close(in_hundreds, released, rtol=1e-14, atol=0)


def test_training_reads_the_range_that_was_stored(scored: Path) -> None:
    scores = [
        score for name in ("score_0", "score_1") for score in pq.read_table(scored / "b.parquet")[name].to_pylist()
    ]
    fitted = max(scores) - min(scores)
    found = stored_range(open_source(scored / "b.parquet"), ("score_0", "score_1"))
    assert found is not None and found.value == fitted > 0.1
    auto, number = trained(scored, "auto", "auto"), trained(scored, "number", fitted)
    other = trained(scored, "other", fitted / 4)
    tiny.assert_same(auto, number)
    assert not all(torch.equal(auto[name], other[name]) for name in auto)
    tiny.assert_same(trained(scored, "cached", "auto", cache={"path": str(scored / "cache")}), auto)


def test_columns_with_names_and_a_data_set_at_hand(scored: Path) -> None:
    source, output = open_source(scored / "bare.parquet"), scored / "named.parquet"
    darkness = FunctionScorer(lambda i, c: [-score for score in brightness(i, c)], "d")
    score_pairs(source, [FunctionScorer(brightness, "b"), darkness], output)
    data = {"path": str(output), "columns": {"score_0": "score_b_0", "score_1": "score_b_1"}}
    expected = trained(scored, "direct", "auto")
    tiny.assert_same(trained(scored, "named", "auto", data=data), expected)
    sections: dict[str, Any] = {"data": {**data, "relabel_by_score": True}, "training": {"steps": 2}}
    config = tiny.config(scored, "smpo", method={"score_range": "auto"}, **sections)
    tiny.assert_same(tiny.weights(tiny.train_model(config, open_model(config), open_dataset(config))), expected)


def test_the_range_of_several_files_spans_all_of_them(scored: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number, shift in enumerate((0.0, 3.0)):
        bright = FunctionScorer(lambda i, c, s=shift: [score + s for score in brightness(i, c)], "b")
        score_pairs(open_source(scored / "bare.parquet"), [bright], tmp_path / "shards" / f"{number}.parquet")
    one = stored_range(open_source(tmp_path / "shards" / "0.parquet"), ("score_0", "score_1"))
    both = stored_range(open_source(tmp_path / "shards"), ("score_0", "score_1"))
    assert one is not None and both is not None
    assert both.low == one.low and both.high == pytest.approx(one.high + 3)
    shutil.copy(scored / "bare.parquet", tmp_path / "shards" / "2.parquet")
    assert stored_range(open_source(tmp_path / "shards"), ("score_0", "score_1")) is None


def test_auto_without_a_stored_range_is_an_error(scored: Path) -> None:
    data = {"path": str(scored / "pairs.parquet")}  # it has scores, from elsewhere
    with pytest.raises(InvalidInput, match=r"score_range = 'auto': no range of the columns 'score_0' and"):
        trained(scored, "run", "auto", data=data)
    assert not (scored / "run").exists()
    with pytest.raises(InvalidInput, match="no range"):
        trained(scored, "run", "auto", data=data, cache={"path": str(scored / "cache")})
    assert not (scored / "cache").exists()


@pytest.mark.parametrize(("factor", "cached"), [(100.0, False), (0.01, True)])
def test_scores_of_another_unit_are_an_error_whoever_wrote_them(scored: Path, factor: float, cached: bool) -> None:
    """PickScore with its scale of 100 beside the published κ of the bare cosine would saturate every weight."""
    output, score = scored / "scaled.parquet", lambda i, c: [factor * score for score in brightness(i, c)]
    score_pairs(open_source(scored / "bare.parquet"), [FunctionScorer(score, "b")], output)
    sections = {"cache": {"path": str(scored / "cache")}} if cached else {}
    unit = r"score_range = 0\.16658: is not of the unit of "
    with pytest.raises(InvalidInput, match=unit + ".*give the range of all scores"):
        trained(scored, "run", PICKSCORE_RANGE, data={"path": str(output)}, **sections)
    rows = pq.read_table(scored / "b.parquet").to_pylist()
    # What writes the pairs anew drops the range with the metadata; it is then measured, not guessed.
    write_pairs(scored / "c.parquet", [row | {n: 100 * row[n] for n in ("score_0", "score_1")} for row in rows])
    assert stored_range(open_source(scored / "c.parquet"), ("score_0", "score_1")) is None
    with pytest.raises(InvalidInput, match=unit + "the scores"):
        trained(scored, "run", PICKSCORE_RANGE, data={"path": str(scored / "c.parquet")}, **sections)


def test_equal_scores_are_an_error(scored: Path) -> None:
    same = FunctionScorer(lambda images, captions: [1.0] * len(images), "same")
    score_pairs(open_source(scored / "bare.parquet"), [same], scored / "same.parquet")
    with pytest.raises(InvalidInput, match=r"all scores .* are equal"):
        trained(scored, "run", "auto", data={"path": str(scored / "same.parquet"), "relabel_by_score": False})
