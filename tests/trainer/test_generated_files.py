"""Where the noise of generated images comes from: evaluate, data build, score and write_pairs keep it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastinvdpo import cli
from fastinvdpo.data import GeneratedDataset, open_source, write_pairs
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.sampling import initial_noise, sample
from fastinvdpo.evaluation.scorers import FunctionScorer
from fastinvdpo.evaluation.scoring import score_pairs
from fastinvdpo.models import load_model
from fastinvdpo.trainer import train
from tests.evaluation.tiny import brightness
from tests.trainer.test_generated import LATENT, config, npy, root, rows

__all__ = ["root"]  # a fixture


def test_evaluate_keeps_its_noise_and_build_and_score_carry_it_into_a_training_set(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of our own, labeled, train with PNAPO."""
    prompts, out, base = ["a cat", "zebra", "a cat"], tmp_path / "evaluation", str(root / "sd3")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--scorer", "tests.evaluation.tiny:brightness"]
    command = ["evaluate", "--base", base, "--aligned", base, *words, "--output", str(out), "num_inference_steps=2"]
    assert cli.main([*command, "batch_size=2"]) == 0 and not (out / "noise").exists()
    assert cli.main([*command, "batch_size=2", "noise=true"]) == 0
    found = json.loads((out / "evaluation.json").read_text())["samples"]
    model = load_model("auto", base)
    for place, one in enumerate(found):
        latent = np.load(out / one["noise"])
        assert latent.dtype == np.float32 and np.array_equal(latent, initial_noise(model, 0, [place])[0].numpy())
    assert cli.main([*command, "noise=yes"]) == 2
    assert "noise = 'yes'" in capsys.readouterr().err
    drawn = sample(model, model.network, prompts, num_inference_steps=2, batch_size=2)
    assert Image.open(out / found[0]["base"]).tobytes() == model.decode_latents(drawn)[0].tobytes()

    lines = [
        {"prompt_id": "cat", "image": found[i]["base"], "noise": found[i]["noise"], "seed": i,
         "objects": [{"id": "a", "name": "cat"}], "scores": {"objects": float(i)}}
        for i in (0, 2)
    ]  # fmt: skip
    (out / "structured.jsonl").write_text("\n".join(map(json.dumps, lines)))
    built = tmp_path / "built.parquet"
    assert (
        cli.main(["data", "build", str(out / "structured.jsonl"), "--output", str(built), "--weight", "objects=1"]) == 0
    )
    (pair,) = GeneratedDataset(built)  # type: ignore[misc]
    for noise, place in zip(pair.noises, (2, 0), strict=True):
        assert np.array_equal(noise, np.load(out / found[place]["noise"]))
    assert sorted(open_source(built).column_names())[-4:] == ["score_0", "score_1", "seed_0", "seed_1"]
    listed = {"image_0": found[0]["base"], "image_1": found[2]["base"], "label": 0, "caption": "a cat"}
    listed |= {"noise_0": found[0]["noise"], "noise_1": found[2]["noise"], "seed_0": 5, "seed_1": 6}
    (out / "pairs.jsonl").write_text(json.dumps(listed))
    scored = tmp_path / "scored.parquet"
    score_pairs(open_source(out / "pairs.jsonl"), [FunctionScorer(brightness, "brightness")], scored)
    (pair,) = GeneratedDataset(scored)  # type: ignore[misc]
    assert np.array_equal(pair.noises[1], np.load(out / found[2]["noise"])) and pair.scores is not None
    assert pq.read_table(scored)["seed_1"].to_pylist() == [6]
    lines[1].pop("seed")
    (out / "structured.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cli.main(["data", "build", str(out / "structured.jsonl")]) == 2
    assert "line 2, seed = None: is missing, and line 1 has one" in capsys.readouterr().err
    result = train(config(root, tmp_path / "run", data={"path": str(built)}, training={"steps": 1, "batch_size": 1}))
    assert result.history[0]["gradient_norm"] > 0


def test_written_pairs_carry_noise_or_seeds(tmp_path: Path) -> None:
    latents = [np.random.default_rng(side).standard_normal(LATENT).astype(np.float16) for side in (0, 1)]
    row = {name: value for name, value in rows("seed", 1)[0].items() if "seed" not in name} | {"label_1": 0.0}
    write_pairs(tmp_path / "noise.parquet", [{**row, "noise_0": latents[0], "noise_1": npy(latents[1])}])
    (pair,) = GeneratedDataset(tmp_path / "noise.parquet")  # type: ignore[misc]
    assert all(np.array_equal(found, latent) for found, latent in zip(pair.noises, latents, strict=True))
    write_pairs(tmp_path / "seed.parquet", [{**row, "seed_0": 7, "seed_1": 2**40}])
    assert GeneratedDataset(tmp_path / "seed.parquet")[0].noises == (7, 2**40)
    for changes, message in (
        ({"noise_0": None, "noise_1": latents[0]}, "is no latent"),
        ({"seed_0": 1.5, "seed_1": 2}, "is not the seed of a generator"),
    ):
        with pytest.raises(InvalidInput, match=message):
            write_pairs(tmp_path / "bad.parquet", [{**row, **changes}])
