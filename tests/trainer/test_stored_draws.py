"""Draws in the cache: training takes them as they are, without a reference, on any machine the same."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastinvdpo.data import PairDataset
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import PairBatch
from fastinvdpo.methods.base import STREAM_TIMESTEP
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import perturb
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.trainer import TrainConfig, cache_writing, precompute, train
from fastinvdpo.trainer.batches import BatchBuilder, DrawOrder, drops_caption, swaps_tie
from fastinvdpo.trainer.cache import PairCache, taken_draws
from fastinvdpo.trainer.dry_run import count_evaluations, described
from fastinvdpo.trainer.networks import Networks
from tests.models import tiny as models
from tests.trainer import tiny
from tests.trainer.test_cache import PAIRS, mapping, refuse
from tests.trainer.test_families import LENGTH, write_two_pairs

DRAWS = 3
METHODS: dict[str, dict[str, Any]] = {
    "diffusion-dpo": {"name": "diffusion-dpo"},
    "inpo": {"name": "inpo", "num_inference_steps": 3, "inverter": "reference"},
    "smpo": {"name": "smpo", "num_inference_steps": 2, "inverter": "reference", "score_range": 0.3},
    "linear-dpo": {"name": "linear-dpo"},
}


def drawn(root: Path, name: str = "diffusion-dpo", /, **sections: Any) -> TrainConfig:
    """A run from stored draws. Captions are dropped and ties kept, so that what changes between visits is there."""
    sections["method"] = {**METHODS[name], **sections.get("method", {})}
    sections["cache"] = {"draws": DRAWS, **sections.get("cache", {})}
    sections["data"] = {"caption_dropout": 0.4, "ties": "keep", **sections.get("data", {})}
    return TrainConfig.from_mapping(mapping(root, "diffusion-dpo", **sections))


@pytest.fixture
def tied(workspace: Path) -> Path:
    """Every third pair is a tie."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(workspace / "pairs.parquet").to_pylist()
    for row in rows[::3]:
        row["label_0"] = row["label_1"] = 0.5
    pq.write_table(pa.Table.from_pylist(rows), workspace / "pairs.parquet")
    return workspace


def built(stored: PairCache, draws: range) -> PairBatch:
    order = DrawOrder(PAIRS, 0, len(draws), 1)
    return BatchBuilder(stored, torch.device("cpu"), order, with_unconditional=True, caption_dropout=0.4).build(draws)


@pytest.mark.parametrize("name", ["diffusion-dpo", "inpo"])
def test_a_batch_of_stored_draws_gives_the_loss_and_gradient_of_the_same_draws_bit_for_bit(
    tied: Path, name: str, small_shards: None
) -> None:
    config = drawn(tied, name, training={"batch_size": 4})
    stored, model = precompute(config, progress=False), load_model("stable-diffusion", tied / "model")
    assert stored.network_evaluations >= 2 * PAIRS * DRAWS and stored.draws == DRAWS
    objective = config.method.objective(model.schedule)
    networks = Networks(model, lora=None, gradient_checkpointing=False)
    perturb(networks.policy_module, 0.02, seed=0)
    dropped = swapped = 0
    for start in range(0, 24, 4):
        batch = built(stored, range(start, start + 4))
        assert batch.stored_draw is not None
        dropped += sum(drops_caption(0, int(number), 0.4) for number in batch.stored_draw)
        turned = [
            int(number) // DRAWS % 3 == 0 and swaps_tie(0, start + i) for i, number in enumerate(batch.stored_draw)
        ]
        swapped += sum(turned)
        found = []
        same = replace(batch, reference_pred=None)
        for reference, given in ((refuse, batch), (networks.reference, same)):
            networks.policy_module.zero_grad()
            before = dict(networks.evaluations)
            out = objective(networks.policy, reference, given, seed=0)
            out.loss.backward()
            made = {kind: count - before[kind] for kind, count in networks.evaluations.items()}
            assert made == {"with_gradient": 8, "without_gradient": 0 if given is batch else 8}
            gradient = [p.grad.flatten() for p in networks.trainable().values() if p.grad is not None]
            found.append((out.loss.detach(), out.margin.detach(), torch.cat(gradient)))
        assert float(found[0][2].abs().max()) > 0
        for ours, expected in zip(*found, strict=True):
            assert torch.equal(ours, expected)
        # Inverted here, in other batches, where a network rounds otherwise; a swapped tie keeps its images' own noise.
        with torch.no_grad():
            again = objective(networks.policy, networks.reference, replace(same, trajectory=None), seed=0).margin
        kept = ~torch.tensor(turned) if name == "inpo" else slice(None)
        torch.testing.assert_close(again[kept], found[0][1][kept], rtol=1e-4, atol=1e-5)
    assert 0 < dropped < 24 and swapped > 0


