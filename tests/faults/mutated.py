"""Damaged and hostile inputs of every format: a reader answers or refuses, within bounds, and touches nothing else.

``python -m tests.faults.mutated --count 6000 --seed 0`` writes a good input of every format, mutates one of its files
at a time, and reads it in a forked process. It fails on a traceback, a wait of more than 20 seconds, a growth of more
than 1 GiB, and a file that appears elsewhere; ``--only NAME --first N`` runs one case again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastinvdpo.config import load_config
from fastinvdpo.data import PairDataset, open_source, write_pairs
from fastinvdpo.data.score_range import measured_range, stored_range
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.prompts import load_prompts
from fastinvdpo.evaluation.scorers import FunctionScorer
from fastinvdpo.evaluation.scoring import score_pairs

SECONDS, GROWTH_KIB, CASES_PER_PROCESS = 20, 1 << 20, 50
ODD = [
    *("9" * 400, "-1", "1e999", "NaN", "null", "true", "0.5", '""', "[]", "{}", "[" * 100_000),
    *('"\\ud83d"', '"\\u0000"', '"/etc/passwd"', '"../../../etc/passwd"', '"/dev/zero"', '"fifo"', '"images"'),
    *('"' + "x" * 5000 + '"', "!!python/object:os.x {}", "&a [*a]", "*a"),
    *("'", '"', "#", "{", "]", ",", ":", "\t", "\x00", "\ufeff", "\u2028"),
]


def write_inputs(root: Path) -> None:
    """A good input of every format, each in a folder of its own."""
    picture = Image.effect_noise((9, 7), 80)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    rows = [
        {
            **{f"jpg_{side}": encoded.getvalue() for side in (0, 1)},
            **{"label_0": i % 2, "label_1": 1 - i % 2, "caption": f"caption {i}", "score_0": 0.1 * i, "score_1": 0.5},
        }
        for i in range(4)
    ]
    for name in ("parquet", "shards", "folder", "ranked", "saved", "config", "prompts", "scores", "images"):
        (root / name).mkdir(parents=True)
    write_pairs(root / "parquet" / "pairs.parquet", rows)
    for name in ("folder", "ranked", "images"):
        (root / name / "images").mkdir()
        os.mkfifo(root / name / "fifo")
        for number, kind in enumerate(("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")):
            picture.convert("RGB").save(root / name / "images" / f"{number}.img", kind)
    lines = [
        {
            **{f"image_{side}": f"images/{(i + side) % 6}.img" for side in (0, 1)},
            **{"label": i % 2, "caption": f"a {i}", "score_0": 1, "score_1": 2.5},
        }
        for i in range(6)
    ]
    for name in ("folder", "images"):
        (root / name / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranked = [{"prompt": "a cat", "image_path": [f"images/{i}.img" for i in range(3)], "rank": [2, 1, 3]}] * 3
    (root / "ranked" / "pairs.json").write_text(json.dumps(ranked, indent=1))
    with tarfile.open(root / "shards" / "pairs.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i, row in enumerate(rows):
            told = json.dumps({key: row[key] for key in ("label_0", "label_1", "caption")}).encode()
            for ending, data in (("0.png", row["jpg_0"]), ("1.png", row["jpg_1"]), ("json", told), ("txt", b"a cat")):
                member = tarfile.TarInfo(f"{'long/' * (30 * (i == 3))}{i:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(root / "saved" / "set")
    (root / "config" / "run.yaml").write_text(
        "method:\n  name: inpo\n  beta: 2000.0\nmodel: {path: base, lora: {rank: 4, target_modules: [to_q, to_k]}}\n"
        "data:\n  path: pairs.parquet\n  columns: {score_0: a, score_1: b}\n  max_broken: 0.01\n"
        "training:\n  steps: 1_000  # some\n  seed: 7\noptimizer: &o {learning_rate: 1e-8}\n"
        "output: {directory: 'run #3'}\n"
    )
    (root / "prompts" / "p.txt").write_text("a cat\na dog\n")
    (root / "prompts" / "p.json").write_text('[{"prompt": "a cat"}, "a dog"]')
    (root / "prompts" / "p.jsonl").write_text('{"prompt": "a cat"}\n"a dog"\n')
    shutil.copy(root / "parquet" / "pairs.parquet", root / "prompts" / "p.parquet")
    shutil.copy(root / "parquet" / "pairs.parquet", root / "scores" / "pairs.parquet")
    score(root / "scores")


def score(folder: Path) -> None:
    scorer = FunctionScorer(lambda images, captions: torch.arange(len(images)), "mine")
    score_pairs(open_source(folder / "pairs.parquet", streaming=True), [scorer], folder / "scored.parquet", named=True)


def pairs(path: Path) -> None:
    """Open a set, decode every pair, and look for the range of its scores."""
    source = open_source(path)
    dataset = PairDataset(source, max_broken=sys.maxsize, resolution=8)
    for i in range(min(len(dataset), 20)):
        refused(partial(dataset.pair, i, i))
    measured_range(source)
    stored_range(source, ("score_0", "score_1"))


def streamed(path: Path) -> None:
    dataset = PairDataset(open_source(path, streaming=True), resolution=8)
    for i in range(min(len(dataset), 20)):
        refused(partial(dataset.pair, i, i))


def refused(read: Callable[[], Any]) -> bool:
    try:
        read()
    except InvalidInput as error:
        assert len(str(error)) < 20_000, f"a message of {len(str(error))} characters"
        return True
    return False


# name: the file that is mutated (a pattern), and what reads its folder
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "parquet": ("*.parquet", lambda folder: pairs(folder / "pairs.parquet")),
    "streamed": ("*.parquet", lambda folder: streamed(folder / "pairs.parquet")),
    "shards": ("*.tar", lambda folder: pairs(folder / "pairs.tar")),
    "folder": ("*.jsonl", lambda folder: pairs(folder / "pairs.jsonl")),
    "ranked": ("*.json", lambda folder: pairs(folder / "pairs.json")),
    "images": ("images/*.img", lambda folder: pairs(folder / "pairs.jsonl")),
    "saved": ("set/*", lambda folder: pairs(folder / "set")),
    "config": ("*.yaml", lambda folder: load_config(folder / "run.yaml")),
    "prompts": ("p.*", lambda folder: [refused(partial(load_prompts, file)) for file in folder.glob("p.*")]),
    "scores": ("scored.parquet", score),
}
FOLDERS = {"streamed": "parquet"}


def mutate(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """``data`` with some bits turned, bytes lost or moved, keys repeated, values replaced by odd ones."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(found) + 1)
        end = min(len(found), at + draw.choice([1, 4, 16, 200, 5000]))
        kind = draw.choice(
            ["bits", "bits", "cut", "drop", "move", "splice", "number", "value", "value", "repeat", "fill", "header"]
        )
        if kind == "bits" and found:
            for _ in range(draw.choice([1, 2, 8])):
                found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del found[at:]
        elif kind == "drop":
            del found[at:end]
        elif kind == "move":
            found[at:at] = found[draw.randrange(len(found) + 1) :][: end - at]
        elif kind == "splice":
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            found[at:end] = other[start : start + 4096]
        elif kind == "fill":
            found[at:end] = bytes([draw.choice([0, 255, 127])]) * (end - at)
        elif kind == "header" and len(found) >= 1024:
            _edit_header(found, draw)
        elif kind in ("number", "value"):
            pattern = rb"\d+" if kind == "number" else rb'"[^"\n]*"|(?<=: )[^\n,}]+'
            places = list(re.finditer(pattern, bytes(found)))
            if places:
                place = draw.choice(places)
                found[place.start() : place.end()] = draw.choice(ODD).encode()
        elif kind == "repeat":
            lines = bytes(found).split(b"\n")
            lines.insert(draw.randrange(len(lines)), draw.choice(lines))
            found = bytearray(b"\n".join(lines))
    return bytes(found)


