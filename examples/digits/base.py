"""The two base models of the demo: a UNet of about a million parameters trained on the digits, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastinvdpo._examples import SCHEDULER
from fastinvdpo._examples.digits import digits
from fastinvdpo._extras import require
from fastinvdpo.errors import invalid
from fastinvdpo.models.digits import EMBEDDING_DIM, embed_prompts

WEIGHTS = Path(__file__).parent / "weights"
# Share of the captions that name another digit: what separates the two base models.
CAPTION_NOISE = {"clean": 0.0, "noisy": 0.42}
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.995
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": EMBEDDING_DIM,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def train_base(
    captions: str,
    directory: str | Path,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Path:
    """Train a base model on the 1,497 training scans and save it in fp16 to ``directory``; returns the directory.

    ``captions`` is ``"clean"`` or ``"noisy"`` (42 % of the captions name another digit, so that without guidance
    the model shows the prompted digit about half of the time). Noise prediction at uniform timesteps, AdamW under a
    one-cycle schedule; the exponential average of the weights is what is kept. ``report(step, loss)`` is called
    after every hundredth step.
    """
    if captions not in CAPTION_NOISE:
        raise invalid(
            "captions", captions, "is not a base model of the demo", f"choose one of {', '.join(CAPTION_NOISE)}"
        )
    diffusers = require("diffusers", extra="train", purpose="training the demo's base model")
    generator = torch.Generator().manual_seed(seed)
    train, _ = digits.load_splits()
    images = torch.from_numpy(train.images).float().div(127.5).sub(1).unsqueeze(1)
    conditions = embed_prompts(_captions(train.labels, CAPTION_NOISE[captions], seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(**UNET)
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=0.0)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(1, steps + 1):
        index = torch.randint(len(images), (batch_size,), generator=generator)
        timesteps = torch.randint(SCHEDULER["num_train_timesteps"], (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *images.shape[1:], generator=generator)
        kept = torch.rand(batch_size, 1, 1, generator=generator) >= CAPTION_DROPOUT
        noisy = scheduler.add_noise(images[index], noise, timesteps)
        predicted = unet(noisy, timesteps, conditions[index] * kept).sample
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        one_cycle.step()
        average.update_parameters(unet)
        if report is not None and step % 100 == 0:
            report(step, loss.item())
    directory = Path(directory)
    kept_unet: Any = average.module
    kept_unet.half().save_pretrained(directory / "unet", safe_serialization=True)
    scheduler.save_pretrained(directory / "scheduler")
    return directory


def _captions(labels: np.ndarray, noise: float, seed: int) -> list[str]:
    """One caption an image, the same for the whole training; a share ``noise`` of them names one of the nine others."""
    random = np.random.RandomState(seed)
    wrong = random.rand(len(labels)) < noise
    shift = random.randint(1, 10, size=len(labels))
    return [digits.prompt_of(label) for label in np.where(wrong, (labels + shift) % 10, labels)]
