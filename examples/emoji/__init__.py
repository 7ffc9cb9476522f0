"""The demo on emoji: a small Stable Diffusion, and what is needed to train, align and judge it."""

from fastinvdpo._extras import require

for _package in ("numpy", "PIL", "pydantic", "yaml"):
    require(_package, extra="train", purpose="the demo")
