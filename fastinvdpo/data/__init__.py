"""Preference pairs: reading, writing and transforming them."""

from fastinvdpo.data.pairs import Pair, PairDataset
from fastinvdpo.data.transforms import ImageGeometry
from fastinvdpo.data.writing import write_pairs

__all__ = ["ImageGeometry", "Pair", "PairDataset", "write_pairs"]
