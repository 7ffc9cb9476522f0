"""MARS in the trainer: stages on captioned images, preference on image tokens, with tiny decoders and tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastinvdpo.data import open_source
from fastinvdpo.errors import InvalidInput
from fastinvdpo.methods import MarsDPO, MarsStage1, MarsStage2, PairBatch
from fastinvdpo.models.mars import MarsPipeline, Sampling, caption_images, generate_images
from fastinvdpo.ops.preference_loss.utilities import UTILITIES
from fastinvdpo.trainer import TrainConfig, train
from fastinvdpo.trainer.callbacks import Callback
from fastinvdpo.trainer.networks import Networks
from tests.data.test_pairs import encoded, store
from tests.models import tiny_mars
from tests.trainer import tiny
from tests.trainer.forked import Server
from tests.trainer.test_resume import history

CAPTIONS = ("a red fox", "two pears", "a table", "two red pears on a table")
SIDE, TOKENS = 16, 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a VQ tokenizer, four captioned images, and pairs of them."""
    root = tmp_path_factory.mktemp("mars")
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(8)]
    tiny_mars.write(root, images)
    rows = zip(images, CAPTIONS, strict=False)
    store(root / "images.parquet", [{"image": encoded(image), "caption": caption} for image, caption in rows])
    pairs = [
        {"jpg_0": encoded(images[i]), "jpg_1": encoded(images[i + 4]), "label_0": 1, "label_1": 0, "caption": caption}
        for i, caption in enumerate(CAPTIONS)
    ]
    store(root / "pairs.parquet", pairs)
    return root


def mapping(root: Path, folder: Path, method: str = "mars-stage1", /, **sections: Any) -> dict[str, Any]:
    data = "pairs.parquet" if method == "mars-dpo" else "images.parquet"
    base: dict[str, dict[str, Any]] = {
        "method": {"name": method},
        "model": {"family": "mars", "path": str(root / "language"), "vae": str(root / "vq"), "max_sequence_length": 12},
        "data": {"path": str(root / data)},
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1, "lr_scheduler": "cosine", "warmup_steps": 1},
        "training": {"steps": 6, "batch_size": 2},
        "output": {"directory": str(folder), "checkpoint_every": 2, "log_every": 1, "tensorboard": False},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}


def run(root: Path, folder: Path, method: str = "mars-stage1", /, **sections: Any) -> Any:
    return train(TrainConfig.from_mapping(mapping(root, folder, method, **sections)), progress=False)


def visual(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "visual_expert.safetensors")


# Training


def test_stage_one_learns_a_small_set_in_both_directions_and_leaves_the_language_model(
    root: Path, tmp_path: Path
) -> None:
    folder, start = tmp_path / "run", MarsPipeline.load(root / "new")
    sections = {"training": {"steps": 150, "batch_size": 4}, "output": {"checkpoint_every": 150}}
    result = run(root, folder, **sections, optimizer={"learning_rate": 1e-2})
    first, last = result.history[0], result.history[-1]
    assert first["image_loss"] == pytest.approx(math.log(tiny_mars.CODES), rel=1e-5)
    assert last["image_loss"] < 0.3 and last["caption_loss"] < 0.3
    assert 0.3 < sum(row["captions"] for row in result.history) / 150 < 0.7
    assert all(row["images"] + row["captions"] == 1 for row in result.history)
    assert all(("caption_loss" in row) == (row["captions"] > 0) for row in result.history)
    # What is written is the visual expert, the tokenizer of images, and a card that says how it is loaded.
    names = {file.name for file in (folder / "model").iterdir()}
    assert names == {"visual_expert.safetensors", "mars.json", "vqvae", "README.md"}
    card = (folder / "model" / "README.md").read_text()
    for part in ("mars.MarsPipeline.load", "library_name: fastinvdpo", "4 images from", "trained by mars-stage1"):
        assert part in card
    trained = MarsPipeline.load(folder / "model")
    stored = tiny.stored(folder, 150)
    assert set(stored.trainable) == set(trained.network.visual_parameters())
    tiny.assert_same(visual(folder), stored.trainable)
    before = start.network.state_dict()
    for name, value in trained.network.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in stored.trainable), name
    text = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(trained.network.decoder(input_ids=text).logits, tiny_mars.decoder()(input_ids=text).logits)
    codes = trained.encode_images([Image.open(file) for file in map(_file(root), range(4))])
    greedy = generate_images(trained.network, CAPTIONS, TOKENS, sampling=Sampling(temperature=0))
    assert float((greedy == codes).float().mean()) > 0.9
    assert caption_images(trained.network, codes, 8) == trained.network.text_ids(CAPTIONS)


def _file(root: Path) -> Callable[[int], Any]:
    import io

    source = open_source(root / "images.parquet", form="images")
    source.resolve(("image", "caption"))
    return lambda row: io.BytesIO(source.image(row, 0))


