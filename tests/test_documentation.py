"""Every command that README.md and docs/ show runs: on a tiny Stable Diffusion checkpoint, two steps of one pair.

docs/guides/data.md and docs/guides/evaluation.md have tests of their own. What no test runs is listed in ``NOT_RUN``
with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fastinvdpo import NoiseSchedule, PairBatch, build_objective, cli
from fastinvdpo.methods import Draws
from fastinvdpo.methods.smpo import preference_probability, smoothed_pair_weight
from tests import documentation
from tests.cases import SD_SCHEDULER
from tests.data import test_documentation as data_page
from tests.evaluation import test_documentation as evaluation_page

OTHER_TESTS = {"docs/guides/data.md": data_page.COMMANDS, "docs/guides/evaluation.md": evaluation_page.COMMANDS}

_INSTALLS = "installs from a package index; tests/kernels/packaging.py builds and installs the wheel"
_LAUNCHES = "wants eight GPUs; tests/trainer/launched.py starts two processes this way"
NOT_RUN = {
    "make demo": "minutes; tests/examples/test_emoji.py runs one, shortened",
    "make test": "this suite",
    "make test-deep": "what .ci/run calls beside this suite",
    "make test-faults": "hours",
    "make docs": "wants packages of its own; the tests below hold pages, links and their place in the navigation",
    "pip install torch": _INSTALLS,
    "pip install 'setuptools>=77' wheel ninja": _INSTALLS,
    "pip install --no-build-isolation .": _INSTALLS,
    "pip install --no-build-isolation '.[train]'": _INSTALLS,
    "accelerate launch --multi_gpu --num_processes 8 -m fastinvdpo train run.yaml": _LAUNCHES,
    "torchrun --nproc_per_node 8 -m fastinvdpo train run.yaml": _LAUNCHES,
    "accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --num_processes 8 "
    "-m fastinvdpo train run.yaml training.max_batch=4": "accelerate turns FSDP on for GPUs alone; "
    "tests/trainer/sharded.py shares weights between two processes",
}

# What the pages call by the name it has on a machine with data, and what the tests have in its place.
STAND_INS = {
    "/models/stable-diffusion-v1-5": "base",
    "/data/": "",
    "runs/inpo/model": "base",
    "partiprompts": "prompts.txt",
    "yuvalkirstain/PickScore_v1": "pickscore",
}
# Presets hold the published numbers: thousands of pairs a step, of pictures that this checkpoint cannot take.
SMALL = (
    *("training.steps=2", "training.batch_size=1", "training.gradient_accumulation_steps=1"),
    *("optimizer.warmup_steps=0", "data.resolution=16", "output.tensorboard=false"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = {"name": "inversion-dpo", "num_inference_steps": 2}
    return documentation.write_place(tmp_path_factory.mktemp("documentation"), method=method)


def arguments_of(command: str) -> list[str]:
    """What a command of the pages is run with here."""
    program, *arguments = shlex.split(command)
    assert program == "fastinvdpo"
    for name, stand_in in STAND_INS.items():
        arguments = [argument.replace(name, stand_in) for argument in arguments]
    if arguments[0] == "evaluate":
        arguments.append("num_inference_steps=2")
    if "--preset" in arguments:
        arguments += SMALL
    if arguments[0] in ("train", "precompute") and "--dry-run" not in arguments:
        arguments.append("--no-progress")
        arguments += ["method.num_inference_steps=8"] * ("inversion-dpo-sdxl" in arguments)
    return arguments


@pytest.mark.parametrize("page", [page for page in documentation.PAGES if page not in OTHER_TESTS])
def test_commands_run(
    page: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    trained = 0
    for command in documentation.commands(page):
        if command in NOT_RUN:
            continue
        arguments = arguments_of(command)
        if "train" in arguments and "--dry-run" not in arguments and not _has_own_directory(arguments):
            trained += 1  # the runs of one page do not continue each other
            arguments.append(f"output.directory={page.replace('/', '-')}-{trained}")
        assert cli.main(arguments) == 0, (command, capsys.readouterr().err)
        shown = capsys.readouterr().out
        assert shown
        if arguments[0] == "train" and "--dry-run" not in arguments:
            told = re.search(r"^2 steps in .* Model: (\S+)$", shown, re.MULTILINE)
            assert told and (place / told[1]).is_dir(), (command, shown)


# Published sizes in the Python blocks, and what the tests run.
SMALL_CODE = {
    "resolution=512": "resolution=16",
    "set_timesteps(50)": "set_timesteps(5)",
    "num_inference_steps=80": "num_inference_steps=5",
    '"warmup_steps": 100': '"warmup_steps": 1',
    '"steps": 400': '"steps": 2',
}


# tests/models/test_mars.py runs the block of docs/mars.md.
PYTHON = [page for page in documentation.PAGES if documentation.blocks(page, "python") and page != "docs/mars.md"]


@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks_run_in_order(page: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one program, and nothing is defined but what the blocks define; on the files of ``place``."""
    (tmp_path / "base").symlink_to(place / "base")
    (tmp_path / "pairs.parquet").symlink_to(place / "pairs.parquet")
    monkeypatch.chdir(tmp_path)
    program: dict[str, Any] = {"__name__": page}
    for block in documentation.blocks(page, "python"):
        for name, stand_in in {**STAND_INS, **SMALL_CODE}.items():
            block = block.replace(name, stand_in)
        exec(compile(block, page, "exec"), program)
    assert program["result"].loss.isfinite()
    trained = program["unet"].conv_in.weight if "unet" in program else program["model_pred"]
    assert trained.grad.isfinite().all()
    assert page != "README.md" or (tmp_path / "runs/inpo/model").is_dir()


