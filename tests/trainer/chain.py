"""Every family from a saved checkpoint through precompute, train and evaluate to the pictures of plain diffusers.

``make test-deep`` runs this file, by name.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from fastinvdpo import cli
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.models import DiffusionModel, load_model
from fastinvdpo.models.adapters import add_lora, merged_copy
from tests.models import tiny as models
from tests.trainer import tiny
from tests.trainer.test_families import DIFFUSERS_LORA, LENGTH, LORA, images, write_two_pairs

ROOT = Path(__file__).parents[2]
PROMPTS = ["a cat", "zebra"]
STEPS, GUIDANCE = 2, 2.0
ALL = tuple(tiny.METHODS)
# Inversion-DPO scores whole chains, of levels that the refiner and Turbo were not trained on.
FAMILIES = {"sd15": ALL, "sd21": ALL, "sdxl": ALL, "refiner": ALL[:3], "turbo": ALL[:3], "sd3": ALL, "flux": ALL,
            "klein": ALL, "qwen": ALL, "z-image": ALL, "wan": ALL}  # fmt: skip
TIMESTEPS = {"refiner": {"range": [0, 199]}, "turbo": {"values": [249, 499, 749, 999]}}
# What is evaluated at another size than the checkpoint's own, which is large; test_videos.py has videos.
SIZES: dict[str, dict[str, Any]] = {"wan": {"resolution": 16}}
# Of a family every other method with LoRA, and its last method, whose result is evaluated, in both ways.
RUNS = [
    pytest.param(family, method, lora, id=f"{family}-{method}-{'lora' if lora else 'full'}")
    for i, (family, methods) in enumerate(FAMILIES.items()) for j, method in enumerate(methods)
    for lora in ((False, True) if method == methods[-1] else (bool((i + j) % 2),))
]  # fmt: skip


class Chain(NamedTuple):
    """The files of one run through the commands."""

    config: Path
    cache: Path
    run: Path
    evaluation: Path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    write_two_pairs(root)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def checkpoint(root: Path, family: str) -> Path:
    path = root / family
    if not path.exists():
        build = models.turbo_pipeline if family == "turbo" else models.PIPELINES[family]
        build().save_pretrained(path, safe_serialization=True)
    return path


@functools.cache
def before(path: Path) -> bytes:
    return images(DiffusionPipeline.from_pretrained(path), path.name)


def write_config(root: Path, place: Path, family: str, method: str, lora: bool, cache: Path) -> Chain:
    """Two steps; what does not depend on the policy is shared by all runs that name the same ``cache``."""
    options: dict[str, Any] = {"num_inference_steps": STEPS} if method != "diffusion-dpo" else {}
    model: dict[str, Any] = {"family": "auto", "path": str(checkpoint(root, family)), "lora": LORA if lora else None}
    if family in TIMESTEPS:
        options["timesteps"] = TIMESTEPS[family]
    if family in models.FLOW:
        model["max_sequence_length"] = LENGTH
    if family == "turbo":
        model["zero_terminal_snr"] = True
    values = tiny.mapping(
        root,
        method,
        method=options,
        model=model,
        data={"resolution": 16},
        training={"steps": STEPS, "batch_size": 1},
        optimizer={"warmup_steps": 0, "learning_rate": 1e-2},
        output={"directory": str(place / "run"), "log_every": 1},
    )
    place.mkdir(exist_ok=True)
    (place / "run.yaml").write_text(yaml.safe_dump({**values, "cache": {"path": str(cache)}}))
    return Chain(place / "run.yaml", cache, place / "run", place / "evaluation")


def evaluation_of(root: Path, chain: Chain, family: str, lora: bool) -> list[str]:
    aligned = chain.run / ("adapter" if lora else "model")
    files = ["--base", str(checkpoint(root, family)), "--aligned", str(aligned), "--output", str(chain.evaluation)]
    told = ["--prompts", str(root / "prompts.txt"), "--scorer", "tests.evaluation.tiny:brightness"]
    size = [f"{name}={value}" for name, value in SIZES.get(family, {}).items()]
    return ["evaluate", *files, *told, f"num_inference_steps={STEPS}", f"guidance_scale={GUIDANCE:g}", *size]


@functools.cache
def opened(path: Path, lora: bool) -> DiffusionModel:
    """The base, with adapters where a run has them; read once, its weights are those of whoever asked last."""
    model = load_model("auto", path, **SIZES.get(path.name, {}))
    if lora:
        add_lora(model.network, rank=LORA["rank"], alpha=LORA["alpha"], targets=model.default_lora_targets)
    return model


def trained_model(path: Path, chain: Chain, lora: bool) -> DiffusionModel:
    """With the weights that the run's last checkpoint holds; adapters are separate, as in training."""
    model = opened(path, lora)
    parameters = dict(model.network.named_parameters())
    stored = load_file(chain.run / "checkpoints" / f"step-{STEPS:08d}" / "trainable.safetensors")
    assert stored.keys() == {name for name, parameter in parameters.items() if parameter.requires_grad}
    with torch.no_grad():
        for name, value in stored.items():
            parameters[name].copy_(value)
    return model


def drawn(model: DiffusionModel, network: Any) -> list[bytes]:
    """What ``fastinvdpo evaluate`` draws with a network."""
    latents = sample(model, network, PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    return [picture.tobytes() for picture in model.decode_latents(latents)]


def pictures(folder: Path) -> list[bytes]:
    return [Image.open(folder / f"{place:05d}.png").tobytes() for place in range(len(PROMPTS))]


@pytest.mark.parametrize(("family", "method", "lora"), RUNS)
def test_through_the_commands(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], family: str, method: str, lora: bool
) -> None:
    base = checkpoint(root, family)
    cache = root / f"{family}-{'trajectories' if method == 'inversion-dpo' else 'latents'}"
    chain = write_config(root, tmp_path, family, method, lora, cache)
    assert cli.main(["precompute", str(chain.config), "--no-progress"]) == 0
    assert cli.main(["train", str(chain.config), "--no-progress"]) == 0
    assert [json.loads(line)["step"] for line in (chain.run / "history.jsonl").read_text().splitlines()] == [1, 2]

    # Plain diffusers draws what the trained network draws, by the pipeline's own sampler.
    model: Any = trained_model(base, chain, lora)
    plain = DiffusionPipeline.from_pretrained(base if lora else chain.run / "model")
    if lora:
        plain.load_lora_weights(chain.run / "adapter", weight_name=DIFFUSERS_LORA)
    found = images(plain, family)
    assert found == images(model.pipeline, family)
    assert found != before(base)
    if method != FAMILIES[family][-1]:
        return

    trained = model.network
    if lora:
        plain.fuse_lora()
        plain.unload_lora_weights()
        trained = merged_copy(model.network)
        merged = DiffusionPipeline.from_pretrained(chain.run / "model")
        assert images(merged, family) == images(plain, family)
    reloaded = getattr(plain, model.network_folder)
    theirs, ours = reloaded.state_dict(), trained.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(value, ours[name]) for name, value in theirs.items())

    # And by that of the evaluation, which merges adapters. A refiner is refused: it starts from images.
    evaluated = cli.main(evaluation_of(root, chain, family, lora))
    if family == "refiner":
        assert evaluated == 2 and "starts from another model's images" in capfd.readouterr().err
        return
    assert evaluated == 0
    summary = json.loads((chain.evaluation / "evaluation.json").read_text())
    assert summary["prompts"] == len(PROMPTS) and "brightness" in summary["scorers"]
    shown = pictures(chain.evaluation / "aligned")
    assert shown == drawn(model, reloaded)
    assert shown != pictures(chain.evaluation / "base")
