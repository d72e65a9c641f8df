"""The linear system of a derivative, A u = v or Aᵀu = v with A = ∂F/∂x, as an optimality condition of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.func import vmap

from implicitlayers.inexact import Inexact, solve_to_error
from implicitlayers.linear.operator import Late, Operator
from implicitlayers.linear.preconditioner import LBFGSPreconditioner
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.problem import Bound, Condition, Lanes, Outcome, Posed, Term, aligned
from implicitlayers.status import (
    AdjointError,
    AdjointReport,
    AdjointWarning,
    Policy,
    Status,
    describe_failures,
    failed,
    warn_caller,
)

__all__ = ["AdjointRule", "Gathered", "LinearSystem", "RightHandSide", "WarmStart"]


class WarmStart:
    """The last solution of each shape of linear system, kept from one call to the next."""

    def __init__(self) -> None:
        self._last: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}

    def start(self, like: Tensor) -> Tensor | None:
        """Where to start a system with a right-hand side like this; None where none was solved yet."""
        return self._last.get((like.shape, like.dtype, like.device))

    def keep(self, u: Tensor, status: Tensor) -> None:
        """Remember a solution; a failed lane starts from zero next time."""
        usable = torch.where(failed(status).unsqueeze(-1), torch.zeros_like(u), u)
        self._last[u.shape, u.dtype, u.device] = usable.detach()


@dataclass
class Gathered:
    """What the forward solve of one call leaves for its derivative.

    Attributes:
        pairs: steps and changes of the gradient ``[*lanes, n]``, the oldest first, where the solver keeps them.
    """

    pairs: Sequence[tuple[Tensor, Tensor]] = ()


@dataclass(frozen=True)
class AdjointRule:
    """How the linear system of a derivative is solved, and what happens where it cannot be.

    Attributes:
        linear_solver: solves A u = v.
        damping: added to A.
        gauss_newton: whether A uses Gauss-Newton curvature.
        on_failure: policy.
        report: filled by the first-order derivative.
        warm_start: where the first-order derivative starts from, if not from zero.
        gathered: filled by the forward solve.
        gradient_tol: the relative error of the adjoint that is aimed at, if any.
    """

    linear_solver: LinearSolver
    damping: float
    gauss_newton: bool
    on_failure: Policy
    report: AdjointReport = field(compare=False)
    warm_start: WarmStart | None = field(default=None, compare=False)
    gathered: Gathered = field(default_factory=Gathered, compare=False)
    gradient_tol: float | None = None

    def prepared(self) -> LinearSolver:
        """The linear solver, its preconditioner made from the forward solve's pairs where it asks for them."""
        preconditioner = getattr(self.linear_solver, "preconditioner", None)
        if not (isinstance(preconditioner, LBFGSPreconditioner) and self.gathered.pairs and not preconditioner.pairs):
            return self.linear_solver
        with_pairs = preconditioner.with_pairs(self.gathered.pairs)
        return replace(self.linear_solver, preconditioner=with_pairs)  # type: ignore[type-var]

    def inexact(self, bound: Bound, x: Tensor) -> Inexact:
        """What is wrong with x as the solution of a condition."""
        return Inexact.of(bound, x, self.prepared(), self.damping)


