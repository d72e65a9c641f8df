"""The implicit function theorem, once, for every problem of this library.

Let x(θ) satisfy F(x(θ), θ) = 0 with A = ∂F/∂x regular. Differentiating in θ,

    A dx + (∂F/∂θ) dθ = 0        so        dx = -A⁻¹ (∂F/∂θ) dθ                       (forward mode, `jvp`)
    vᵀdx = -(A⁻ᵀv)ᵀ (∂F/∂θ) dθ   so    ∂L/∂θ = -(∂F/∂θ)ᵀ u   with   Aᵀu = v = ∂L/∂x   (reverse mode, `backward`)

(Krantz & Parks 2013; for argmin layers Gould et al. 2016; Blondel et al. 2022). Only the solution enters, not the path
to it, so nothing of the solve is recorded.

The linear system is itself an optimality condition, A(x, θ) u - v = 0 in the unknown u with parameters (v, x, θ), and
is solved by the same Function. Hence its derivatives follow the same rule and every order of derivative is right, if
three things are kept, each of which fails silently otherwise:

- the backward works on the *saved output* x, which carries the derivative dx/dθ, never on a detached copy;
- inside `jvp` forward mode is switched on again, because PyTorch switches it off there;
- tangents are pushed through F by a double transpose, because PyTorch's dual numbers do not nest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import vmap

from implicitlayers.functorch import batched, forward_ad_enabled, primal, pullback, pushforward
from implicitlayers.linear.operator import Operator
from implicitlayers.linear.solve import LinearSolution, LinearSolver
from implicitlayers.loop import Finished, iterate
from implicitlayers.problem import Bound, Condition, Lanes, ObjectiveTerm, Outcome, Term, aligned, select
from implicitlayers.solver import Solver
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

__all__ = ["AdjointRule", "ImplicitArgmin", "LinearSystem", "Stationarity", "finish_forward", "solve_forward"]


class ImplicitArgmin(Function):
    """Solve F(x, tensors) = 0, differentiably.

    ``apply(condition, x0, *tensors) -> (x, status, steps, residual, objective)``. `condition` is a `Condition` and
    holds no tensor; ``x0 [n]`` is only a start and gets no gradient. Only the first output is differentiable. Works
    under backward of any order, forward-mode AD and every torch.func transform.
    """

    @staticmethod
    def forward(condition: Condition, x0: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outcome = condition.solve(x0, tensors)
        # PyTorch refuses an output that is an input, which a solver that has nothing to do may return.
        return (outcome.x.clone() if outcome.x is x0 else outcome.x, *outcome[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.condition = inputs[0]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[:2], *inputs[2:])
        ctx.save_for_forward(*output[:2], *inputs[2:])

    @staticmethod
    def backward(ctx: Any, v: Tensor, *_: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, status, *tensors = ctx.saved_tensors
        condition: Condition = ctx.condition
        # A lane that diverged and that the loss leaves out, v = 0, contributes nothing; but zero times infinity is NaN,
        # and would reach every tensor that lanes share.
        dead = (status == Status.NON_FINITE) & (v == 0).all(-1)
        x = torch.where(dead.unsqueeze(-1), torch.zeros_like(x), x)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        u = _solve_linearized(condition, v, x, tensors)
        grads: list[Tensor | None] = [None] * len(tensors)
        for term in condition.terms:
            inside = [i for i in wanted if i in term.slots]
            if inside:
                residual = _residual_of(term, condition.lanes, x, tensors, inside)
                pulled = pullback(residual, [tensors[i] for i in inside], u)
                for i, g in zip(inside, pulled, strict=True):
                    grads[i] = -g if grads[i] is None else grads[i] - g
        return None, None, *grads

    @staticmethod
    def jvp(ctx: Any, _condition: Any, _x0: Any, *tangents: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, _, *tensors = (primal(t) for t in ctx.saved_tensors)
        condition: Condition = ctx.condition
        given = [i for i, t in enumerate(tangents) if t is not None]
        with forward_ad_enabled():
            dF = torch.zeros_like(x)
            for term in condition.terms:
                inside = [i for i in given if i in term.slots]
                if inside:
                    residual = _residual_of(term, condition.lanes, x, tensors, inside)
                    dF = dF + pushforward(residual, [tensors[i] for i in inside], [tangents[i] for i in inside])  # type: ignore[misc]
            return -_solve_linearized(condition, dF, x, tensors), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], condition: Condition, x0: Tensor, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        def front(t: Tensor, dim: int | None) -> Tensor:
            return t if dim is None else t.movedim(dim, 0)

        x0 = x0.expand(info.batch_size, *x0.shape) if in_dims[1] is None else front(x0, in_dims[1])
        level = tuple(None if dim is None else 0 for dim in in_dims[2:])
        lifted = condition.with_lanes((*condition.lanes, level))
        return ImplicitArgmin.apply(lifted, x0, *map(front, tensors, in_dims[2:])), (0, 0, 0, 0, 0)


def _residual_of(term: Term, lanes: Lanes, x: Tensor, tensors: Sequence[Tensor], which: Sequence[int]) -> Any:
    """The term's residual on all lanes as a function of the tensors in the slots `which` alone."""
    _, term_lanes = select(tensors, lanes, term.slots)
    residual = batched(term.residual, term_lanes)

    def f(*chosen: Tensor) -> Tensor:
        values = dict(zip(which, chosen, strict=True))
        return residual(x, *[values.get(slot, tensors[slot]) for slot in term.slots])

    return f


