"""Placeholder until the sparse kernels land: the reference backend."""

from sparsight.kernels.reference import accumulate, combine, dots, select

__all__ = ["accumulate", "combine", "dots", "select"]
