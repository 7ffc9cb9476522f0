"""Scores of every scorer against values computed by hand in float64, in any batch, for any kind of image."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.scorers import FunctionScorer, in_batches, open_scorer
from tests.evaluation import tiny_clip as tiny

CAPTIONS = ["ab", "zz top", "", "a cat on a mat in a hat", "ab"]
# A cosine of float32 embeddings: no number passes more than about 64 roundings in a row on its way through two layers,
# each of 2^-24 relative to terms of the size of the result (the norm divides once more).
ROUNDING = 64 * 2.0**-24


def pictures(count: int = len(CAPTIONS), size: int = tiny.SIZE) -> list[Image.Image]:
    """Noise of the size that the model sees, so that resizing and cropping change nothing."""
    numbers = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in numbers]


def tokens(caption: str) -> list[int]:
    """As tiny's tokenizer splits: start, a token a letter (the last one of a word has its own), end, padding."""
    ids = [0]
    for word in caption.split():
        ids += [2 + string.ascii_lowercase.index(letter) for letter in word]
        ids[-1] += 26
    return [*ids[: tiny.TOKENS - 1], 1] + [1] * (tiny.TOKENS - 1 - len(ids))


def pixels(images: list[Image.Image]) -> Tensor:
    arrays = torch.stack([torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float64)) for image in images])
    scaled = (arrays / 255 - torch.tensor(tiny.MEAN).double()) / torch.tensor(tiny.STD).double()
    return scaled.permute(0, 3, 1, 2)


def embeddings(images: list[Image.Image], captions: list[str]) -> tuple[Tensor, Tensor]:
    """CLIP's embeddings in float64, not normalized; padding is masked."""
    model = tiny.clip_model().double()
    ids = torch.tensor([tokens(caption) for caption in captions])
    ends = [row.index(1) for row in ids.tolist()]
    mask = torch.tensor([[int(k <= end) for k in range(tiny.TOKENS)] for end in ends])
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=pixels(images)).pooler_output)
        hidden = model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = hidden[torch.arange(len(ids)), torch.tensor(ends)]
        return image, model.text_projection(pooled)


def cosines(images: list[Image.Image], captions: list[str]) -> Tensor:
    image, text = embeddings(images, captions)
    return (image * text).sum(1) / (image.square().sum(1).sqrt() * text.square().sum(1).sqrt())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    ("kind", "scale", "score"),
    [
        ("pickscore", tiny.SCALE, lambda cos: tiny.SCALE * cos),
        ("hps", 100, lambda cos: 100 * cos),
        ("clip", 100, lambda cos: (100 * cos).clamp(min=0)),
    ],
)
def test_clip_scores_by_hand(clip: Path, kind: str, scale: float, score: Any) -> None:
    scores = open_scorer(f"{kind}={clip}")(pictures(), CAPTIONS)
    assert scores.dtype == torch.float32 and scores.shape == (5,)
    cos = cosines(pictures(), CAPTIONS)
    assert cos.std() > 0.1 and (cos < 0).any() and (cos > 0).any()  # the test can tell scores apart
    assert (scores.double() - score(cos)).abs().max() <= scale * ROUNDING
    if kind == "clip":
        assert (scores == 0).sum() == (cos <= 0).sum()


def test_the_same_scores_in_any_batch_and_order(clip: Path) -> None:
    scorer = open_scorer(f"pickscore={clip}", batch_size=2)
    whole = scorer(pictures(), CAPTIONS)
    alone = torch.cat([scorer([image], [caption]) for image, caption in zip(pictures(), CAPTIONS, strict=True)])
    backwards = scorer(pictures()[::-1], CAPTIONS[::-1]).flip(0)
    for other in (alone, backwards, in_batches(scorer, pictures(), CAPTIONS)):
        assert (whole - other).abs().max() <= tiny.SCALE * ROUNDING
    assert in_batches(scorer, [], []).shape == (0,)


def test_captions_are_cut_off_at_the_length_of_the_model(clip: Path) -> None:
    scorer = open_scorer(f"hps={clip}")
    long = "abcdefghijklmnopqrstuvwxyz"
    images = pictures(3)
    cut, same, other = scorer([images[0]] * 3, [long, long[:10] + "xyz", "z" + long]).tolist()
    assert cut == same != other  # ten letters fit between start and end
    assert abs(cut - 100 * cosines(images[:1], [long]).item()) <= 100 * ROUNDING


