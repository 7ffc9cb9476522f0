"""The commands: each reads its arguments and hands them to one function of the package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from fastinvdpo.cli.options import PathsExpanded, quiet, read_config, with_checkpoint

# A preset names no data, and --dry-run reads none.
NO_DATA = "path/to/pairs"

app = typer.Typer(
    help="Align diffusion models to preference pairs by inversion-based DPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at pairs, and build them from scored images.", no_args_is_help=True)

Progress: TypeAlias = Annotated[bool, typer.Option(help="Show a progress bar.", callback=quiet)]
Pairs: TypeAlias = Annotated[str, typer.Argument(help="Pairs in any format that training reads.", show_default=False)]
Preset: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Start from published hyper-parameters, such as inpo-sd15; 'train --preset list' shows all."),
]
Family: TypeAlias = Annotated[
    str, typer.Option(help="auto, or a family of docs/models, such as stable-diffusion or flux.")
]
DataKeys: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...",
        help="Keys of the section data, as in format=hpd or max_broken=0.03.",
        show_default=False,
    ),
]
Configuration: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [section.key=value]...",
        help="A configuration file, then values that override it; values are read as YAML.",
        show_default=False,
    ),
]


@app.command(cls=PathsExpanded)
def train(
    arguments: Configuration = None,
    preset: Preset = None,
    resume: Annotated[
        str,
        typer.Option(help="'auto' continues from the newest checkpoint, 'never' starts, or the path of a checkpoint."),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved configuration and the count of network evaluations, and stop."
        ),
    ] = False,
    progress: Progress = True,
) -> None:
    """Train a model as CONFIG.yaml says; every key can be overridden, as in training.steps=100."""
    from fastinvdpo import config as configuration

    if preset == "list":
        typer.echo("\n".join(configuration.presets()))
        return
    config = read_config(arguments, preset, defaults={"data": {"path": NO_DATA}} if dry_run and preset else None)
    if dry_run:
        from fastinvdpo.trainer.dry_run import described
        from fastinvdpo.trainer.opening import with_launcher

        config = with_launcher(config)
        typer.echo(configuration.to_yaml(config), nl=False)
        typer.echo(described(config))
        return
    from fastinvdpo.evaluation import EvaluationCallback
    from fastinvdpo.trainer import train as run

    callbacks = [] if config.evaluation is None else [EvaluationCallback(config.evaluation)]
    result = run(config, resume=resume, progress=progress, callbacks=callbacks)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(
            f"{result.steps} steps in {result.seconds:.0f} s, {result.network_evaluations:,} network evaluations. "
            f"Model: {result.model_directory}"
        )
        if result.best_model_directory is not None:
            typer.echo(f"Best model: {result.best_model_directory}")
        if result.data is not None:
            listed = f" Listed in {result.directory / 'broken.jsonl'}." if result.data.broken else ""
            typer.echo(f"Data: {result.data}.{listed}")


@app.command(cls=PathsExpanded)
def precompute(arguments: Configuration = None, preset: Preset = None, progress: Progress = True) -> None:
    """Store what does not depend on the policy below the configuration's cache.path: latents, embeddings, and for
    Inversion-DPO, or with cache.draws, all of the reference.
    """
    config = read_config(arguments, preset)
    from fastinvdpo.trainer import precompute as fill

    cache = fill(config, progress=progress)
    if os.environ.get("RANK", "0") == "0":
        images, captions = cache.index.first["image"][-1], cache.index.first["caption"][-1]
        what = "single images" if cache.unpaired else "pairs"
        drawn = f"{cache.draws} draws of each, " if cache.draws else ""
        typer.echo(
            f"{len(cache)} {what}: {drawn}{images} images, {captions} captions, {cache.network_evaluations:,} network "
            f"evaluations. Cache: {cache.directory}"
        )
        if cache.summary is not None:
            typer.echo(f"Data: {cache.summary}.")


@data.command(cls=PathsExpanded)
def inspect(
    path: Pairs,
    options: DataKeys = None,
    output: Annotated[Path, typer.Option(help="Directory for pairs.png, data.json and broken.jsonl.")] = Path(
        "runs/inspect"
    ),
    pairs: Annotated[int, typer.Option(min=1, help="Pairs on the sheet.")] = 8,
) -> None:
    """Count rows, ties and broken rows by cause, report sizes, captions and scores, and draw a sheet of pairs."""
    from fastinvdpo.config.files import load_data_section
    from fastinvdpo.data.broken import REPORT
    from fastinvdpo.data.inspecting import SHEET, inspect_pairs
    from fastinvdpo.output import OutputDirectory
    from fastinvdpo.trainer.opening import open_pairs

    section = load_data_section(path, options or [])
    with OutputDirectory(output, reads=[section.path]) as place:
        place.claim(SHEET, *REPORT)
        typer.echo(inspect_pairs(open_pairs(section, all_broken=True), place, pairs=pairs))


@data.command(cls=PathsExpanded)
def build(
    structured: Annotated[Path, typer.Argument(help="JSON Lines of structured images.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Parquet file to write; without it the input is checked.")] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="NAME=NUMBER, repeated: weights of the scores. Without any: Pareto dominance."),
    ] = None,
    margin: Annotated[float, typer.Option(help="Least difference between winner and loser.")] = 0.0,
    max_pairs: Annotated[int, typer.Option(help="Pairs of one prompt, at most.")] = 4,
    balance: Annotated[bool, typer.Option(help="About equally many pairs for every relation.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the choice of pairs.")] = 0,
    image_root: Annotated[Path | None, typer.Option(help="Directory of the images, if not that of the file.")] = None,
) -> None:
    """Turn several scored images per prompt into pairs, with a data card beside them."""
    from fastinvdpo._examples.structured.building import PairRule, build_pairs, parse_weights, relation_counts
    from fastinvdpo._examples.structured.schema import read_structured

    rule = PairRule(parse_weights(weight or []), margin, max_pairs, balance, seed)
    if output is None:
        typer.echo(f"{len(read_structured(structured))} images, no mistakes. --output writes pairs.")
        return
    pairs = build_pairs(structured, output, rule, image_root=image_root)
    counts = ", ".join(f"{count} {relation}" for relation, count in sorted(relation_counts(pairs).items()))
    typer.echo(f"{len(pairs)} pairs ({counts}): {output}, described in {output.with_suffix('.md')}")


@app.command(cls=PathsExpanded)
def score(
    path: Pairs,
    scorer: Annotated[
        list[str],
        typer.Option(
            help="KIND=PATH_OR_ID[,option=value]..., repeated; KIND is pickscore, hps, clip or aesthetic; options are "
            "name, processor, revision and, below an aesthetic head, clip.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Parquet file to write.", show_default=False)],
    options: DataKeys = None,
    relabel: Annotated[str | None, typer.Option(help="Name of the scorer whose higher score wins the pair.")] = None,
    agree: Annotated[
        str | None,
        typer.Option(help="With --relabel: leave out pairs on whose winner fewer scorers agree; a number, or 'all'."),
    ] = None,
    named: Annotated[bool, typer.Option("--named", help="Columns score_NAME_0 even for a single scorer.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that pass a scorer at once.")] = 32,
    device: Annotated[str, typer.Option(help="'auto', or a device of PyTorch's, such as cuda:1.")] = "auto",
    progress: Progress = True,
) -> None:
    """Score the images of pairs and write the scores beside them; killed at any moment, it continues."""
    from fastinvdpo.config.files import load_data_section
    from fastinvdpo.evaluation.scorers import open_scorers
    from fastinvdpo.evaluation.scoring import list_of_broken, open_to_score, score_pairs

    section = load_data_section(path, options or [])
    source = open_to_score(section)
    scorers = open_scorers(scorer, batch_size=batch_size, device=device, own=False)
    result = score_pairs(
        source,
        scorers,
        output,
        relabel=relabel,
        agree=int(agree) if agree is not None and agree.isdecimal() else agree,
        named=named,
        max_broken=section.max_broken,
        progress=progress,
    )
    typer.echo(str(result))
    if result.broken:
        typer.echo(f"Listed in {list_of_broken(output)}.")


@app.command(cls=PathsExpanded)
def demo(
    method: Annotated[
        str, typer.Option(help="Any method but pnapo, which needs the noise of an image.")
    ] = "diffusion-dpo",
    preference: Annotated[
        str,
        typer.Option(
            help="noto or twemoji (that designer's drawing wins), vivid (the more saturated one wins) or prompt (the "
            "prompted emoji wins against another)."
        ),
    ] = "noto",
    seed: Annotated[int, typer.Option(help="Seed of pairs, training and samples.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps instead of the recipe's.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to write, instead of runs/demo/METHOD-PREFERENCE-SEED.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="'shuffle' makes winners and losers random: nothing should be learned.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Directory of the base model, instead of the shipped one.")] = None,
    progress: Annotated[
        bool, typer.Option(help="Show a progress bar and the table at the end.", callback=quiet)
    ] = True,
) -> None:
    """Align a small Stable Diffusion of emoji to a preference in minutes on a CPU, and show what changed."""
    from fastinvdpo._examples.emoji.run import Run, run_demo

    run_demo(Run(method, preference, seed, steps, control), base=base, output=output, progress=progress)


@app.command(cls=PathsExpanded)
@with_checkpoint("model")
def invert(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, or one parquet file of pairs.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Directory or hub id of the model.", show_default=False)],
    family: Family = "auto",
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt for all images; repeated, one for each.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for latents, report and overview.")] = Path("runs/invert"),
    num_inference_steps: Annotated[int, typer.Option(help="Steps up to the noise, and as many down.")] = 50,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Guidance in both directions; without it none, for FLUX.1-dev 3.5.", show_default=False),
    ] = None,
    renoise_iterations: Annotated[int, typer.Option(help="ReNoise iterations of each step up.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images that pass the network at once.")] = 8,
    max_images: Annotated[int, typer.Option(help="Use the first so many images.")] = 16,
) -> None:
    """Invert images to noise and sample them back: reconstruction error, latents and an overview."""
    from fastinvdpo.evaluation.inversion import run_invert

    report = run_invert(
        family,
        model,
        images,
        output=output,
        prompts=prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        renoise_iterations=renoise_iterations,
        batch_size=batch_size,
        max_images=max_images,
    )
    typer.echo(json.dumps(report, indent=2))


@app.command(cls=PathsExpanded)
@with_checkpoint("base")
@with_checkpoint("aligned", prefix="aligned_")
def evaluate(
    base: Annotated[str, typer.Option(help="Directory or hub id of the model before alignment.", show_default=False)],
    aligned: Annotated[
        str, typer.Option(help="The model after it: a whole one, its network, or an adapter.", show_default=False)
    ],
    prompts: Annotated[
        str,
        typer.Option(help=".txt, .json, .jsonl or .parquet; or partiprompts, hpdv2 (hub).", show_default=False),
    ],
    scorer: Annotated[
        list[str],
        typer.Option(
            help="Repeated: KIND=PATH (pickscore, hps, clip, aesthetic), or MODULE:NAME of your own.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for images, evaluation.json and report.html.")] = Path(
        "runs/evaluate"
    ),
    family: Family = "auto",
    column: Annotated[str | None, typer.Option(help="Column or key of the prompts.", show_default=False)] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Use the first so many.", show_default=False)] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="num_inference_steps=25, guidance_scale (the default of the base's pipeline), seed=0, batch_size=8, "
            "dtype=fp32 or bf16, noise=false.",
            show_default=False,
        ),
    ] = None,
    shown: Annotated[int, typer.Option(min=0, help="Pairs of images in the report.")] = 24,
) -> None:
    """Sample base and aligned model from the same noise, score the images, and report who wins how often."""
    from fastinvdpo.evaluation import comparing
    from fastinvdpo.evaluation.prompts import load_prompts, load_sources
    from fastinvdpo.evaluation.scorers import open_scorers
    from fastinvdpo.models.loading import family_class, resolve_family

    edits = family_class(resolve_family(family, base)).edits
    summary = comparing.compare(
        base,
        aligned,
        load_prompts(prompts, column=column, limit=max_prompts),
        open_scorers(scorer),
        output,
        family=family,
        sampling=comparing.parse_sampling(options or []),
        shown=shown,
        sources=load_sources(prompts, limit=max_prompts) if edits else None,
    )
    for note in summary["notes"]:
        typer.echo(f"Note: {note}")
    for name, found in summary["scorers"].items():
        mean, median = (
            " → ".join(f"{found[side][kind]:.5g}" for side in comparing.SIDES) for kind in ("mean", "median")
        )
        rate = "win rate {mean:.3f} [{ci_low:.3f}, {ci_high:.3f}]".format(**found["win_rate"])
        typer.echo(f"{name}: {rate}, {found['ties']} ties of {summary['prompts']}; mean {mean}, median {median}")
    typer.echo(f"Report: {output / comparing.PAGE}, numbers: {output / comparing.SUMMARY}")


app.add_typer(data, name="data")
_PASSED_ON: dict[str, Any] = {"context_settings": {"ignore_unknown_options": True}, "add_help_option": False}


@app.command(**_PASSED_ON)
def doctor(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """List versions, devices and backends, and why a backend is not available; --json for machines."""
    from fastinvdpo import doctor as examination

    raise typer.Exit(examination.main(arguments or []))


@app.command(**_PASSED_ON)
def bench(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Measure the ops beside plain PyTorch and torch.compile; --quick takes a minute, --help lists the rest."""
    from fastinvdpo._benchmarks import run

    raise typer.Exit(run.main(arguments or []))
