"""The cache of what does not depend on the policy: its files, and reading single pairs of it.

A directory with::

    manifest.json              what it was computed from, and when complete the size of every shard, and digests of the
                               other files but those
    index.safetensors          which images and which caption belong to each pair, its row in the data and its scores;
                               of single images (Diffusion-KTO) a pair is one image, and whether it was liked
    data.json, broken.jsonl    what became of the rows of the data, and the ones that were left out
    unconditional.safetensors  the embedding of the empty prompt
    pairs-000000.safetensors   the images and captions that occur first in pairs 0 … 31, and so on
    draws-000000.safetensors   with ``cache.draws`` = K: the K draws of each of these pairs

An image that occurs in several pairs under one caption and mask is stored once, and so is a caption. Tensors of a
shard, one row an image or caption::

    image.latents              (n, C, h, w) float32
    image.geometry.NAME        (n, …) float32: the part of the conditioning that follows from size and crop (SDXL)
    image.mask                 (n, 1, h, w) float32, of data with masks
    image.noise, image.seed    (n, C, h, w) float32 or (n, 1) int64, PNAPO: what an image was generated from
    image.trajectory           (n, N, …), Inversion-DPO: the chain inverted by the reference; (n, 2N, …) with targets
    image.reference_pred       (n, N, …), Inversion-DPO: the reference's guided predictions there
    caption.NAME               (m, …): the rest of the conditioning; of models that edit, of each caption with a source:
                               source_latents (m, C, h, w) float32 and, where prompts see the source, empty.NAME
    draw.reference_pred        (32·K, 2, …), pair by pair, winner and loser: what the reference predicts
    draw.trajectory            (32·K, 2, …): the noisy latents, where the reference made them

A draw's random numbers are keyed by its number among those of all pairs, pair·K + k; noise follows from that and is not
stored.

Clean latents, geometry and masks are float32 always, whole numbers stay; the others are of the type ``cache.dtype``.
Files appear atomically. The header of a shard has a CRC-32 of each image, caption and draw, which is verified whenever
one is read.
"""

from __future__ import annotations

import functools
import json
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from fastinvdpo.atomic import atomic_file
from fastinvdpo.data.broken import read_summary
from fastinvdpo.errors import InvalidInput, invalid
from fastinvdpo.io import Digests, check_same, plain, sealed, unsealed
from fastinvdpo.methods.base import STREAM_STORED
from fastinvdpo.models.base import SOURCE_LATENTS
from fastinvdpo.ops import philox
from fastinvdpo.trainer.batches import EncodedPair, Tensors

if TYPE_CHECKING:
    from fastinvdpo.config import TrainConfig

PAIRS_PER_SHARD = 32
KINDS = {"pairs": ("image", "caption"), "draws": ("draw",)}
"""What the shards of each name hold."""
MANIFEST, INDEX, UNCONDITIONAL = "manifest.json", "index.safetensors", "unconditional.safetensors"
_METADATA = "fastinvdpo"
_OPEN_SHARDS = 64
_AT_ONCE = 1024  # philox takes as long for so many sample indices as for one
_OF_REFERENCE = ("method.", "cache.draws", "training.seed", "data.caption_dropout")


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds.

    Attributes:
        key: what the cache was computed from; hash: its digest, which every shard carries.
        sizes, draw_sizes: bytes of every shard, of pairs and of draws; None and nothing until all are there.
        files: remembered digests of the files in the key; digests: of the other files of the cache; frozen: of the
            text encoders and the VAE that encoded it.
    """

    key: dict[str, Any]
    hash: str
    pairs_per_shard: int
    sizes: list[int] | None = None
    draw_sizes: list[int] = field(default_factory=list)
    network_evaluations: int = 0
    files: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest of a directory, None where there is none. Raises ``InvalidInput`` for a damaged one."""
        path = directory / MANIFEST
        if not path.is_file():
            return None
        try:
            return cls(**unsealed(path))
        except (OSError, ValueError, TypeError) as error:
            problem = f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
            remedy = "name another directory, or delete that file and run fastinvdpo precompute again"
            raise invalid("cache.path", str(directory), problem, remedy) from None

    def write(self, directory: Path) -> None:
        with atomic_file(directory / MANIFEST) as temporary:
            temporary.write_text(json.dumps(sealed(asdict(self)), indent=1) + "\n")

    def complete(self, directory: Path) -> bool:
        """Whether every shard is there, with the size it was written with."""
        if self.sizes is None:
            return False
        sizes = {"pairs": self.sizes, "draws": self.draw_sizes}
        files = {shard_path(directory, i, of): size for of in sizes for i, size in enumerate(sizes[of])}
        return all(file.is_file() and file.stat().st_size == size for file, size in files.items())


