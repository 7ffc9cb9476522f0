"""Preference pairs: reading, writing and transforming them."""

from fastinvdpo.data.buckets import Buckets
from fastinvdpo.data.pairs import Pair, PairDataset
from fastinvdpo.data.source import PairSource
from fastinvdpo.data.sources import open_source
from fastinvdpo.data.transforms import ImageGeometry
from fastinvdpo.data.writing import write_pairs

__all__ = ["Buckets", "ImageGeometry", "Pair", "PairDataset", "PairSource", "open_source", "write_pairs"]