def _has_own_directory(arguments: list[str]) -> bool:
    return any(argument.startswith("output.directory=") for argument in arguments)


def test_no_command_is_left_out() -> None:
    shown = {page: documentation.commands(page) for page in documentation.PAGES}
    assert all(shown[page] == run for page, run in OTHER_TESTS.items())
    everywhere = {command for found in shown.values() for command in found}
    assert sorted(set(NOT_RUN) - everywhere) == [], "exceptions for commands that no page shows"
    assert all(not command.startswith("fastinvdpo") for command in NOT_RUN)


def test_commands_stand_in_blocks_that_are_read() -> None:
    named = set.union(*(documentation.languages(page) for page in documentation.PAGES))
    assert named <= {documentation.SHELL, "json", "yaml", "python", "diff"}


def test_every_method_has_a_page_in_the_table_and_every_family_one() -> None:
    from fastinvdpo.methods import METHODS, TOKEN_METHODS
    from fastinvdpo.models import families

    readme = (documentation.ROOT / "README.md").read_text("utf-8")
    for method in METHODS:
        assert f"docs/methods/{method}.md" in documentation.PAGES
        assert f"[`{method}`](docs/methods/{method}.md)" in readme
    assert {f"docs/models/{family}.md" for family in families() if family not in ("digits", "mars")} <= set(
        documentation.PAGES
    )
    mars = (documentation.ROOT / "docs/mars.md").read_text("utf-8")
    assert [method for method in TOKEN_METHODS if f"| `{method}` |" not in mars] == []


# --- numbers that the pages give and that can be computed ---


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first row starts with ``| heading``, without emphasis and code marks."""
    lines = (documentation.ROOT / page).read_text("utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading}"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


class Counted:
    """A network that predicts one fixed noise and counts the samples of its forward passes."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        self.seen["with" if torch.is_grad_enabled() else "without"] += len(latents)
        return torch.ones_like(latents)


