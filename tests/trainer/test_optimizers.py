"""Adafactor as the released codes set it for SDXL; AdamW with 8-bit moments is in test_bitsandbytes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastinvdpo.config.sections import OptimizerSection
from fastinvdpo.trainer.checkpoint import load_checkpoint
from fastinvdpo.trainer.state import build_optimizer
from tests.trainer import tiny
from tests.trainer.test_resume import _assert_same

RATE, DECAY = 0.01, 0.1


def _by_the_formula(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5) at a given learning rate, decay 1 - t^-0.8, clipped at 1."""
    weight, rows, columns = weight.double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        keep, square = 1 - step**-0.8, gradient.double().square() + 1e-30
        if weight.ndim > 1:
            rows = keep * rows + (1 - keep) * square.mean(-1, keepdim=True)
            columns = keep * columns + (1 - keep) * square.mean(-2, keepdim=True)
            update = gradient.double() / (rows * columns / rows.mean(-2, keepdim=True)).sqrt()  # type: ignore[union-attr]
        else:
            rows = keep * rows + (1 - keep) * square
            update = gradient.double() / rows.sqrt()
        update = update / update.square().mean().sqrt().clamp(min=1.0)
        weight = weight * (1 - DECAY * RATE) - RATE * update
    return weight


def test_adafactor_makes_the_steps_of_its_paper_at_the_given_rate() -> None:
    """No scaling by the size of a weight, which is 3 here; a convolution is a stack of matrices."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4, 3, 2, 2), (6,)]
    start = [3.0 * torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [
        [scale * torch.randn(shape, generator=generator) for shape in shapes] for scale in (1e-3, 1.0, 1e-2, 10.0)
    ]
    parameters = [nn.Parameter(value.clone()) for value in start]
    settings = OptimizerSection(
        name="adafactor", learning_rate=RATE / 8, scale_lr=True, weight_decay=DECAY, lr_scheduler="constant"
    )
    optimizer, scheduler = build_optimizer(settings, parameters, effective_batch=8, steps=10)
    for row in gradients:
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        scheduler.step()
    for i, parameter in enumerate(parameters):
        expected = _by_the_formula(start[i], [row[i] for row in gradients])
        # Some twenty roundings of float32 in every step of size RATE, and those of weights of size 10.
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=4 * 2**-24, atol=80 * 2**-24 * RATE)
    kept = sum(value.numel() for value in optimizer.state[parameters[1]].values() if torch.is_tensor(value))
    assert kept == 4 * 3 * 2 + 4 * 3 * 2 + 1  # rows, columns, and the size of the weight


def test_the_schedule_sets_the_rate_of_adafactor() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    settings = OptimizerSection(name="adafactor", learning_rate=0.5, weight_decay=0.0, warmup_steps=2)
    optimizer, scheduler = build_optimizer(settings, [parameter], effective_batch=1, steps=4)
    moved = []
    for _ in range(4):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(3, 2)
        optimizer.step()
        scheduler.step()
        moved.append(float((before - parameter.detach()).mean()))
    assert moved == pytest.approx([0.0, 0.25, 0.5, 0.5], rel=1e-6)


@pytest.mark.parametrize(
    "sections",
    [{"model": {"lora": {"rank": 2}}}, {"performance": {"channels_last": True}}],
    ids=["lora", "full, channels_last"],
)
def test_adafactor_resumes_bit_for_bit(workspace: Path, sections: dict[str, Any]) -> None:
    sections = {"optimizer": {"name": "adafactor"}, **sections}
    resumed = tiny.trained_in_attempts(workspace / "resumed", 3, 6, **sections)
    whole = tiny.trained_in_attempts(workspace / "whole", 6, **sections)
    stored = [load_checkpoint(tiny.complete_checkpoints(root / "checkpoints")[-1]) for root in (resumed, whole)]
    _assert_same(stored[0].trainable, stored[1].trainable)
    _assert_same(stored[0].state, stored[1].state)
    weights = [tiny.weights(root) for root in (resumed, whole)]
    _assert_same(*weights)
    base = load_file(workspace / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = [name for name, value in weights[0].items() if not torch.equal(value, base[name])]
    # Biases of keys move nothing, and a rate of 1e-3 rounds to nothing in no weight of this size.
    assert len(moved) > (8 if sections.get("model") else 100)


def test_adafactor_leaves_convolutions_in_their_layout() -> None:
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    parameter, plain = nn.Parameter(weight.clone()), nn.Parameter(weight.contiguous())
    gradient = torch.randn(8, 4, 3, 3)
    for one in (parameter, plain):
        settings = OptimizerSection(name="adafactor", learning_rate=0.1, warmup_steps=0)
        optimizer, _ = build_optimizer(settings, [one], effective_batch=1, steps=4)
        one.grad = torch.empty_like(one).copy_(gradient)
        optimizer.step()
    assert parameter.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(parameter, plain, rtol=1e-6, atol=1e-7)
