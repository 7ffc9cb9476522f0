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


def test_renoise_brings_the_way_up_closer_to_the_way_down(model: DiffusionModel) -> None:
    plain, once = (
        invert_images(model, noise(), ["a three"], num_inference_steps=10, renoise_iterations=count).latent_mse.mean()
        for count in (0, 1)
    )
    assert once < plain


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_network_that_ignores_its_input_is_inverted_exactly(
    model: DiffusionModel, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inversion and sampling then use the same output in every step, so the affine steps cancel. Latents are pixels.
    constant = {"predict": lambda self, network, latents, timesteps, conditioning: latents.new_full(latents.shape, 0.3)}
    constant["encode_images"] = lambda self, images: pixels_of(images, "RGB").repeat(1, 2, 1, 1)[:, :4]
    constant["decode_latents"] = lambda self, latents: images_of(((latents[:, :3] + 1) * 127.5).round().byte())
    for name, replacement in constant.items():
        monkeypatch.setattr(type(model), name, replacement)
    result = invert_images(model, noise(), [""], num_inference_steps=steps)
    torch.testing.assert_close(result.reconstructed_latents, result.clean_latents, rtol=0, atol=1e-4)
    assert [image.tobytes() for image in result.reconstructions] == [
        image.convert("RGB").tobytes() for image in noise()
    ]
    assert result.mse.max() == 0
    assert torch.isinf(result.psnr).all()


def test_the_way_back_is_the_sampler(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a three", "b", "c"]
    result = invert_images(model, noise(), prompts, num_inference_steps=10, guidance_scale=2.0)
    monkeypatch.setattr("fastinvdpo.evaluation.sampling.philox.normal", lambda *arguments: result.latents)
    sampled = sample(model, model.network, prompts, num_inference_steps=10, guidance_scale=2.0)
    torch.testing.assert_close(sampled, result.reconstructed_latents, rtol=1e-5, atol=1e-5)


def test_errors_are_those_of_the_returned_tensors_and_images(model: DiffusionModel) -> None:
    model.network.train()
    result = invert_images(model, noise(), [""], num_inference_steps=5)
    assert model.network.training, "the network keeps its mode"
    model.network.eval()
    assert not result.latents.requires_grad and all(p.grad is None for p in model.network.parameters())
    assert result.latents.shape == result.clean_latents.shape == (3, 4, 8, 8)
    expected = ((result.reconstructed_latents - result.clean_latents) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(result.latent_mse, expected)
    for i in range(3):
        pairs = zip(result.originals[i].tobytes(), result.reconstructions[i].tobytes(), strict=True)
        mse = sum(((a - b) / 255) ** 2 for a, b in pairs) / 192
        assert float(result.mse[i]) == pytest.approx(mse)
        assert float(result.psnr[i]) == pytest.approx(-10 * torch.log10(torch.tensor(mse)).item(), rel=1e-5)


def test_guidance_changes_the_path_and_doubles_the_evaluations(model: DiffusionModel) -> None:
    def inverted(prompt: str, **options: Any) -> Any:
        return invert_images(model, noise(), [prompt], num_inference_steps=6, **options)

    plain, guided = inverted("a three"), inverted("a three", guidance_scale=2.0)
    renoised = inverted("a three", guidance_scale=2.0, renoise_iterations=1)
    assert (plain.network_evaluations, guided.network_evaluations) == (3 * 6 * 2, 2 * 3 * 6 * 2)
    assert renoised.network_evaluations == 3 * 6 * (4 + 2)
    assert not torch.allclose(plain.latents, guided.latents)
    empty, same = inverted(""), inverted("", guidance_scale=3.0)
    torch.testing.assert_close(same.latents, empty.latents, rtol=1e-4, atol=1e-4)


def test_batches_and_prompts_stay_with_their_images(model: DiffusionModel) -> None:
    prompts = ["a", "b", "c"]
    together = invert_images(model, noise(), prompts, num_inference_steps=4)
    apart = invert_images(model, noise(), prompts, num_inference_steps=4, batch_size=2)
    torch.testing.assert_close(apart.latents, together.latents, rtol=1e-4, atol=1e-5)
    assert together.prompts == prompts
    last = invert_images(model, noise()[2:], ["c"], num_inference_steps=4)
    torch.testing.assert_close(last.latents, together.latents[2:], rtol=1e-4, atol=1e-5)


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
    assert [entry["image"] for entry in report["images"]] == [str(path) for path in files]
    assert {entry["prompt"] for entry in report["images"]} == {"a one"}
    stored = load_file(out / "latents.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == dict.fromkeys(
        ("clean", "inverted", "reconstructed"), (3, 4, 8, 8)
    )
    for entry, clean, back in zip(report["images"], stored["clean"], stored["reconstructed"], strict=True):
        assert entry["latent_mse"] == pytest.approx(float((clean - back).square().mean()), rel=1e-5)
    assert report["mean"]["latent_mse"] == pytest.approx(sum(e["latent_mse"] for e in report["images"]) / 3, rel=1e-5)
    with Image.open(out / "invert.png") as sheet:
        sheet.load()
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
    report = run_invert(
        "auto", directory, [tmp_path / "pairs.parquet"], output=tmp_path / "out", num_inference_steps=2, max_images=3
    )
    named = [(entry["image"], entry["prompt"]) for entry in report["images"]]
    assert named == [
        ("row 0, winner", "a two"),
        ("row 0, loser", "a two"),
        ("row 1, winner", "a six"),
    ]
    clean = load_file(tmp_path / "out" / "latents.safetensors")["clean"]
    assert torch.equal(clean, load_model("auto", directory).encode_images([second, first, third]))
    Image.new("RGB", (40, 24), (9, 9, 9)).save(tmp_path / "wide.jpg")  # resized and cropped to the model
    report = run_invert("auto", directory, [tmp_path / "wide.jpg"], output=tmp_path / "out", num_inference_steps=2)
    assert report["images"][0]["prompt"] == ""
    assert load_file(tmp_path / "out" / "latents.safetensors")["clean"].shape == (1, 4, 8, 8)


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
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps = 2.5"),
        ({"num_inference_steps": 1001}, "num_inference_steps = 1001"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan"),
        ({"guidance_scale": -1}, "guidance_scale = -1"),
        ({"guidance_scale": "2"}, "guidance_scale = '2'"),
        ({"renoise_iterations": -1}, "renoise_iterations = -1"),
        ({"renoise_iterations": 0.5}, "renoise_iterations = 0.5"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": True}, "batch_size = True"),
    ],
)
def test_bad_inputs(model: DiffusionModel, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": noise(), "prompts": ["a"], **change}
    images, prompts = arguments.pop("images"), arguments.pop("prompts")
    with pytest.raises(InvalidInput, match=message) as caught:
        invert_images(model, images, prompts, **arguments)
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
        arguments = {
            "family": "auto",
            "path": directory,
            "inputs": files,
            "output": tmp_path / "out",
            **change,
        }
        with pytest.raises(InvalidInput, match=message):
            run_invert(**arguments)
        assert not (tmp_path / "out").exists()
