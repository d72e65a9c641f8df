"""Differentiable layers whose output is the solution of an optimization problem."""

from implicitlayers.adjoints import Adjoint, Implicit, OneStep, Unrolled
from implicitlayers.api import argmin, fixed_point, least_squares, root
from implicitlayers.implicit import ImplicitArgmin
from implicitlayers.linear.auto import Auto
from implicitlayers.linear.bicgstab import BiCGStab
from implicitlayers.linear.cg import CG
from implicitlayers.linear.dense import Dense
from implicitlayers.linear.gmres import GMRES
from implicitlayers.linear.minres import MINRES
from implicitlayers.linear.neumann import Neumann
from implicitlayers.linear.normal import LSMR, NormalCG
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.preconditioner import Jacobi, LBFGSPreconditioner, Nystrom, Preconditioner
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.problem import Kind
from implicitlayers.quadratic import PrimalDual, quadratic_program
from implicitlayers.regularizers import Proximal, Regularizer, Ridge
from implicitlayers.solver import Solver
from implicitlayers.solvers.gradient import GradientDescent
from implicitlayers.solvers.interior_point import InteriorPoint
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
)
from implicitlayers.terms import Composite

__version__ = "0.1.0"

__all__ = [
    "CG", "GMRES", "LBFGS", "LSMR", "MINRES", "Adjoint", "AdjointError", "AdjointReport", "AdjointWarning", "Armijo",
    "Auto", "BiCGStab", "Composite", "Dense", "GradientDescent", "Implicit", "ImplicitArgmin", "ImplicitLayersError",
    "InteriorPoint", "Jacobi", "Kind", "LBFGSPreconditioner", "LineSearch", "LinearSolution", "LinearSolver",
    "MisuseError", "Neumann", "Newton", "NormalCG", "Nystrom", "OneStep", "Operator", "Preconditioner", "PrimalDual",
    "Proximal", "Regularizer", "Ridge", "Solution", "SolveError", "SolveWarning", "Solver", "Stats", "Status",
    "Unrolled", "argmin", "fixed_point", "least_squares", "quadratic_program", "root",
]  # fmt: skip