class Stop(Callback):
    """Ends a run after a step, as a crash would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step(self, trainer: Any, step: int) -> None:
        if step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["mars-stage1", "mars-dpo"])
def test_a_run_that_was_cut_off_continues_bit_for_bit(root: Path, tmp_path: Path, method: str) -> None:
    options = {"data": {"caption_dropout": 0.3}, "training": {"gradient_accumulation_steps": 2, "ema_decay": 0.9}}
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        config = TrainConfig.from_mapping(mapping(root, cut, method, **options))
        train(config, progress=False, callbacks=[Stop(5)])
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    for folder in (cut, whole):
        run(root, folder, method, **options)
    ends = [tiny.stored(folder) for folder in (cut, whole)]
    for part in ("trainable", "ema", "state"):
        tiny.assert_same(getattr(ends[0], part), getattr(ends[1], part))
    tiny.assert_same(visual(cut), visual(whole))
    tiny.assert_same(load_file(whole / "model-raw/visual_expert.safetensors"), ends[1].trainable)
    assert history(cut, [1, 2, 3, 4, 5, 6]) == history(whole, [1, 2, 3, 4, 5, 6])
    with pytest.raises(InvalidInput, match=r"different are .*model VQModel"):
        run(root, cut, method, **options, model={"vae": str(root / "other")})


def together(run: dict[str, Any]) -> None:
    train(TrainConfig.from_mapping(run), progress=False)


def test_two_processes_make_the_steps_of_one(root: Path, tmp_path: Path, forks: Server) -> None:
    """Of single samples, so that in some steps a process has captions alone, and no gradient of the image head."""
    both, alone = ({"batch_size": size, "steps": 4} for size in (1, 2))
    adam = {"learning_rate": 1e-3, "epsilon": 1e-3}  # with a tiny ε rounding would decide the steps of small gradients
    forks.together(together, mapping(root, tmp_path / "both", training=both, optimizer=adam))
    run(root, tmp_path / "alone", training=alone, optimizer=adam)
    rows = history(tmp_path / "both", [1, 2, 3, 4])
    assert {row["captions"] for row in rows} >= {0.5}
    for row, other in zip(rows, history(tmp_path / "alone", [1, 2, 3, 4]), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    one, other = visual(tmp_path / "both"), visual(tmp_path / "alone")
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)


def test_three_stages_and_preference_follow_one_another(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "one")
    path = {"family": "auto", "path": str(tmp_path / "one/model"), "vae": None}
    two = run(root, tmp_path / "two", "mars-stage2", model=path)
    assert two.history[-1]["loss"] < two.history[0]["loss"] and "caption_loss" not in two.history[0]
    path["path"] = str(tmp_path / "two/model")
    three = run(root, tmp_path / "three", "mars-stage3", model={**path, "low_resolution": 8})
    assert three.history[-1]["loss"] < three.history[0]["loss"]
    cascade = MarsPipeline.load(tmp_path / "three/model", low_resolution=8)
    image = Image.new("RGB", (SIDE, SIDE), "red")
    low = cascade.encode_small([image])["low"]
    assert low.shape == (1, 4) and torch.equal(low, cascade.encode_images([image.resize((8, 8))]))
    assert generate_images(cascade.network, ["a table"], TOKENS, low=low, guidance=2.0).shape == (1, TOKENS)
    options = {"method": {"beta": 4.0, "reduction": "mean"}, "training": {"steps": 8, "max_batch": 3}}
    dpo = run(root, tmp_path / "dpo", "mars-dpo", model=path, **options, optimizer={"learning_rate": 1e-3})
    assert dpo.history[0]["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert dpo.history[-1]["loss"] < 0.65 and dpo.history[-1]["implicit_accuracy"] == 1
    assert dpo.history[0]["log_prob_winner"] == dpo.history[0]["reference_log_prob_winner"]
    assert dpo.history[-1]["model_flops_per_pair"] > 0 and dpo.network_evaluations == 8 * 8


# The objectives


def pipeline(root: Path, noise: float = 0.0, **options: Any) -> MarsPipeline:
    """In float64; ``noise``: added to the visual expert."""
    model = MarsPipeline.load(root / "new", dtype=torch.float64, max_sequence_length=8, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.network.visual_parameters().values():
            value += noise * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return model


def batch(model: MarsPipeline, captions: tuple[str, ...] = CAPTIONS, sides: int = 1) -> PairBatch:
    codes = torch.randint(tiny_mars.CODES, (sides * len(captions), 6), generator=torch.Generator().manual_seed(2))
    conditioning = {name: torch.cat([value] * sides) for name, value in model.encode_prompts(captions).items()}
    return PairBatch(codes, conditioning, torch.arange(40, 40 + len(captions)))


def networks(model: MarsPipeline) -> Networks:
    return Networks(model, lora=None, gradient_checkpointing=False)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_preference_is_the_formula_with_plain_log_softmax_for_every_utility(root: Path, reduction: str) -> None:
    model = pipeline(root, noise=0.05)
    both, given = networks(model), batch(model, sides=2)
    method: Any = MarsDPO(beta=0.7, reduction=reduction)  # type: ignore[arg-type]
    for utility in UTILITIES:
        options = {"utility": utility, "label_smoothing": 0.1 if UTILITIES[utility].smoothed else 0.0}
        equal = MarsDPO(beta=0.7, reduction=reduction, **options).objective(None)(  # type: ignore[arg-type]
            both.policy, both.reference, given, seed=0
        )
        assert not equal.entries.any()
        assert utility != "sigmoid" or equal.loss.item() == math.log(2)
    with torch.no_grad():
        for value in model.network.visual_parameters().values():
            value *= 1.1

    def plain(network: Any) -> Tensor:
        found = []
        for caption, codes in zip(CAPTIONS * 2, given.latents, strict=True):
            (text,) = model.network.text_ids([caption])
            ids = torch.tensor([[*text, network.begin, *(codes + network.text_size).tolist()]])
            logits = network(ids)[0, -7:-1] @ network.visual_head.T
            found.append(logits.log_softmax(-1)[range(6), codes].sum() / (6 if reduction == "mean" else 1))
        return torch.stack(found)

    leaves = list(model.network.visual_parameters().values())
    for utility in UTILITIES:
        options = {"utility": utility, "label_smoothing": 0.1 if UTILITIES[utility].smoothed else 0.0}
        method = MarsDPO(beta=0.7, reduction=reduction, **options)  # type: ignore[arg-type]
        out = method.objective(None)(both.policy, both.reference, given, seed=0)
        ratios = plain(both.policy_module) - plain(both.reference_module).detach()
        margin = 0.7 * (ratios[:4] - ratios[4:])
        expected = UTILITIES[utility].value(margin, 0.7, method.label_smoothing).mean()
        torch.testing.assert_close(out.entries, margin, rtol=1e-6, atol=1e-7)  # norms are float32 in transformers
        torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-7)
        ours, theirs = (torch.autograd.grad(loss, leaves) for loss in (out.loss, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_reference_is_a_copy_of_the_visual_expert_alone(root: Path) -> None:
    model = pipeline(root)
    both, own = networks(model), set(model.network.visual_parameters())
    assert both.reference_module is not None and set(both.trainable()) == own
    policy, reference = (dict(module.named_parameters()) for module in (both.policy_module, both.reference_module))
    for name, value in policy.items():
        assert (value is reference[name]) == (name not in own), name
        assert not reference[name].requires_grad and value.requires_grad == (name in own)


def test_an_image_has_the_loss_of_its_own_tokens_and_without_a_caption_none_is_said(root: Path) -> None:
    model = pipeline(root, noise=0.05)
    captions = (*CAPTIONS, *CAPTIONS, "", "")
    given = batch(model, captions)
    out = MarsStage1().objective(None)(networks(model).policy, _none, given, seed=5)
    spoken = MarsStage1().captioning(given, 5).bool()
    assert 0 < int(spoken.sum()) < 8 and not spoken[8:].any()
    images = model.network.image_log_probs(captions, given.latents, "mean")
    told = model.network.caption_log_probs(given.latents, captions, "mean")
    torch.testing.assert_close(out.entries, -torch.where(spoken, told, images), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.loss, out.entries.mean())
    share = [int(MarsStage1(caption_share=s).captioning(given, 5).sum()) for s in (0.0, 1.0)]
    assert share == [0, 8]
    drawn = MarsStage2().objective(None)(networks(model).policy, _none, given, seed=5)
    torch.testing.assert_close(drawn.entries, -images, rtol=1e-6, atol=1e-7)
    # A caption that is cut has no end; one that is not, has.
    short = MarsPipeline(model.network, model.vq, max_sequence_length=3).encode_prompts(CAPTIONS[2:])
    assert short["length"].tolist() == [2, 3] and short["spoken"].tolist() == [3, 3]


def _none(*given: Any) -> Tensor:
    raise AssertionError("a stage has no reference")


def test_a_batch_of_captions_alone_has_a_gradient_of_everything_that_is_trained(root: Path) -> None:
    model = pipeline(root)
    both = networks(model)
    out = MarsStage1(caption_share=1.0).objective(None).backward(both.policy, _none, batch(model), seed=0)
    assert out.loss.isfinite() and all(value.grad is not None for value in both.trainable().values())
    assert not model.network.visual_head.grad.any()  # type: ignore[union-attr]


def test_activations_that_are_computed_again_give_the_same_gradient(root: Path) -> None:
    found = []
    for again in (False, True):
        model = pipeline(root, noise=0.05)
        both = Networks(model, lora=None, gradient_checkpointing=again)
        layer, calls = both.policy_module.decoder.model.layers[0], []
        layer.input_layernorm.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        MarsStage1().objective(None).backward(both.policy, _none, batch(model), seed=0)
        assert len(calls) == 1 + again
        found.append([value.grad for value in both.trainable().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