def shard_path(directory: Path, shard: int, of: str = "pairs") -> Path:
    return directory / f"{of}-{shard:06d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
    """Write a file that is there completely or not at all, and has the same bytes each time it is written."""
    with atomic_file(path) as temporary:
        # In one entry: safetensors writes several in any order.
        safetensors.torch.save_file(dict(tensors), temporary, metadata={_METADATA: json.dumps(metadata)})


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the tensors of an image or caption, and of their names and types."""
    found = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, found)
    return found


def stored_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file; empty where it is missing, damaged or not ours."""
    if not path.is_file():
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as stored:
            metadata: dict[str, Any] = json.loads((stored.metadata() or {}).get(_METADATA, "{}"))
            return metadata
    except (safetensors.SafetensorError, ValueError):
        return {}


def taken_draws(seed: int, sample_index: Tensor, draws: int) -> Tensor:
    """Which of its pair's stored draws each sample index takes, int64 ``(n,)``: at every visit any, equally likely."""
    return philox.integers(seed, STREAM_STORED, sample_index, draws)


class PairIndex:
    """Which images and captions the pairs of a cache consist of.

    Attributes:
        images: int64 ``(pairs, 2)``, the numbers of winner and loser; ``(n, 1)`` of single images.
        captions, rows: int64 ``(pairs,)``, the number of the caption, and the row in the data.
        scores: float64 ``(pairs, 2)``, or None.
        ties: bool ``(pairs,)``, pairs without a winner. liked: bool ``(n,)``, of single images; None of pairs.
        first: for ``"image"``, ``"caption"`` and, if stored, ``"draw"`` the number of the first one of every shard, and
            the count at the end.
    """

    def __init__(self, directory: Path, pairs_per_shard: int = PAIRS_PER_SHARD, draws: int = 0) -> None:
        tensors: Tensors = safetensors.torch.load_file(directory / INDEX)
        self.images, self.captions, self.rows = tensors["images"], tensors["captions"], tensors["rows"]
        self.scores, self.liked = tensors.get("scores"), tensors.get("liked")
        self.ties = tensors.get("ties", torch.zeros(self.rows.shape[0], dtype=torch.bool))
        self.first = {kind: tensors[f"first_{kind}"].tolist() for kind in ("image", "caption")}
        self.shards = len(self.first["image"]) - 1
        if draws:
            self.first["draw"] = [draws * min(i * pairs_per_shard, len(self)) for i in range(self.shards + 1)]

    def __len__(self) -> int:
        return self.images.shape[0]


def reference_key(config: TrainConfig) -> dict[str, Any]:
    """What decides, beside the model, what a cache holds of the reference, by key of the configuration; empty where it
    holds nothing.
    """
    options = config.reference_options
    key = {} if options is None else {f"method.{name}": value for name, value in options.items()}
    if options is not None and config.cache.draws is not None:
        key |= {"cache.draws": config.cache.draws, "training.seed": config.training.seed}
        key |= {"data.caption_dropout": config.data.caption_dropout}
    return key


