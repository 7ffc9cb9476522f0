"""The cache's files: resumable, and refused where they do not fit, are damaged or another process writes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastinvdpo import io as digests_module
from fastinvdpo.data import PairDataset
from fastinvdpo.errors import InvalidInput
from fastinvdpo.models import load_model
from fastinvdpo.output import OutputDirectory
from fastinvdpo.trainer import TrainConfig, cache, cache_writing, precompute, train
from fastinvdpo.trainer.cache import PairCache
from fastinvdpo.trainer.opening import open_data_source
from tests.trainer import tiny
from tests.trainer.forked import Server
from tests.trainer.test_cache import GUIDED, IMAGES, LEVELS, PAIRS, both, config_of, mapping, shards
from tests.trainer.test_contents import another_network, another_schedule
from tests.trainer.test_files import flip


def fill(root: Path, method: str = "inversion-dpo", /, **sections: Any) -> PairCache:
    return precompute(config_of(root, method, **sections), progress=False)


def counted_fills(runs: list[dict[str, Any]], fatal: int) -> list[int]:
    """Kills its process at the n-th prediction of a network, or runs to the end. The predictions of each run."""
    predictions, counts = tiny.CountedPredictions(fatal), []
    cache_writing.PAIRS_PER_SHARD = 3
    for run in runs:
        predictions.count = 0
        precompute(TrainConfig.from_mapping(run), progress=False)
        counts.append(predictions.count)
    return counts


@pytest.mark.parametrize(("method", "draws"), [("inversion-dpo", None), ("smpo", 3)])
def test_a_killed_precompute_resumes_without_recomputing_finished_shards(
    workspace: Path, forks: Server, method: str, draws: int | None
) -> None:
    """Three, three, three pairs and one; of draws, which the reference makes, as many shards."""
    killed, whole, kind = workspace / "killed", workspace / "whole", "draws" if draws else "pairs"
    # A range of scores decides weights, and no draw.
    options = {"inverter": "reference", "score_range": "auto"} if draws else {}
    runs = [mapping(workspace, method, method=options, cache={"path": str(c), "draws": draws}) for c in (killed, whole)]
    (total,) = forks.call(counted_fills, runs[1:], 0).result
    assert forks.call(counted_fills, runs[:1], total // 2 + 1).status == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in killed.glob(f"{kind}-*")}
    assert 0 < len(finished) < 4
    rest, again = forks.call(counted_fills, [runs[0], runs[0]], 0).result
    assert 0 < rest < total * (1 - len(finished) / 4) + 1 and again == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    (killed / f"{kind}-000001.safetensors").unlink()
    assert 0 < forks.call(counted_fills, runs[:1], 0).result[0] < total / 2
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in killed.iterdir()} == names
    files = [name for name in names if name.endswith(".safetensors")]
    assert len(files) == 2 + 4 + (4 if draws else 0)  # index, unconditional, shards of pairs and of draws
    for name in files:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    one, other = (cache.Manifest.read(path) for path in (killed, whole))
    assert one is not None and other is not None and (one.sizes, one.draw_sizes) == (other.sizes, other.draw_sizes)
    assert one.network_evaluations == other.network_evaluations
    if not draws:
        assert one.network_evaluations == IMAGES * LEVELS * GUIDED * 2


def test_training_completes_an_incomplete_cache(workspace: Path, small_shards: None) -> None:
    first = fill(workspace)
    contents = [path.read_bytes() for path in shards(workspace)]
    kept, missing, cut, _ = shards(workspace)
    missing.unlink()
    with cut.open("r+b") as file:
        file.truncate(1000)
    written = kept.stat().st_mtime_ns
    result = train(config_of(workspace), progress=False)
    assert [path.read_bytes() for path in shards(workspace)] == contents
    assert kept.stat().st_mtime_ns == written
    assert result.network_evaluations == first.network_evaluations + 6 * 2 * 2 * LEVELS * GUIDED


def test_one_process_writes(workspace: Path) -> None:
    written_there = pytest.raises(InvalidInput, match=r"cache\.path = .*: another process is writing there")
    with OutputDirectory(workspace / "cache"), written_there:
        fill(workspace)
    fill(workspace)
    left = workspace / "cache" / ".fastinvdpo-abcdefgh.tmp"  # of a process that was killed after the last shard
    left.mkdir()
    (left / "lock").touch()
    fill(workspace)
    assert not left.exists()


# --- never used where it does not fit ---


Change = Callable[[Path], Any] | None
STALE: dict[str, tuple[Change, dict[str, Any], str]] = {
    "weights": (another_network, {}, r"model unet \(sha256:[0-9a-f]{12}… there, sha256:[0-9a-f]{12}… here\)"),
    "schedule": (another_schedule, {}, r"different are scheduler beta_end \(0\.012 there, 0\.02 here\)\. Remedy"),
    "rows": (
        lambda root: tiny.write_data(root / "pairs.parquet", pairs=11),
        *({}, r"data rows \(10 there, 11 here\), data captions \(sha256"),
    ),
    "content": (
        lambda root: tiny.write_data(root / "pairs.parquet", scores=False),
        *({}, r"different are data scores \(sha256:\w+… there, sha256:\w+… here\)\. Remedy"),
    ),
    "levels": (None, {"method": {"num_inference_steps": 4}}, r"method\.num_inference_steps \(3 there, 4 here\)"),
    "guidance": (None, {"method": {"guidance_scale": 3.0}}, r"method\.guidance_scale \(2\.0 there, 3\.0 here\)"),
    "variant": (None, {"method": {"variant": "step"}}, r"method\.variant \('endpoint' there, 'step' here\)"),
    "model time": (None, {"method": {"model_time": "source"}}, r"method\.model_time \('destination' there, 'source'"),
    "dtype": (None, {"cache": {"dtype": "bf16"}}, r"cache\.dtype \('fp32' there, 'bf16' here\)"),
    "resolution": (None, {"data": {"resolution": 8}}, r"data\.resolution \(None there, 8 here\)"),
    "precision": (None, {"training": {"mixed_precision": "bf16"}}, r"training\.mixed_precision \('no' there, 'bf16'"),
    "reference": (None, {"model": {"reference_dtype": "bf16"}}, r"model\.reference_dtype \(None there, 'bf16' here\)"),
    "method": (None, {}, r"contents \('latents, embeddings, traj"),
}


@pytest.fixture(scope="module")
def filled(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a complete cache."""
    root = Path(shutil.copytree(template, tmp_path_factory.mktemp("filled") / "root"))
    fill(root)
    return root


