"""Scores, cache and training, killed with SIGKILL twenty times at random moments: nothing is lost and nothing differs.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fastinvdpo import cli
from fastinvdpo.data import write_pairs
from fastinvdpo.evaluation import scoring
from fastinvdpo.trainer import cache_writing
from fastinvdpo.trainer.cache import Manifest
from tests.evaluation import tiny_clip
from tests.trainer import tiny
from tests.trainer.forked import Ended, Server
from tests.trainer.test_resume import history

KILLS, SEED = 20, 0
PAIRS, STEPS = 48, 12


def run(words: list[str]) -> None:
    """A command, in a process of its own, with files small enough that there are many of them."""
    scoring.ROWS_PER_PART, cache_writing.PAIRS_PER_SHARD = 4, 4
    assert cli.main([*words, "--no-progress"]) == 0


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The three, each of which needs what the one before it has written; what they write is where they are called."""
    root, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    tiny.write_model(root / "model")
    clip = tiny_clip.write_clip(root / "clip")
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(2 * PAIRS)]
    rows = [
        {"jpg_0": pictures[2 * i], "jpg_1": pictures[2 * i + 1], "label_0": 1, "label_1": 0,
         "caption": f"a {tiny.WORDS[i % len(tiny.WORDS)]}"}
        for i in range(PAIRS)
    ]  # fmt: skip
    write_pairs(root / "pairs.parquet", rows)
    (root / "prompts.txt").write_text("\n".join(f"a {word}" for word in tiny.WORDS))
    training = {"steps": STEPS, "batch_size": 2, "gradient_accumulation_steps": 2, "ema_decay": 0.9}
    evaluation = {
        "every": 3,
        "prompts": str(root / "prompts.txt"),
        "scorers": ["tests.evaluation.tiny:brightness"],
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
    }
    output = {"directory": "run", "checkpoint_every": 2, "log_every": 5, "tensorboard": False}
    config: dict[str, Any] = tiny.mapping(
        root, "inversion-dpo", data={"path": "scored.parquet"}, training=training, output=output
    )
    config |= {"cache": {"path": "cache"}, "evaluation": evaluation}
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    scored = [str(root / "pairs.parquet"), "--scorer", f"pickscore={clip}", "--batch-size", "4"]
    return {
        "score": ["score", *scored, "--relabel", "pickscore", "--output", "scored.parquet"],
        "precompute": ["precompute", str(root / "run.yaml")],
        "train": ["train", str(root / "run.yaml")],
    }


def moments(seconds: dict[str, float], generator: random.Random) -> dict[str, list[float]]:
    """When to kill each command, from its start: one moment in each of as many equal parts as it has kills, which are
    shared out by duration, three to each at least.
    """
    counts = {name: max(3, round(KILLS * length / sum(seconds.values()))) for name, length in seconds.items()}
    counts[max(seconds, key=lambda name: seconds[name])] += KILLS - sum(counts.values())
    planned = {}
    for name, count in counts.items():
        planned[name] = [(part + generator.random()) / count * seconds[name] for part in range(count)]
        generator.shuffle(planned[name])
    return planned


def test_twenty_kills(commands: dict[str, list[str]], forks: Server, tmp_path: Path) -> None:
    """What is killed is started again, with the same command, and killed again, until the planned moments are used up.

    A resumed command has less to do than one that starts; where it ends before its moment, the moment is kept for the
    next time that everything is done from the start.
    """

    def call(name: str, place: Path, kill_after: float | None = None) -> Ended:
        ended = forks.call(run, commands[name], directory=place, kill_after=kill_after)
        assert ended.status in (0, -signal.SIGKILL), ended.said
        return ended

    whole = tmp_path / "whole"
    whole.mkdir()
    seconds = {name: call(name, whole).seconds for name in commands}
    planned = moments(seconds, random.Random(SEED))
    print(f"seed {SEED}; seconds {seconds}; moments {planned}")
    kills = dict.fromkeys(commands, 0)
    for round_ in range(2 * KILLS):
        if not any(planned.values()):
            break
        place = tmp_path / f"round-{round_}"
        place.mkdir()
        for name in commands:
            fresh = True
            while planned[name]:
                ended = call(name, place, planned[name][0])
                if ended.status == 0:
                    break
                print(f"round {round_}: {name} killed after {ended.seconds:.2f} s, left {left_over(place)}")
                planned[name].pop(0)
                kills[name] += 1
                fresh = False
            else:
                assert call(name, place).status == 0
                continue
            if fresh:  # the machine has become faster
                planned[name][0] *= 0.8
        compare(place, whole)
    assert sum(kills.values()) == KILLS and min(kills.values()) >= 3, kills


def left_over(place: Path) -> list[str]:
    """Temporary files and directories, by their paths."""
    return [str(path.relative_to(place)) for path in place.rglob(".fastinvdpo-*.tmp")]


def compare(place: Path, whole: Path) -> None:
    """The same files, and in them the same but for times."""
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (place, whole)]
    assert names[0] == names[1]
    assert left_over(place) == [] and not list(place.glob("*.parts"))
    exact = [name for name in names[0] if name.endswith((".parquet", ".safetensors", "best.json", "base.json"))]
    exact += ["run/evaluation/history.jsonl", "cache/data.json"]
    assert len(exact) > PAIRS // 4  # shards of four pairs
    for name in exact:
        assert (place / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (Manifest.read(root / "cache") for root in (place, whole))
    assert ours is not None and theirs is not None
    assert (ours.key, ours.sizes, ours.network_evaluations) == (theirs.key, theirs.sizes, theirs.network_evaluations)
    assert history(place / "run", [1, 5, 10, 12]) == history(whole / "run", [1, 5, 10, 12])
    for step in (10, 12):
        one, other = (tiny.stored(root / "run", step) for root in (place, whole))
        for part in ("trainable", "ema", "state"):
            tiny.assert_same(getattr(one, part), getattr(other, part))
        assert one.meta["network_evaluations"] == other.meta["network_evaluations"]
    assert tiny.moved(tiny.weights(place / "run")) > 1e-4
