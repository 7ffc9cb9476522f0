"""PNAPO in the trainer: pairs of generated images, each noised with what it was generated from."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastinvdpo import NoiseSchedule, build_objective
from fastinvdpo.data import GeneratedDataset, PairDataset, open_source
from fastinvdpo.data.content import content_of
from fastinvdpo.errors import InvalidInput
from fastinvdpo.io import Digests
from fastinvdpo.methods import PNAPO, PairBatch
from fastinvdpo.trainer import TrainConfig, precompute, train
from fastinvdpo.trainer.batches import BatchBuilder, PairEncoder
from fastinvdpo.trainer.dry_run import count_evaluations
from fastinvdpo.trainer.opening import open_dataset, open_model
from fastinvdpo.trainer.order import DrawOrder
from tests.data.test_pairs import encoded, store
from tests.methods.problems import REFERENCE, SCHEDULE, Policy, pairs
from tests.models import tiny as models
from tests.trainer import tiny
from tests.trainer.forked import Server

PAIRS, SIDE, LATENT = 6, 16, (4, 8, 8)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def rows(kind: str = "noise", count: int = PAIRS) -> list[dict[str, Any]]:
    """Pairs of one size; the second image wins every other one, and the scores say so."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        images = [encoded(Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))) for _ in range(2)]
        row = {"jpg_0": images[0], "jpg_1": images[1], "label_0": 1.0 - i % 2, "caption": "ab"[i % 2]}
        row |= {"score_0": 0.5 + (1 - i % 2), "score_1": 0.5 + i % 2 + 0.01 * i}
        for side in (0, 1):
            noise = rng.standard_normal(LATENT).astype(np.float16 if i % 2 else np.float32)
            row |= {f"seed_{side}": 2 * i + side} if kind == "seed" else {f"noise_{side}": npy(noise)}
        found.append(row)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated")
    for name in ("sd3", "sd15"):
        models.PIPELINES[name]().save_pretrained(root / name, safe_serialization=True)
    for kind in ("noise", "seed"):
        store(root / f"{kind}.parquet", rows(kind))
    return root


def mapping(root: Path, directory: Path, kind: str = "noise", **sections: Any) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "model": {"family": "auto", "path": str(root / "sd3"), "max_sequence_length": 6},
        "data": {"path": str(root / f"{kind}.parquet"), "resolution": SIDE},
        "optimizer": {"warmup_steps": 0, "learning_rate": 1e-3},
        "training": {"steps": 4, "batch_size": 2},
        "output": {"directory": str(directory), "log_every": 1, "checkpoint_every": 2},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    values = tiny.mapping(root, **merged)
    values["method"] = {"name": "pnapo", "beta": 200.0, **sections.get("method", {})}
    return values


def config(root: Path, directory: Path, kind: str = "noise", **sections: Any) -> TrainConfig:
    return TrainConfig.from_mapping(mapping(root, directory, kind, **sections))


def trained(directory: Path) -> dict[str, Tensor]:
    return load_file(next((directory / "model" / "transformer").glob("*.safetensors")))


# The objective


FLOW = NoiseSchedule.flow(torch.arange(1, 1001, dtype=torch.float64) / 1000)


