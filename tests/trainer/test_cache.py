"""The cache: training from it is training without it, from less; it is resumable, and refused where it does not fit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastinvdpo import io as digests_module
from fastinvdpo.data import PairDataset, write_pairs
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import ChainObjective
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import perturb
from fastinvdpo.models.digits import DigitsModel
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import TrainConfig, TrainResult, cache, cache_writing, precompute, train
from fastinvdpo.trainer.batches import BatchBuilder, DrawOrder
from fastinvdpo.trainer.cache import PairCache
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.opening import open_data_source
from tests.trainer import tiny
from tests.trainer.forked import Server
from tests.trainer.test_files import flip
from tests.trainer.test_resume import _assert_same

LEVELS, PAIRS, IMAGES, CAPTIONS, GUIDED = 3, 10, 20, 4, 2


def _mapping(root: Path, method: str = "inversion-dpo", name: str = "run", /, **sections: Any) -> dict[str, Any]:
    """The tiny configuration with a cache in ``root/cache``."""
    changes = {**sections, "output": {"directory": str(root / name), "log_every": 1, **sections.get("output", {})}}
    cached = {"path": str(root / "cache"), **changes.pop("cache", {})}
    return {**tiny.mapping(root, method, **changes), "cache": cached}


def _config(root: Path, method: str = "inversion-dpo", name: str = "run", /, **sections: Any) -> TrainConfig:
    return TrainConfig.from_mapping(_mapping(root, method, name, **sections))


def _both(root: Path, method: str = "inversion-dpo", /, **changes: Any) -> tuple[TrainResult, TrainResult]:
    """The same run from the cache and without."""
    cached = train(_config(root, method, **changes), progress=False)
    return cached, train(_config(root, method, "spot", **{**changes, "cache": {"path": None}}), progress=False)


def _shards(root: Path) -> list[Path]:
    return sorted((root / "cache").glob("pairs-*"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shards: three, three, three pairs and one."""
    monkeypatch.setattr(cache_writing, "PAIRS_PER_SHARD", 3)


# --- the same training ---


@pytest.mark.parametrize("method", ["diffusion-dpo", "inpo", "smpo"])
def test_training_from_the_cache_is_the_same_bit_for_bit(workspace: Path, method: str, small_shards: None) -> None:
    training = {"gradient_accumulation_steps": 2, "steps": 4}
    cached, spot = _both(workspace, method, data={"caption_dropout": 0.3}, training=training)
    assert [row["loss"] for row in cached.history] == [row["loss"] for row in spot.history]
    assert cached.network_evaluations == spot.network_evaluations
    base, spot_weights = tiny.unet().state_dict(), tiny.weights(spot)
    for name, value in tiny.weights(cached).items():
        assert torch.equal(value, spot_weights[name])
    assert any(not torch.equal(value, base[name]) for name, value in spot_weights.items())


# Far from Adam's sign-like first steps, so that rounding in a prediction stays rounding in the weights.
SMOOTH = {"epsilon": 1e3, "learning_rate": 1.0, "max_grad_norm": None}


PERTURBED = {"init_perturbation": 0.05}
ROUNDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "endpoint": ({"guidance_scale": 1.0}, {}),
    "step": ({"variant": "step", "guidance_scale": 2.0}, {}),
    "distance": ({"variant": "distance", "guidance_scale": 2.0}, PERTURBED),
    "distance-policy": ({"variant": "distance-policy", "guidance_scale": 1.0}, PERTURBED),
    "sampled levels": ({"timesteps_per_step": 2}, {}),
    "sampled levels, lora": ({"timesteps_per_step": 2}, {"lora": {"rank": 2}}),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.filterwarnings("ignore:variant 'distance:UserWarning")
