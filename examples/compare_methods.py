"""All methods on the demo's emoji with as many network evaluations each: reward gained, fidelity kept, time::

    python -m fastinvdpo._examples.compare_methods --output comparison

β and the other options are the demo's. The learning rate is searched for each method: of those in ``LEARNING_RATES``,
the one with the highest reward at seed 0 whose samples still show the prompted emoji, among the five nearest, as often
as ``FIDELITY`` asks of the base model's. Two further seeds are trained with it, and one run on labels that a coin
decides, where nothing should be learned. Every run is kept; called again, the command continues with those that are
missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastinvdpo._examples.emoji.judge import Verdict
from fastinvdpo._examples.emoji.run import BATCH_SIZE, METHODS, EmojiDemo, Run
from fastinvdpo.data import write_pairs
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.evaluation.metrics import win_rate
from fastinvdpo.evaluation.page import DPI, new_figure
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import TrainConfig, train
from fastinvdpo.trainer.dry_run import count_evaluations

PREFERENCE = "noto"
EVALUATIONS = 80_000
LEARNING_RATES = (1e-5, 3e-5, 1e-4)
SEEDS = (0, 1, 2)
FIDELITY = 0.9
"""Least share of the base model's own top-5 fidelity."""


def compare(
    demo: EmojiDemo,
    output: OutputDirectory,
    methods: Sequence[str],
    *,
    evaluations: int = EVALUATIONS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Make the runs that are missing in ``output``, then the table and the plot of all.

    Args:
        demo: the base model, the pairs and the judge.
        methods: names in ``METHODS``.
        evaluations: network evaluations of a run, up to a step's.
        learning_rates: searched at the first of ``seeds``.

    Returns:
        What ``comparison.json`` holds: the settings, and by method its chosen runs, those of the search and the
        control.
    """
    base = functools.cache(lambda seed: demo.verdict(PREFERENCE, demo.sample(demo.base, seed)))
    found: dict[str, Any] = {}
    for method in methods:

        def run(learning_rate: float, seed: int, control: str | None = None, name: str = method) -> dict[str, Any]:
            settings = {"method": name, "learning_rate": learning_rate, "seed": seed, "control": control}
            return _kept(demo, base, output, {**settings, "evaluations": evaluations})

        search = [run(rate, seeds[0]) for rate in learning_rates]
        chosen = _best(search)
        rate = chosen["learning_rate"]
        found[method] = {
            "runs": [chosen, *(run(rate, seed) for seed in seeds[1:])],
            "search": search,
            "control": run(rate, seeds[0], "shuffle"),
        }
    result = {"preference": PREFERENCE, "evaluations": evaluations, "methods": found}
    output.write("comparison.json", result)
    output.write("comparison.md", table(result))
    with output.file("comparison.png") as partial:
        _plot(partial, result)
    return result


def method_config(
    demo: EmojiDemo, run: Run, evaluations: int, learning_rate: float, directory: Path, rows: Sequence[dict]
) -> TrainConfig:
    """The configuration of a run in a directory, with as many steps as its evaluations allow."""

    def config(steps: int) -> TrainConfig:
        found = demo.config(dataclasses.replace(run, steps=steps), directory, rows, learning_rate).as_dict()
        found["cache"]["path"] = None  # every method makes all of its evaluations
        found["output"]["tensorboard"] = False
        return TrainConfig.from_mapping(found)

    counted = count_evaluations(config(1))
    steps = round(evaluations / (BATCH_SIZE * (counted.with_gradient + counted.without_gradient)))
    if steps < 1:
        raise invalid("evaluations", evaluations, f"is less than one step of {run.method} needs", "give more")
    return config(steps)


def _kept(
    demo: EmojiDemo, base: Callable[[int], Verdict], output: OutputDirectory, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The run with these settings: read where it is kept, else made. ``base(seed)``: the verdict on the base model."""
    name = "-".join(str(value) for value in settings.values() if value is not None) + ".json"
    stored = output.path / "runs" / name
    if stored.exists():
        found: dict[str, Any] = json.loads(stored.read_text())
        return found
    run = Run(settings["method"], PREFERENCE, settings["seed"], control=settings["control"])
    rows = demo.rows(run)
    with tempfile.TemporaryDirectory() as scratch:
        write_pairs(Path(scratch) / "pairs.parquet", rows)
        config = method_config(demo, run, settings["evaluations"], settings["learning_rate"], Path(scratch), rows)
        result = train(config, resume="never", progress=False)
        before, after = base(run.seed), demo.verdict(PREFERENCE, demo.sample(result.model_directory, run.seed))
    row = {
        **settings,
        "steps": result.steps,
        "network_evaluations": result.network_evaluations,
        "seconds": result.seconds,
        "gain": float((after.rewards - before.rewards).mean()),
        "win_rate": win_rate(after.rewards, before.rewards).mean,
        "before": before.as_dict(),
        **after.as_dict(),
    }
    output.write(f"runs/{name}", row)
    print(f"{name}: gain {row['gain']:.4f}, top 5 {row['top5']:.3f}", file=sys.stderr, flush=True)
    return row


def _best(search: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The highest gain among those with fidelity; the most faithful where none has."""
    faithful = [row for row in search if row["top5"] >= FIDELITY * row["before"]["top5"]]
    return max(faithful, key=lambda row: row["gain"]) if faithful else max(search, key=lambda row: row["top5"])


def table(result: Mapping[str, Any]) -> str:
    """The comparison in Markdown, highest gain first: means over the seeds, least and greatest gain in brackets."""
    columns = [
        "method",
        "learning rate",
        "gain in reward",
        "win rate",
        "prompted emoji among five nearest",
        "Fréchet distance",
    ]
    columns += ["evaluations", "seconds", "gain with random labels"]
    base = _before(result)
    lines = [f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|"]
    lines.append(f"| before | | | | {base['top5']:.3f} | {base['frechet']:.2f} | | | |")
    means = {name: np.mean([row["gain"] for row in found["runs"]]) for name, found in result["methods"].items()}
    for name in sorted(means, key=lambda name: -means[name]):
        runs = result["methods"][name]["runs"]
        gains = [row["gain"] for row in runs]
        mean = {key: np.mean([row[key] for row in runs]) for key in ("win_rate", "top5", "frechet", "seconds")}
        cells = [name, f"{runs[0]['learning_rate']:.0e}", f"{means[name]:.3f} [{min(gains):.3f}, {max(gains):.3f}]"]
        cells += [f"{mean['win_rate']:.3f}", f"{mean['top5']:.3f}", f"{mean['frechet']:.2f}"]
        cells += [f"{np.mean([row['network_evaluations'] for row in runs]):,.0f}", f"{mean['seconds']:.0f}"]
        lines.append(f"| {' | '.join([*cells, format(result['methods'][name]['control']['gain'], '.3f')])} |")
    return "\n".join(lines) + "\n"


def _plot(path: Path, result: Mapping[str, Any]) -> None:
    """Fréchet distance against gain: a large mark for the chosen runs' mean, small ones for the search."""
    figure = new_figure((7.0, 4.5))
    axis = figure.subplots()
    for place, (name, found) in enumerate(result["methods"].items()):
        color = f"C{place % 10}"
        axis.plot(*_points(found["search"]), ".", color=color, alpha=0.5)
        mean = [float(np.mean(values)) for values in _points(found["runs"])]
        axis.plot(*mean, "os^v"[place // 10], color=color, markersize=9, label=name)
    axis.axhline(_before(result)["frechet"], color="gray", linewidth=0.8, linestyle=":")
    axis.set(xlabel="gain in reward", ylabel="Fréchet distance to real emoji")
    axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, format="png", dpi=DPI)


def _before(result: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = next(iter(result["methods"].values()))["runs"][0]["before"]
    return found


def _points(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["gain"] for row in rows], [row["frechet"] for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 for a mistake in its arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("::")[0])
    parser.add_argument("--output", required=True, help="directory of runs, comparison.json, .md and .png")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, separated by commas (default: all)")
    parser.add_argument("--base", type=Path, help="directory of the base model, instead of the shipped one")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="network evaluations of a run")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    try:
        for method in methods:
            if method not in METHODS:
                raise invalid("--methods", method, "is not known", f"choose among {', '.join(METHODS)}")
        with OutputDirectory(options.output) as output:
            output.claim("comparison.json", "comparison.md", "comparison.png", files=["runs/*.json"])
            print(table(compare(EmojiDemo(options.base), output, methods, evaluations=options.evaluations)), end="")
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