def evaluations_per_pair(method: str, **options: Any) -> tuple[float, float]:
    """With and without gradient, over one pair at every timestep of Stable Diffusion's schedule."""
    schedule, network, pairs = NoiseSchedule.from_config(SD_SCHEDULER), Counted(), 1000
    if method == "inversion-dpo":
        pairs = 2
    nothing = {"prompts": torch.zeros(2 * pairs, 1)}
    batch = PairBatch(
        torch.zeros(2 * pairs, 1), nothing, torch.arange(pairs), unconditional=nothing, scores=torch.ones(2 * pairs)
    )
    draws = Draws(timesteps=torch.arange(1000)) if method != "inversion-dpo" else Draws()
    build_objective(method, schedule, **options)(network, network, batch, seed=0, draws=draws)
    return network.seen["with"] / pairs, network.seen["without"] / pairs


COSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusion-dpo": ("diffusion-dpo", {}),
    "inpo, N = 10": ("inpo", {}),
    "smpo, N = 5": ("smpo", {}),
    "smpo, N = 10": ("smpo", {"num_inference_steps": 10}),
    "inversion-dpo, N = 80, guidance 2": ("inversion-dpo", {}),
}


def test_network_evaluations_of_a_pair() -> None:
    rows = table("docs/methods/diffusion-dpo.md", "a pair of")
    base = 3 * 2 + 2
    found = {}
    for name, with_gradient, without_gradient, relative in rows:
        found[name] = (float(with_gradient), float(without_gradient))
        cost = (3 * found[name][0] + found[name][1]) / base
        assert float(relative) == pytest.approx(cost, rel=0.02), name
    for name, (method, options) in COSTS.items():
        assert found[name] == pytest.approx(evaluations_per_pair(method, **options), abs=0.005), name
    # From a cache the reference costs nothing, and the policy passes at the sampled levels alone.
    whole = found["inversion-dpo, N = 80, guidance 2"]
    assert found["the same, from a cache"] == (whole[0], 0)
    assert found["the same, timesteps_per_step: 4"] == (4 / 80 * whole[0], 0)


def test_share_of_the_noise_in_the_target_of_an_inversion() -> None:
    """A network that always predicts the same noise: of what it predicts, how much is in the target?"""
    schedule, network = NoiseSchedule.from_config(SD_SCHEDULER), Counted()
    black = torch.zeros(2, 1, dtype=torch.float64)
    batch = PairBatch(black, {"prompts": black}, torch.tensor([0]))
    for level, ours, today, pinned in table("docs/methods/inpo.md", "t |"):
        for compat, told in ((None, ours), ("released", today), ("released-diffusers-0.20", pinned)):
            objective = build_objective("inpo", schedule, eta=0.0, compat=compat)
            draws = Draws(timesteps=torch.tensor([int(level)]))
            output = objective(network, network, batch, seed=0, draws=draws)
            assert output.target is not None
            assert f"{float(output.target[0, 0]):.2f}" == told, (level, compat)


def test_weights_of_smoothed_preferences() -> None:
    for difference, cosine, logit in table("docs/methods/smpo.md", "difference"):
        for scale, told in ((1.0, cosine), (100.0, logit)):
            scores = torch.tensor([scale * float(difference)]), torch.zeros(1)
            weight = smoothed_pair_weight(preference_probability(*scores))
            assert f"{float(weight):.2f}" == told


# --- the site: what `mkdocs build --strict` refuses, without mkdocs ---

DOCS = documentation.ROOT / "docs"
SITE = sorted(path for pattern in ("*.md", "*.ipynb") for path in DOCS.rglob(pattern))


def navigation(entries: Any) -> list[str]:
    """The pages of the site's navigation, in order."""
    if isinstance(entries, str):
        return [entries]
    return [
        page for entry in (entries.values() if isinstance(entries, dict) else entries) for page in navigation(entry)
    ]


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub and the site make them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_stands_once_in_the_navigation() -> None:
    text = (documentation.ROOT / "mkdocs.yml").read_text("utf-8")
    settings = yaml.safe_load(re.sub(r"!!python/\S+", "", text))
    assert sorted(navigation(settings["nav"])) == [str(path.relative_to(DOCS)) for path in SITE]


