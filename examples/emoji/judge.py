"""The demo's judges: two small networks that only ever saw the designers' own drawings.

    python -m fastinvdpo._examples.emoji.judge [--output judge.safetensors]

trains them (a few minutes on one core) and prints how well they do on emoji that they have not seen. One tells who drew
an image, from all emoji but the held-out ones. The other lays an emoji's two drawings next to each other and all other
emoji apart: the space in which the nearest real emoji to a sample, and the Fréchet distance, are found.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastinvdpo._examples.emoji.data import Emoji, load_emoji, saturation, split
from fastinvdpo._extras import require

WEIGHTS = Path(__file__).with_name("judge.safetensors")
DIMENSIONS = 64
_TEMPERATURE = 0.07


def small_network(outputs: int) -> nn.Sequential:
    """A convolutional network of 0.2 million parameters, from images ``(n, 3, 32, 32)`` in [-1, 1] to ``outputs``."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 96), (96, 128)):
        stride = 1 if before == 3 else 2
        convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, outputs))


@dataclass(frozen=True)
class Verdict:
    """What the judge found in ``n`` images; ``ranks`` and ``rewards`` ``(n,)``, a rank of 1 is the prompted emoji."""

    rewards: np.ndarray
    ranks: np.ndarray
    noto: float
    saturation: float
    frechet: float

    def as_dict(self) -> dict[str, float]:
        """The entries of summary.json."""
        return {
            "reward": float(self.rewards.mean()),
            "top1": float((self.ranks <= 1).mean()),
            "top5": float((self.ranks <= 5).mean()),
            "noto": self.noto,
            "saturation": self.saturation,
            "frechet": self.frechet,
        }


