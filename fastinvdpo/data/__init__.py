"""Preference pairs: reading, writing and transforming them."""

from fastinvdpo._extras import require

for _package in ("pyarrow", "PIL"):
    require(_package, extra="train", purpose="preference pairs")

from fastinvdpo.data.captioned import CaptionedDataset
from fastinvdpo.data.generated import GeneratedDataset
from fastinvdpo.data.likes import LikedDataset, LikedImage
from fastinvdpo.data.pairs import Pair, PairDataset
from fastinvdpo.data.rows import PairSource
from fastinvdpo.data.sources import open_source
from fastinvdpo.data.transforms import Buckets, ImageGeometry
from fastinvdpo.data.writing import write_pairs

__all__ = [
    "Buckets", "CaptionedDataset", "GeneratedDataset", "ImageGeometry", "LikedDataset", "LikedImage", "Pair",
    "PairDataset", "PairSource", "open_source", "write_pairs",
]  # fmt: skip