def test_inversion_dpo_from_the_cache_differs_by_rounding(workspace: Path, name: str, small_shards: None) -> None:
    """The reference is asked in other batches than in training, where a network may round otherwise."""
    method, model = ROUNDED[name]
    cached, spot = _both(workspace, method=method, model=model, optimizer=SMOOTH, training={"steps": 4})
    for row, expected in zip(cached.history, spot.history, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    base, spot_weights = tiny.unet().state_dict(), tiny.weights(spot)
    for key, value in tiny.weights(cached).items():
        torch.testing.assert_close(value, spot_weights[key], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(value, base[key]) for key, value in spot_weights.items())


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("endpoint", torch.float32), ("step", torch.float64), ("distance", torch.float32), ("distance", torch.float64)],
)
@pytest.mark.filterwarnings("ignore:variant 'distance:UserWarning")
def test_the_gradient_from_the_cache_is_the_plain_one(workspace: Path, variant: str, dtype: torch.dtype) -> None:
    """In float32 from the files, in float64 with the same tensors computed in float64."""
    config = _config(
        workspace, method={"variant": variant}, model={"init_perturbation": 0.05 if variant == "distance" else 0.0}
    )
    stored = precompute(config, progress=False)
    model = load_model("digits", workspace / "model", dtype=dtype)
    objective = config.method.objective(model.schedule)
    assert isinstance(objective, ChainObjective)
    networks = Networks(model, lora=None, gradient_checkpointing=False)
    perturb(networks.policy_module, 0.02, seed=0)
    order = DrawOrder(PAIRS, 0, 4, 1)
    batch = BatchBuilder(stored, model.device, order, with_unconditional=True).build(range(4))
    wide = {
        name: {k: v.to(dtype) for k, v in getattr(batch, name).items()} for name in ("conditioning", "unconditional")
    }
    plain = replace(batch, latents=batch.latents.to(dtype), **wide, trajectory=None, reference_pred=None)
    if dtype == torch.float64:
        inputs = (plain.conditioning, plain.unconditional)
        chain = objective.reference_trajectory(networks.reference, plain.latents, *inputs)
        predictions = objective.reference_predictions(networks.reference, chain, *inputs)
        batch = replace(plain, trajectory=chain, reference_pred=predictions)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the reference was asked")

    gradients = []
    for reference, given in ((refuse, batch), (networks.reference, plain)):
        networks.policy_module.zero_grad()
        objective(networks.policy, reference, given, seed=0).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in networks.trainable().values() if p.grad is not None]))
    cached, expected = gradients
    assert expected.abs().max() > 0
    assert (cached - expected).norm() <= (1e-9 if dtype == torch.float64 else 1e-4) * expected.norm()


def test_bf16_rounds_what_is_stored_and_nothing_else(workspace: Path) -> None:
    """Storing a reference prediction r as r(1 + δ), |δ| ≤ 2⁻⁸, moves a score m((p − r)(p + r − 2τ)) by at most
    m(2|r − τ||δr| + (δr)²). The trajectory is rounded before the reference is asked there, so that it adds nothing.
    """
    config = _config(workspace, cache={"dtype": "bf16"})
    stored = precompute(config, progress=False)
    assert set(stored.image_tensors) == {"latents", "trajectory", "reference_pred"}
    tensors = load_file(_shards(workspace)[0])
    assert {name: value.dtype for name, value in tensors.items()} == {
        "image.latents": torch.float32,
        "image.trajectory": torch.bfloat16,
        "image.reference_pred": torch.bfloat16,
        "caption.encoder_hidden_states": torch.bfloat16,
    }
    model = load_model("digits", workspace / "model")
    objective = config.method.objective(model.schedule)
    networks = Networks(model, lora=None, gradient_checkpointing=False)
    perturb(networks.policy_module, 0.02, seed=0)
    builder = BatchBuilder(stored, model.device, DrawOrder(PAIRS, 0, PAIRS, 1), with_unconditional=True)
    batch = builder.build(range(PAIRS))
    with torch.no_grad():
        rounded = objective(networks.policy, networks.reference, batch, seed=0)
        exact = objective(networks.policy, networks.reference, replace(batch, reference_pred=None), seed=0)
    assert exact.target is not None
    error = 2.0**-8 * exact.reference_pred.abs()
    bound = (2 * (exact.reference_pred - exact.target).abs() * error + error**2).flatten(2).mean((1, 2))
    allowed = 500.0 / 2 * (bound[:PAIRS] + bound[PAIRS:])
    difference = (rounded.margin - exact.margin).abs()
    assert (difference <= allowed + 1e-4).all()
    assert difference.max() > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mixed_precision_and_a_bf16_reference(workspace: Path, dtype: str) -> None:
    training, model = {"mixed_precision": "bf16", "steps": 2}, {"reference_dtype": "bf16"}
    cached, spot = _both(workspace, cache={"dtype": dtype}, training=training, model=model, optimizer=SMOOTH)
    # bf16 predictions carry 8 bits, as what is stored does.
    assert cached.history[0]["reference_mse_winner"] == pytest.approx(spot.history[0]["reference_mse_winner"], rel=2e-2)
    assert cached.history[-1]["gradient_norm"] == pytest.approx(spot.history[-1]["gradient_norm"], rel=0.2)


