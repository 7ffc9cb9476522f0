"""Benchmarks and records of the fused ops; an installed package holds them as ``fastinvdpo._benchmarks``."""
