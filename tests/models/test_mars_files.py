"""MARS: its checkpoints, images as codes, and the program of the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastinvdpo import InvalidInput
from fastinvdpo.models.mars import (
    MarsConfig,
    MarsModel,
    decode_codes,
    encode_images,
    load_mars,
    save_mars,
)
from tests import documentation
from tests.models.test_mars import CODES, IMAGES, PROMPTS, decoder, mars, trained


def test_a_checkpoint_holds_the_visual_expert_alone_and_finds_its_language_model(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    decoder(dtype=torch.float32).save_pretrained(base)
    decoder(dtype=torch.float32, rms_norm_eps=1e-6).apply(
        lambda module: module.weight.data.mul_(2.0) if isinstance(module, nn.Embedding) else None
    ).save_pretrained(other)
    config = MarsConfig(CODES, shared_output=True)
    model = load_mars(base, config)
    assert model.tokenizer is None and model.config == config
    trained(model, 2)
    save_mars(model, tmp_path / "mars")
    assert {file.name for file in (tmp_path / "mars").iterdir()} == {"visual_expert.safetensors", "mars.json"}
    size = sum(value.nbytes for value in model.visual_parameters().values())
    assert (tmp_path / "mars/visual_expert.safetensors").stat().st_size < 1.1 * size + 10_000
    again = load_mars(tmp_path / "mars")
    assert again.config == config and torch.equal(
        model.image_log_probs(PROMPTS, IMAGES), again.image_log_probs(PROMPTS, IMAGES)
    )
    assert load_mars(tmp_path / "mars", dtype=torch.bfloat16).visual_head.dtype == torch.bfloat16
    base.rename(tmp_path / "moved")
    assert torch.equal(load_mars(tmp_path / "mars", base=tmp_path / "moved").visual_head, model.visual_head)
    with pytest.raises(InvalidInput, match="another language model"):
        load_mars(tmp_path / "mars", base=other)
    with pytest.raises(InvalidInput, match=r"mars\.json"):
        load_mars(tmp_path / "moved")
    with pytest.raises(InvalidInput, match="revision"):
        load_mars(tmp_path / "mars", revision="main")
    (tmp_path / "moved").rename(base)
    weights, description = tmp_path / "mars/visual_expert.safetensors", tmp_path / "mars/mars.json"
    whole, told = weights.read_bytes(), json.loads(description.read_text())
    tensors = load_file(weights)
    tensors |= {"stranger": tensors.pop("visual_head"), "visual_embedding": tensors["visual_embedding"][1:].clone()}
    save_file(tensors, weights)
    problem = r"path = .*visual_expert\.safetensors.*lacks visual_head; it has unknown stranger; .* visual_embedding\."
    with pytest.raises(InvalidInput, match=problem):
        load_mars(tmp_path / "mars")
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match=r"path = .*visual_expert\.safetensors.*is no whole safetensors file"):
        load_mars(tmp_path / "mars")
    weights.write_bytes(whole)
    description.write_text(json.dumps({key: value for key, value in told.items() if key != "fingerprint"}))
    with pytest.raises(InvalidInput, match=r"path = .*mars\.json.*lacks fingerprint"):
        load_mars(tmp_path / "mars")
    description.write_text(json.dumps({**told, "base": str(tmp_path / "gone")}))
    with pytest.raises(InvalidInput, match=r"base = .*gone"):
        load_mars(tmp_path / "mars")
    save_mars(mars(dtype=torch.float32), tmp_path / "mars")
    with pytest.raises(InvalidInput, match="base = None"):
        load_mars(tmp_path / "mars")


def test_the_program_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small language model with a tokenizer of words."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = ["[PAD]", "[END]", "a", "red", "fox", "two", "pears", "on", "table"]
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[PAD]"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=split, eos_token="[END]", pad_token="[PAD]")
    decoder(dtype=torch.float32).save_pretrained(tmp_path / "base")
    fast.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    (block,) = documentation.blocks("docs/mars.md", "python")
    for shown, small in {"/models/SmolLM2-135M": "base", "8192": "20", "256": "6"}.items():
        assert shown in block
        block = block.replace(shown, small)
    program: dict[str, Any] = {}
    exec(compile(block, "docs/mars.md", "exec"), program)
    assert program["image"].shape == (1, 6) and len(program["caption"]) == 2 and program["log_probs"].isfinite().all()
    assert program["model"].text_ids(["a red fox"], end=True) == [[2, 3, 4, 1]]


@pytest.mark.parametrize("norm", ["group", "spatial"])
def test_the_round_trip_of_an_image_through_codes(norm: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vq = diffusers.VQModel(
        **blocks, block_out_channels=[32, 32], latent_channels=4, num_vq_embeddings=CODES, norm_type=norm
    ).eval()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        vq.quantize.embedding.weight.copy_(vq.encode(pixels).latents.permute(0, 2, 3, 1).flatten(0, 2)[:CODES])
    codes = encode_images(vq, pixels)
    assert codes.shape == (2, 64) and codes.dtype == torch.int64 and len(codes.unique()) > CODES // 2
    with torch.no_grad():
        torch.testing.assert_close(decode_codes(vq, codes, (8, 8)), vq(pixels).sample)
    MarsModel(decoder(), MarsConfig(CODES)).check_codes(codes)
    with pytest.raises(InvalidInput, match=r"codes\.shape"):
        decode_codes(vq, codes, (4, 8))