# --- from less ---


def test_training_from_a_complete_cache_touches_nothing_else(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = precompute(_config(workspace), progress=False)
    assert before.network_evaluations == IMAGES * LEVELS * GUIDED * 2  # inverted, then asked along the chain

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("training from the cache asked for this")

    monkeypatch.setattr(DigitsModel, "encode_images", refuse)
    monkeypatch.setattr(DigitsModel, "encode_prompts", refuse)
    monkeypatch.setattr(PairDataset, "__init__", refuse)
    monkeypatch.setattr(Networks, "reference", refuse)
    monkeypatch.setattr("fastinvdpo.trainer.networks.frozen_copy", refuse)
    result = train(_config(workspace), progress=False)
    policy = 6 * 2 * 2 * LEVELS * GUIDED
    assert result.history[-1]["network_evaluations_with_gradient"] == policy
    assert result.history[-1]["network_evaluations_without_gradient"] == 0
    assert result.network_evaluations == policy + before.network_evaluations
    assert load_model("digits", result.model_directory)


def test_a_reference_that_is_not_there_is_not_asked(workspace: Path) -> None:
    model = load_model("digits", workspace / "model")
    networks = Networks(model, lora=None, gradient_checkpointing=False, reference="none")
    assert networks.reference_module is None
    with pytest.raises(RuntimeError, match="keeps none"):
        networks.reference(torch.zeros(1, 1, 8, 8), torch.tensor([1]), model.encode_prompts([""]))


def test_equal_images_and_captions_are_stored_once(workspace: Path, small_shards: None) -> None:
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(4)]
    rows = [
        {"jpg_0": pictures[a], "jpg_1": pictures[b], "label_0": 1, "label_1": 0, "caption": caption}
        for a, b, caption in [(0, 1, "a"), (1, 2, "a"), (2, 0, "a"), (0, 3, "a"), (0, 1, "b"), (3, 3, "b"), (1, 0, "a")]
    ]
    write_pairs(workspace / "pairs.parquet", rows)
    stored = precompute(_config(workspace), progress=False)
    assert stored.index.images.tolist() == [[0, 1], [1, 2], [2, 0], [0, 3], [4, 5], [6, 6], [1, 0]]
    assert stored.index.captions.tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert stored.index.first == {"image": [0, 3, 7, 7], "caption": [0, 1, 2, 2]}
    assert stored.network_evaluations == 7 * LEVELS * GUIDED * 2
    cached, spot = _both(workspace, optimizer=SMOOTH, training={"steps": 7})
    for row, expected in zip(cached.history, spot.history, strict=True):
        assert row["policy_mse_winner"] == pytest.approx(expected["policy_mse_winner"], rel=1e-4)
        assert row["policy_mse_loser"] == pytest.approx(expected["policy_mse_loser"], rel=1e-4)


