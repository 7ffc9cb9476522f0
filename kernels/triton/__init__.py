"""Triton kernels: one module for each op of ``fastinvdpo/ops``, holding its jit functions and its launchers."""
