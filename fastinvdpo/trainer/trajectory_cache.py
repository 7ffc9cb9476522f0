"""Inversion-DPO's reference trajectories, computed once before training and kept in the output directory.

They depend on the reference, the data and the inversion alone. They are stored in shards of safetensors, each written
atomically with a fingerprint of all three; a shard whose fingerprint matches is used again, so a killed run continues
where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastinvdpo._extras import require
from fastinvdpo.objectives import InversionDPO
from fastinvdpo.trainer.atomic import atomic_file
from fastinvdpo.trainer.batches import BatchBuilder, EncodedPair, Side
from fastinvdpo.trajectories import Network

SHARD_IMAGES = 128
# Options of the objective that do not change a trajectory.
_UNRELATED = ("name", "beta", "utility", "label_smoothing", "timesteps_per_step")

Item = tuple[str, Side]  # caption, image


class TrajectoryCache:
    """Trajectories of every distinct (image, caption) of a data set, in host memory mapped from files.

    Args:
        directory: where the shards are.
        fingerprint: what :func:`fingerprint` gave; shards of another one are computed again.
        chunk: images per inversion. Fixed, since the results of a network may differ in the last bit with the batch
            size.
    """

    def __init__(self, directory: Path, fingerprint: str, chunk: int, log: Callable[[str], None]) -> None:
        self._directory, self._fingerprint, self._chunk, self._log = directory, fingerprint, chunk, log
        self._where: dict[str, tuple[int, int]] = {}
        self._shards: list[Tensor] = []

    def compute(
        self, items: Sequence[Item], invert: Callable[[Sequence[Item]], Tensor], *, rank: int = 0, processes: int = 1
    ) -> None:
        """Write the shards that are missing or stale; process ``rank`` takes every ``processes``-th."""
        self._directory.mkdir(parents=True, exist_ok=True)
        starts = list(range(0, len(items), SHARD_IMAGES))
        stale = [shard for shard in range(len(starts)) if not self._is_valid(shard)]
        if stale and any(self._path(shard).exists() for shard in stale):
            self._log("The cached trajectories belong to another model, data set or inversion; computing them again.")
        elif stale:
            self._log(f"Inverting {len(items)} images once, into {self._directory}.")
        else:
            self._log(f"Using the {len(items)} cached trajectories in {self._directory}.")
        for shard in stale:
            if shard % processes == rank:
                self._write(shard, items[starts[shard] : starts[shard] + SHARD_IMAGES], invert)

    def open(self, items: Sequence[Item]) -> None:
        """Map the shards; call it when all processes have computed theirs."""
        safetensors = require("safetensors.torch", extra="train", purpose="reading cached trajectories")
        shards = range(0, len(items), SHARD_IMAGES)
        self._shards = [safetensors.load_file(self._path(shard))["trajectory"] for shard in range(len(shards))]
        self._where = {side.key: divmod(i, SHARD_IMAGES) for i, (_, side) in enumerate(items)}

    def lookup(self, keys: Sequence[str]) -> Tensor:
        """Trajectories ``(n, N, …)`` of the images with these keys, on the host."""
        places = [self._where[key] for key in keys]
        return torch.stack([self._shards[shard][i] for shard, i in places])

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard:06d}.safetensors"

    def _is_valid(self, shard: int) -> bool:
        safetensors = require("safetensors", extra="train", purpose="reading cached trajectories")
        if not self._path(shard).is_file():
            return False
        try:
            with safetensors.safe_open(self._path(shard), framework="pt") as stored:
                metadata = stored.metadata() or {}
        except safetensors.SafetensorError:
            return False  # not written by us, or damaged: computed again
        return bool(metadata.get("fingerprint") == self._fingerprint)

    def _write(self, shard: int, items: Sequence[Item], invert: Callable[[Sequence[Item]], Tensor]) -> None:
        safetensors = require("safetensors.torch", extra="train", purpose="caching trajectories")
        chunks = [invert(items[start : start + self._chunk]).cpu() for start in range(0, len(items), self._chunk)]
        with atomic_file(self._path(shard)) as temporary:
            metadata = {"fingerprint": self._fingerprint}
            safetensors.save_file({"trajectory": torch.cat(chunks)}, temporary, metadata=metadata)


def distinct_items(pairs: Sequence[EncodedPair]) -> list[Item]:
    """Every distinct (image, caption) in the order of its first occurrence."""
    items: dict[str, Item] = {}
    for pair in pairs:
        for side in (pair.winner, pair.loser):
            items.setdefault(side.key, (pair.caption, side))
    return list(items.values())


def inverter(
    objective: InversionDPO, reference: Network, builder: BatchBuilder, device: torch.device
) -> Callable[[Sequence[Item]], Tensor]:
    """The function that inverts a chunk of items with the reference."""
    guided = objective.guidance_scale != 1

    def invert(items: Sequence[Item]) -> Tensor:
        geometry = [side.geometry for _, side in items]
        conditional = builder.embed([caption for caption, _ in items], geometry)
        unconditional = builder.embed([""] * len(items), geometry) if guided else None
        latents = torch.stack([side.latents.to(device) for _, side in items])
        return objective.reference_trajectory(reference, latents, conditional, unconditional)

    return invert


def fingerprint(
    weights: str,
    scheduler_config: Mapping[str, Any],
    options: Mapping[str, Any],
    items: Sequence[Item],
    probe: Mapping[str, Tensor],
) -> str:
    """SHA-256 of everything a trajectory depends on.

    Args:
        weights: digest of the reference's weights, from :func:`tensors_digest`.
        scheduler_config: the noise schedule's configuration.
        options: options of the objective.
        items: the images; their keys and the first one's latent (which stands for the image encoder) enter.
        probe: embedding of some prompt, which stands for the text encoder.
    """
    related = {key: value for key, value in options.items() if key not in _UNRELATED}
    parts = [
        weights,
        json.dumps([related, dict(scheduler_config)], sort_keys=True, default=str),
        tensors_digest({**probe, "latents": items[0][1].latents}),
        *(side.key for _, side in items),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