def test_only_the_rows_asked_for_are_read(workspace: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = precompute(_config(workspace), progress=False)
    everything = torch.cat([load_file(path)["image.trajectory"] for path in _shards(workspace)])
    numbers = [19, 0, 7, 7, 12]
    monkeypatch.setattr(cache, "_OPEN_SHARDS", 1)
    opened: list[int] = []
    one_open = PairCache(workspace / "cache", cache.Manifest.read(workspace / "cache"))  # type: ignore[arg-type]
    original = one_open._open
    monkeypatch.setattr(one_open, "_shard", lambda shard: opened.append(shard) or original(shard))
    for reader in (stored, one_open):
        found = torch.stack([reader._read("image", number)["trajectory"] for number in numbers])
        assert torch.equal(found, everything[numbers])
    assert opened == [3, 0, 1, 1, 2]


# --- resumable ---


def counted_fills(runs: list[dict[str, Any]], fatal: int) -> list[int]:
    """Kills its process at the n-th prediction of a network, or runs to the end. How often each run asked a network."""
    predictions, counts = tiny.CountedPredictions(fatal), []
    cache_writing.PAIRS_PER_SHARD = 3
    for run in runs:
        predictions.count = 0
        precompute(TrainConfig.from_mapping(run), progress=False)
        counts.append(predictions.count)
    return counts


def test_a_killed_precompute_resumes_without_recomputing_finished_shards(workspace: Path, forks: Server) -> None:
    killed, whole = (_mapping(workspace, cache={"path": str(workspace / name)}) for name in ("killed", "whole"))
    # A shard of three pairs is inverted in two chunks (two pairs at once), each asks 2 · LEVELS times.
    per_shard = 2 * 2 * LEVELS
    assert forks.call(counted_fills, [killed], per_shard * 2 + 3).status == -signal.SIGKILL
    finished = sorted(path.name for path in (workspace / "killed").glob("pairs-*"))
    assert finished == ["pairs-000000.safetensors", "pairs-000001.safetensors"]
    times = [(workspace / "killed" / name).stat().st_mtime_ns for name in finished]
    # The third shard, and the fourth with its single pair in one chunk.
    expected = per_shard + per_shard // 2
    done = forks.call(counted_fills, [killed, whole, killed], 0)
    assert (done.status, done.result) == (0, [expected, 2 * per_shard + expected, 0])
    assert [(workspace / "killed" / name).stat().st_mtime_ns for name in finished] == times
    names = {path.name for path in (workspace / "whole").iterdir()}
    assert {path.name for path in (workspace / "killed").iterdir()} == names
    for name in names:
        if name.endswith(".safetensors"):
            assert (workspace / "killed" / name).read_bytes() == (workspace / "whole" / name).read_bytes()
    one, other = (cache.Manifest.read(workspace / name) for name in ("killed", "whole"))
    assert one is not None and other is not None
    assert one.network_evaluations == other.network_evaluations == IMAGES * LEVELS * GUIDED * 2
    assert one.sizes == other.sizes


def test_training_completes_an_incomplete_cache(workspace: Path, small_shards: None) -> None:
    first = precompute(_config(workspace), progress=False)
    shards = _shards(workspace)
    contents = [path.read_bytes() for path in shards]
    shards[1].unlink()
    with shards[2].open("r+b") as file:
        file.truncate(1000)
    kept = shards[0].stat().st_mtime_ns
    result = train(_config(workspace), progress=False)
    assert [path.read_bytes() for path in _shards(workspace)] == contents
    assert shards[0].stat().st_mtime_ns == kept
    assert result.network_evaluations == first.network_evaluations + 6 * 2 * 2 * LEVELS * GUIDED


def test_one_process_writes(workspace: Path) -> None:
    written_there = pytest.raises(InvalidInput, match=r"cache\.path = .*: another process is writing there")
    with OutputDirectory(workspace / "cache"), written_there:
        precompute(_config(workspace), progress=False)
    precompute(_config(workspace), progress=False)


# --- never used where it does not fit ---


def _other_weights(root: Path) -> None:
    model = load_model("digits", root / "model")
    perturb(model.network, 1e-3, seed=0)
    model.save(root / "model")


def _other_schedule(root: Path) -> None:
    file = root / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("0.012", "0.02"))


