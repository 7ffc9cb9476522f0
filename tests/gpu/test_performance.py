"""The trainer's performance switches where they belong: recorded calls, compiled blocks, layouts, on a GPU."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fastinvdpo.config.sections import LoraSection
from fastinvdpo.models import load_model
from fastinvdpo.models.quantization import Kind, QuantizedLinear, dequantize_nf4, nf4_dequantizer
from fastinvdpo.trainer import train
from fastinvdpo.trainer.networks import Networks
from fastinvdpo.trainer.performance import GraphedCalls
from tests.trainer import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    tiny.write_model(tmp_path / "model")
    tiny.write_data(tmp_path / "pairs.parquet")
    return tmp_path


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2, alpha=4.0)], ids=["copy", "lora"])
def test_replayed_calls_are_the_calls(workspace: Path, lora: LoraSection | None) -> None:
    """The same kernels in the same order: the same bits, also after an update of the weights in place."""
    model = load_model("stable-diffusion", workspace / "model").to("cuda")
    networks = Networks(model, lora=lora, gradient_checkpointing=False)
    told = model.encode_prompts(["a one", "a two", ""])
    for update in range(3):
        with torch.no_grad():
            for parameter in networks.trainable().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        given = (torch.randn(3, 4, 8, 8, device="cuda"), torch.tensor([update, 400, 900], device="cuda"), told)
        graphs = networks.graphs or GraphedCalls()
        with torch.no_grad():
            networks.graphs = None
            expected = [networks.policy(*given), networks.reference(*given)]
            networks.graphs = graphs
            found = [networks.policy(*given), networks.reference(*given)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert not torch.equal(*found)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_quantized_weights_are_those_of_the_host(workspace: Path, kind: Any) -> None:
    """Moved there, not quantized anew, or moved for each product; and a run on them starts with policy = reference."""
    linear = torch.nn.Linear(96, 64)
    layers = [QuantizedLinear(copy.deepcopy(linear), kind, offload).to("cuda") for offload in (False, True)]
    whole = QuantizedLinear(linear, kind).dequantized(torch.float32)
    there = [layer.dequantized(torch.float32, torch.device("cuda", 0)) for layer in layers]
    # PyTorch may divide by 127 or 448 as a product with its reciprocal there: five roundings in all.
    rounding = 0 if kind in ("bf16", "nf4") else 5 * 2**-24
    torch.testing.assert_close(there[0].cpu(), whole, rtol=rounding, atol=0)
    assert torch.equal(*there) and layers[1].weight.is_pinned()
    results = []
    for offload in (False, True):
        model = {"lora": {"rank": 2}, "quantization": kind, "offload": offload}
        output = {"directory": str(workspace / str(offload))}
        training = {"steps": 2, "mixed_precision": "bf16"}
        results.append(train(tiny.config(workspace, model=model, training=training, output=output), progress=False))
        assert results[-1].history[0]["margin"] == 0
    assert results[0].history[-1]["loss"] == pytest.approx(results[1].history[-1]["loss"], rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("shape", [(64, 64), (64, 32), (5, 13), (1280, 10240)])
def test_the_kernel_of_bitsandbytes_has_the_bits_of_the_formula(shape: tuple[int, int]) -> None:
    """Otherwise training would go on with plain PyTorch in its place, and a warning."""
    assert nf4_dequantizer(torch.device("cuda", 0), torch.Size(shape)) is not dequantize_nf4


SWITCHES: dict[str, dict[str, Any]] = {
    "cuda_graphs": {"cuda_graphs": True},
    "compile": {"compile": True},
    "both": {"cuda_graphs": True, "compile": True},
    "channels_last": {"channels_last": True},
    "xformers": {"attention": "xformers"},
}


@pytest.mark.parametrize("name", ["smpo", "inversion-dpo"])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_training_with_a_switch(workspace: Path, name: str, switches: dict[str, Any]) -> None:
    """The losses of a run without it, up to the rounding of the networks: at β = 500 an error of 1e-6 in each of two
    predictions of size 1 moves a margin by up to 500·2·2e-6, and the loss by half of that.
    """
    if switches.get("attention") == "xformers" and importlib.util.find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    losses = []
    for own in ({}, switches):
        config = tiny.config(
            workspace,
            name,
            method={"static_shapes": True} if name == "smpo" else {},
            performance={"tf32": False, **own},
            training={"steps": 2},
            optimizer={"learning_rate": 1e-6},
            output={"directory": str(workspace / f"run-{len(losses)}"), "log_every": 1},
        )
        losses.append([row["loss"] for row in train(config, progress=False).history])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
