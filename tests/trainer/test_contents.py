"""A run is what it was made of: content counts, paths do not; every other content is refused by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastinvdpo.data import PairDataset
from fastinvdpo.errors import InvalidInput
from fastinvdpo.io import sealed, unsealed
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import perturb
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.trainer import TrainConfig, train
from fastinvdpo.trainer.checkpoint import check_same_run, frozen_contents
from tests.models import tiny as models
from tests.trainer import tiny

FOUR = {"steps": 4}


@pytest.fixture(scope="module")
def begun(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a run of two steps."""
    root = Path(shutil.copytree(template, tmp_path_factory.mktemp("begun") / "root"))
    tiny.trained(root, training={"steps": 2})
    return root


@pytest.fixture
def root(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "root"))


def _flip_a_label(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(root / "pairs.parquet").to_pylist()
    rows[3]["label_0"], rows[3]["label_1"] = rows[3]["label_1"], rows[3]["label_0"]
    pq.write_table(pa.Table.from_pylist(rows), root / "pairs.parquet")


def another_schedule(root: Path) -> None:
    file = root / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("0.012", "0.02"))


def another_network(root: Path) -> None:
    model = load_model("stable-diffusion", root / "model")
    perturb(model.network, 1e-3, seed=0)
    model.save_network(root / "model", model.network)