class Judge:
    """The two networks, and the features of all real drawings, those of ``emoji``."""

    def __init__(self, emoji: Emoji, weights: Path | None = None) -> None:
        stored = require("safetensors.torch", extra="train", purpose="reading the demo's judges").load_file(
            weights or WEIGHTS
        )
        self._designer, self._eyes = small_network(1), small_network(DIMENSIONS)
        for name, network in (("designer", self._designer), ("eyes", self._eyes)):
            state = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
            network.load_state_dict(state)
            network.eval()
        self._real = np.stack([self.features(images) for images in emoji.images])
        self._places = {name: place for place, name in enumerate(emoji.names)}
        held_out = split()[1]
        right = [(self.noto_logits(images[held_out]) > 0) == is_noto for is_noto, images in enumerate(emoji.images)]
        self.held_out_accuracy = float(np.mean(right))

    def noto_logits(self, images: np.ndarray) -> np.ndarray:
        """How sure the judge is that Noto's designer drew each image, float64 ``(n,)``; positive for Noto."""
        return _forward(self._designer, images)[:, 0]

    def features(self, images: np.ndarray) -> np.ndarray:
        """Points on the unit sphere, float64 ``(n, DIMENSIONS)``, of uint8 images ``(n, 32, 32, 3)``."""
        found = _forward(self._eyes, images)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def likeness(self, images: np.ndarray) -> np.ndarray:
        """Cosine of each image and the nearer drawing of each emoji, ``(n, emoji)``."""
        return np.max(self.features(images) @ self._real.transpose(0, 2, 1), axis=0)

    def judge(self, preference: str, images: np.ndarray, prompts: Sequence[str]) -> Verdict:
        """Reward of every image under a preference, fidelity to the prompts, and distance to the real drawings.

        The reward is the designer's logit under ``noto`` (negated: ``twemoji``), :func:`saturation` under ``vivid``,
        and the likeness to the prompted emoji under ``prompt``.
        """
        logits, colors, likeness = self.noto_logits(images), saturation(images), self.likeness(images)
        prompted = np.array([self._places[prompt] for prompt in prompts])
        own = likeness[np.arange(len(images)), prompted]
        rewards = {"noto": logits, "twemoji": -logits, "vivid": colors, "prompt": own}[preference]
        ranks = 1 + (likeness > own[:, None]).sum(1)
        distance = frechet_distance(self.features(images), self._real.reshape(-1, DIMENSIONS))
        return Verdict(rewards, ranks, float((logits > 0).mean()), float(colors.mean()), distance)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features, ``(n, d)`` and ``(m, d)``.

    ``|mu_1 − mu_2|² + tr(S_1 + S_2 − 2 (S_1^½ S_2 S_1^½)^½)`` (Dowson and Landau, 1982), the formula of FID. It
    depends on the number of samples, so compare values only for equal n and m.
    """
    one, two = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ two @ root).clip(min=0)
    shift = first.mean(0) - second.mean(0)
    return float(shift @ shift + np.trace(one) + np.trace(two) - 2 * np.sqrt(cross).sum())


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 ``(n, h, w, 3)`` as float32 ``(n, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32) / 127.5 - 1)


@torch.no_grad()
def _forward(network: nn.Module, images: np.ndarray) -> np.ndarray:
    parts = [network(part) for part in to_tensor(images).split(256)]
    found: np.ndarray = torch.cat(parts).double().numpy()
    return found


def train_judges(
    emoji: Emoji, seen: np.ndarray, *, steps: int = 500, batch_size: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of both networks, in fp16: the designer's from a step's ``batch_size`` of the emoji at the places
    ``seen``, the features' from as many of all, each in both drawings, changed by :func:`augment`.
    """
    generator = torch.Generator().manual_seed(seed)
    drawings = torch.stack([to_tensor(images) for images in emoji.images])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks: dict[str, Any] = {"designer": small_network(1), "eyes": small_network(DIMENSIONS)}
    places = {"designer": torch.from_numpy(seen), "eyes": torch.arange(len(emoji))}
    stored = {}
    for name, network in networks.items():
        network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            chosen = places[name][torch.randint(len(places[name]), (batch_size,), generator=generator)]
            images = augment(drawings[:, chosen].flatten(0, 1), generator)
            found = network(images.contiguous(memory_format=torch.channels_last))
            if name == "designer":
                is_noto = torch.arange(2).repeat_interleave(batch_size).float()
                loss = functional.binary_cross_entropy_with_logits(found[:, 0], is_noto)
            else:
                first, second = functional.normalize(found).split(batch_size)
                loss = _contrast(first, second, chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        state = network.eval().state_dict()
        for key, value in state.items():
            stored[f"{name}.{key}"] = (value.half() if value.is_floating_point() else value).contiguous()
    return stored


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts by up to two pixels, blur, noise and shades, each of random strength: what a decoder may do."""
    n = len(images)

    def uniform() -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator)

    padded = functional.pad(images, (2, 2, 2, 2), value=1.0)
    x, y = torch.randint(5, (2, 1), generator=generator).flatten().tolist()
    shifted = padded[:, :, y : y + images.shape[2], x : x + images.shape[3]]
    smooth = functional.avg_pool2d(functional.pad(shifted, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurred = torch.lerp(shifted, smooth, uniform())
    shaded = (blurred - 1) * (1 + 0.2 * (uniform() - 0.5)) + 1
    return shaded + 0.15 * uniform() * torch.randn(images.shape, generator=generator)


def _contrast(first: Tensor, second: Tensor, emoji: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al., 2018, equation 4), both ways; an emoji that is there twice is no negative."""
    similar = first @ second.T / _TEMPERATURE
    twice = (emoji[:, None] == emoji) & ~torch.eye(len(emoji), dtype=torch.bool)
    similar = similar.masked_fill(twice, -torch.inf)
    target = torch.arange(len(emoji))
    return functional.cross_entropy(similar, target) + functional.cross_entropy(similar.T, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the judges, and say what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)
    emoji = load_emoji()
    stored = train_judges(emoji, split()[0], steps=options.steps)
    require("safetensors.torch", extra="train", purpose="writing the judges").save_file(stored, options.output)
    judge = Judge(emoji, options.output)
    print(f"designer of held-out emoji: {judge.held_out_accuracy:.3f}")


if __name__ == "__main__":
    main()
