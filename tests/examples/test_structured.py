"""Structured images: what the validator says, how prompts are composed, and properties of the pairs that are built."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinvdpo import cli
from fastinvdpo._examples.structured.building import (
    NO_RELATION,
    BuiltPair,
    PairRule,
    build_pairs,
    choose_pairs,
    parse_weights,
    relation_counts,
)
from fastinvdpo._examples.structured.schema import StructuredImage, read_structured
from fastinvdpo.data import PairDataset, open_source
from fastinvdpo.errors import InvalidInput
from tests.data.test_pairs import encoded, image


def record(number: int = 0, prompt_id: str = "p", **changes: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "prompt_id": prompt_id,
        "image": f"{number}.png",
        "objects": [
            {"id": "a", "name": "cube", "attributes": ["small", "red"], "box": [0.1, 0.2, 0.5, 0.9]},
            {"id": "b", "name": "apple"},
            {"id": "c", "name": "tree"},
        ],
        "relations": [{"subject": "a", "predicate": "left of", "object": "b"}],
        "scores": {"objects": 0.1 * number, "relations": 0.5},
    }
    return {**own, **changes}


def structured(number: int = 0, prompt_id: str = "p", **changes: Any) -> StructuredImage:
    return StructuredImage.model_validate(record(number, prompt_id, **changes))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


# Prompts and mistakes


def test_prompts_are_composed_from_the_structure() -> None:
    assert structured().compose() == "a small red cube left of an apple, and a tree"
    assert structured(relations=[]).compose() == "a small red cube, an apple, and a tree"
    assert structured(objects=[{"id": "x", "name": "owl"}], relations=[]).compose() == "an owl"
    assert structured(prompt="as asked").compose() == "as asked"


MISTAKES: dict[str, tuple[dict[str, Any] | str, str]] = {
    "not json": ("{", r"s.jsonl, line 2 = '2 bytes': is not valid JSON"),
    "missing": ({k: v for k, v in record().items() if k != "image"}, r"line 2, image = None: .*Remedy: add it"),
    "unknown": (record(score=1), r"line 2, score = 1: .*Remedy: remove it"),
    "box": (
        record(objects=[{"id": "a", "name": "cube", "box": [0.5, 0, 0.1, 1]}], relations=[]),
        r"line 2, objects.0.box = \[0.5, 0, 0.1, 1\]: is not left < right",
    ),
    "box outside": (
        record(objects=[{"id": "a", "name": "cube", "box": [0, 0, 2, 1]}], relations=[]),
        r"line 2, objects.0.box.2 = 2: input should be less than or equal to 1",
    ),
    "twice": (record(objects=[{"id": "a", "name": "x"}] * 2, relations=[]), "several objects with the id 'a'"),
    "nobody": (
        record(relations=[{"subject": "a", "predicate": "on", "object": "z"}]),
        r"a relation with 'z', which is the id of no object \(a, b, c\)",
    ),
    "no objects": (record(objects=[], relations=[]), r"line 2, objects = \[\]: .*Remedy: give at least one"),
    "text for a score": (record(scores={"objects": "high", "relations": 1}), r"line 2, scores.objects = 'high'"),
    "score lacks": (record(scores={"objects": 1.0}), r"line 2, scores = \['objects'\]: lacks \['relations'\]"),
    "mask lacks": (record(mask="m.png"), "line 1, mask = None: is missing, and line 2 has one"),
    "another prompt": (record(prompt="other"), r"line 2, prompt = 'other': differs from .* of line 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_line_field_value_and_remedy(tmp_path: Path, name: str) -> None:
    bad, message = MISTAKES[name]
    with pytest.raises(InvalidInput, match=message) as caught:
        read_structured(write(tmp_path / "s.jsonl", [record(), bad]))
    assert "Remedy: " in str(caught.value)


def test_all_mistakes_are_told_at_once_up_to_twenty(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_structured(write(tmp_path / "s.jsonl", [record(), *[{"prompt_id": "p"}] * 30]))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "… and 70 more mistakes."
    with pytest.raises(InvalidInput, match="holds no images"):
        read_structured(write(tmp_path / "s.jsonl", []))


# Properties of the pairs

PREDICATES = ("left of", "on", "behind", "under")
grades = st.integers(0, 4).map(lambda n: n / 4)  # exact sums, and ties


@st.composite
def sets_of_images(draw: st.DrawFn, most_relations: int = 2) -> list[StructuredImage]:
    found = []
    for prompt in range(draw(st.integers(1, 6))):
        chosen = draw(st.lists(st.sampled_from(PREDICATES), max_size=most_relations, unique=True))
        relations = [{"subject": "a", "predicate": predicate, "object": "b"} for predicate in chosen]
        for _ in range(draw(st.integers(1, 5))):
            scores = {"one": draw(grades), "two": draw(grades)}
            found.append(structured(len(found), f"p{prompt}", relations=relations, scores=scores))
    return found


@st.composite
def rules(draw: st.DrawFn) -> PairRule:
    return PairRule(
        weights=draw(st.sampled_from([{}, {"one": 1.0, "two": 0.5}])),
        margin=draw(st.sampled_from([0.0, 0.25, 0.75])),
        max_pairs=draw(st.integers(1, 4)),
        balance=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


@given(sets_of_images(), rules())
@settings(deadline=None)
def test_what_holds_for_every_pair(images: list[StructuredImage], rule: PairRule) -> None:
    pairs = choose_pairs(images, rule)
    for pair in pairs:
        winner, loser = images[pair.winner], images[pair.loser]
        assert winner.prompt_id == loser.prompt_id
        assert pair.relation in (winner.predicates or (NO_RELATION,))
        gains = {name: winner.scores[name] - loser.scores[name] for name in winner.scores}
        if rule.weights:
            gain = sum(weight * gains[name] for name, weight in rule.weights.items())
            assert gain > 0 and gain >= rule.margin
        else:
            assert min(gains.values()) >= 0 < max(gains.values()) and max(gains.values()) >= rule.margin
    assert len({frozenset((pair.winner, pair.loser)) for pair in pairs}) == len(pairs), "no pair twice"
    per_prompt = Counter(images[pair.winner].prompt_id for pair in pairs)
    assert max(per_prompt.values(), default=0) <= rule.max_pairs
    assert choose_pairs(images, rule) == pairs, "a function of images and seed"


@given(sets_of_images(), rules())
@settings(deadline=None)
def test_without_balance_every_prompt_gives_all_it_has(images: list[StructuredImage], rule: PairRule) -> None:
    unbalanced = PairRule(rule.weights, rule.margin, rule.max_pairs, False, rule.seed)
    counts = Counter(images[pair.winner].prompt_id for pair in choose_pairs(images, unbalanced))
    for prompt in {one.prompt_id for one in images}:
        members = [one for one in images if one.prompt_id == prompt]
        offered = sum(rule.prefers(a.scores, b.scores) for a in members for b in members)
        assert counts[prompt] == min(offered, rule.max_pairs)


@given(sets_of_images(most_relations=2), rules())
@settings(deadline=None)
def test_relations_are_balanced_within_one(images: list[StructuredImage], rule: PairRule) -> None:
    def counted(balance: bool) -> tuple[list[BuiltPair], set[str]]:
        pairs = choose_pairs(images, PairRule(rule.weights, rule.margin, rule.max_pairs, balance, rule.seed))
        prompts = {images[pair.winner].prompt_id for pair in pairs}
        offered = {r for i in images if i.prompt_id in prompts for r in i.predicates or (NO_RELATION,)}
        return pairs, offered

    _, offered = counted(False)  # relations of prompts that have any pair
    counts = relation_counts(counted(True)[0])
    assert set(counts) <= offered
    if offered:
        assert max(counts[r] for r in offered) - min(counts[r] for r in offered) <= 1


@given(sets_of_images(most_relations=1), rules())
@settings(deadline=None)
def test_one_relation_a_prompt_is_balanced_without_loss(images: list[StructuredImage], rule: PairRule) -> None:
    everything = relation_counts(choose_pairs(images, PairRule(rule.weights, rule.margin, rule.max_pairs, False)))
    counts = relation_counts(choose_pairs(images, PairRule(rule.weights, rule.margin, rule.max_pairs, True)))
    rarest = min(everything.values(), default=0)
    assert all(min(total, rarest) <= counts[r] <= min(total, rarest + 1) for r, total in everything.items())


# Through the command line


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Forty images of ten prompts with random scores, on disk."""
    draws = random.Random(0)
    records = []
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(encoded(image(number)))
        predicate = PREDICATES[number // 4 % 3]
        relations = [{"subject": "a", "predicate": predicate, "object": "b"}]
        scores = {"objects": draws.random(), "relations": draws.random()}
        records.append(record(number, f"prompt {number // 4}", relations=relations, scores=scores))
    return write(tmp_path / "structured.jsonl", records)


@pytest.mark.parametrize("weights", [["--weight", "objects=1", "--weight", "relations=2"], []], ids=["sum", "pareto"])
def test_built_pairs_are_read_back(
    images: Path, tmp_path: Path, weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "build", str(images), "--max-pairs", "3", "--margin", "0.1", *weights]
    assert cli.main([*command, "--output", str(tmp_path / "a" / "pairs.parquet")]) == 0
    assert "pairs (" in capsys.readouterr().out
    dataset = PairDataset(tmp_path / "a" / "pairs.parquet")
    assert dataset.has_scores == bool(weights)
    by_look = {image(r["number"]).tobytes(): r for r in ({"number": n} for n in range(40))}
    known = {entry.image: entry for _, entry in read_structured(images)}
    for pair in dataset:
        numbers = [by_look[side.tobytes()]["number"] for side in (pair.winner, pair.loser)]
        won, lost = (known[f"{number}.png"] for number in numbers)
        assert won.prompt_id == lost.prompt_id and pair.caption == won.compose()
        if weights:
            assert pair.winner_score == pytest.approx(won.scores["objects"] + 2 * won.scores["relations"])
            assert pair.winner_score - pair.loser_score >= 0.1
    card = (tmp_path / "a" / "pairs.md").read_text()
    assert f"{len(dataset)} preference pairs" in card and "| left of |" in card
    assert cli.main([*command, "--output", str(tmp_path / "b" / "pairs.parquet")]) == 0
    for name in ("pairs.parquet", "pairs.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_built_pairs_keep_masks(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(image(number)))
        (tmp_path / f"mask-{number}.png").write_bytes(encoded(image(number + 50)))
    lines = [record(number, mask=f"mask-{number}.png") for number in range(3)]
    build_pairs(write(tmp_path / "s.jsonl", lines), tmp_path / "pairs.parquet", PairRule({"objects": 1.0}))
    pairs = PairDataset(open_source(tmp_path / "pairs.parquet").with_masks())
    for pair in pairs:
        for side, mask in ((pair.winner, pair.winner_mask), (pair.loser, pair.loser_mask)):
            assert mask.getpixel((0, 0)) == side.getpixel((0, 0)) + 50
    (tmp_path / "mask-1.png").write_bytes(encoded(image(50, (4, 4))))
    with pytest.raises(InvalidInput, match=r"line 2, mask 'mask-1\.png' = \(4, 4\): is not the size of its image"):
        build_pairs(tmp_path / "s.jsonl", tmp_path / "again.parquet", PairRule({"objects": 1.0}))


def test_winners_stand_on_both_sides(images: Path, tmp_path: Path) -> None:
    build_pairs(images, tmp_path / "pairs.parquet", PairRule({"objects": 1.0}, balance=False))
    dataset = PairDataset(tmp_path / "pairs.parquet")
    first = [dataset.source.record(row).values["label_0"] == 1 for row in range(len(dataset))]
    assert len(first) == 40 and 5 < sum(first) < 35


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.md"])
def test_an_output_that_is_there_is_kept(
    images: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("made by hand")
    assert cli.main(["data", "build", str(images), "--output", str(tmp_path / "pairs.parquet")]) == 2
    assert f"{name}': is there already" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "made by hand"


def test_killed_before_it_wrote_the_card_it_is_completed(images: Path, tmp_path: Path) -> None:
    target, card = tmp_path / "pairs.parquet", tmp_path / "pairs.md"
    build_pairs(images, target, PairRule())
    text, written = card.read_text(), target.stat().st_mtime_ns
    card.unlink()
    with pytest.raises(InvalidInput, match="is there already"):
        build_pairs(images, target, PairRule(seed=1))  # others than those
    build_pairs(images, target, PairRule())
    assert card.read_text() == text and target.stat().st_mtime_ns == written


def test_mistakes_of_the_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "build", str(images)]) == 0
    assert "40 images, no mistakes" in capsys.readouterr().out
    (tmp_path / "7.png").write_bytes(b"text")
    output = tmp_path / "pairs.parquet"
    for arguments, message in (
        (["--weight", "beauty=1"], "is the name of no score"),
        (["--weight", "objects"], "is not NAME=NUMBER"),
        (["--weight", "objects=nan"], "is not a weight"),
        (["--margin", "-1"], "is not a difference of scores"),
        (["--max-pairs", "0"], "leaves no pair"),
        (["--weight", "objects=1", "--margin", "9"], "gives no pair"),
        (["--weight", "objects=1", "--no-balance"], "line 8, image '7.png' = "),
    ):
        assert cli.main(["data", "build", str(images), "--output", str(output), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
    assert parse_weights(["a=1", "b=-0.5"]) == {"a": 1.0, "b": -0.5}
