"""Hypothesis strategies for tensors, trees, matrices, problems and layers; they shrink to small and readable ones."""

from implicitlayers.testing.strategies.problems import (
    Example,
    Problem,
    contractions,
    layers,
    strongly_convex_problems,
)
from implicitlayers.testing.strategies.tensors import matrices, spd_matrices, tensors, trees

__all__ = [
    "Example", "Problem", "contractions", "layers", "matrices", "spd_matrices", "strongly_convex_problems", "tensors",
    "trees",
]  # fmt: skip
