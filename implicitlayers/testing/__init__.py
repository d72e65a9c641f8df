"""The testing kit: is the gradient of a differentiable layer right? For layers of any library, or written by hand.

`assert_gradients_match` asks it of one layer at one point, `check_layer` of many points that Hypothesis draws from
`strategies`; `problems` are closed forms to hold a solver against. Needs ``implicitlayers[testing]``.
"""

from implicitlayers.testing import problems, strategies
from implicitlayers.testing.checks import Checked, check_layer
from implicitlayers.testing.finite_difference import finite_difference
from implicitlayers.testing.gradients import assert_gradients_match, compare_gradients
from implicitlayers.testing.linear_checks import check_linear_solver
from implicitlayers.testing.report import Comparison, GradientMismatch, GradientReport, InconclusiveGradients
from implicitlayers.testing.solver_checks import check_adjoint, check_solver

__all__ = [
    "Checked", "Comparison", "GradientMismatch", "GradientReport", "InconclusiveGradients", "assert_gradients_match",
    "check_adjoint", "check_layer", "check_linear_solver", "check_solver", "compare_gradients", "finite_difference",
    "problems", "strategies",
]  # fmt: skip
