"""Differentiable layers whose output is the solution of an optimization problem."""

from implicitlayers.adjoints import Adjoint, Implicit, OneStep, Unrolled
from implicitlayers.api import argmin, fixed_point, least_squares, root
from implicitlayers.implicit import ImplicitArgmin
from implicitlayers.linear.cg import CG
from implicitlayers.linear.dense import Dense
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.problem import Kind
from implicitlayers.regularizers import Proximal, Regularizer, Ridge
from implicitlayers.solver import Solver
from implicitlayers.solvers.gradient import GradientDescent
from implicitlayers.solvers.lbfgs import LBFGS
from implicitlayers.solvers.line_search import Armijo, LineSearch
from implicitlayers.solvers.newton import Newton
from implicitlayers.status import (
    AdjointError,
    AdjointReport,
    AdjointWarning,
    ImplicitLayersError,
    MisuseError,
    Solution,
    SolveError,
    SolveWarning,
    Stats,
    Status,
)  # fmt: skip
from implicitlayers.terms import Composite

__version__ = "0.1.0"

__all__ = [
    "CG", "LBFGS", "Adjoint", "AdjointError", "AdjointReport", "AdjointWarning", "Armijo", "Composite", "Dense",
    "GradientDescent", "Implicit", "ImplicitArgmin", "ImplicitLayersError", "Kind", "LineSearch", "LinearSolution",
    "LinearSolver", "MisuseError", "Newton", "OneStep", "Operator", "Proximal", "Regularizer", "Ridge", "Solution",
    "SolveError", "SolveWarning", "Solver", "Stats", "Status", "Unrolled", "argmin", "fixed_point", "least_squares",
    "root",
]  # fmt: skip