@pytest.mark.parametrize("draws", [1, 3, 8])
def test_every_stored_draw_is_taken_equally_often_and_anew_at_every_visit(draws: int) -> None:
    """300 pairs, 400 passes: within 6 standard deviations over all, of every pair, and from one pass to the next."""
    pairs, passes = 300, 400
    index = torch.arange(pairs * passes)
    taken = taken_draws(5, index, draws).view(passes, pairs)
    assert int(taken.min()) == 0 and int(taken.max()) == draws - 1

    def within(found: torch.Tensor, trials: int, share: float) -> bool:
        return bool(((found.double() - trials * share).abs() <= 6 * (trials * share * (1 - share)) ** 0.5).all())

    assert within(torch.bincount(taken.flatten(), minlength=draws), pairs * passes, 1 / draws)
    assert within(torch.stack([(taken == k).sum(0) for k in range(draws)]), passes, 1 / draws)
    following = taken[:-1].flatten() * draws + taken[1:].flatten()
    assert within(torch.bincount(following, minlength=draws**2), pairs * (passes - 1), 1 / draws**2)


@pytest.mark.parametrize(("name", "lora"), [("diffusion-dpo", None), ("inpo", {"rank": 2})])
def test_training_makes_two_evaluations_a_pair_and_has_no_reference(
    workspace: Path,
    name: str,
    lora: dict[str, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And resumes bit for bit."""
    sections: dict[str, Any] = {"model": {"lora": lora}, "output": {"log_every": 1}}
    config = drawn(workspace, name, **sections)
    filled = precompute(config, progress=False)
    inversion = 0 if name == "diffusion-dpo" else filled.network_evaluations - 2 * PAIRS * DRAWS
    assert filled.network_evaluations == 2 * PAIRS * DRAWS + inversion and (inversion > 0) == (name == "inpo")
    for place, part in (
        (StableDiffusionModel, "encode_images"),
        (StableDiffusionModel, "encode_prompts"),
        (PairDataset, "__init__"),
    ):
        monkeypatch.setattr(place, part, refuse)
    monkeypatch.setattr(Networks, "reference", refuse)
    monkeypatch.setattr("fastinvdpo.trainer.networks.frozen_copy", refuse)
    caplog.set_level(logging.INFO, "fastinvdpo.trainer")
    whole = train(config, progress=False)
    assert "Draws: one of 3 a pair that are stored with the reference's predictions." in caplog.text
    assert (
        "one of 3 draws (timestep, noise) that were fixed before" in (whole.model_directory / "README.md").read_text()
    )
    # Policy = reference, in batches of one size: nothing is rounded otherwise.
    first, last = whole.history[0], whole.history[-1]
    assert first["margin"] == 0 and first["policy_mse_winner"] == first["reference_mse_winner"]
    assert last["margin"] != 0
    assert last["network_evaluations_with_gradient"] == 6 * 2 * 2 and last["network_evaluations_without_gradient"] == 0
    assert whole.network_evaluations == 6 * 2 * 2 + filled.network_evaluations
    assert count_evaluations(config)[:2] == (2, 0)
    assert described(config).startswith("# Draws stored a pair: 3, of which a visit takes one.\n")

    part = {"directory": str(workspace / "parts"), "log_every": 1}
    for steps in (2, 4, 6):
        parts = train(drawn(workspace, name, **{**sections, "output": part}, training={"steps": steps}), progress=False)
    tiny.assert_same(tiny.weights(parts), tiny.weights(whole))
    assert [row["loss"] for row in parts.history] == [row["loss"] for row in whole.history]
    monkeypatch.undo()
    other = drawn(workspace, name, **{**sections, "output": part}, cache={"path": None, "draws": None})
    with pytest.raises(
        InvalidInput, match=r"belongs to another run; different are cache\.draws \(3 there, None here\)"
    ):
        train(other, progress=False)


def test_flow_matching_from_stored_draws(tmp_path: Path) -> None:
    """With text encoders and a VAE, in bfloat16: what is stored as bfloat16 of predictions in it is exact."""
    models.PIPELINES["sd3"]().save_pretrained(tmp_path / "model", safe_serialization=True)
    write_two_pairs(tmp_path)
    config = drawn(
        tmp_path,
        model={"family": "auto", "max_sequence_length": LENGTH},
        data={"resolution": 16},
        training={"steps": 2, "mixed_precision": "bf16"},
        optimizer={"warmup_steps": 0, "learning_rate": 1e-3},
        cache={"dtype": "bf16"},
        output={"log_every": 1},
    )
    first, last = train(config, progress=False).history
    assert first["margin"] == 0 and first["policy_mse_winner"] == first["reference_mse_winner"] > 0
    assert last["margin"] != 0 and last["network_evaluations_without_gradient"] == 0


def test_draws_depend_on_seed_and_pair_alone(workspace: Path, small_shards: None) -> None:
    """Not on the batch that a sample index is in; and the same pair takes another of its draws at another visit."""
    stored = precompute(drawn(workspace), progress=False)
    at_once = built(stored, range(40)).stored_draw
    assert at_once is not None
    alone = [built(stored, range(i, i + 1)).stored_draw for i in range(40)]
    assert at_once.tolist() == [int(number) for number in alone]  # type: ignore[arg-type]
    assert sorted({int(number) for number in at_once // DRAWS}) == list(range(PAIRS))
    assert len(set(at_once.tolist())) > 2 * PAIRS
    # The size of their batches changes the draws by rounding alone; one larger than a shard is cut to it.
    wide = precompute(drawn(workspace, cache={"path": str(workspace / "wide"), "batch_size": 100}), progress=False)
    assert wide.network_evaluations == 4 * 2 * 3 * DRAWS  # of the last shard the three draws of its pair are kept
    for number in range(PAIRS * DRAWS):
        one, other = (reader._read("draw", number)["reference_pred"] for reader in (stored, wide))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # K timesteps of a pair are K draws of the method's density, whatever K is.
    objective = drawn(workspace).method.objective(load_model("stable-diffusion", workspace / "model").schedule)
    timesteps = objective.method.timesteps.draw(objective.schedule, 0, STREAM_TIMESTEP, at_once)
    out = objective(lambda x, *_: x, refuse, built(stored, range(40)), seed=0)
    assert torch.equal(out.timesteps, timesteps.repeat(2))


OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "K": (None, {"cache": {"draws": 4}}, r"different are cache\.draws \(3 there, 4 here\)\. Remedy"),
    "none": (None, {"cache": {"draws": None}}, r"cache\.draws \(3 there, "),
    "seed": (None, {"training": {"seed": 1}}, r"different are training\.seed \(0 there, 1 here\)\. Remedy"),
    "captions": (None, {"data": {"caption_dropout": 0.1}}, r"data\.caption_dropout \(0\.4 there, 0\.1 here\)"),
    "range": (
        None,
        {"method": {"timesteps": {"range": [20, 999]}}},
        r"method\.timesteps\.range \(None there, \[20, 999",
    ),
    "density": (
        None,
        {"method": {"timesteps": {"logit_mean": 1.0}}},
        r"method\.timesteps\.logit_mean \(0\.0 there, 1\.0",
    ),
    "noise": (None, {"method": {"eta": 0.2}}, r"method\.eta \(0\.1 there, 0\.2 here\)"),
}


@pytest.fixture(scope="module")
def filled(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(template, tmp_path_factory.mktemp("filled") / "root"))
    precompute(drawn(root, "inpo"), progress=False)
    return root


@pytest.mark.parametrize("name", OTHERS)
def test_draws_of_something_else_are_refused_by_name(filled: Path, tmp_path: Path, name: str) -> None:
    change, sections, reason = OTHERS[name]
    root = filled
    if change is not None:
        root = Path(shutil.copytree(filled, tmp_path / "root"))
        change(root)
    with pytest.raises(InvalidInput, match=rf"cache\.path = .*holds what was computed from something else; .*{reason}"):
        train(drawn(root, "inpo", **sections), progress=False)
    assert not (root / "run").exists()


def test_what_changes_no_draw_keeps_them(filled: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_writing, "_complete", refuse)
    sections: dict[str, Any] = {
        "model": {"lora": {"rank": 2}, "init_perturbation": 0.01},
        "training": {"batch_size": 3},
    }
    options = {"beta": 7.0, "utility": "hinge", "safeguard": 0.5, "anchor": 0.1, "static_shapes": True}
    stored = precompute(drawn(filled, "inpo", method=options, cache={"batch_size": 7}, **sections), progress=False)
    # A cache at hand is compared too, with the section of the run.
    model = load_model("stable-diffusion", filled / "model")
    for wrong, reason in ((drawn(filled, "inpo", training={"seed": 2}), r"training\.seed \(0 there, 2 here\)"),
                          (drawn(filled), r"method\.name \('inpo' there"),
                          (drawn(filled, cache={"draws": None}), r"cache\.draws \(3 there")):  # fmt: skip
        with pytest.raises(InvalidInput, match=reason):
            tiny.train_model(wrong, model, stored)
    monkeypatch.undo()
    # All losses on the same noising share their draws.
    precompute(drawn(workspace), progress=False)
    monkeypatch.setattr(cache_writing, "_complete", refuse)
    assert precompute(drawn(workspace, "linear-dpo"), progress=False).draws == DRAWS
