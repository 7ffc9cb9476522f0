"""Data in a run: rows that are left out, ties that are kept, and the order of draws."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from fastinvdpo import cli
from fastinvdpo.data import PairDataset, write_pairs
from fastinvdpo.models import load_model
from fastinvdpo.trainer import TrainConfig, precompute
from fastinvdpo.trainer.batches import BatchBuilder, PairEncoder
from fastinvdpo.trainer.order import DrawOrder, by_bucket, by_window, drops_caption, epoch_order, swaps_tie
from tests.data.test_pairs import encoded
from tests.trainer import tiny

ROWS = 1000
PLANTED = {"corrupt image": 20, "missing image": 10, "missing caption": 40, "malformed label": 15}
TIES, BROKEN = 50, sum(PLANTED.values())


@pytest.fixture
def faulty(workspace: Path) -> dict[str, list[int]]:
    """1,000 pairs with known faults in ``pairs.parquet``; the rows that have them."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(ROWS):
        images = [encoded(Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))) for _ in range(2)]
        rows.append(dict(zip(("jpg_0", "jpg_1"), images, strict=True)))
        rows[-1] |= {"label_0": float(i % 2), "label_1": 1.0 - i % 2, "caption": f"a {tiny.WORDS[i % 4]}"}
    numbers = list(range(ROWS))
    random.Random(0).shuffle(numbers)
    faulty = {cause: [numbers.pop() for _ in range(count)] for cause, count in {**PLANTED, "tie": TIES}.items()}
    for i in faulty["corrupt image"]:
        side = f"jpg_{i % 2}"
        data = bytearray(rows[i][side])
        if i % 3:
            data[len(data) // 2] ^= 0xFF  # found by decoding alone
        rows[i][side] = bytes(data) if i % 3 else bytes(data[:-20])
    for i in faulty["missing image"]:
        rows[i][f"jpg_{i % 2}"] = None if i % 3 else b""
    for i in faulty["missing caption"]:
        rows[i]["caption"] = None
    for i in faulty["malformed label"]:
        rows[i] |= {"label_0": 2.0} if i % 2 else {"label_1": None}
    for i in faulty["tie"]:
        rows[i] |= {"label_0": 0.5, "label_1": 0.5}
    pq.write_table(pa.Table.from_pylist(rows), workspace / "pairs.parquet")
    (workspace / "run.yaml").write_text(yaml.safe_dump(tiny.mapping(workspace)))
    return faulty


@pytest.mark.parametrize("ties", ["drop", "keep"])
def test_counts_of_a_run_are_what_was_planted(
    workspace: Path, faulty: dict[str, list[int]], ties: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"data.ties={ties}", "data.max_broken=0.1", "training.steps=3", "--no-progress"]
    assert cli.main(["train", str(workspace / "run.yaml"), *options]) == 0
    shown = capsys.readouterr().out
    pairs = ROWS - BROKEN - (TIES if ties == "drop" else 0)
    tied = f"{TIES} ties dropped" if ties == "drop" else f"{TIES} of them ties"
    assert f"Data: {ROWS} rows: {pairs} pairs, {tied}, {BROKEN} broken rows left out (" in shown
    assert str(workspace / "run" / "broken.jsonl") in shown
    summary = json.loads((workspace / "run" / "data.json").read_text())
    assert summary["broken"] == PLANTED
    assert (summary["rows"], summary["pairs"], summary["ties"]) == (ROWS, pairs, TIES)
    lines = [json.loads(line) for line in (workspace / "run" / "broken.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == sorted(row for cause in PLANTED for row in faulty[cause])
    assert all(line["row"] in faulty[line["cause"]] for line in lines)


@pytest.mark.usefixtures("faulty")
def test_a_limit_below_what_was_planted_ends_the_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for limit, message in ((BROKEN - 1, "84: more rows than that are broken"), (1.5, "1.5: is neither a count")):
        assert cli.main(["train", str(workspace / "run.yaml"), f"data.max_broken={limit}"]) == 2
        assert f"data.max_broken = {message}" in capsys.readouterr().err


@pytest.mark.usefixtures("faulty")
def test_the_cache_keeps_the_counts(workspace: Path) -> None:
    pq.write_table(pq.read_table(workspace / "pairs.parquet").slice(0, 60), workspace / "pairs.parquet")
    once: dict[str, Any] = {"data": {"max_broken": 0.5}, "training": {"steps": 1}, "optimizer": {"warmup_steps": 0}}
    plain = tiny.trained(workspace, **once)
    cached = tiny.trained(workspace, "cached", cache={"path": str(workspace / "cache")}, **once)
    assert plain.data == cached.data and plain.data is not None and plain.data.broken
    for name in ("data.json", "broken.jsonl"):
        assert (cached.directory / name).read_bytes() == (plain.directory / name).read_bytes()


# Ties that are kept


@pytest.mark.parametrize(
    ("happens", "share"), [(swaps_tie, 0.5), (lambda seed, draw: drops_caption(seed, draw, 0.3), 0.3)]
)
def test_a_coin_has_its_rate_and_depends_on_seed_and_draw_alone(happens: Any, share: float) -> None:
    first = [happens(0, draw) for draw in range(4000)]
    assert abs(np.mean(first) - share) < 5 * np.sqrt(share * (1 - share) / 4000)
    assert first == [happens(0, draw) for draw in range(4000)] != [happens(1, draw) for draw in range(4000)]
    assert not any(drops_caption(0, draw, 0.0) for draw in range(100))


def test_kept_ties_swap_sides_by_their_draw_with_and_without_cache(workspace: Path) -> None:
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(12)]
    rows = [
        {"jpg_0": images[2 * i], "jpg_1": images[2 * i + 1], "caption": f"a {i}", "score_0": 1.0, "score_1": 2.0}
        | {"label_0": 0.5 if i % 2 else 1.0, "label_1": 0.5 if i % 2 else 0.0}
        for i in range(6)
    ]
    write_pairs(workspace / "pairs.parquet", rows)
    mapping = tiny.mapping(workspace, data={"ties": "keep"}, cache={"path": str(workspace / "cache")})
    cache = precompute(TrainConfig.from_mapping(mapping), progress=False)
    model, dataset = (
        load_model("auto", workspace / "model"),
        PairDataset(workspace / "pairs.parquet", ties="keep"),
    )
    order, swaps = DrawOrder(len(dataset), 0, 2, 1), []
    plain, cached = (
        BatchBuilder(pairs, model.device, order, with_unconditional=False)
        for pairs in (PairEncoder(model, dataset), cache)
    )
    for start in range(0, 60, 2):
        batch, same = plain.build(range(start, start + 2)), cached.build(range(start, start + 2))
        assert batch.scores is not None and same.scores is not None
        assert torch.equal(batch.latents, same.latents) and torch.equal(batch.scores, same.scores)
        for k, draw in enumerate(range(start, start + 2)):
            pair = dataset[order.pair_index(draw)]
            swapped = bool(batch.scores[k] > batch.scores[2 + k])
            assert swapped == (pair.tie and swaps_tie(0, draw))
            winner = pair.loser if swapped else pair.winner
            torch.testing.assert_close(batch.latents[k], model.encode_images([winner])[0], rtol=0, atol=0)
            swaps.append(swapped)
    assert 0 < sum(swaps) < len(swaps)


def test_a_dropped_caption_is_dropped_on_both_sides(workspace: Path) -> None:
    model, dataset = load_model("auto", workspace / "model"), PairDataset(workspace / "pairs.parquet")
    order, pairs = DrawOrder(10, 0, 10, 1), PairEncoder(model, dataset)
    builder = BatchBuilder(pairs, model.device, order, with_unconditional=False, caption_dropout=0.5)
    winners, losers = builder.build(range(40)).conditioning["encoder_hidden_states"].chunk(2)
    assert torch.equal(winners, losers)
    empty = model.encode_prompts([""])["encoder_hidden_states"][0]
    dropped = [torch.equal(one, empty) for one in winners]
    assert 0 < sum(dropped) < 40


# Orders


@pytest.mark.parametrize(("batch", "accumulation", "processes"), [(12, 1, 1), (3, 4, 1), (2, 2, 3), (1, 3, 4)])
def test_a_step_has_the_same_draws_however_they_are_dealt(batch: int, accumulation: int, processes: int) -> None:
    for step in (0, 1, 7):
        draws = [
            draw
            for rank in range(processes)
            for micro in range(accumulation)
            for draw in DrawOrder(10, 0, batch, accumulation, processes, rank).micro_batch(step, micro)
        ]
        assert sorted(draws) == list(range(12 * step, 12 * step + 12))


def test_every_epoch_has_every_pair_once_in_another_order(workspace: Path) -> None:
    def epoch(number: int, *, seed: int = 3, batch: int = 4) -> list[int]:
        order = DrawOrder(50, seed, batch, 1)
        return [order.pair_index(draw) for draw in range(50 * number, 50 * number + 50)]

    assert all(Counter(epoch(number)) == Counter(range(50)) for number in range(3))
    assert epoch(0) != epoch(1) != epoch(2)
    assert epoch(0, batch=25) == epoch(0) != epoch(0, seed=4)
    plain = epoch_order(PairDataset(workspace / "pairs.parquet"), 2)  # which asks for no order of its own
    numbers = [
        [order.pair_index(d) for d in range(20)]
        for order in (DrawOrder(10, 3, 2, 1), DrawOrder(10, 3, 2, 1, epochs=plain))
    ]
    assert numbers[0] == numbers[1]


def test_an_epoch_of_windows_visits_every_pair_once_and_few_groups_at_a_time() -> None:
    groups = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9], [10, 11, 12]]
    order = by_window(groups, groups_per_window=2)

    def epoch(*seed: int) -> list[int]:
        return [int(number) for number in order.order(np.random.default_rng(seed))]

    first = epoch(0, 0)
    assert sorted(first) == list(range(13)) and order.length == 13
    group_of = [next(g for g, group in enumerate(groups) if i in group) for i in first]
    seen = list(dict.fromkeys(group_of))
    windows = [seen[:2], seen[2:4], seen[4:]]
    position = [next(w for w, window in enumerate(windows) if group in window) for group in group_of]
    assert position == sorted(position), "a window ends before the next begins"
    assert epoch(0, 1) != first == epoch(0, 0) != epoch(1, 0)


def test_an_epoch_of_buckets_visits_every_pair_in_batches_of_one_bucket() -> None:
    bucket_of = [0] * 7 + [2] * 4 + [5]
    order = by_bucket(bucket_of, batch_size=3)
    assert order.length == 9 + 6 + 3
    draws = DrawOrder(len(bucket_of), 4, 3, 2, epochs=order)
    for epoch in range(3):
        numbers = [draws.pair_index(d) for d in range(epoch * order.length, (epoch + 1) * order.length)]
        batches = [numbers[start : start + 3] for start in range(0, len(numbers), 3)]
        assert all(len({bucket_of[i] for i in batch}) == 1 for batch in batches)
        counts = Counter(numbers)
        assert set(counts) == set(range(12)), "none is left out"
        assert max(counts[i] for i in range(7)) <= 2
    one, two = (
        DrawOrder(12, 0, 3, 2, epochs=order),
        [DrawOrder(12, 0, 3, 1, 2, rank, epochs=order) for rank in range(2)],
    )
    for step in range(6):  # processes share the batches of a step
        assert [one.micro_batch(step, micro) for micro in range(2)] == [each.micro_batch(step, 0) for each in two]