def generated(count: int = 4, **changes: Any) -> PairBatch:
    noise = torch.randn(2 * count, 4, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return dataclasses.replace(pairs(count), noise=noise, **changes)


@pytest.mark.parametrize("options", [{}, {"anchor": 1e-30}], ids=["fused", "from the sums"])
def test_the_loss_is_that_of_the_formula_with_each_sides_own_noise(options: dict[str, Any]) -> None:
    batch = generated(step=150)
    method = PNAPO(beta=50.0, score_scale=20.0, decay_start=100, decay_end=200, **options)
    out = method.objective(FLOW)(Policy(), REFERENCE, batch, seed=3)
    assert batch.noise is not None and batch.scores is not None and out.target is not None
    t = ((out.timesteps + 1).double() / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(out.noisy_latents, (1 - t) * batch.latents + t * batch.noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.target, batch.noise - batch.latents)
    assert torch.equal(out.timesteps[:4], out.timesteps[4:]) and len(set(out.timesteps.tolist())) == 4
    error, known = ((pred - out.target).square().flatten(1).mean(1) for pred in (out.policy_pred, out.reference_pred))
    winner, loser = (error - known).chunk(2)
    better, worse = batch.scores.chunk(2)
    z = -50 * (2 * torch.sigmoid(20 * (better - worse)) - 1) * 0.75 * (winner - loser)
    torch.testing.assert_close(out.margin, z, rtol=1e-6, atol=1e-9)  # the weight is float32
    expected = -logsigmoid(z).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(loss, out.policy_pred, retain_graph=True)[0] for loss in (out.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


def test_the_schedule_falls_from_one_to_a_half_along_a_cosine() -> None:
    method = PNAPO(decay_start=10, decay_end=20)
    found = [method.schedule_weight(step) for step in (0, 10, 15, 20, 100)]
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])
    assert method.schedule_weight(12) == pytest.approx(0.75 + 0.25 * math.cos(math.pi / 5))
    assert PNAPO(decay_start=3, decay_end=3).schedule_weight(3) == 0.5 and PNAPO().schedule_weight(10**6) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_gives_the_noise_that_a_pipeline_of_diffusers_draws(dtype: torch.dtype) -> None:
    batch = dataclasses.replace(generated(), noise=None, seeds=torch.arange(8) + 2**40)
    noise = PNAPO(seed_dtype="bf16" if dtype == torch.bfloat16 else "fp32").noise_of(batch)  # type: ignore[arg-type]
    for seed, one in zip(range(8), noise, strict=True):
        theirs = randn_tensor((1, 4, 4, 4), torch.Generator().manual_seed(seed + 2**40), torch.device("cpu"), dtype)
        assert torch.equal(one, theirs[0].double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_scale": 0.0}, r"^score_scale = 0.0: must be positive"),
        ({"decay_start": 5}, r"^decay_start, decay_end = \(5, None\): are not the first and the last step"),
        ({"decay_start": 9, "decay_end": 5}, r"^decay_start, decay_end = \(9, 5\)"),
        ({"seed_dtype": "int8"}, r"^seed_dtype = 'int8': is not known"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        PNAPO(**options)


def test_what_a_batch_or_a_schedule_lacks_is_named() -> None:
    objective = build_objective("pnapo", FLOW)
    for changes, name in (({"noise": None}, "noise"), ({"scores": None}, "scores")):
        with pytest.raises(InvalidInput, match=f"^batch.{name} = None: pnapo"):
            objective(Policy(), REFERENCE, dataclasses.replace(generated(), **changes), seed=0)
    with pytest.raises(InvalidInput, match=r"^prediction_type = 'epsilon': pnapo is of flow matching"):
        build_objective("pnapo", SCHEDULE)


# The data


def test_noise_follows_its_image_from_tables_folders_and_shards(tmp_path: Path, root: Path) -> None:
    folder, shard = tmp_path / "folder", tmp_path / "pairs.tar"
    folder.mkdir()
    lines = []
    with tarfile.open(shard, "w") as tar:
        for i, row in enumerate(rows()):
            line = {name: value for name, value in row.items() if not isinstance(value, bytes)}
            files = {"jpg_0": "0.png", "jpg_1": "1.png", "noise_0": "noise_0.npy", "noise_1": "noise_1.npy"}
            for name, ending in files.items():
                (folder / f"{i}.{ending}").write_bytes(row[name])
            lines.append(json.dumps(line | {name: f"{i}.{ending}" for name, ending in files.items()}))
            for ending, data in [(end, row[name]) for name, end in files.items()] + [
                ("json", json.dumps(line).encode())
            ]:
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "lost.jsonl").write_text("\n".join(lines).replace("3.noise_1.npy", "nowhere.npy"))
    with pytest.warns(UserWarning, match="1 malformed noise"):
        assert len(GeneratedDataset(folder / "lost.jsonl", max_broken=1)) == PAIRS - 1
    contents = []
    for path in (root / "noise.parquet", folder, shard):
        data = GeneratedDataset(path, resolution=SIDE)
        assert len(data) == PAIRS and data.has_noise
        for pair, row in zip(data, rows(), strict=True):  # type: ignore[call-overload]
            stored = [np.load(io.BytesIO(row[f"noise_{side}"])) for side in (0, 1)]
            for found, expected in zip(pair.noises, stored if row["label_0"] else stored[::-1], strict=True):
                assert found.dtype == np.float32 and np.array_equal(found, expected)
        source = open_source(path)
        source.resolve(())
        contents.append(content_of(source, Digests()))
    assert contents[0] == contents[1] == contents[2]
    other = rows()
    other[0]["noise_1"] = npy(np.zeros(LATENT, np.float32))
    source = open_source(store(tmp_path / "other.parquet", other))
    source.resolve(())
    changed = content_of(source, Digests())
    assert {name for name in changed if changed[name] != contents[0][name]} == {"data noise"}
    seeds = GeneratedDataset(root / "seed.parquet")
    assert [pair.noises for pair in seeds][:2] == [(0, 1), (3, 2)]  # type: ignore[attr-defined]
    assert seeds.entry(0).keys != PairDataset(root / "seed.parquet").entry(0).keys


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "6 bytes': cannot be read as .npy": lambda row: {"noise_0": b"latent"},
    "holds no bytes": lambda row: {"noise_1": None},
    "holds NaN or infinity": lambda row: {"noise_0": npy(np.full(LATENT, np.nan, np.float32))},
    "(64,) float32': cannot be read as .npy (it is no (C, h, w)": lambda row: {
        "noise_0": npy(np.zeros(64, np.float32))
    },
    "int64': cannot be read as .npy (it is no (C, h, w)": lambda row: {"noise_0": npy(np.zeros(LATENT, np.int64))},
    "object': cannot be read as .npy": lambda row: {"noise_0": npy(np.full(LATENT, None, dtype=object))},
    "cannot be read as .npy (buffer is smaller": lambda row: {"noise_1": row["noise_1"][:-1]},
    "900000000000, 8, 8) float32': cannot": lambda row: {
        "noise_0": npy(np.zeros(LATENT, np.float32)).replace(b"(4, 8, 8), }            ", b"(900000000000, 8, 8), } ")
    },
}


@pytest.mark.parametrize("problem", BROKEN)
def test_noise_that_is_none_is_a_broken_row(tmp_path: Path, problem: str) -> None:
    stored = rows()
    stored[1] |= BROKEN[problem](stored[1])
    path = store(tmp_path / "pairs.parquet", stored)
    with pytest.raises(InvalidInput, match=r"row 1, column 'noise_[01]'.*" + re.escape(problem)):
        GeneratedDataset(path, resolution=SIDE)
    with pytest.warns(UserWarning, match="left out 1 broken rows"):
        data = GeneratedDataset(path, resolution=SIDE, max_broken=1)
    assert len(data) == PAIRS - 1 and data.summary.broken == {"malformed noise": 1}


def test_images_that_the_noise_does_not_give_are_refused(tmp_path: Path, root: Path) -> None:
    path = root / "noise.parquet"
    with pytest.raises(InvalidInput, match=r"^data.random_flip = True: mirrors an image, and no noise gives"):
        GeneratedDataset(path, resolution=SIDE, random_flip=True)
    with pytest.raises(InvalidInput, match=r"^data.resolution = 8: resizes or crops images.*\[\(16, 16\)\]"):
        GeneratedDataset(path, resolution=8)
    with pytest.raises(InvalidInput, match=r"^data.resolution = 16: .*not looked at \(data.streaming\)"):
        GeneratedDataset(open_source(path, streaming=True), resolution=SIDE)
    bare = [{name: value for name, value in row.items() if "noise" not in name} for row in rows()]
    with pytest.raises(
        InvalidInput, match=r"does not say what noise its images were generated from.*noise_0 and noise_1"
    ):
        GeneratedDataset(store(tmp_path / "bare.parquet", bare))
    stored = rows("seed")
    stored[2]["seed_0"] = None
    with pytest.raises(InvalidInput, match=r"row 2, column 'seed_0' = None: is not the seed of a generator"):
        GeneratedDataset(store(tmp_path / "seed.parquet", stored))


# Runs


@pytest.mark.parametrize(("kind", "lora"), [("noise", None), ("seed", {"rank": 2})], ids=["full", "lora"])
def test_it_trains_resumes_bit_for_bit_and_reads_its_cache(
    root: Path, tmp_path: Path, lora: dict[str, Any] | None, kind: str
) -> None:
    sections: dict[str, Any] = {"model": {"lora": lora}, "method": {"decay_start": 1, "decay_end": 3}}
    cache = {"path": str(tmp_path / "cache")}

    def run(folder: str, steps: int = 4, **more: Any) -> Any:
        given = config(root, tmp_path / folder, kind, training={"steps": steps}, **sections, **more)
        return train(given, progress=False)

    whole = run("whole")
    first = whole.history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["gradient_norm"] > 0
    assert whole.history[-1]["network_evaluations_with_gradient"] == 4 * 2 * 2
    run("stopped", 2)
    run("stopped")
    run("cached", cache=cache)
    expected = trained(tmp_path / "whole")
    start = open_model(config(root, tmp_path / "x", kind)).network.state_dict()
    assert max(float((value - start[name]).abs().max()) for name, value in expected.items()) > 1e-4
    tiny.assert_same(trained(tmp_path / "stopped"), expected)
    for name, value in trained(tmp_path / "cached").items():  # encoders round otherwise in other batches
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
    stored = precompute(config(root, tmp_path / "x", kind, cache=cache, **sections), progress=False)
    assert stored.has_noise and kind in stored.stored["image"]
    plain = config(root, tmp_path / "x", kind, cache=cache)
    values = {**plain.as_dict(), "method": {"name": "diffusion-dpo"}}
    with pytest.raises(InvalidInput, match="different are contents"):
        precompute(TrainConfig.from_mapping(values), progress=False)


def test_a_batch_has_the_noise_of_its_images_and_the_step_of_its_draws(root: Path, tmp_path: Path) -> None:
    given = config(root, tmp_path / "run", training={"batch_size": 2, "gradient_accumulation_steps": 2})
    model, data = open_model(given), open_dataset(given)
    order = DrawOrder(PAIRS, 0, 2, 2)
    builder = BatchBuilder(PairEncoder(model, data), model.device, order, with_unconditional=False)
    batch = builder.build(range(6, 8))
    drawn = [data.pair(order.pair_index(draw), draw) for draw in (6, 7)]
    expected = [pair.noises[side] for side in (0, 1) for pair in drawn]  # type: ignore[union-attr]
    assert batch.noise is not None and np.array_equal(batch.noise.numpy(), np.stack(expected))  # type: ignore[arg-type]
    assert batch.step == 1 and builder.build(range(2)).step == 0


def _train(run: dict[str, Any]) -> None:
    train(TrainConfig.from_mapping(run), progress=False)


def test_two_processes_equal_one(root: Path, tmp_path: Path, forks: Server) -> None:
    smooth = {"epsilon": 1.0, "learning_rate": 0.1, "max_grad_norm": None}

    def run(folder: str, batch: int) -> dict[str, Any]:
        training = {"batch_size": batch, "gradient_accumulation_steps": 2, "steps": 3}
        method = {"decay_start": 0, "decay_end": 4}
        return mapping(root, tmp_path / folder, "seed", training=training, optimizer=smooth, method=method)

    _train(run("alone", 2))
    forks.together(_train, run("together", 1))
    expected, found = trained(tmp_path / "alone"), trained(tmp_path / "together")
    start = open_model(config(root, tmp_path / "x")).network.state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in expected.items())
    assert moved > 1e-4
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-3 * moved)


