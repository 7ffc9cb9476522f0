"""Judging a model: deterministic sampling, inversion, statistics, reports."""

from fastinvdpo._extras import require

for _package in ("numpy", "PIL", "pyarrow", "safetensors"):
    require(_package, extra="train", purpose="evaluation")

from fastinvdpo.evaluation.in_training import EvaluationCallback

__all__ = ["EvaluationCallback"]