def test_every_mode_of_images_scores_as_its_rgb_and_the_middle_counts(clip: Path) -> None:
    scorer = open_scorer(f"pickscore={clip}")
    (rgb,) = pictures(1)
    transparent = rgb.copy()
    transparent.putalpha(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    palette = rgb.quantize(16)
    for image in (rgb.convert("L"), transparent, palette, rgb.convert("CMYK"), rgb.convert("1")):
        assert image.mode != "RGB"
        expected = tiny.SCALE * cosines([image], ["ab"])
        assert (scorer([image], ["ab"]).double() - expected).abs().max() <= tiny.SCALE * ROUNDING
    assert scorer([transparent], ["ab"]) == scorer([rgb], ["ab"])
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste(rgb, (16, 0))
    assert scorer([wide], ["ab"]) == scorer([rgb], ["ab"])  # the middle is what the model sees


@pytest.mark.parametrize("file", ["published.safetensors", "published.pth", "linear.safetensors"])
def test_aesthetic_head_by_hand(clip: Path, tmp_path: Path, file: str) -> None:
    layers = tiny.head_layers() if "published" in file else [torch.nn.Linear(tiny.WIDTH, 1)]
    state = tiny.head_state(layers) if "published" in file else layers[0].state_dict()
    head = tiny.write_head(tmp_path / file, {name: tensor.detach().clone() for name, tensor in state.items()})
    scores = open_scorer(f"aesthetic={head},clip={clip}")(pictures(), CAPTIONS)
    image, _ = embeddings(pictures(), CAPTIONS)
    value = image / image.square().sum(1, keepdim=True).sqrt()
    size = value.abs()
    with torch.no_grad():
        for layer in layers:  # no activation between them
            weight, bias = layer.weight.double(), layer.bias.double()
            value, size = value @ weight.T + bias, size @ weight.T.abs() + bias.abs()
    assert scores.shape == (5,) and scores.std() > 0
    # Relative to the sum of the terms' sizes: a dot product of 1024 numbers rounds each of them a few times, summed in
    # blocks.
    assert ((scores.double() - value[:, 0]).abs() <= ROUNDING * size[:, 0]).all()


def test_the_key_follows_the_content(clip: Path, tmp_path: Path) -> None:
    key = open_scorer(f"hps={clip}").key
    assert key == open_scorer(f"hps={tiny.write_clip(tmp_path / 'same')}", batch_size=7).key
    other = open_scorer(f"hps={tiny.write_clip(tmp_path / 'other', seed=1)}").key
    assert other["weights"] != key["weights"] and other["processor"] == key["processor"]
    assert open_scorer(f"clip={clip}").key != key


def test_a_processor_of_another_place(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tiny.write_clip(tmp_path / "bare", processor=False)
    processor = tiny.write_processor(tmp_path / "processor")
    expected = open_scorer(f"pickscore={clip}")(pictures(), CAPTIONS)
    assert torch.equal(open_scorer(f"pickscore={bare},processor={processor}")(pictures(), CAPTIONS), expected)
    monkeypatch.setattr("fastinvdpo.evaluation.scorers.PICKSCORE_PROCESSOR", str(processor))
    assert torch.equal(open_scorer(f"pickscore={bare}")(pictures(), CAPTIONS), expected)
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        open_scorer(f"hps={bare}")  # only PickScore is published without


def test_what_cannot_be_loaded_is_said(clip: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weight": Harmful()}, tmp_path / "harmful.pth")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    zeros = torch.zeros
    heads = {
        "of other width": ({"weight": zeros(1, 5), "bias": zeros(1)}, "gets 8 numbers"),
        "of two scores": ({"weight": zeros(2, 8), "bias": zeros(2)}, "gives 2 numbers"),
        "too short": ({"layers.0.weight": zeros(1, 8), "layers.0.bias": zeros(1)}, "no known aesthetic head"),
        "of other names": ({"linear.weight": zeros(1, 8)}, "no known aesthetic head"),
    }
    refused = {
        f"aesthetic={tmp_path / 'harmful.pth'},clip={clip}": "cannot be read",
        f"aesthetic={tmp_path / 'missing.pth'},clip={clip}": "is no file",
        f"clip={tmp_path}": r"holds no config\.json",
        f"clip={tmp_path / 'bert'}": "a model of type 'bert'",
    }
    for name, (state, message) in heads.items():
        refused[f"aesthetic={tiny.write_head(tmp_path / f'{name}.safetensors', state)},clip={clip}"] = message
    refused |= dict.fromkeys(("", "pickscore", "pickscore=", "imagereward=x"), "describes no scorer")
    refused |= dict.fromkeys(("clip=x,clip=y", "clip=x,name", "hps=x,name="), "is no option of")
    for spec, message in refused.items():
        with pytest.raises(InvalidInput, match=message):
            open_scorer(spec)
    assert not (tmp_path / "executed").exists()


def test_a_function_is_a_scorer() -> None:
    scorer = FunctionScorer(lambda images, captions: [float(len(caption)) for caption in captions], "length", 2)
    assert in_batches(scorer, pictures(), CAPTIONS).tolist() == [2.0, 6.0, 0.0, 23.0, 2.0]
    for wrong, match in (
        (lambda i, c: [1.0], "shape"),
        (lambda i, c: [float("nan")] * len(i), "not finite"),
        (lambda i, c: ["good"] * len(i), r"wrong': fails on a batch of 3 images \(ValueError"),
        (lambda i, c: None, "fails"),
        (lambda i, c: 1 / 0, r"ZeroDivisionError.*Remedy: look at .*test_scorers\.py, line"),
    ):
        with pytest.raises(InvalidInput, match=match):
            in_batches(FunctionScorer(wrong, "wrong", 3), pictures(), CAPTIONS)
