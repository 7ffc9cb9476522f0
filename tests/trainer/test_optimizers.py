"""Adafactor as the released codes set it for SDXL, and AdamW with 8-bit moments from bitsandbytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastinvdpo.config.sections import OptimizerSection
from fastinvdpo.errors import InvalidInput, MissingExtra
from fastinvdpo.trainer import train
from fastinvdpo.trainer.state import build_optimizer, check_8bit
from tests.trainer import tiny

try:
    import bitsandbytes
except ImportError as error:
    bitsandbytes, REASON = None, f"bitsandbytes cannot be imported: {error}"
else:
    REASON = ""
needs_bitsandbytes = pytest.mark.skipif(bitsandbytes is None, reason=REASON)
RATE, DECAY = 0.01, 0.1


def _by_the_formula(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5) at a given learning rate, decay 1 - t^-0.8, clipped at 1; the
    rate rises in two steps.
    """
    weight, rows, columns = weight.double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        rate = RATE * min(1.0, (step - 1) / 2)
        keep, square = 1 - step**-0.8, gradient.double().square() + 1e-30
        if weight.ndim > 1:
            rows = keep * rows + (1 - keep) * square.mean(-1, keepdim=True)
            columns = keep * columns + (1 - keep) * square.mean(-2, keepdim=True)
            update = gradient.double() / (rows * columns / rows.mean(-2, keepdim=True)).sqrt()  # type: ignore[union-attr]
        else:
            rows = keep * rows + (1 - keep) * square
            update = gradient.double() / rows.sqrt()
        update = update / update.square().mean().sqrt().clamp(min=1.0)
        weight = weight * (1 - DECAY * rate) - rate * update
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
        name="adafactor", learning_rate=RATE / 8, scale_lr=True, weight_decay=DECAY, warmup_steps=2
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


def test_adamw8bit_without_the_extra_or_a_kernel_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = tiny.config(workspace, data={"path": "/nowhere"}, optimizer={"name": "adamw8bit"})
    with pytest.raises(MissingExtra, match=r"optimizer\.name = adamw8bit needs .*fastinvdpo\[bnb\]"):
        train(config, progress=False)
    with pytest.raises(InvalidInput, match=r"adamw8bit.*no kernels for meta in the installed bitsandbytes"):
        check_8bit(torch.optim.AdamW, torch.device("meta"))


SETTINGS = OptimizerSection(name="adamw8bit", learning_rate=0.01, warmup_steps=0, weight_decay=0.1)


@needs_bitsandbytes
@pytest.mark.parametrize("size", [4096, 5000, 65 * 77])
def test_adamw8bit_is_adamw_with_rounded_moments(size: int) -> None:
    """Each update is AdamW's, in float64, from the moments that the one before left. A moment is a value of the code
    times the largest of its block of 256: the nearest one, as far as a table of 2^16 cells over [-1, 1] tells, in which
    the kernel for CPUs looks it up.
    """
    generator = torch.Generator().manual_seed(size)
    weight = nn.Parameter(torch.randn(size, generator=generator))
    optimizer, _ = build_optimizer(SETTINGS, [weight], effective_batch=1, steps=5)
    beta1, beta2 = SETTINGS.beta1, SETTINGS.beta2
    means = [torch.zeros(size, dtype=torch.float64) for _ in range(2)]
    for step in range(1, 5):
        before = weight.detach().double()
        sizes = 10 ** (4 * torch.rand(size, generator=generator) - 4)
        weight.grad = sizes * torch.randn(size, generator=generator)
        gradient = weight.grad.double()
        optimizer.step()
        for mean, beta, power in zip(means, (beta1, beta2), (1, 2), strict=True):
            mean.mul_(beta).add_((1 - beta) * gradient**power)
        update = (means[0] / (1 - beta1**step)) / ((means[1] / (1 - beta2**step)).sqrt() + SETTINGS.epsilon)
        expected = before * (1 - 0.01 * 0.1) - 0.01 * update
        # A few roundings of float32 in each part; 1 - β2 as float32 has it is off by 2^-24 / (1 - β2) of itself.
        allowed = 8 * 2**-24 * before.abs() + 0.01 * update.abs() * (8 * 2**-24 + 2**-24 / (1 - beta2))
        assert ((weight.detach().double() - expected).abs() <= allowed).all()
        state = optimizer.state[weight]
        for which, mean in enumerate(means, 1):
            code, indices = state[f"qmap{which}"].double(), state[f"state{which}"].long()
            largest = nn.functional.pad(mean.abs(), (0, -size % 256)).view(-1, 256).amax(1)
            assert ((state[f"absmax{which}"].double() - largest).abs() <= 4 * 2**-24 * largest).all()
            scale = state[f"absmax{which}"].double().repeat_interleave(256)[:size]
            distances = ((mean / scale)[:, None] - code).abs()
            taken = distances.gather(1, indices[:, None])[:, 0]
            assert (taken <= distances.amin(1) + 2**-15 + 8 * 2**-24).all()
            mean.copy_(code[indices] * scale)


@needs_bitsandbytes
def test_a_wrong_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    update = functional.optimizer_update_8bit_blockwise

    def misplaced(*arguments: Any, **options: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.shape == (20,):  # the largest of each block
                argument.copy_(argument.roll(1))
        update(*arguments, **options)

    build_optimizer(SETTINGS, [nn.Parameter(torch.zeros(8))], effective_batch=1, steps=5)
    monkeypatch.setattr(functional, "optimizer_update_8bit_blockwise", misplaced)
    with pytest.raises(InvalidInput, match=r"adamw8bit.*: makes other updates than AdamW on cpu .*choose adamw"):
        build_optimizer(SETTINGS, [nn.Parameter(torch.zeros(8))], effective_batch=1, steps=5)