@dataclass(frozen=True)
class _ProductTerm(Term):
    """u ↦ (∂residual/∂x) u of another term or its transpose; its parameters are the other's x and tensors."""

    base: Term
    transposes: bool

    @property
    def slots(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1, *(slot + 2 for slot in self.base.slots))

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.base.symmetric

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return (self.base.transposed if self.transposes else self.base.product)(x, *params)

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return (self.base.transposed if self.transposes else self.base.product)(y, *params)

    def transposed(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return (self.base.product if self.transposes else self.base.transposed)(y, *params)

    def linearize(
        self, x: Tensor, params: Sequence[Tensor], lanes: Lanes, *, transposed: bool = False
    ) -> Callable[[Tensor], Tensor]:
        return self.base.linearize(*self._at_base(x, params, lanes), transposed=transposed != self.transposes)

    def diagonal(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> Tensor | None:
        return self.base.diagonal(*self._at_base(x, params, lanes))

    @staticmethod
    def _at_base(x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> tuple[Tensor, Sequence[Tensor], Lanes]:
        # Linear in u: its own linearization is the base's at the base's point, which may lack lanes that u has.
        point = _over_lanes(params[0], [level[0] for level in lanes], x.shape[:-1])
        return point, params[1:], tuple(level[1:] for level in lanes)


@dataclass(frozen=True)
class RightHandSide(Term):
    """u ↦ -v."""

    slots: tuple[int, ...] = (0,)

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return -params[0]

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return torch.zeros_like(y)


@dataclass(frozen=True)
class LinearSystem(Condition):
    """(A(x, θ) + damping·I) u - v = 0 in u, with tensors ``(v, x, *θ)``, or the same with Aᵀ."""

    base: tuple[Term, ...]
    rule: AdjointRule
    lanes: Lanes
    transposes: bool
    first_order: bool = True
    minimizing: bool = False

    @property
    def terms(self) -> tuple[Term, ...]:
        # The damping term depends on no tensor, so it matters to `solve` alone.
        return (RightHandSide(), *(_ProductTerm(t, self.transposes) for t in self.base))

    def solve(self, x0: Tensor, tensors: Sequence[Tensor]) -> Outcome:
        v, x, rest = tensors[0], tensors[1], tuple(tensors[2:])
        v = _over_lanes(v, [level[0] for level in self.lanes], x0.shape[:-1])
        # In a level where only the cotangent has a lane (the rows of a Jacobian) one linearization serves all lanes.
        shared = [all(dim is None for dim in level[1:]) for level in self.lanes]
        sizes = [size for size, alone in zip(x0.shape[:-1], reversed(shared), strict=True) if not alone]
        own = tuple(level for level, alone in zip(self.lanes, shared, strict=True) if not alone)
        x = _over_lanes(x, [level[1] for level in own], sizes)
        bound = Posed(self.base).bind(rest, tuple(level[2:] for level in own))

        def product(transposed: bool) -> Callable[[Tensor], Tensor]:
            return _share(bound.linearize(x, self.rule.damping, transposed=transposed), shared)

        symmetric = all(term.symmetric for term in self.base)
        other = None if symmetric else Late(lambda: product(not self.transposes))
        operator = Operator(product(self.transposes), symmetric, self.minimizing, other)
        if not self.first_order:
            solution = self.rule.prepared().solve(operator, v)
        else:
            warm, aim = self.rule.warm_start, (self.rule.gradient_tol or torch.inf) / 2
            start = None if warm is None else warm.start(v)
            solution, error = solve_to_error(self.rule.prepared(), operator, v, start, aim)
            if warm is not None:
                warm.keep(solution.x, solution.status)
            if self.rule.gradient_tol is not None:
                everywhere = _over_lanes(tensors[1], [level[1] for level in self.lanes], x0.shape[:-1])
                bound = Posed(self.base).bind(rest, tuple(level[2:] for level in self.lanes))
                solution, error = self._account_for(self.rule.inexact(bound, everywhere), solution, error)
            self._report(solution, error)
        u = self._apply_policy(solution)
        return Outcome(
            u, solution.status, solution.steps, solution.residual, torch.full_like(solution.residual, torch.nan)
        )

    def linear_system(self, *, transposed: bool) -> LinearSystem:
        # F is linear in u, so the derivative of u is governed by the same matrix, with a new right-hand side.
        products = tuple(_ProductTerm(t, self.transposes) for t in self.base)
        lanes = tuple((0, 0, *level) for level in self.lanes)
        return LinearSystem(products, self.rule, lanes, transposed, first_order=False)

    def with_lanes(self, lanes: Lanes) -> LinearSystem:
        return replace(self, lanes=lanes)

    def _account_for(self, inexact: Inexact, solution: LinearSolution, error: Tensor) -> tuple[LinearSolution, Tensor]:
        """Add the error that an inexact x̂ makes; lanes that miss `gradient_tol` have stalled."""
        inner = inexact.change_along(solution.x, transposed=self.transposes)
        self.rule.report.inner_error, error = inner, error + inner
        assert self.rule.gradient_tol is not None
        misses = (error > self.rule.gradient_tol) & (solution.status == Status.CONVERGED)
        status = torch.where(misses, torch.full_like(solution.status, Status.STALLED), solution.status)
        return solution._replace(status=status), error

    def _report(self, solution: LinearSolution, error: Tensor) -> None:
        report = self.rule.report
        report.steps, report.status, report.residual = solution.steps, solution.status, solution.residual
        report.curvature = (solution.curvature_min, solution.curvature_max)
        report.damping, report.error_estimate = self.rule.damping, error

    def _apply_policy(self, solution: LinearSolution) -> Tensor:
        rule = self.rule
        if rule.on_failure == "nan":
            return torch.where(
                failed(solution.status).unsqueeze(-1), torch.full_like(solution.x, torch.nan), solution.x
            )
        if rule.on_failure in ("raise", "warn") and rule.linear_solver.looks and bool(failed(solution.status).any()):
            what = "The linear solve of the derivative"
            if self.first_order and rule.gradient_tol is not None and rule.report.error_estimate is not None:
                worst = float(rule.report.error_estimate.max())
                what = f"{what} to gradient_tol={rule.gradient_tol:.3g} (estimated relative error {worst:.3g})"
            message = describe_failures(what, solution.status, solution.steps, solution.residual)
            if rule.on_failure == "raise":
                raise AdjointError(message)
            warn_caller(AdjointWarning(message))
        return solution.x


def _over_lanes(t: Tensor, has: Sequence[int | None], sizes: Sequence[int]) -> Tensor:
    """Expand ``t [*some lanes, n]`` to all lanes; `has` is innermost level first, `sizes` outermost first."""
    return aligned(t, has).expand(*sizes, t.shape[-1])


def _share(product: Callable[[Tensor], Tensor], shared: Sequence[bool]) -> Callable[[Tensor], Tensor]:
    """Map a product that knows only the other levels over the shared ones; `shared` is innermost level first."""
    for level, alone in enumerate(shared):
        if alone:
            # Shared levels further out are stripped by the maps around this one, so only the others stand before it.
            dim = sum(not outer for outer in shared[level + 1 :])
            product = vmap(product, in_dims=dim, out_dims=dim)
    return product
