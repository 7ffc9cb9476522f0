"""Diffusion-KTO in the trainer: single images, drawn by label, against one baseline of all processes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastinvdpo import cli
from fastinvdpo.data import LikedDataset, PairDataset
from fastinvdpo.errors import InvalidInput, NonFiniteLoss
from fastinvdpo.methods import KTO, Draws, PairBatch, build_objective
from fastinvdpo.models import load_model
from fastinvdpo.models.stable_diffusion import StableDiffusionModel
from fastinvdpo.trainer import TrainConfig, precompute, train
from fastinvdpo.trainer.batches import BatchBuilder, PairEncoder
from fastinvdpo.trainer.dry_run import count_evaluations
from fastinvdpo.trainer.order import DrawOrder, by_label
from tests.cases import GOLDEN, load_golden
from tests.data.test_pairs import encoded, store
from tests.methods.problems import REFERENCE, SCHEDULE, Policy
from tests.test_losses import relative
from tests.trainer import tiny

IMAGES, LIKED = 10, 4


def write_likes(path: Path) -> Path:
    """Ten images, four of them liked."""
    rng = np.random.default_rng(2)
    rows = [
        {
            "image": encoded(Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))),
            "liked": i < LIKED,
            "caption": f"a {tiny.WORDS[i % 4]}",
        }
        for i in range(IMAGES)
    ]
    return store(path, rows)


@pytest.fixture
def likes(workspace: Path) -> Path:
    """A workspace with ``likes.parquet``."""
    write_likes(workspace / "likes.parquet")
    return workspace


def mapping(root: Path, **sections: Any) -> dict[str, Any]:
    values = tiny.mapping(
        root, **{**sections, "data": {"path": str(root / "likes.parquet"), **sections.get("data", {})}}
    )
    values["method"] = {"name": "kto", "beta": 200.0, **sections.get("method", {})}
    return values


def run(root: Path, folder: str = "run", **sections: Any) -> Any:
    sections["output"] = {"directory": str(root / folder), "log_every": 1, **sections.get("output", {})}
    return train(TrainConfig.from_mapping(mapping(root, **sections)), progress=False)


# The objective


def batch(count: int = 5) -> PairBatch:
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randn(count, generator=generator, dtype=torch.float64)
    latents = torch.randn(count, 4, 4, 4, generator=generator, dtype=torch.float64)
    index = torch.arange(100, 100 + count)
    return PairBatch(latents, {"prompt": prompt}, index, liked=torch.arange(count) % 3 > 0)


def test_the_loss_is_that_of_the_formula_with_a_timestep_and_noise_for_each_image() -> None:
    given = batch()
    objective = build_objective("kto", SCHEDULE, beta=50.0, like_weight=2.0)
    out = objective(Policy(), REFERENCE, given, seed=3)
    assert len(set(out.timesteps.tolist())) == 5 and len({float(one.sum()) for one in out.target}) == 5
    error, known = ((pred - out.target).square().flatten(1).mean(1) for pred in (out.policy_pred, out.reference_pred))
    g, y = known - error, 2.0 * given.liked - 1
    kappa = g.mean().clamp(min=0).detach()
    logit = y * 50 * (g - kappa)
    expected = ((1.5 + y / 2) * (1 - torch.sigmoid(logit))).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.margin, logit, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.kappa, kappa, rtol=1e-9, atol=1e-15)
    assert float(out.implicit_accuracy) == float((logit > 0).double().mean())
    gradients = [torch.autograd.grad(loss, out.policy_pred, retain_graph=True)[0] for loss in (out.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-13)
    row = {name: tensor[2:3] for name, tensor in given.conditioning.items()}
    alone = dataclasses.replace(
        given,
        latents=given.latents[2:3],
        conditioning=row,
        sample_index=given.sample_index[2:3],
        liked=given.liked[2:3],
    )
    torch.testing.assert_close(objective(Policy(), REFERENCE, alone, seed=3).noisy_latents[0], out.noisy_latents[2])


RECORDED = [path.stem for path in sorted((GOLDEN / "kto").glob("*.json")) if "original" not in path.stem]
"""Those whose baseline is not that of other prompts."""


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_runs_of_the_released_code(name: str) -> None:
    """From latents and the recorded noise through the objective; tests/test_losses.py has the loss alone."""
    record, run = load_golden(f"kto/{name}")
    settings: dict[str, Any] = run["settings"]
    policy = record["in.policy_pred"].double().requires_grad_()
    count = len(policy)
    labels = {"liked": record["in.labels"], "sample_index": torch.arange(count)}
    given = PairBatch(torch.zeros_like(policy), {"prompt": torch.zeros(count)}, **labels)
    draws = Draws(timesteps=torch.full((count,), 500), noise=record["in.target"].double())
    weights = {"like_weight": settings["lam_d"], "dislike_weight": settings["lam_u"]}
    objective = build_objective("kto", SCHEDULE, beta=float(settings["beta"]), halo=settings["halo"], **weights)
    reference = record["in.ref_pred"].double()
    out = objective(lambda *_: policy, lambda *_: reference, given, seed=0, draws=draws)
    expected = {"out.loss": out.loss, "mid.kl": out.kappa, "mid.signed_logit": out.margin}  # type: ignore[attr-defined]
    expected |= {"mid.model_losses": out.policy_mse, "mid.ref_losses": out.reference_mse}
    expected["grad.policy_pred"] = torch.autograd.grad(out.loss, policy)[0]
    errors = {key: relative(found, record[key]) for key, found in expected.items() if key in record}
    assert len(errors) >= 5 and {key: error for key, error in errors.items() if not error < 1e-9} == {}


def test_the_baseline_is_one_for_all_processes() -> None:
    given, objective = batch(), build_objective("kto", SCHEDULE, beta=50.0)
    seen: list[torch.Tensor] = []

    def gather(values: torch.Tensor) -> torch.Tensor:
        seen.append(values)
        return torch.cat([values, torch.full((3,), 7.0).to(values)])

    out = dataclasses.replace(objective, gather=gather)(Policy(), REFERENCE, given, seed=3)
    assert float(out.kappa) == pytest.approx(float((seen[0].sum() + 21) / 8))
    assert not out.kappa.requires_grad


def test_pairs_and_single_images_are_not_mixed_up() -> None:
    single = batch(4)
    with pytest.raises(InvalidInput, match=r"^batch.liked = \(4,\): belongs to single images"):
        build_objective("inpo", SCHEDULE)(Policy(), REFERENCE, single, seed=0)
    with pytest.raises(InvalidInput, match=r"^batch.liked = None: is what single images need"):
        build_objective("kto", SCHEDULE)(Policy(), REFERENCE, dataclasses.replace(single, liked=None), seed=0)
    with pytest.raises(InvalidInput, match=r"^batch.sample_index = .* one number per image"):
        index = torch.arange(2)
        build_objective("kto", SCHEDULE)(Policy(), REFERENCE, dataclasses.replace(single, sample_index=index), seed=0)
    for share in (-0.1, 1.5, True):
        with pytest.raises(InvalidInput, match=f"^like_share = {share}: is no share"):
            KTO(like_share=share)


# Draws


@pytest.mark.parametrize("share", [0.8, 0.5, 0.0, 1.0])
def test_labels_are_drawn_in_their_shares_and_images_of_a_label_alike(share: float) -> None:
    liked = [i % 10 == 0 for i in range(500)]
    order = DrawOrder(500, 0, 2, 1, epochs=by_label(liked, share))
    draws = [order.pair_index(draw) for draw in range(40 * 500)]
    assert abs(np.mean([liked[i] for i in draws]) - share) <= 5 * np.sqrt(share * (1 - share) / len(draws))
    for label, expected in ((True, share * len(draws) / 50), (False, (1 - share) * len(draws) / 450)):
        counts = Counter(i for i in draws if liked[i] == label)
        assert len(counts) == (0 if expected == 0 else 50 if label else 450)
        assert all(abs(count - expected) <= 5 * np.sqrt(expected) for count in counts.values())
    assert draws[:500] != draws[500:1000]
    again = DrawOrder(500, 0, 1, 1, 2, 1, epochs=by_label(liked, share))
    assert [again.pair_index(draw) for draw in range(700)] == draws[:700]


def test_a_share_of_what_the_data_lack_is_refused(likes: Path) -> None:
    with pytest.raises(InvalidInput, match=r"method.like_share = 0.8: needs disliked images, and the data have none"):
        by_label([True, True], 0.8)
    with pytest.raises(InvalidInput, match=r"method.like_share = 0.1: needs liked images"):
        by_label([False], 0.1)
    assert sorted(by_label([True] * 9, 1.0).order(np.random.default_rng(0))) == list(range(9))


# Runs


def test_a_run_logs_by_label_and_tells_its_cache_from_that_of_pairs(likes: Path, small_shards: None) -> None:
    """Resumed, and from the cache bit for bit: tests/trainer/test_same_bits.py."""
    cache, training = {"path": str(likes / "cache")}, {"gradient_accumulation_steps": 2, "batch_size": 3}
    result = run(likes, data={"caption_dropout": 0.3}, training=training, cache=cache)
    assert result.data is not None and (result.data.pairs, result.data.liked) == (IMAGES, LIKED)
    first, last = result.history[0], result.history[-1]
    assert first["margin"] == first["kappa"] == 0 and first["loss"] == first["implicit_accuracy"] == 0.5
    assert first["policy_mse_liked"] == first["reference_mse_liked"] and first["gradient_norm"] > 0
    assert last["loss"] != 0.5 and last["policy_mse_liked"] > 0 and 0 < last["liked"] <= 1
    assert last["network_evaluations_with_gradient"] == last["network_evaluations_without_gradient"] == 36
    assert tiny.moved(tiny.weights(result)) > 1e-4
    assert "10 images from" in (result.model_directory / "README.md").read_text()
    same = mapping(likes, data={"caption_dropout": 0.3}, cache=cache)
    stored = precompute(TrainConfig.from_mapping(same), progress=False)
    assert stored.unpaired and sum(stored.liked) == LIKED and stored.index.images.shape == (IMAGES, 1)
    pairs = tiny.mapping(likes, cache=cache)
    with pytest.raises(InvalidInput, match=r"different are .*data\.form"):
        train(TrainConfig.from_mapping(pairs), progress=False)


def test_pairs_are_read_as_likes_where_the_user_says_so(likes: Path) -> None:
    pairs = {"path": str(likes / "pairs.parquet")}
    with pytest.raises(
        InvalidInput, match=r"^method.name = 'kto' trains on images that were liked .*set data.form to pai"
    ):
        run(likes, data=pairs)
    result = run(likes, data={**pairs, "form": "pairs"}, training={"batch_size": 4})
    assert result.data is not None and str(result.data) == "10 rows: 20 images, 10 liked"
    with pytest.raises(
        InvalidInput, match=r"^method.name = 'diffusion-dpo' trains on pairs, and .*set data.form to likes"
    ):
        tiny.trained(likes, data={"path": str(likes / "likes.parquet")})
    model, config = load_model("auto", likes / "model"), tiny.mapping(likes)
    for data, method, what in (
        (PairDataset(likes / "pairs.parquet"), KTO(), "single images"),
        (LikedDataset(likes / "likes.parquet"), TrainConfig.from_mapping(config).method, "pairs"),
    ):
        with pytest.raises(InvalidInput, match=f"trains on {what}, which {type(data).__name__} does not hold"):
            tiny.train_model(TrainConfig.from_mapping({**config, "method": method}), model, data)


def test_a_data_set_at_hand_trains_as_its_file(likes: Path) -> None:
    config = TrainConfig.from_mapping(mapping(likes))
    assert config.data.form == "likes" and TrainConfig.from_mapping(config.as_dict()) == config
    result = tiny.train_model(config, load_model("auto", likes / "model"), LikedDataset(likes / "likes.parquet"))
    tiny.assert_same(tiny.weights(result), tiny.weights(run(likes, "file")))


def test_each_image_has_its_own_caption_and_label_in_a_batch(likes: Path) -> None:
    model, data = load_model("auto", likes / "model"), LikedDataset(likes / "likes.parquet")
    order = DrawOrder(IMAGES, 0, 5, 1, epochs=by_label(data.liked, 0.5))
    built = BatchBuilder(PairEncoder(model, data), model.device, order, with_unconditional=False).build(range(5))
    drawn = [data[order.pair_index(draw)] for draw in range(5)]
    assert built.liked is not None and built.liked.tolist() == [one.liked for one in drawn]
    assert torch.equal(built.latents, model.encode_images([one.side.image for one in drawn]))
    expected = model.encode_prompts([one.caption for one in drawn])["encoder_hidden_states"]
    assert torch.equal(built.conditioning["encoder_hidden_states"], expected)


def test_a_loss_that_is_not_finite_names_the_image(likes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = StableDiffusionModel.encode_images
    monkeypatch.setattr(StableDiffusionModel, "encode_images", lambda self, images: encode(self, images) * torch.nan)
    with pytest.raises(NonFiniteLoss, match=r"image in data row \d+ .* first in the latents of the image"):
        run(likes)


def test_the_commands_count_and_check(likes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig.from_mapping(mapping(likes))
    assert count_evaluations(config)[:2] == (1, 1)
    free = mapping(likes, data={"resolution": 8, "buckets": {"multiple": 8}}, method={"like_share": None})
    assert TrainConfig.from_mapping(free).method.like_share is None
    path = str(likes / "likes.parquet")
    assert cli.main(["data", "inspect", path, "form=likes", "--output", str(likes / "seen")]) == 0
    shown = capsys.readouterr().out
    assert "liked     4 (0 also disliked)\ndisliked  6" in shown and (likes / "seen" / "pairs.png").is_file()
    assert cli.main(["data", "inspect", path, "--output", str(likes / "seen")]) == 2
    assert "set data.form to likes" in capsys.readouterr().err
    scoring = ["score", path, "form=likes", "--scorer", "clip=x", "--output", str(likes / "s.parquet")]
    assert cli.main(scoring) == 2
    assert "data.form = 'likes': has no pairs to score" in capsys.readouterr().err