def _other_pairs(root: Path) -> None:
    tiny.write_data(root / "pairs.parquet", pairs=11)


def _swapped_scores(root: Path) -> None:
    tiny.write_data(root / "pairs.parquet", scores=False)


STALE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "weights": (_other_weights, {}, r"model unet \(sha256:[0-9a-f]{12}… there, sha256:[0-9a-f]{12}… here\)"),
    "schedule": (_other_schedule, {}, r"different are scheduler beta_end \(0\.012 there, 0\.02 here\)\. Remedy"),
    "rows": (_other_pairs, {}, r"data rows \(10 there, 11 here\), data captions \(sha256"),
    "content": (_swapped_scores, {}, r"different are data scores \(sha256:\w+… there, sha256:\w+… here\)\. Remedy"),
    "levels": (None, {"method": {"num_inference_steps": 4}}, r"method\.num_inference_steps \(3 there, 4 here\)"),
    "guidance": (None, {"method": {"guidance_scale": 3.0}}, r"method\.guidance_scale \(2\.0 there, 3\.0 here\)"),
    "variant": (None, {"method": {"variant": "step"}}, r"method\.variant \('endpoint' there, 'step' here\)"),
    "model time": (None, {"method": {"model_time": "source"}}, r"method\.model_time \('destination' there, 'source'"),
    "dtype": (None, {"cache": {"dtype": "bf16"}}, r"cache\.dtype \('fp32' there, 'bf16' here\)"),
    "resolution": (None, {"data": {"resolution": 8}}, r"data\.resolution \(None there, 8 here\)"),
    "precision": (None, {"training": {"mixed_precision": "bf16"}}, r"training\.mixed_precision \('no' there, 'bf16'"),
    "reference": (None, {"model": {"reference_dtype": "bf16"}}, r"model\.reference_dtype \(None there, 'bf16' here\)"),
    "method": (None, {"method": {"name": "inpo", "guidance_scale": None}}, r"contents \('latents, embeddings, traj"),
}


