"""Networks with random weights, and pairs of random latents, for whole training steps: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.data import ImageGeometry, Pair
from fastinvdpo.data.pairs import Side
from fastinvdpo.diffusion.schedule import NoiseSchedule
from fastinvdpo.models.stable_diffusion import StableDiffusionModel


@dataclass(frozen=True)
class Size:
    """A network and its inputs.

    Attributes:
        unet: configuration of diffusers' ``UNet2DConditionModel``.
        latents: shape of one latent.
        prompt: ``(tokens, width)`` of a prompt's embedding.
        pooled: width of SDXL's pooled embedding; 0 where there is none.
        mixed_precision: as in ``training.mixed_precision``.
        gpu: whether only a GPU can do it in any reasonable time.
        in_turn: whether networks and optimizers of both sides, the released one and ours, fit into 80 GB together.
    """

    unet: dict[str, Any]
    latents: tuple[int, int, int]
    prompt: tuple[int, int]
    pooled: int = 0
    mixed_precision: str = "no"
    gpu: bool = False
    in_turn: bool = True


SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}

# As their configuration files publish them: what differs from the defaults of diffusers' class.
_SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


SIZES = {
    "tiny": Size(  # 5.7 million parameters
        {
            "sample_size": 32,
            "block_out_channels": (64, 128),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "norm_num_groups": 16,
        },
        (4, 32, 32),
        (8, 64),
    ),
    "sd15": Size(  # 512 x 512 pixels
        _SD15_UNET,
        (4, 64, 64),
        (77, 768),
        mixed_precision="bf16",
        gpu=True,
    ),
    "sdxl": Size(  # 1024 x 1024 pixels
        _SDXL_UNET,
        (4, 128, 128),
        (77, 2048),
        pooled=1280,
        mixed_precision="bf16",
        gpu=True,
        in_turn=False,
    ),
}


class RandomModel(StableDiffusionModel):
    """A UNet with random weights, the same each time; an image's pixel is the number of a random latent."""

    def __init__(self, size: Size) -> None:
        diffusers = require("diffusers", extra="train", purpose="the networks to measure")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **size.unet).eval()
        self._size, self.is_sdxl, self.latent_shape = size, size.pooled > 0, size.latents
        self.scheduler_config = dict(SCHEDULER)
        self.schedule = NoiseSchedule.from_config(SCHEDULER)
        self.image_size = (8 * size.latents[1], 8 * size.latents[2])

    def frozen_modules(self) -> tuple[torch.nn.Module, ...]:
        return ()

    def encode_images(self, images: Sequence[Any], posterior: Tensor | None = None) -> Tensor:
        return torch.stack([self._random(7 + image.getpixel((0, 0)), self._size.latents) for image in images])

    def encode_prompts(self, prompts: Sequence[str], *, geometry: Any = None) -> dict[str, Tensor]:
        seeds = [len(prompt) for prompt in prompts]
        conditioning = {"encoder_hidden_states": torch.stack([self._random(seed, self._size.prompt) for seed in seeds])}
        if self.is_sdxl:
            conditioning["text_embeds"] = torch.stack([self._random(seed, (self._size.pooled,)) for seed in seeds])
            row = [*self.image_size, 0, 0, *self.image_size]
            conditioning["time_ids"] = torch.tensor([row] * len(seeds), dtype=torch.float32, device=self.device)
        return conditioning

    def _random(self, seed: int, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device)


class RandomPairs:
    """So many pairs with scores, as the trainer's data set."""

    random_flip, center_crop, has_scores = False, True, True

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return self._pairs

    def pair(self, i: int, draw: int) -> Pair:
        image = require("PIL.Image", extra="train", purpose="the pairs to measure with")
        geometry = ImageGeometry((0, 0), (0, 0), (0, 0))
        sides = tuple(Side(image.new("I", (1, 1), 2 * i + side), geometry, f"{i} {side}") for side in (0, 1))
        return Pair(sides, "x" * (1 + i), i, (0.25, 0.20 + 0.01 * (i % 3)))
