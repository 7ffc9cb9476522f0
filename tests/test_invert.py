"""Inverting images to noise and back: the error, what it depends on, the files, and the bad inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastinvdpo.data import write_pairs
from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.inversion import invert_images, overview, run_invert
from fastinvdpo.evaluation.sampling import sample
from fastinvdpo.models import DiffusionModel, load_model
from fastinvdpo.models.base import images_of, pixels_of
from tests.models import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def model(directory: Path) -> DiffusionModel:
    return calm(load_model("auto", directory))


def calm(model: DiffusionModel) -> DiffusionModel:
    """Shrink the outputs of random weights, so that the path bends as slowly as a trained model's.

    Outputs of size one that are no prediction of the noise are blown up by 1/√ᾱ on the way down (14 at the last level),
    and no affordable number of steps reaches the range where the error shrinks with the step.
    """
    with torch.no_grad():
        for parameter in model.network.conv_out.parameters():
            parameter *= 0.1
    return model


def noise(count: int = 3, size: tuple[int, int] = (8, 8)) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(0, 256, (count, size[0] * size[1]), generator=generator, dtype=torch.uint8)
    return [Image.frombytes("L", size, bytes(row.tolist())) for row in values]


def test_the_error_is_of_first_order_in_the_step(model: DiffusionModel) -> None:
    results = [invert_images(model, noise(), ["a three"], num_inference_steps=steps) for steps in (20, 40, 80)]
    errors = [float(result.latent_mse.mean()) for result in results]
    # It halves, and its square quarters, with every doubling of the steps.
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_network_that_ignores_its_input_is_inverted_exactly(
    model: DiffusionModel, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inversion and sampling then use the same output in every step, so the affine steps cancel. Latents are pixels.
    constant = {"predict": lambda self, network, latents, *_: latents.new_full(latents.shape, 0.3)}
    constant["encode_images"] = lambda self, images: pixels_of(images, "RGB").repeat(1, 2, 1, 1)[:, :4]
    constant["decode_latents"] = lambda self, latents: images_of(((latents[:, :3] + 1) * 127.5).round().byte())
    for name, replacement in constant.items():
        monkeypatch.setattr(type(model), name, replacement)
    result = invert_images(model, noise(), [""], num_inference_steps=steps)
    torch.testing.assert_close(result.reconstructed_latents, result.clean_latents, rtol=0, atol=1e-4)
    originals = [image.convert("RGB").tobytes() for image in noise()]
    assert [image.tobytes() for image in result.reconstructions] == originals
    assert result.mse.max() == 0
    assert torch.isinf(result.psnr).all()


def test_the_way_back_is_the_sampler_and_errors_are_those_of_the_returned_tensors_and_images(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, settings = ["a three", "b", "c"], {"num_inference_steps": 10, "guidance_scale": 2.0}
    model.network.train()
    result = invert_images(model, noise(), prompts, **settings)
    assert model.network.training, "the network keeps its mode"
    model.network.eval()
    assert not result.latents.requires_grad and all(p.grad is None for p in model.network.parameters())
    assert result.latents.shape == result.clean_latents.shape == (3, 4, 8, 8) and result.prompts == prompts
    expected = ((result.reconstructed_latents - result.clean_latents) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(result.latent_mse, expected)
    for i in range(3):
        pairs = zip(result.originals[i].tobytes(), result.reconstructions[i].tobytes(), strict=True)
        mse = sum(((a - b) / 255) ** 2 for a, b in pairs) / 192
        assert float(result.mse[i]) == pytest.approx(mse)
        assert float(result.psnr[i]) == pytest.approx(-10 * torch.log10(torch.tensor(mse)).item(), rel=1e-5)
    for images, texts, of in ((noise(), prompts, slice(3)), (noise()[2:], ["c"], slice(2, 3))):  # in any batch
        apart = invert_images(model, images, texts, batch_size=2, **settings)
        torch.testing.assert_close(apart.latents, result.latents[of], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("fastinvdpo.evaluation.sampling.philox.normal", lambda *arguments: result.latents)
    sampled = sample(model, model.network, prompts, **settings)
    torch.testing.assert_close(sampled, result.reconstructed_latents, rtol=1e-5, atol=1e-5)


def test_guidance_changes_the_path_and_renoise_brings_the_way_up_closer_to_the_way_down(model: DiffusionModel) -> None:
    def inverted(prompt: str, **options: Any) -> Any:
        return invert_images(model, noise(), [prompt], num_inference_steps=6, **options)

    plain, guided = inverted("a three"), inverted("a three", guidance_scale=2.0)
    renoised = inverted("a three", guidance_scale=2.0, renoise_iterations=1)
    evaluations = [result.network_evaluations for result in (plain, guided, renoised)]
    assert evaluations == [3 * 6 * 2, 3 * 6 * 2 * 2, 3 * 6 * (4 + 2)]
    assert not torch.allclose(plain.latents, guided.latents)
    assert renoised.latent_mse.mean() < guided.latent_mse.mean()
    empty, same = inverted(""), inverted("", guidance_scale=3.0)
    torch.testing.assert_close(same.latents, empty.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "sdxl"])
def test_stable_diffusion(tmp_path: Path, kind: str) -> None:
    pipeline = tiny.sdxl_pipeline() if kind == "sdxl" else tiny.sd_pipeline(prediction_type=kind)
    pipeline.save_pretrained(tmp_path)
    model = calm(load_model("auto", tmp_path))
    images = [image.convert("RGB") for image in noise(2, (16, 16))]
    coarse, fine = (invert_images(model, images, ["a cat"], num_inference_steps=steps) for steps in (20, 80))
    assert fine.latent_mse.mean() < coarse.latent_mse.mean() / 2
    assert overview(model, fine).mode == "RGB"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, noise(), strict=True):
        image.save(path)
    return paths


def test_run_writes_latents_image_and_report(directory: Path, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run_invert("auto", directory, files, output=out, prompts=["a one"], num_inference_steps=5)
    assert json.loads((out / "report.json").read_text()) == report
    named = [(entry["image"], entry["prompt"]) for entry in report["images"]]
    assert named == [(str(path), "a one") for path in files]
    stored = load_file(out / "latents.safetensors")
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    assert shapes == dict.fromkeys(("clean", "inverted", "reconstructed"), (3, 4, 8, 8))
    errors = (stored["clean"] - stored["reconstructed"]).square().mean((1, 2, 3))
    assert [entry["latent_mse"] for entry in report["images"]] == pytest.approx(errors.tolist(), rel=1e-5)
    assert report["mean"]["latent_mse"] == pytest.approx(float(errors.mean()), rel=1e-5)
    with Image.open(out / "invert.png") as sheet:
        columns = [sheet.crop((8 + k * 136, 28, 8 + k * 136 + 128, 28 + 128)).convert("L") for k in range(3)]
    assert columns[0].resize((8, 8), Image.Resampling.NEAREST).tobytes() == noise()[0].tobytes()
    assert columns[1].tobytes() != columns[0].tobytes() != columns[2].tobytes()


def test_run_takes_a_pair_set_with_its_captions(directory: Path, tmp_path: Path) -> None:
    first, second, third = noise(3)
    rows = [
        {"jpg_0": first, "jpg_1": second, "label_0": 0, "label_1": 1, "caption": "a two"},
        {"jpg_0": third, "jpg_1": first, "label_0": 1, "label_1": 0, "caption": "a six"},
    ]
    write_pairs(tmp_path / "pairs.parquet", rows)
    Image.new("RGB", (40, 24), (9, 9, 9)).save(tmp_path / "wide.jpg")  # resized and cropped to the model

    def inverted(name: str) -> tuple[list[tuple[str, str]], torch.Tensor]:
        settings = {"num_inference_steps": 2, "max_images": 3}
        report = run_invert("auto", directory, [tmp_path / name], output=tmp_path / "out", **settings)
        named = [(entry["image"], entry["prompt"]) for entry in report["images"]]
        return named, load_file(tmp_path / "out" / "latents.safetensors")["clean"]

    named, clean = inverted("pairs.parquet")
    sides = [("row 0, winner", 0), ("row 0, loser", 0), ("row 1, winner", 1)]
    assert named == [(name, rows[number]["caption"]) for name, number in sides]
    assert torch.equal(clean, load_model("auto", directory).encode_images([second, first, third]))
    named, clean = inverted("wide.jpg")
    assert named[0][1] == "" and clean.shape == (1, 4, 8, 8)


BAD_NUMBERS: list[tuple[str, Any]] = [
    *[("num_inference_steps", value) for value in (0, 2.5, 1001)],
    *[("guidance_scale", value) for value in (float("nan"), -1, "2")],
    *[("renoise_iterations", value) for value in (-1, 0.5)],
    *[("batch_size", value) for value in (0, True)],
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "images = .*is empty"),
        ({"images": ["a.png"]}, r"images\[0\] = 'a.png': is not a PIL image"),
        ({"images": [*noise(1), *noise(1, (9, 9))]}, r"images\[1\].size = \(9, 9\)"),
        ({"prompts": "a"}, "prompts = 'a': is one string"),
        ({"prompts": []}, "prompts = .*is empty"),
        ({"prompts": ["a", "b"]}, "prompts = .*are 2 for 3 images"),
        ({"prompts": ["a", "b", 3]}, r"prompts\[2\] = 3: is not a string"),
        *[({name: value}, f"{name} = {value!r}") for name, value in BAD_NUMBERS],
    ],
)
def test_bad_inputs(model: DiffusionModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        invert_images(model, **{"images": noise(), "prompts": ["a"], **change})
    assert "Remedy: " in str(caught.value)


def test_bad_runs_leave_nothing_behind(directory: Path, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "half.png").write_bytes(files[0].read_bytes()[:-30])
    (tmp_path / "no-shards").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"inputs": []}, "inputs = "),
        ({"inputs": str(files[0])}, "inputs = .*is not a list"),
        ({"inputs": [tmp_path / "gone.png"]}, r"inputs\[0\] = .*gone.png': is not a readable image"),
        ({"inputs": [files[0], tmp_path / "text.png"]}, r"inputs\[1\] = .*text.png': is not a readable image"),
        ({"inputs": [tmp_path / "half.png"]}, r"half.png': is not a readable image \([^()]*\([^()]*\)\). Remedy: pass"),
        ({"inputs": [tmp_path / "gone.parquet"]}, r"gone.parquet': does not exist"),
        ({"inputs": [tmp_path / "no-shards"]}, r"without \*.parquet files"),
        ({"inputs": [files[0], tmp_path / "no-shards"]}, "mixes a pair set with other paths"),
        ({"prompts": ["a", "b"]}, "prompts = .*are 2 for 3 images"),
        ({"max_images": 0}, "max_images = 0"),
        ({"output": files[0]}, "output = .*is what the run reads"),
        ({"family": "gan"}, r"model\.family = 'gan'"),
        ({"path": tmp_path / "nowhere"}, r"model\.path = "),
        ({"num_inference_steps": 4000}, "num_inference_steps = 4000"),
    ]
    for change, message in cases:
        arguments = {"family": "auto", "path": directory, "inputs": files, "output": tmp_path / "out", **change}
        with pytest.raises(InvalidInput, match=message):
            run_invert(**arguments)
        assert not (tmp_path / "out").exists()
