"""Models that edit a source image: what the network gets, the data, and the way from pairs to plain diffusers."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from fastinvdpo import cli
from fastinvdpo.data import PairDataset, open_source, write_pairs
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.inversion import invert_images
from fastinvdpo.evaluation.prompts import load_sources
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.models import load_model
from fastinvdpo.models.adapters import add_lora
from fastinvdpo.models.flow import pack_latents
from fastinvdpo.trainer import TrainConfig, opening, train
from tests.models import tiny as models
from tests.models.test_flow_models import NOISE, recorded
from tests.trainer import tiny
from tests.trainer.test_families import DIFFUSERS_LORA, KOHYA_LORA, LORA

PROMPTS, LENGTH = ["a cat", "a longer prompt than that"], 24
OPTIONS = {"resolution": 16, "max_sequence_length": LENGTH}
SEEN = (24, 16)  # width and height that the pipelines give every source


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Sources of a few pixels instead of a million, in diffusers' own functions."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [SEEN])
        patch.setattr(edit, "calculate_dimensions", lambda area, ratio: (*SEEN, None))
        patch.setattr(plus, "calculate_dimensions", lambda area, ratio: SEEN)
        patch.setattr(transformers, "Qwen2VLProcessor", models.ImagesOnly)
        yield


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints; two pairs of one caption, edited from different images; prompts with sources."""
    root = tmp_path_factory.mktemp("editing")
    for name, build in models.EDITING.items():
        build().save_pretrained(root / name, safe_serialization=True)
    keys = {"label_0": 1, "label_1": 0, "caption": "a cat", "score_0": 0.3, "score_1": 0.2}
    rows = [{"jpg_0": picture(0), "jpg_1": picture(1 + i), "source": picture(5 + i), **keys} for i in range(2)]
    write_pairs(root / "pairs.parquet", rows)
    lines = []
    for i, prompt in enumerate(PROMPTS):
        picture(8 + i).save(root / f"{i}.png")
        lines.append(json.dumps({"prompt": prompt, "source": f"{i}.png"}))
    (root / "prompts.jsonl").write_text("\n".join(lines))
    return root


def theirs(pipeline: Any, prompt: str, source: Image.Image, start: Any, *, guided: bool = True, **options: Any) -> Any:
    """What diffusers' pipeline makes of one prompt."""
    pipeline.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": LENGTH, "return_dict": False}
    if type(pipeline).__name__ == "FluxKontextPipeline":
        size |= {"max_area": 256, "guidance_scale": 3.5}
    else:
        size |= {"negative_prompt": "", "true_cfg_scale": 3.0 if guided else 1.0}
    start = {"latents": pack_latents(start)} if isinstance(start, torch.Tensor) else {"generator": start}
    return pipeline(image=source, prompt=prompt, **size, **start, **options)[0]