@pytest.mark.parametrize("name", STALE)
def test_a_stale_cache_is_refused_with_the_reason(filled: Path, tmp_path: Path, name: str) -> None:
    """Whether it is complete or not."""
    change, settings, reason = STALE[name]
    root = Path(shutil.copytree(filled, tmp_path / "root"))
    if list(STALE).index(name) % 2:
        shards(root)[0].unlink()
    if change is not None:
        change(root)
    before = {path: path.read_bytes() for path in (root / "cache").iterdir()}
    config = config_of(root, "inpo" if name == "method" else "inversion-dpo", **settings)
    for command in (precompute, train):
        with pytest.raises(InvalidInput, match=reason) as caught:
            command(config, progress=False)  # type: ignore[operator]
        assert str(caught.value).startswith(f"cache.path = {str(root / 'cache')!r}: holds what was computed from")
        assert "Remedy: restore those values, name another cache.path, or delete that one" in str(caught.value)
    assert {path: path.read_bytes() for path in (root / "cache").iterdir()} == before
    assert not (root / "run").exists()


def test_what_changes_nothing_stored_keeps_the_cache(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(filled, tmp_path / "moved"))  # other paths, other times
    monkeypatch.setattr(cache_writing, "_complete", lambda *arguments, **options: pytest.fail("computed again"))
    fill(
        root,
        method={"beta": 7.0, "utility": "hinge", "timesteps_per_step": 2},
        model={"lora": {"rank": 2}, "init_perturbation": 0.01},
        training={"batch_size": 3, "seed": 5},
        cache={"batch_size": 7},
    )


def test_other_methods_do_not_depend_on_unet_and_schedule(workspace: Path) -> None:
    assert fill(workspace, "diffusion-dpo").network_evaluations == 0
    another_network(workspace)
    another_schedule(workspace)
    again, spot = both(workspace, "smpo", training={"steps": 2})
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
    times = file.stat()
    flip(file, 800)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and time of modification
    assert remembered.of([file]) != first


def test_what_was_damaged_or_written_by_others_is_not_trusted(workspace: Path) -> None:
    fill(workspace)
    (shard,) = shards(workspace)
    before = shard.read_bytes()
    tensors = {name: torch.zeros_like(value) for name, value in load_file(shard).items()}
    metadata = {**cache.stored_metadata(shard), "hash": "0" * 64}
    save_file(tensors, shard, metadata={"fastinvdpo": json.dumps(metadata)})
    assert shard.stat().st_size == len(before)
    with pytest.raises(InvalidInput, match=r"shard pairs-000000\.safetensors is missing, damaged, or belongs to an"):
        train(config_of(workspace), progress=False)
    shard.unlink()  # the remedy
    fill(workspace)
    assert shard.read_bytes() == before
    (workspace / "cache" / "manifest.json").write_text('{"key": {}')
    with pytest.raises(InvalidInput, match=r"cache\.path = .*its manifest\.json cannot be read.*or delete that file"):
        train(config_of(workspace), progress=False)