def _solve_linearized(condition: Condition, v: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return ImplicitArgmin.apply(condition.linear_system(), torch.zeros_like(v), v, x, *tensors)[0]


@dataclass(frozen=True)
class AdjointRule:
    """How the linear system of a derivative is solved, and what happens where it cannot be.

    Attributes:
        linear_solver: solves A u = v.
        damping: added to A.
        gauss_newton: whether A uses Gauss-Newton curvature.
        on_failure: policy.
        report: filled by the first-order derivative.
    """

    linear_solver: LinearSolver
    damping: float
    gauss_newton: bool
    on_failure: Policy
    report: AdjointReport = field(compare=False)


def solve_forward(solver: Solver[Any], bound: Bound, x0: Tensor) -> Outcome:
    """Run a solver on all lanes; recorded or not, as the surrounding grad mode says."""
    return finish_forward(solver, bound, iterate(solver, bound, x0, solver.max_steps, look=solver.looks))


def finish_forward(solver: Solver[Any], bound: Bound, end: Finished) -> Outcome:
    """What the end of a loop means as an outcome."""
    x, residual, objective = solver.postprocess(bound, end.state)
    return Outcome(x, end.status, solver.count(end.state, end.steps), residual, objective)


@dataclass(frozen=True)
class Stationarity(Condition):
    """F = Σ ∇(term) = 0: a stationary point of a sum of smooth terms. ∂F/∂x is symmetric."""

    summands: tuple[Term, ...]
    solver: Solver[Any]
    rule: AdjointRule
    lanes: Lanes = ()

    @property
    def terms(self) -> tuple[Term, ...]:
        return self.summands

    def solve(self, x0: Tensor, tensors: Sequence[Tensor]) -> Outcome:
        return solve_forward(self.solver, Bound(self.summands, tuple(tensors), self.lanes), x0)

    def linear_system(self) -> LinearSystem:
        terms = tuple(
            replace(t, gauss_newton=self.rule.gauss_newton) if isinstance(t, ObjectiveTerm) else t
            for t in self.summands
        )
        # The unknown and the cotangent carry every lane.
        return LinearSystem(terms, self.rule, tuple((0, 0, *level) for level in self.lanes))

    def with_lanes(self, lanes: Lanes) -> Stationarity:
        return replace(self, lanes=lanes)


@dataclass(frozen=True)
class _ProductTerm(Term):
    """u ↦ (∂residual/∂x) u of another term, whose parameters are its x and its tensors."""

    base: Term

    @property
    def slots(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1, *(slot + 2 for slot in self.base.slots))

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return self.base.product(x, *params)

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return self.base.product(y, *params)

    def linearize(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> Any:
        return self.base.linearize(*self._at_base(x, params, lanes))

    def diagonal(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> Tensor | None:
        return self.base.diagonal(*self._at_base(x, params, lanes))

    @staticmethod
    def _at_base(x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> tuple[Tensor, Sequence[Tensor], Lanes]:
        # Linear in u: its own linearization is the base's at the base's point, which may lack lanes that u has.
        point = _over_lanes(params[0], [level[0] for level in lanes], x.shape[:-1])
        return point, params[1:], tuple(level[1:] for level in lanes)


@dataclass(frozen=True)
class _RightHandSide(Term):
    """u ↦ -v."""

    slots: tuple[int, ...] = (0,)

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return -params[0]

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return torch.zeros_like(y)


@dataclass(frozen=True)
class LinearSystem(Condition):
    """(A(x, θ) + damping·I) u - v = 0 in u, with tensors ``(v, x, *θ)``; A symmetric."""

    base: tuple[Term, ...]
    rule: AdjointRule
    lanes: Lanes
    first_order: bool = True
    minimizing: bool = False

    @property
    def terms(self) -> tuple[Term, ...]:
        # The damping term depends on no tensor, so it matters to `solve` alone.
        return (_RightHandSide(), *(_ProductTerm(t) for t in self.base))

    def solve(self, x0: Tensor, tensors: Sequence[Tensor]) -> Outcome:
        v, x, rest = tensors[0], tensors[1], tuple(tensors[2:])
        v = _over_lanes(v, [level[0] for level in self.lanes], x0.shape[:-1])
        # In a level where only the cotangent has a lane (the rows of a Jacobian) one linearization serves all lanes.
        shared = [all(dim is None for dim in level[1:]) for level in self.lanes]
        sizes = [size for size, alone in zip(x0.shape[:-1], reversed(shared), strict=True) if not alone]
        own = tuple(level for level, alone in zip(self.lanes, shared, strict=True) if not alone)
        x = _over_lanes(x, [level[1] for level in own], sizes)
        product = Bound(self.base, rest, tuple(level[2:] for level in own)).linearize(x, self.rule.damping)
        operator = Operator(_share(product, shared), symmetric=True, minimizing=self.minimizing)
        solution = self.rule.linear_solver.solve(operator, v)
        u = self._report(solution)
        return Outcome(
            u, solution.status, solution.steps, solution.residual, torch.full_like(solution.residual, torch.nan)
        )

    def linear_system(self) -> LinearSystem:
        # F is linear in u, so the derivative of u is governed by the same matrix, with a new right-hand side.
        products = tuple(_ProductTerm(t) for t in self.base)
        return LinearSystem(products, self.rule, tuple((0, 0, *level) for level in self.lanes), first_order=False)

    def with_lanes(self, lanes: Lanes) -> LinearSystem:
        return replace(self, lanes=lanes)

    def _report(self, solution: LinearSolution) -> Tensor:
        """Keep the report, apply the policy, and return the solution."""
        rule = self.rule
        if self.first_order:
            low = solution.curvature_min
            bound = torch.where(low > 0, solution.residual / low, torch.full_like(low, torch.inf))
            rule.report.steps, rule.report.status = solution.steps, solution.status
            rule.report.residual, rule.report.curvature = solution.residual, (low, solution.curvature_max)
            rule.report.damping, rule.report.error_estimate = rule.damping, bound
        if rule.on_failure == "nan":
            return torch.where(
                failed(solution.status).unsqueeze(-1), torch.full_like(solution.x, torch.nan), solution.x
            )
        if rule.on_failure in ("raise", "warn") and rule.linear_solver.looks and bool(failed(solution.status).any()):
            message = describe_failures(
                "The linear solve of the derivative", solution.status, solution.steps, solution.residual
            )
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