@pytest.mark.parametrize("name", list(models.EDITING))
def test_the_transformer_gets_what_the_pipeline_gives_it_and_samples_are_the_same(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model("auto", root / name, **OPTIONS)
    assert model.edits and model.family == ("flux-kontext" if name == "kontext" else "qwen-image-edit")
    sources = [picture(3), picture(4)]
    for i, prompt in enumerate(PROMPTS):
        one, noise = [sources[i]], NOISE[i : i + 1]
        seen = {"sources": one} if model.prompt_sees_source else {}
        with recorded(model.network) as calls, torch.no_grad():
            theirs(
                model.pipeline, prompt, one[0], noise, num_inference_steps=1, sigmas=[1.0], guided=False,
                output_type="latent",
            )  # fmt: skip
            told = model.encode_prompts([prompt], **seen) | model.encode_sources(one)
            told |= {"guidance": torch.tensor([3.5])} if name == "kontext" else {}
            model.predict(model.network, noise, torch.tensor([999]), told)
        (expected, _), (ours, _) = calls
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(ours[key], value, rtol=0, atol=0)
            elif key == "img_shapes":
                assert [list(map(tuple, shapes)) for shapes in ours[key]] == [list(map(tuple, s)) for s in value]
            elif not key.endswith("attention_kwargs") and key != "return_dict":
                assert ours.get(key) == value, key
    monkeypatch.setattr("fastinvdpo.evaluation.sampling.philox.normal", lambda *arguments: NOISE)
    scale = 3.5 if name == "kontext" else 3.0
    options = {"num_inference_steps": 4, "guidance_scale": scale}
    sampled = sample(model, model.network, PROMPTS, sources=sources, **options)
    for i, prompt in enumerate(PROMPTS):
        found = theirs(
            model.pipeline, prompt, sources[i], NOISE[i : i + 1], num_inference_steps=4, output_type="latent"
        )
        torch.testing.assert_close(pack_latents(sampled[i : i + 1]), found, rtol=0, atol=1e-4)
    # The source matters, and its place in the batch does not.
    other = sample(model, model.network, PROMPTS, sources=sources[::-1], **options)
    assert not torch.allclose(other, sampled, atol=1e-3)
    with pytest.raises(InvalidInput, match=r"sources = None: are not the source images of 2 prompts"):
        sample(model, model.network, PROMPTS, **options)


def images(pipeline: Any) -> bytes:
    drawn = [theirs(pipeline, p, picture(9), torch.Generator().manual_seed(3), num_inference_steps=2) for p in PROMPTS]
    return b"".join(one[0].tobytes() for one in drawn)


def _config(root: Path, place: Path, name: str, method: str, lora: bool, /, **sections: Any) -> TrainConfig:
    # Diffusers reads kohya's names of FLUX.1 at the published width alone.
    formats = ["diffusers", *(["kohya"] if lora and name != "kontext" else [])]
    values = tiny.mapping(
        root,
        method,
        method={"num_inference_steps": 2} if method != "diffusion-dpo" else {},
        model={
            "family": "auto",
            "path": str(root / name),
            "max_sequence_length": LENGTH,
            "lora": LORA if lora else None,
        },
        data={"resolution": 16},
        training={"steps": 2, "batch_size": 2},
        optimizer={"warmup_steps": 0, "learning_rate": 1e-2},
        output={"directory": str(place), "log_every": 1, "formats": formats},
    )
    return TrainConfig.from_mapping({**values, **sections})


RUNS = [
    *(("kontext", "diffusion-dpo", True), ("kontext", "inversion-dpo", False), ("kontext", "inpo", False)),
    *(("qwen-edit", "inversion-dpo", True), ("qwen-edit", "smpo", False), ("qwen-edit-plus", "inpo", True)),
]


@pytest.mark.parametrize(("name", "method", "lora"), RUNS)
def test_from_a_cache_to_the_images_of_plain_diffusers(
    root: Path, tmp_path: Path, name: str, method: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run reads neither VAE nor text encoder, and learns what it learns without the cache."""
    opened: list[Any] = []
    monkeypatch.setattr(opening, "open_model", lambda *a, _open=opening.open_model, **k: opened.append(_open(*a, **k))
                        or opened[-1])  # fmt: skip
    config = _config(root, tmp_path / "run", name, method, lora, cache={"path": str(tmp_path / "cache")})
    result = train(config, progress=False)
    assert [len(model.frozen_modules()) > 0 for model in opened] == [True, False]
    assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    plain: Any = DiffusionPipeline.from_pretrained(root / name if lora else result.model_directory)
    before = images(DiffusionPipeline.from_pretrained(root / name))
    model: Any = load_model("auto", root / name, **OPTIONS)
    if lora:
        add_lora(model.network, rank=LORA["rank"], alpha=LORA["alpha"], targets=model.default_lora_targets)
        plain.load_lora_weights(result.directory / "adapter", weight_name=DIFFUSERS_LORA)
    adapted, parameters = images(plain), dict(model.network.named_parameters())
    for key, value in load_file(result.directory / "checkpoints/step-00000002/trainable.safetensors").items():
        parameters[key].data.copy_(value)
    assert images(model.pipeline) == adapted, "the trained network, by the pipeline"
    if lora:
        others = [images(DiffusionPipeline.from_pretrained(result.model_directory))]
        if name != "kontext":
            plain.unload_lora_weights()
            plain.load_lora_weights(result.directory / "adapter", weight_name=KOHYA_LORA)
            others.append(images(plain))
        for other in others:
            assert max(abs(a - b) for a, b in zip(other, adapted, strict=True)) <= 1
    assert adapted != before
    direct = train(_config(root, tmp_path / "direct", name, method, lora), progress=False)
    for one, other in zip(result.history, direct.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    if method != "inversion-dpo":
        return
    aligned = result.directory / ("adapter" if lora else "model")
    files = ["--base", str(root / name), "--aligned", str(aligned), "--output", str(tmp_path / "evaluation")]
    told = ["--prompts", str(root / "prompts.jsonl"), "--scorer", "tests.evaluation.tiny:brightness"]
    assert cli.main(["evaluate", *files, *told, "num_inference_steps=2", "resolution=16"]) == 0
    summary = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert summary["prompts"] == 2 and summary["guidance_scale"] == (3.5 if name == "kontext" else 4.0)
    whole: Any = load_model("auto", result.model_directory, resolution=16)
    sources = load_sources(root / "prompts.jsonl")
    drawn = whole.decode_latents(sample(whole, whole.network, PROMPTS, sources=sources, num_inference_steps=2))
    stored = [Image.open(tmp_path / "evaluation" / "aligned" / f"0000{i}.png") for i in range(2)]
    gap = [np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(drawn, stored, strict=True)]
    assert max(gap) <= (1 if lora else 0)


@pytest.mark.parametrize("kind", ["parquet", "folder", "webdataset"])
def test_sources_are_read_in_every_format_and_missing_ones_are_broken_rows(
    root: Path, tmp_path: Path, kind: str
) -> None:
    """Cut as the pair is; text in a column of that name is no image where none is demanded."""
    place = tmp_path / "data"
    place.mkdir()
    for i in range(4):
        picture(i, (18, 16)).save(place / f"{i}.png")
    (place / "2.png").write_bytes(b"no image")
    sources: list[Any] = ["3.png", "2.png", None]
    rows = [{"jpg_0": "0.png", "jpg_1": "1.png", "label": 0, "caption": "a", "source": source} for source in sources]
    if kind == "folder":
        (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":

        def content(name: str | None) -> Any:
            return None if name is None else (place / name).read_bytes()

        names = ("jpg_0", "jpg_1", "source")
        table = [{**row, **{name: content(row[name]) for name in names}, "label_0": 1, "label_1": 0} for row in rows]
        import pyarrow as arrow
        from pyarrow import parquet

        place = tmp_path / "pairs.parquet"
        parquet.write_table(
            arrow.Table.from_pylist([{k: v for k, v in r.items() if k != "label"} for r in table]), place
        )
    else:
        with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
            for number, row in enumerate(rows):
                for ending, name in (("0.png", "0.png"), ("1.png", "1.png"), ("source.png", row["source"])):
                    if name is not None:
                        tar.add(place / name, f"{number}.{ending}")
                (tmp_path / "row.json").write_text(json.dumps({"label": 0, "caption": "a"}))
                tar.add(tmp_path / "row.json", f"{number}.json")
        place = tmp_path / "pairs.tar"

    with pytest.warns(UserWarning, match="left out 2 broken rows"):
        dataset = PairDataset(open_source(place).with_sources(), resolution=16, max_broken=2)
    assert dataset.summary.broken == {"corrupt image": 1, "missing image": 1}
    pair = dataset[0]
    assert (
        pair.source is not None and pair.source.image.tobytes() == picture(3, (18, 16)).crop((1, 0, 17, 16)).tobytes()
    )
    assert dataset.entry(0).source_key and dataset.entry(0).keys != PairDataset(place, resolution=16).entry(0).keys
    with pytest.raises(InvalidInput, match=r"row 1.*source"):
        PairDataset(open_source(place).with_sources(), resolution=16)
    with pytest.raises(
        InvalidInput, match=r"data\.path.*has source images in 'source', and model\.family is of models"
    ):
        PairDataset(open_source(place).with_sources(False))
    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(root / "0.png", text / "0.png")
    line = {"jpg_0": "0.png", "jpg_1": "0.png", "label": "tie", "caption": "a", "source": "laion"}
    (text / "pairs.jsonl").write_text(json.dumps(line))
    assert len(PairDataset(open_source(text).with_sources(False), ties="keep")) == 1


def test_sources_and_families_must_fit(root: Path, tmp_path: Path) -> None:
    models.flux_pipeline().save_pretrained(tmp_path / "flux", safe_serialization=True)
    tiny.write_data(tmp_path / "plain.parquet", pairs=2)
    model = {"family": "auto", "path": str(tmp_path / "flux"), "max_sequence_length": LENGTH}
    for sections, problem in (
        ({"model": model}, r"data\.path = .*has source images"),
        ({"data": {"path": str(tmp_path / "plain.parquet"), "resolution": 16}}, r"data\.path = .*has no 'source'"),
        (
            {"method": {"name": "kto"}, "data": {"path": str(root / "pairs.parquet"), "form": "pairs"}},
            r"has no source images, and model\.family edits those",
        ),
    ):
        with pytest.raises(InvalidInput, match=problem):
            train(_config(root, tmp_path / "run", "kontext", "diffusion-dpo", False, **sections), progress=False)
    config = _config(root, tmp_path / "run", "kontext", "diffusion-dpo", False)
    with pytest.raises(InvalidInput, match=r"model\.family = 'flux-kontext': edits a source image, which an inversion"):
        invert_images(opening.open_model(config), [picture(0)], ["a"])
    with pytest.raises(
        InvalidInput, match=r"model\.family = 'flux-kontext': edits source images, which the pairs have"
    ):
        tiny.train_model(config, opening.open_model(config), PairDataset(root / "pairs.parquet", resolution=16))
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(InvalidInput, match=r"prompts = .*holds no source images"):
        load_sources(tmp_path / "prompts.txt")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "source": "../x.png"}')
    with pytest.raises(InvalidInput, match="lies outside the folder"):
        load_sources(tmp_path / "prompts.jsonl")