class PairCache:
    """A complete cache as a data set of encoded pairs: files are mapped, and only the rows that are drawn are read.

    Attributes:
        unconditional: the conditioning of the empty prompt, ``(1, …)``, without geometry.
        contents: digests of the pairs, and of what encoded them.
        stored: names of the tensors of an ``"image"``, of a ``"caption"`` and of a ``"draw"``.
        draws: K, how many draws of every pair are stored; 0 for none.
        has_reference: whether the reference's predictions are stored, so that training needs no reference.
        unpaired: whether it holds single images; liked: of each of them.
        network_evaluations: what the whole cache cost.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.network_evaluations = directory, manifest.network_evaluations
        self._hash, self._key = manifest.hash, manifest.key
        self.draws: int = manifest.key["cache.draws"] if manifest.draw_sizes else 0
        self.contents = {name: value for name, value in manifest.key.items() if name.startswith("data ")}
        self.contents |= manifest.frozen
        for name, digest in manifest.digests.items():
            if not (directory / name).is_file() or Digests().one(directory / name) != digest:
                problem = f"its {name} is missing, or no longer what was written"
                remedy = f"delete {MANIFEST} and {name} there, and run fastinvdpo precompute"
                raise invalid("cache.path", str(directory), problem, remedy)
        self.summary = read_summary(directory)
        self.index = PairIndex(directory, manifest.pairs_per_shard, self.draws)
        self.unconditional: dict[str, Tensor] = safetensors.torch.load_file(directory / UNCONDITIONAL)
        self._shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open)
        self._taken = functools.lru_cache(maxsize=8)(self._take)
        files = [self._shard("pairs", 0)[0], *([self._shard("draws", 0)[0]] if self.draws else [])]
        names = [name.split(".", 1) for file in files for name in list(file.keys())]
        self.stored = {kind: [name for of, name in names if of == kind] for kind in self.index.first}
        self.has_scores, self.has_masks = self.index.scores is not None, "mask" in self.stored["image"]
        self.has_reference = any("reference_pred" in names for names in self.stored.values())
        self.unpaired = self.index.liked is not None
        self.has_sources = SOURCE_LATENTS in self.stored["caption"]
        self.has_noise = not {"noise", "seed"}.isdisjoint(self.stored["image"])
        self.liked: list[bool] = [] if self.index.liked is None else self.index.liked.tolist()

    def __len__(self) -> int:
        return len(self.index)

    def fetch(self, index: int, draw: int) -> EncodedPair:
        """A pair, in the stored types. Raises ``InvalidInput`` for a shard that is damaged or not ours."""
        known = self.index
        sides = tuple(self._read("image", int(number)) for number in known.images[index])
        scores = None if known.scores is None else tuple(known.scores[index].tolist())
        caption = self._read("caption", int(known.captions[index]))
        number = None
        if self.draws:
            number = index * self.draws + self._taken(draw // _AT_ONCE)[draw % _AT_ONCE]
            drawn = self._read("draw", number)
            sides = tuple(side | {name: of[i] for name, of in drawn.items()} for i, side in enumerate(sides))
        liked = self.liked[index] if self.unpaired else None
        row, tie = int(known.rows[index]), bool(known.ties[index])
        return EncodedPair(sides, caption, scores, row, tie, liked, number)

    def check_draws(self, wanted: Mapping[str, Any]) -> None:
        """Raise ``InvalidInput`` unless the stored draws are those of :func:`reference_key`."""
        stored = {name: value for name, value in self._key.items() if name.startswith(_OF_REFERENCE)}
        if "cache.draws" in {**stored, **wanted}:
            check_same("cache.path", self.directory, stored, plain(wanted))

    def encode(self, fetched: Sequence[EncodedPair]) -> list[EncodedPair]:
        return list(fetched)

    def _take(self, block: int) -> list[int]:
        """Which of their pairs' draws as many consecutive sample indices take."""
        index = torch.arange(block * _AT_ONCE, (block + 1) * _AT_ONCE)
        taken: list[int] = taken_draws(self._key["training.seed"], index, self.draws).tolist()
        return taken

    def _read(self, kind: str, number: int) -> Tensors:
        """The tensors of an image, caption or draw."""
        first, of = self.index.first[kind], "draws" if kind == "draw" else "pairs"
        number_of_shard = bisect_right(first, number) - 1
        place, (shard, checksums) = number - first[number_of_shard], self._shard(of, number_of_shard)
        names = self.stored[kind]
        if not {f"{kind}.{name}" for name in names} <= set(shard.keys()):
            raise self._damaged(of, number_of_shard)
        tensors: Tensors = {name: shard.get_slice(f"{kind}.{name}")[place] for name in names}
        if checksum(tensors) != checksums[kind][place]:
            raise self._damaged(of, number_of_shard)
        return tensors

    def _open(self, of: str, shard: int) -> tuple[Any, dict[str, list[int]]]:
        """The file of a shard, of ``"pairs"`` or of ``"draws"``, and the checksums of what is in it."""
        path = shard_path(self.directory, shard, of)
        metadata = stored_metadata(path)
        first = {kind: self.index.first[kind] for kind in KINDS[of]}
        counts = {kind: numbers[shard + 1] - numbers[shard] for kind, numbers in first.items()}
        checksums = metadata.get("crc32", {})
        if metadata.get("hash") != self._hash or {kind: len(checksums.get(kind, [])) for kind in counts} != counts:
            raise self._damaged(of, shard)
        return safetensors.safe_open(path, framework="pt"), checksums

    def _damaged(self, of: str, shard: int) -> InvalidInput:
        path = shard_path(self.directory, shard, of)
        problem = f"its shard {path.name} is missing, damaged, or belongs to another cache"
        return invalid("cache.path", str(self.directory), problem, f"delete {path} and run fastinvdpo precompute")