@pytest.mark.parametrize("page", [documentation.ROOT / "README.md", *SITE], ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """From a page of the site to another one, since nothing else is there."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        there = Path(os.path.normpath(target))
        on_site = there in SITE or (there.suffix == ".png" and DOCS in there.parents)
        assert page not in SITE or on_site, f"{link} is not on the site"
        assert not anchor or anchor in anchors(target), link
    assert not (page.is_symlink() and re.search(r"\]\((?!\w+:|#)", prose)), "its links start from two places"


@pytest.mark.parametrize("page", [page for page in SITE if page.suffix == ".md"], ids=lambda path: path.name)
def test_a_list_follows_an_empty_line(page: Path) -> None:
    """GitHub draws it without one, the site does not."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^(?![-*] |[#|\s]|\d+\. ).+\n(?=- |1\. )", prose, re.MULTILINE) == []


def test_the_readme_takes_thirty_seconds() -> None:
    assert len((documentation.ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


# --- numbers that were measured: benchmarks/results/ ---


def measured(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((documentation.ROOT / "benchmarks/results" / name).read_text())["results"]
    return found


def test_numbers_of_the_pair_loss_are_those_that_were_measured() -> None:
    rows = measured("amd-epyc-2-threads/20261121224541-7a9ab052a.json")
    cases = {(row["dtype"], row["pairs"], row["provider"]): row for row in rows}
    readme = (documentation.ROOT / "README.md").read_text("utf-8")
    told = [row[1:] for row in table("docs/guides/kernels.md", "pairs")[:2]]
    errors = table("docs/guides/kernels.md", "dtype")
    for dtype, speeds, (_, *ranges) in zip(("float32", "bfloat16"), told, errors, strict=True):
        times = {
            pairs: [
                cases[dtype, pairs, provider]["milliseconds"]["median"] for provider in ("eager", "compile", "native")
            ]
            for pairs in (1, 2, 8, 16, 32, 64)
        }
        assert speeds == [f"{eager / ours:.1f} / {compiled / ours:.1f}" for eager, compiled, ours in times.values()]
        for provider, shown in zip(("native", "eager", "compile"), ranges, strict=True):
            found = [cases[dtype, pairs, provider]["errors"]["gradient"] for pairs in times]
            bounds = [f"{bound:.1e}".replace("e-0", "e-") for bound in (min(found), max(found))]
            assert shown == " to ".join(dict.fromkeys(bounds))
    found = [cases["bfloat16", pairs, "eager"]["errors"]["gradient"] for pairs in times]
    ours = max(cases["bfloat16", pairs, "native"]["errors"]["gradient"] for pairs in times)
    assert f"**{ours:.2%}".replace("%", " %") in readme
    assert f"has {100 * min(found):.0f} to {100 * max(found):.0f} %" in readme
    ratios = [float(speed.split(" / ")[1]) for speeds in told for speed in speeds]
    assert f"{min(ratios)} to {max(ratios)} times as fast as `torch.compile`" in readme


def test_numbers_of_a_step_of_inversion_dpo_are_those_that_were_measured() -> None:
    """At 20 levels with times, at 80 without."""
    short = {row["provider"]: row for row in measured("amd-epyc-2-threads/step-20261121175958-ea71804dc.json")}
    long = {row["provider"]: row for row in measured("amd-epyc-1-thread/step-20261121191037-eca1b4b4a.json")}
    mb, more = ({name: f"{row['peak_bytes'] / 1e6:,.0f} MB" for name, row in rows.items()} for rows in (short, long))
    slower, cached = (1 / short[name]["speedup"]["released"] for name in ("ours", "ours-cached"))
    readme = (documentation.ROOT / "README.md").read_text("utf-8")
    for told in (
        f"**{mb['ours']}** for a step of Inversion-DPO with N = 20 levels, {more['ours']} with 80",
        f"the released order takes {mb['released']} with 20, with gradient checkpointing "
        f"{mb['released-checkpointed']}, and {more['released-checkpointed']} with 80",
        f"{slower:.1f} times as long as in the released order, from a cache {cached:.1f} times",
    ):
        assert told in readme
