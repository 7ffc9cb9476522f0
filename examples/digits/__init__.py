"""The demo: a small diffusion model of real handwritten digits, aligned to preferences over them."""

from fastinvdpo._extras import require

for _package in ("numpy", "PIL", "pydantic", "yaml"):
    require(_package, extra="train", purpose="the demo")
