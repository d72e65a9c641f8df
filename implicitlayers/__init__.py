"""Differentiable layers whose output is the solution of an optimization problem."""

from implicitlayers import nn
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
from implicitlayers.linear_equation import linear_solve
from implicitlayers.problem import Kind
from implicitlayers.quadratic import PrimalDual, quadratic_program
from implicitlayers.regularizers import (
    Box,
    ElasticNet,
    GroupLasso,
    L1Ball,
    L2Ball,
    Lasso,
    NonNegative,
    Penalty,
    Prox,
    Proximal,
    Regularizer,
    Ridge,
    Simplex,
)
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.adam import Adam
from implicitlayers.solvers.fixed_point import Anderson, Broyden, FixedPointIteration
from implicitlayers.solvers.given import BestSoFar, Given
from implicitlayers.solvers.gradient import GradientDescent
from implicitlayers.solvers.interior_point import InteriorPoint
from implicitlayers.solvers.lbfgs import LBFGS
from implicitlayers.solvers.least_squares import GaussNewton, LevenbergMarquardt
from implicitlayers.solvers.line_search import Armijo, Fixed, LineSearch, StrongWolfe
from implicitlayers.solvers.newton import Newton
from implicitlayers.solvers.proximal import ProximalGradient
from implicitlayers.solvers.scipy_method import Scipy
from implicitlayers.solvers.torch_optimizer import TorchOptimizer
from implicitlayers.status import (
    RUNNING,
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
    "CG", "GMRES", "LBFGS", "LSMR", "MINRES", "RUNNING", "Adam", "Adjoint", "AdjointError", "AdjointReport",
    "AdjointWarning", "Anderson", "Armijo", "Auto", "BestSoFar", "BiCGStab", "Box", "Broyden", "Composite", "Dense",
    "ElasticNet", "Fixed", "FixedPointIteration", "GaussNewton", "Given", "GradientDescent", "GroupLasso", "Implicit",
    "ImplicitArgmin", "ImplicitLayersError", "InteriorPoint", "Jacobi", "Kind", "L1Ball", "L2Ball",
    "LBFGSPreconditioner", "Lasso", "LevenbergMarquardt", "LineSearch", "LinearSolution", "LinearSolver", "MisuseError",
    "Neumann", "Newton", "NonNegative", "NormalCG", "Nystrom", "OneStep", "Operator", "Penalty", "Preconditioner",
    "PrimalDual", "Progress", "Prox", "Proximal", "ProximalGradient", "Regularizer", "Ridge", "Scipy", "Simplex",
    "Solution", "SolveError", "SolveWarning", "Solver", "Stats", "Status", "StrongWolfe", "TorchOptimizer", "Unrolled",
    "argmin", "fixed_point", "least_squares", "linear_solve", "nn", "quadratic_program", "root",
]  # fmt: skip
