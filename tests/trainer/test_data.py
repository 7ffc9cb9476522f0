"""Data in a run: rows that are left out, ties that are kept, and the order of draws for buckets and streaming."""

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
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.trainer import precompute, train
from fastinvdpo.trainer.batches import BatchBuilder, ByBucket, ByWindow, DrawOrder, PairEncoder, epoch_order, swaps_tie
from tests.data.test_pairs import encoded
from tests.models import tiny as tiny_models
from tests.trainer import tiny

ROWS = 1000
PLANTED = {"corrupt image": 20, "missing image": 10, "missing caption": 40, "malformed label": 15}
TIES = 50


def plant(path: Path) -> dict[str, list[int]]:
    """A file of 1,000 pairs with known faults, and the rows that have them."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(ROWS):
        images = [encoded(Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))) for _ in range(2)]
        label = float(i % 2)
        rows.append(dict(zip(("jpg_0", "jpg_1"), images, strict=True)))
        rows[-1] |= {"label_0": label, "label_1": 1 - label, "caption": f"a {tiny.WORDS[i % 4]}"}
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
    pq.write_table(pa.Table.from_pylist(rows), path)
    return faulty


@pytest.mark.parametrize("ties", ["drop", "keep"])
def test_counts_of_a_run_are_what_was_planted(workspace: Path, ties: str, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = plant(workspace / "pairs.parquet")
    (workspace / "run.yaml").write_text(yaml.safe_dump(tiny.mapping(workspace)))
    options = [f"data.ties={ties}", "data.max_broken=0.1", "training.steps=3", "--no-progress"]
    assert cli.main(["train", str(workspace / "run.yaml"), *options]) == 0
    shown = capsys.readouterr()
    broken = sum(PLANTED.values())
    pairs = ROWS - broken - (TIES if ties == "drop" else 0)
    tied = f"{TIES} ties dropped" if ties == "drop" else f"{TIES} of them ties"
    assert f"Data: {ROWS} rows: {pairs} pairs, {tied}, {broken} broken rows left out (" in shown.out
    assert str(workspace / "run" / "broken.jsonl") in shown.out
    summary = json.loads((workspace / "run" / "data.json").read_text())
    assert summary["broken"] == PLANTED
    assert (summary["rows"], summary["pairs"], summary["ties"]) == (ROWS, pairs, TIES)
    lines = [json.loads(line) for line in (workspace / "run" / "broken.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == sorted(row for cause in PLANTED for row in faulty[cause])
    assert all(line["row"] in faulty[line["cause"]] for line in lines)
    assert load_model("digits", workspace / "run" / "model")


def test_a_limit_below_what_was_planted_ends_the_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(workspace / "pairs.parquet")
    (workspace / "run.yaml").write_text(yaml.safe_dump(tiny.mapping(workspace)))
    assert cli.main(["train", str(workspace / "run.yaml"), "data.max_broken=84"]) == 2
    assert "data.max_broken = 84: more rows than that are broken" in capsys.readouterr().err
    assert cli.main(["train", str(workspace / "run.yaml"), "data.max_broken=1.5"]) == 2
    assert "data.max_broken = 1.5: is neither a count" in capsys.readouterr().err


def test_the_cache_keeps_the_counts(workspace: Path) -> None:
    plant(workspace / "pairs.parquet")
    rows = pq.read_table(workspace / "pairs.parquet").slice(0, 60)
    pq.write_table(rows, workspace / "pairs.parquet")
    config = tiny.config(workspace, data={"max_broken": 0.5}, training={"steps": 1}, optimizer={"warmup_steps": 0})
    plain = train(config, progress=False)
    mapping = tiny.mapping(workspace, data={"max_broken": 0.5}, training={"steps": 1}, optimizer={"warmup_steps": 0})
    mapping |= {"cache": {"path": str(workspace / "cache")}, "output": {"directory": str(workspace / "cached")}}
    cached = train(type(config).from_mapping(mapping), progress=False)
    assert plain.data == cached.data and plain.data is not None and plain.data.broken
    for name in ("data.json", "broken.jsonl"):
        assert (workspace / "cached" / name).read_bytes() == (workspace / "run" / name).read_bytes()


# Ties that are kept


def tied_rows(path: Path, pairs: int = 6) -> Path:
    rng = np.random.default_rng(1)
    images = [[Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(2)] for _ in range(pairs)]
    names = ("jpg_0", "jpg_1")
    rows = [
        dict(zip(names, both, strict=True)) | {"caption": f"a {i}", "score_0": 1.0, "score_1": 2.0}
        for i, both in enumerate(images)
    ]
    write_pairs(
        path, [row | {"label_0": 0.5 if i % 2 else 1.0, "label_1": 0.5 if i % 2 else 0.0} for i, row in enumerate(rows)]
    )
    return path


def test_the_coin_of_a_tie_is_fair_and_follows_from_the_draw() -> None:
    heads = [swaps_tie(0, draw) for draw in range(4000)]
    assert abs(sum(heads) - 2000) < 5 * 32  # five standard deviations
    assert heads == [swaps_tie(0, draw) for draw in range(4000)] != [swaps_tie(1, draw) for draw in range(4000)]


def test_kept_ties_swap_sides_by_their_draw_with_and_without_cache(workspace: Path) -> None:
    tied_rows(workspace / "pairs.parquet")
    mapping = tiny.mapping(workspace, data={"ties": "keep"}) | {"cache": {"path": str(workspace / "cache")}}
    config = type(tiny.config(workspace)).from_mapping(mapping)
    cache = precompute(config, progress=False)
    model, dataset = load_model("digits", workspace / "model"), PairDataset(workspace / "pairs.parquet", ties="keep")
    order = DrawOrder(len(dataset), 0, 2, 1)
    plain = BatchBuilder(PairEncoder(model, dataset), model.device, order, with_unconditional=False)
    cached = BatchBuilder(cache, model.device, order, with_unconditional=False)
    swaps = []
    for start in range(0, 60, 2):
        batch, same = plain.build(range(start, start + 2)), cached.build(range(start, start + 2))
        torch.testing.assert_close(batch.latents, same.latents, rtol=0, atol=0)
        assert batch.scores is not None and same.scores is not None
        torch.testing.assert_close(batch.scores, same.scores, rtol=0, atol=0)
        for k, draw in enumerate(range(start, start + 2)):
            pair = dataset[order.pair_index(draw)]
            swapped = batch.scores[k] > batch.scores[2 + k]
            assert swapped == (pair.tie and swaps_tie(0, draw))
            winner = pair.loser if swapped else pair.winner
            torch.testing.assert_close(batch.latents[k], model.encode_images([winner])[0], rtol=0, atol=0)
            swaps.append(bool(swapped))
    assert 0 < sum(swaps) < len(swaps)


def test_a_dropped_caption_is_dropped_on_both_sides(workspace: Path) -> None:
    model, dataset = load_model("digits", workspace / "model"), PairDataset(workspace / "pairs.parquet")
    order, pairs = DrawOrder(10, 0, 10, 1), PairEncoder(model, dataset)
    builder = BatchBuilder(pairs, model.device, order, with_unconditional=False, caption_dropout=0.5)
    prompts = builder.build(range(40)).conditioning["encoder_hidden_states"]
    winners, losers = prompts.chunk(2)
    assert torch.equal(winners, losers)
    dropped = [bool((one == 0).all()) for one in winners]  # the embedding of the empty prompt
    assert 0 < sum(dropped) < 40


# Orders


def test_an_epoch_of_windows_visits_every_pair_once_and_few_groups_at_a_time() -> None:
    groups = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9], [10, 11, 12]]
    order = ByWindow(groups, groups_per_window=2)

    def epoch(*seed: int) -> list[int]:
        return [int(number) for number in order.order(np.random.default_rng(seed))]

    first = epoch(0, 0)
    assert sorted(first) == list(range(13)) and order.length == 13
    group_of = [next(g for g, group in enumerate(groups) if i in group) for i in first]
    seen: list[int] = []
    for group in group_of:
        if group not in seen:
            seen.append(group)
    windows = [set(seen[:2]), set(seen[2:4]), set(seen[4:])]
    position = [next(w for w, window in enumerate(windows) if group in window) for group in group_of]
    assert position == sorted(position), "a window ends before the next begins"
    assert epoch(0, 1) != first != epoch(1, 0)
    assert epoch(0, 0) == first, "a function of seed and epoch alone"


def test_an_epoch_of_buckets_visits_every_pair_in_batches_of_one_bucket() -> None:
    bucket_of = [0] * 7 + [2] * 4 + [5]
    order = ByBucket(bucket_of, batch_size=3)
    assert order.length == 9 + 6 + 3
    draws = DrawOrder(len(bucket_of), 4, 3, 2, epochs=order)
    for epoch in range(3):
        numbers = [draws.pair_index(d) for d in range(epoch * order.length, (epoch + 1) * order.length)]
        batches = [numbers[start : start + 3] for start in range(0, len(numbers), 3)]
        assert all(len({bucket_of[i] for i in batch}) == 1 for batch in batches)
        counts = Counter(numbers)
        assert set(counts) == set(range(12)), "none is left out"
        assert max(counts[i] for i in range(7)) <= 2


def test_processes_share_the_batches_of_a_step() -> None:
    epochs = ByBucket([0] * 5 + [1] * 6, batch_size=2)
    one = DrawOrder(11, 0, 2, 2, epochs=epochs)
    two = [DrawOrder(11, 0, 2, 1, 2, rank, epochs=epochs) for rank in range(2)]
    for step in range(6):
        alone = [list(one.micro_batch(step, micro)) for micro in range(2)]
        assert alone == [list(order.micro_batch(step, 0)) for order in two]


def wide_and_high(path: Path) -> Path:
    rng = np.random.default_rng(3)
    sizes = [(16, 32), (32, 16), (16, 16)]  # height, width
    rows = []
    for i in range(9):
        both = [Image.fromarray(rng.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8)) for _ in range(2)]
        rows.append({"jpg_0": both[0], "jpg_1": both[1], "label_0": 1.0, "label_1": 0.0, "caption": "a dog"})
    write_pairs(path, rows)
    return path


def test_training_in_buckets_resumes_bit_for_bit(tmp_path: Path) -> None:
    tiny_models.sd_pipeline().save_pretrained(tmp_path / "model", safe_serialization=True)
    wide_and_high(tmp_path / "pairs.parquet")
    model = {"family": "stable-diffusion"}
    data = {"resolution": 16, "buckets": {"multiple": 8, "max_aspect": 2.0}}

    def run(steps: int, name: str) -> Path:
        output = {"directory": str(tmp_path / name), "checkpoint_every": 1}
        config = tiny.config(tmp_path, model=model, data=data, training={"steps": steps}, output=output)
        return train(config, progress=False).model_directory

    straight = run(4, "straight")
    run(2, "stopped")
    resumed = run(4, "stopped")
    pairs = zip(
        load_model("stable-diffusion", straight).network.parameters(),
        load_model("stable-diffusion", resumed).network.parameters(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    rows = (tmp_path / "stopped" / "history.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(row)["loss"]) for row in rows)
    config = tiny.config(
        tmp_path,
        model=model,
        data=data,
        training={"steps": 5, "batch_size": 1, "gradient_accumulation_steps": 2},
        output={"directory": str(tmp_path / "stopped")},
    )
    with pytest.raises(InvalidInput, match="pairs in a batch of one bucket"):
        train(config, progress=False)


def test_streaming_resumes_bit_for_bit(workspace: Path) -> None:
    table = pq.read_table(workspace / "pairs.parquet")
    pq.write_table(table, workspace / "pairs.parquet", row_group_size=3)

    def run(steps: int, name: str) -> list[torch.Tensor]:
        config = tiny.config(
            workspace,
            data={"streaming": True, "shuffle_buffer": 4, "resolution": 8},
            training={"steps": steps},
            output={"directory": str(workspace / name)},
        )
        model = load_model("digits", train(config, progress=False).model_directory)
        return list(model.network.parameters())

    straight = run(6, "straight")
    run(3, "stopped")
    assert all(torch.equal(a, b) for a, b in zip(straight, run(6, "stopped"), strict=True))


def test_the_order_that_a_data_set_asks_for(workspace: Path, tmp_path: Path) -> None:
    plain = PairDataset(workspace / "pairs.parquet")
    numbers = [DrawOrder(10, 3, 2, 1).pair_index(draw) for draw in range(20)]
    assert [DrawOrder(10, 3, 2, 1, epochs=epoch_order(plain, 2)).pair_index(d) for d in range(20)] == numbers
