"""MARS (arXiv 2407.07614): auto-regressive text to image on a frozen language model. See docs/mars.md."""

from fastinvdpo.models.mars.checkpoint import load_mars, save_mars
from fastinvdpo.models.mars.images import decode_codes, encode_images
from fastinvdpo.models.mars.model import MarsConfig, MarsModel
from fastinvdpo.models.mars.pipeline import MarsPipeline
from fastinvdpo.models.mars.sampling import Sampling, caption_images, generate_images

__all__ = [
    "MarsConfig",
    "MarsModel",
    "MarsPipeline",
    "Sampling",
    "caption_images",
    "decode_codes",
    "encode_images",
    "generate_images",
    "load_mars",
    "save_mars",
]