def _edit_header(found: bytearray, draw: random.Random) -> None:
    """Change a field of a header of a tar file, with the checksum that then belongs to it."""
    block = 512 * draw.randrange(len(found) // 512)
    field, size, values = draw.choice(
        [
            (124, 12, [b"77777777777\0", b"00000000000\0", b"\xff" * 12, b"\x80" + b"\xff" * 11]),
            (156, 1, [b"1", b"2", b"3", b"6", b"x", b"L", b"g", b"S", b"\0"]),
            (0, 20, [b"/etc/passwd\0", b"../../x.json\0", b"\0" * 20, b"._0000.json\0"]),
        ]
    )
    value = draw.choice(values)
    found[block + field : block + field + size] = value[:size].ljust(size, b"\0")
    found[block + 148 : block + 156] = b" " * 8
    found[block + 148 : block + 156] = b"%06o\0 " % sum(found[block : block + 512])


def run_case(name: str, number: int, seed: int, base: Path, place: Path) -> str:
    """What is wrong with the reader's answer; empty where nothing is."""
    draw = random.Random(f"{name} {number} {seed}")
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / FOLDERS.get(name, name), folder, copy_function=_copy)
    pattern, read = READERS[name]
    file = draw.choice(sorted(folder.glob(pattern)))
    others = [other.read_bytes() for other in sorted(base.glob("*/*.*"))]
    file.write_bytes(mutate(file.read_bytes(), draw, others))
    before = sorted(os.listdir(place)), sorted(os.listdir("."))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        refused(partial(read, folder))
    except BaseException:
        return traceback.format_exc()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
    if grown > GROWTH_KIB:
        return f"memory grew by {grown >> 10} MiB"
    return "" if before == (sorted(os.listdir(place)), sorted(os.listdir("."))) else "a file appeared elsewhere"


def _copy(source: str, target: str) -> None:
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copyfile(source, target)


def run_cases(cases: list[tuple[str, int]], seed: int, base: Path, place: Path) -> Iterator[tuple[str, int, str]]:
    """``(name, number, what is wrong)`` of each case, in forked processes; a new one after one that hung or died."""
    while cases:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            os.chdir(place)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            warnings.simplefilter("ignore")
            with os.fdopen(write_end, "w") as told:
                for name, number in cases[:CASES_PER_PROCESS]:
                    told.write(json.dumps(run_case(name, number, seed, base, place)) + "\n")
                    told.flush()
            os._exit(0)
        os.close(write_end)
        done = 0
        with os.fdopen(read_end) as answers:
            while done < min(len(cases), CASES_PER_PROCESS):
                ready = select.select([answers], [], [], SECONDS)[0]
                line = answers.readline() if ready else ""
                yield *cases[done], json.loads(line) if line else "died" if ready else f"no answer in {SECONDS} s"
                done += 1
                if not line:
                    os.kill(child, signal.SIGKILL)
                    break
        os.waitpid(child, 0)
        cases = cases[done:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(READERS))
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    names = [options.only] if options.only else sorted(READERS)
    numbers = range(options.first, options.first + -(-options.count // len(names)))
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        base, place = Path(folder, "base"), Path(folder, "place")
        place.mkdir()
        write_inputs(base)
        for name, number, problem in run_cases(
            [(name, n) for name in names for n in numbers], options.seed, base, place
        ):
            if problem:
                wrong += 1
                print(f"{name} {number} (seed {options.seed}):\n{problem}", flush=True)
    print(f"{len(names) * len(numbers)} mutated inputs, {wrong} answered wrongly")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
