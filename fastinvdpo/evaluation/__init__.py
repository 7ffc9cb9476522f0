"""Judging a model: deterministic sampling, inversion, statistics, reports."""
