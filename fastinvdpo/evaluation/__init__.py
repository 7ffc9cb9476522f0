"""Judging a model: deterministic sampling, inversion, statistics, reports."""

from fastinvdpo._extras import require

require("numpy", extra="train", purpose="evaluation")

from fastinvdpo.evaluation.in_training import EvaluationCallback

__all__ = ["EvaluationCallback"]