@pytest.fixture(scope="module")
def filled(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a complete cache."""
    root = Path(shutil.copytree(template, tmp_path_factory.mktemp("filled") / "root"))
    precompute(_config(root), progress=False)
    return root


@pytest.mark.parametrize("name", STALE)
def test_a_stale_cache_is_refused_with_the_reason(filled: Path, tmp_path: Path, name: str) -> None:
    """Whether it is complete or not."""
    change, settings, reason = STALE[name]
    root = Path(shutil.copytree(filled, tmp_path / "root"))
    if list(STALE).index(name) % 2:
        _shards(root)[0].unlink()
    if change is not None:
        change(root)
    before = {path: path.read_bytes() for path in (root / "cache").iterdir()}
    values = _mapping(root, **settings)
    if name == "method":
        values["method"] = {"name": "inpo"}
    for command in (precompute, train):
        with pytest.raises(InvalidInput, match=reason) as caught:
            command(TrainConfig.from_mapping(values), progress=False)  # type: ignore[operator]
        assert str(caught.value).startswith(f"cache.path = {str(root / 'cache')!r}: holds what was computed from")
        assert "Remedy: restore those values, name another cache.path, or delete that one" in str(caught.value)
    assert {path: path.read_bytes() for path in (root / "cache").iterdir()} == before
    assert not (root / "run").exists()


def test_what_changes_nothing_stored_keeps_the_cache(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(filled, tmp_path / "moved"))  # other paths, other times
    monkeypatch.setattr(cache_writing, "_fill", lambda *arguments, **options: pytest.fail("computed again"))
    changes: dict[str, Any] = {
        "method": {"beta": 7.0, "utility": "hinge", "timesteps_per_step": 2},
        "model": {"lora": {"rank": 2}, "init_perturbation": 0.01},
        "training": {"batch_size": 3, "seed": 5},
        "cache": {"batch_size": 7},
    }
    precompute(_config(root, **changes), progress=False)


def test_other_methods_do_not_depend_on_unet_and_schedule(workspace: Path) -> None:
    assert precompute(_config(workspace, "diffusion-dpo"), progress=False).network_evaluations == 0
    _other_weights(workspace)
    _other_schedule(workspace)
    again, spot = _both(workspace, "smpo", training={"steps": 2})
    assert again.history[0]["policy_mse_winner"] == spot.history[0]["policy_mse_winner"]


def test_digests_are_remembered_until_a_file_changes(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = workspace / "pairs.parquet"
    digests = digests_module.Digests()
    first = digests.of([file])
    assert digests.remembered == {}  # too young to tell a second change within the clock's resolution
    monkeypatch.setattr(digests_module.Digests, "settled_ns", 0)
    assert digests.of([file]) == first
    remembered = digests_module.Digests(json.loads(json.dumps(digests.remembered)))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda *arguments: pytest.fail("read again"))
        assert remembered.of([file]) == first
    content = bytearray(file.read_bytes())
    times = file.stat()
    content[100] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time of modification
    assert remembered.of([file]) != first


def test_what_was_damaged_or_written_by_others_is_not_trusted(workspace: Path) -> None:
    precompute(_config(workspace), progress=False)
    (shard,) = _shards(workspace)
    before = shard.read_bytes()
    tensors = {name: torch.zeros_like(value) for name, value in load_file(shard).items()}
    told = {**cache.stored_metadata(shard), "hash": "0" * 64}
    save_file(tensors, shard, metadata={"fastinvdpo": json.dumps(told)})
    assert shard.stat().st_size == len(before)
    with pytest.raises(InvalidInput, match=r"shard pairs-000000\.safetensors is missing, damaged, or belongs to an"):
        train(_config(workspace), progress=False)
    shard.unlink()  # the remedy
    precompute(_config(workspace), progress=False)
    assert shard.read_bytes() == before
    (workspace / "cache" / "manifest.json").write_text('{"key": {}')
    with pytest.raises(InvalidInput, match=r"cache\.path = .*its manifest\.json cannot be read.*or delete that file"):
        train(_config(workspace), progress=False)


def test_every_flipped_bit_of_a_cache_is_found(workspace: Path, small_shards: None) -> None:
    """Or it changes nothing of what is read."""

    def contents() -> list[Any]:
        manifest = cache.Manifest.read(workspace / "cache")
        assert manifest is not None
        opened = PairCache(workspace / "cache", manifest)
        pairs = [opened.fetch(i, i) for i in range(PAIRS)]
        read = [[side[name] for name in sorted(side)] for p in pairs for side in (p.winner, p.loser, p.caption)]
        others = [(p.scores, p.row, p.tie) for p in pairs], opened.unconditional, opened.summary, opened.contents
        return [read, *others, manifest.key, manifest.sizes, manifest.network_evaluations]

    precompute(_config(workspace), progress=False)
    expected, draw = contents(), random.Random(0)
    for file in [path for path in sorted((workspace / "cache").iterdir()) if not path.name.startswith(".")]:
        content = file.read_bytes()
        for bit in draw.sample(range(8 * len(content)), min(40, 8 * len(content))):
            flip(file, bit)
            try:
                _assert_same(contents(), expected)
            except InvalidInput as error:
                assert str(error).startswith("cache.path = ") and file.name in str(error)
        file.write_bytes(content)


def test_leftovers_of_another_cache_are_not_used(workspace: Path) -> None:
    bf16 = {"path": str(workspace / "bf16"), "dtype": "bf16"}
    precompute(_config(workspace, cache=bf16), progress=False)
    whole = precompute(_config(workspace, cache={"path": str(workspace / "whole")}), progress=False)
    (workspace / "cache").mkdir()
    for name in ("unconditional.safetensors", "index.safetensors", "pairs-000000.safetensors"):
        shutil.copy(workspace / "bf16" / name, workspace / "cache" / name)
    found = precompute(_config(workspace), progress=False)
    _assert_same(found.unconditional, whole.unconditional)
    assert all(tensor.dtype == torch.float32 for tensor in found.unconditional.values())


def test_sets_in_memory_are_known_by_their_rows(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)

    def saved(name: str, pairs: int) -> dict[str, Any]:
        tiny.write_data(workspace / "rows.parquet", pairs=pairs)
        found = datasets.Dataset.from_parquet(str(workspace / "rows.parquet"), cache_dir=str(workspace / "arrow"))
        found.select(range(4)).save_to_disk(workspace / name)
        return {"path": str(workspace / name), "format": "datasets"}

    source = open_data_source(_config(workspace, data=saved("one", 10)).data)
    with pytest.raises(InvalidInput, match="held in memory"):
        source.files()
    precompute(_config(workspace, data=saved("one", 10)), progress=False)
    precompute(_config(workspace, data=saved("copy", 10)), progress=False)
    changed = saved("other", 10)
    found = datasets.load_from_disk(changed["path"]).map(lambda row: row | {"caption": row["caption"] + "!"})
    found.save_to_disk(workspace / "changed")
    with pytest.raises(InvalidInput, match=r"different are data captions"):
        precompute(_config(workspace, data={**changed, "path": str(workspace / "changed")}), progress=False)


def test_mistakes_end_before_anything_is_loaded(workspace: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cache\.path = None: names no directory"):
        precompute(_config(workspace, cache={"path": None}), progress=False)
    with pytest.raises(InvalidInput, match=r"model\.path = .*nowhere'?: holds no"):
        precompute(_config(workspace, model={"path": str(workspace / "nowhere")}), progress=False)
    with pytest.raises(InvalidInput, match=r"data\.path = .*does not exist"):
        precompute(_config(workspace, data={"path": str(workspace / "nowhere")}), progress=False)
    tiny.write_data(workspace / "pairs.parquet", scores=False)
    with pytest.raises(InvalidInput, match=r"method\.name = 'smpo': weighs pairs by scores"):
        precompute(_config(workspace, "smpo"), progress=False)
    precompute(_config(workspace, "inpo"), progress=False)
    with pytest.raises(InvalidInput, match=r"method\.name = 'smpo': weighs pairs by scores"):
        train(_config(workspace, "smpo"), progress=False)
    model, dataset = load_model("digits", workspace / "model"), PairDataset(workspace / "pairs.parquet")
    with pytest.raises(InvalidInput, match=r"cache\.path = .*not to pairs at hand"):
        tiny.train_model(_config(workspace), model, dataset, progress=False)
    train(_config(workspace, "inpo", training={"steps": 2}), progress=False)
    with pytest.raises(InvalidInput, match=r"resume = 'never'"):
        train(_config(workspace, "inpo", cache={"path": str(workspace / "other")}), resume="never", progress=False)
    assert not (workspace / "other").exists()


def test_a_slice_is_not_served_with_another_slice(workspace: Path) -> None:
    (workspace / "repository").mkdir()
    shutil.copy(workspace / "pairs.parquet", workspace / "repository")

    def slice_of(split: str) -> TrainConfig:
        return _config(workspace, data={"path": str(workspace / "repository"), "format": "datasets", "split": split})

    assert len(precompute(slice_of("train[:4]"), progress=False)) == 4
    with pytest.raises(InvalidInput, match=r"cache\.path = .*different are data "):
        precompute(slice_of("train[4:8]"), progress=False)