def test_models_and_data_that_do_not_fit_are_named(root: Path, tmp_path: Path) -> None:
    hub = config(root, tmp_path / "hub", model={"path": "somebody/some-flow-model"})
    assert count_evaluations(hub)[:2] == (2, 2)
    with pytest.raises(InvalidInput, match=r"prediction_type = 'epsilon': pnapo is of flow matching"):
        train(config(root, tmp_path / "sd15", model={"path": str(root / "sd15"), "max_sequence_length": None}))
    small = rows()
    for row in small:
        row["noise_0"] = npy(np.zeros((4, 4, 4), np.float32))
    path = store(tmp_path / "small.parquet", small)
    with pytest.raises(InvalidInput, match=r"^noise.shape = \(4, 4, 4\): has another shape than .*\(4, 8, 8\)"):
        train(config(root, tmp_path / "small", data={"path": str(path)}), progress=False)
    given = config(root, tmp_path / "at hand")
    with pytest.raises(InvalidInput, match=r"needs the noise that images were generated from, which PairDataset does"):
        tiny.train_model(given, open_model(given), PairDataset(root / "noise.parquet", resolution=SIDE))
    table = pq.read_table(root / "noise.parquet").drop(["score_0", "score_1"])
    pq.write_table(table, tmp_path / "unscored.parquet")
    with pytest.raises(InvalidInput, match=r"method.name = 'pnapo': weighs pairs by scores"):
        train(config(root, tmp_path / "unscored", data={"path": str(tmp_path / "unscored.parquet")}), progress=False)
