"""The testing kit: is the gradient of a differentiable layer right? For layers of any library, or written by hand."""

from implicitlayers.testing.finite_difference import finite_difference
from implicitlayers.testing.gradients import assert_gradients_match, compare_gradients
from implicitlayers.testing.report import Comparison, GradientMismatch, GradientReport, InconclusiveGradients

__all__ = [
    "Comparison", "GradientMismatch", "GradientReport", "InconclusiveGradients", "assert_gradients_match",
    "compare_gradients", "finite_difference",
]  # fmt: skip