@pytest.mark.parametrize("method", ["inversion-dpo", "diffusion-dpo"])
def test_every_flipped_bit_of_a_cache_is_found(workspace: Path, method: str, small_shards: None) -> None:
    """Or it changes nothing of what is read: chains, or draws."""

    def contents() -> list[Any]:
        manifest = cache.Manifest.read(workspace / "cache")
        assert manifest is not None
        opened = PairCache(workspace / "cache", manifest)
        pairs = [opened.fetch(i, i) for i in range(PAIRS)]
        read = [[side[name] for name in sorted(side)] for p in pairs for side in (*p.sides, p.caption)]
        read += [list(opened._read("draw", number).values()) for number in range(PAIRS * opened.draws)]
        others = [(p.scores, p.row, p.tie) for p in pairs], opened.unconditional, opened.summary, opened.contents
        return [read, *others, manifest.key, manifest.sizes, manifest.network_evaluations]

    fill(workspace, method, cache={"draws": 2 if method == "diffusion-dpo" else None})
    expected, draw = contents(), random.Random(0)
    for file in [path for path in sorted((workspace / "cache").iterdir()) if not path.name.startswith(".")]:
        content = file.read_bytes()
        for bit in draw.sample(range(8 * len(content)), min(40, 8 * len(content))):
            flip(file, bit)
            try:
                tiny.assert_same(contents(), expected)
            except InvalidInput as error:
                assert str(error).startswith("cache.path = ") and file.name in str(error)
        file.write_bytes(content)


def test_leftovers_of_another_cache_are_not_used(workspace: Path) -> None:
    fill(workspace, cache={"path": str(workspace / "bf16"), "dtype": "bf16"})
    whole = fill(workspace, cache={"path": str(workspace / "whole")})
    (workspace / "cache").mkdir()
    for name in ("unconditional.safetensors", "index.safetensors", "pairs-000000.safetensors"):
        shutil.copy(workspace / "bf16" / name, workspace / "cache" / name)
    found = fill(workspace)
    tiny.assert_same(found.unconditional, whole.unconditional)
    assert all(tensor.dtype == torch.float32 for tensor in found.unconditional.values())


def test_sets_in_memory_and_slices_are_known_by_their_rows(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)
    rows = datasets.Dataset.from_parquet(str(workspace / "pairs.parquet"), cache_dir=str(workspace / "arrow"))
    rows.select(range(4)).save_to_disk(workspace / "one")
    rows.select(range(4)).save_to_disk(workspace / "copy")
    rows.select(range(4)).map(lambda row: row | {"caption": row["caption"] + "!"}).save_to_disk(workspace / "changed")

    def data(name: str) -> dict[str, Any]:
        return {"path": str(workspace / name), "format": "datasets"}

    with pytest.raises(InvalidInput, match="held in memory"):
        open_data_source(config_of(workspace, data=data("one")).data).files()
    fill(workspace, data=data("one"))
    fill(workspace, data=data("copy"))
    with pytest.raises(InvalidInput, match=r"different are data captions"):
        fill(workspace, data=data("changed"))
    (workspace / "repository").mkdir()
    shutil.copy(workspace / "pairs.parquet", workspace / "repository")
    sliced = {"path": str(workspace / "slices")}
    assert len(fill(workspace, data={**data("repository"), "split": "train[:4]"}, cache=sliced)) == 4
    with pytest.raises(InvalidInput, match=r"cache\.path = .*different are data "):
        fill(workspace, data={**data("repository"), "split": "train[4:8]"}, cache=sliced)


def test_mistakes_end_before_anything_is_loaded(workspace: Path) -> None:
    nowhere = str(workspace / "nowhere")
    for sections, message in (
        ({"cache": {"path": None}}, r"cache\.path = None: names no directory"),
        ({"model": {"path": nowhere}}, r"model\.path = .*nowhere'?: does not exist"),
        ({"data": {"path": nowhere}}, r"data\.path = .*does not exist"),
        ({"cache": {"path": str(next(workspace.rglob("*.json")))}}, r"cache\.path = .*: is a file"),
    ):
        with pytest.raises(InvalidInput, match=message):
            fill(workspace, **sections)  # type: ignore[arg-type]
    tiny.write_data(workspace / "pairs.parquet", scores=False)
    without_scores = pytest.raises(InvalidInput, match=r"method\.name = 'smpo': weighs pairs by scores")
    with without_scores:
        fill(workspace, "smpo")
    fill(workspace, "inpo")
    with pytest.raises(InvalidInput, match=r"method\.name = 'smpo': weighs pairs by scores"):
        train(config_of(workspace, "smpo"), progress=False)
    model, dataset = load_model("stable-diffusion", workspace / "model"), PairDataset(workspace / "pairs.parquet")
    with pytest.raises(InvalidInput, match=r"cache\.path = .*not to pairs at hand"):
        tiny.train_model(config_of(workspace), model, dataset)
    train(config_of(workspace, "inpo", training={"steps": 2}), progress=False)
    with pytest.raises(InvalidInput, match=r"resume = 'never'"):
        other = config_of(workspace, "inpo", cache={"path": str(workspace / "other")})
        train(other, resume="never", progress=False)
    assert not (workspace / "other").exists()