CHANGES: dict[str, tuple[Any, str]] = {
    "a label": (_flip_a_label, r"different are data winners \(sha256:\w+… there, sha256:\w+… here\), data\.path"),
    "a row more": (lambda root: tiny.write_data(root / "pairs.parquet", pairs=11), r"data rows \(10 there, 11 here\)"),
    "the base model": (another_network, r"different are model network \(sha256"),
    "its schedule": (another_schedule, r"different are model schedule \(sha256"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_content_is_refused_by_name_and_changes_nothing(root: Path, name: str) -> None:
    change, message = CHANGES[name]
    change(root)
    before = {file: file.read_bytes() for file in (root / "run").rglob("*") if file.is_file()}
    with pytest.raises(InvalidInput, match=rf"belongs to another run; .*{message}"):
        tiny.trained(root, training=FOUR)
    assert {file: file.read_bytes() for file in (root / "run").rglob("*") if file.is_file()} == before


def test_the_same_content_continues_wherever_it_lies(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, model and run have moved; families and formats are named that were inferred; a scheduler says more."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for name, place in (("run", "run"), ("pairs.parquet", "other.parquet"), ("model", "base")):
        shutil.move(root / name, moved / place)
    file = moved / "base" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_diffusers_version": "9.9", "use_unknown": None}))
    monkeypatch.chdir(moved)
    paths = {"data": {"path": "./other.parquet", "format": "parquet"}, "model": {"path": "base", "family": "auto"}}
    result = tiny.trained(moved, training=FOUR, **paths)
    assert result.steps == 4 and [row["step"] for row in result.history] == [1, 2, 4]
    card = (moved / "run" / "model" / "README.md").read_text()
    assert "| steps 1 to 2 | steps 3 to 4 |" in card
    assert "pairs.parquet` | `./other.parquet` |" in card
    (winners,) = [line.split(" | ") for line in card.splitlines() if line.startswith("| data winners")]
    assert winners[1] == winners[2].removesuffix(" |") and "sha256:" in winners[1]


def test_a_checkpoint_of_an_earlier_version_continues_with_a_warning(root: Path) -> None:
    """It has no digests, and lacks keys that the configuration has now."""
    file = root / "run" / "checkpoints" / "step-00000002" / "meta.json"
    meta = unsealed(file)
    for name in ("contents", "attempts", "remembered", "digests"):
        del meta[name]
    del meta["config"]["training"]["ema_decay"], meta["config"]["method"]["timesteps"], meta["config"]["cache"]
    for name, file_name in (("data", "pairs.parquet"), ("model", "model")):
        meta["config"][name]["path"] = str(root / file_name)
    file.write_text(json.dumps({**meta, "format": 1}))
    told = r"could not be compared .* of an earlier version\): .*data winners, .*model network"
    with pytest.warns(UserWarning, match=told):
        tiny.trained(root, training=FOUR)
    card = (root / "run" / "model" / "README.md").read_text()
    assert "| data winners | `not recorded` | `sha256:" in card
    moved = tiny.config(root, training=FOUR, data={"path": str(root / "elsewhere.parquet")})
    shutil.copy(root / "pairs.parquet", root / "elsewhere.parquet")
    meta["config"]["training"]["steps"] = 4
    file.write_text(json.dumps(sealed(meta)))
    with pytest.raises(InvalidInput, match=r"data\.path"):  # nothing says that it is the same
        train(moved, resume=file.parent, progress=False)


def test_model_and_pairs_at_hand_have_digests(workspace: Path) -> None:
    def attempt(steps: int, pairs: str = "pairs.parquet", change: float = 0.0) -> None:
        model = load_model("stable-diffusion", workspace / "model")
        with torch.no_grad():
            next(model.network.parameters()).add_(change)
        tiny.train_model(tiny.config(workspace, training={"steps": steps}), model, PairDataset(workspace / pairs))

    tiny.write_data(workspace / "longer.parquet", pairs=11)
    attempt(2)
    with pytest.raises(InvalidInput, match=r"different are model network"):
        attempt(4, change=0.1)
    with pytest.raises(InvalidInput, match=r"data rows \(10 there, 11 here\)"):
        attempt(4, pairs="longer.parquet")
    attempt(4)
    # Trained in place, a model is no longer what the run began with.
    model = load_model("stable-diffusion", workspace / "run" / "model")
    with pytest.raises(InvalidInput, match=r"different are model network"):
        tiny.train_model(tiny.config(workspace), model, PairDataset(workspace / "pairs.parquet"))


def test_a_run_may_go_on_from_a_cache_and_back(workspace: Path) -> None:
    cache = {"path": str(workspace / "cache")}
    tiny.trained(workspace, training={"steps": 2})
    tiny.trained(workspace, training=FOUR, cache=cache)
    tiny.assert_same(tiny.weights(tiny.trained(workspace)), tiny.weights(tiny.trained(workspace, "whole")))
    _flip_a_label(workspace)
    with pytest.raises(InvalidInput, match=r"different are data winners"):
        tiny.trained(workspace, training={"steps": 8}, cache={"path": str(workspace / "other")})


def test_encoders_tokenizers_and_vae_have_digests_of_their_own() -> None:
    first = frozen_contents(StableDiffusionModel(models.sd_pipeline()))
    assert first == frozen_contents(StableDiffusionModel(models.sd_pipeline()))
    assert list(first) == ["model AutoencoderKL", "model CLIPTextModel", "model CLIPTokenizer"]
    scaled = models.sd_pipeline()
    scaled.vae.register_to_config(scaling_factor=0.5)
    encoder = models.sd_pipeline()
    next(encoder.text_encoder.parameters()).data.add_(1e-3)
    words = models.sd_pipeline()
    words.tokenizer.add_tokens(["zebrafish"])
    for pipeline, part in ((scaled, "AutoencoderKL"), (encoder, "CLIPTextModel"), (words, "CLIPTokenizer")):
        found = frozen_contents(StableDiffusionModel(pipeline))
        assert [name for name in first if found[name] != first[name]] == [f"model {part}"]


def test_paths_are_free_where_contents_have_been_compared(workspace: Path) -> None:
    one = {"data rows": 3, "data images": "sha256:1", "model network": "sha256:2"}
    stored, now = (tiny.mapping(workspace, **{s: {"path": p} for s in ("data", "model")}) for p in ("a", "b"))
    meta = {"step": 1, "config": TrainConfig.from_mapping(stored).as_dict(), "run": {}}
    here = TrainConfig.from_mapping(now).as_dict()
    check_same_run({**meta, "contents": one}, here, {}, one)
    unread = {**one, "data images": "not hashed (output.data_hash)"}
    with pytest.raises(InvalidInput, match=r"different are data\.path \('a' there, 'b' here\)\. Remedy"):
        check_same_run({**meta, "contents": unread}, here, {}, one)
    with pytest.warns(UserWarning, match=r"one of the two has no digest\): data images$"):
        check_same_run({**meta, "contents": unread}, meta["config"], {}, one)
