"""Linear systems posed by the user, A(θ) x = b, as an entry point of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from implicitlayers import tape
from implicitlayers.adjoints import Implicit
from implicitlayers.flat import Structure, Tree, flatten_tensors
from implicitlayers.functorch import all_lanes, batched, full_precision, opaque_to_compile, pullback
from implicitlayers.implicit import ImplicitArgmin
from implicitlayers.linear.cg import CG
from implicitlayers.linear.operator import Late, Operator, asymmetric
from implicitlayers.linear.solve import LinearSolver
from implicitlayers.linearized import AdjointRule, LinearSystem, RightHandSide
from implicitlayers.loop import norm
from implicitlayers.policy import apply_policy
from implicitlayers.pose import Equation, UserFunction
from implicitlayers.problem import Condition, Lanes, Outcome, Posed, Term, aligned
from implicitlayers.status import AdjointReport, MisuseError, Policy, Solution, Stats, check_policy

__all__ = ["linear_solve"]


@opaque_to_compile
def linear_solve(
    operator: Callable[..., Any] | Operator | Tensor,
    b: Tree,
    *params: Any,
    solver: LinearSolver | None = None,
    x0: Tree | None = None,
    symmetric: bool | None = None,
    adjoint: Implicit | None = None,
    on_failure: Policy = "raise",
) -> Solution:
    """Solve a linear system, and differentiate the solution.

    A(θ) x = b. With u = A⁻ᵀ v the derivatives are ∂L/∂b = u and ∂L/∂θ = -(∂(A x)/∂θ)ᵀ u, so that a backward is one more
    solve, with the transposed operator, which is derived from `operator` where A is not symmetric. Derivatives of every
    order reach b, the params, and every tensor that `operator` captures.

    Args:
        operator: ``(x, *params) -> A x``, a linear map of a tree like b to such a tree; or a square matrix ``[n, n]``;
            or an `Operator`, for a vector b.
        b: the right-hand side; a tensor or any tree of tensors of one floating dtype.
        *params: what the operator depends on.
        solver: how to solve; `CG()` by default, for symmetric positive definite A.
        x0: where to start; zero by default. Gets no gradient.
        symmetric: whether A = Aᵀ. By default what an `Operator` says of itself, else what the solver requires: who
            takes `CG` or `MINRES` says that A is symmetric, which is checked for a matrix.
        adjoint: how to solve the systems of the derivatives; ``Implicit(solver)`` by default.
        on_failure: see `argmin`.

    Returns:
        The solution; ``stats.residual`` is ‖A x - b‖ and ``stats.objective`` NaN.

    Raises:
        MisuseError: the call cannot mean what it says, or the operator is not linear.
        SolveError: some lanes failed and ``on_failure="raise"``.

    Examples:
        >>> A = torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
        >>> b = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> x = linear_solve(lambda x: A @ x, b, solver=GMRES()).value
        >>> torch.allclose(torch.autograd.grad(x[0], b)[0], torch.linalg.inv(A)[0])
        True
    """
    solver = CG() if solver is None else solver
    adjoint = Implicit(solver) if adjoint is None else adjoint
    for what, name, kind in ((solver, "solver", LinearSolver), (adjoint, "adjoint", Implicit)):
        if not isinstance(what, kind):
            raise MisuseError(
                f"{name} is {what!r}, which is no {kind.__name__}; pass for instance {kind.__name__}(...)."
            )
    check_policy(on_failure, "on_failure")
    if symmetric is None:
        symmetric = operator.symmetric if isinstance(operator, Operator) else solver.requires_symmetric
    if solver.requires_symmetric and not symmetric:
        raise MisuseError(
            f"{type(solver).__name__} solves symmetric systems only, and the operator is said not to be symmetric; "
            "pass solver=GMRES(), BiCGStab() or Dense()."
        )
    structure = Structure.of(b, "b")
    right = structure.flatten(b, "b")
    start = None if x0 is None else structure.flatten(x0, "x0").detach()
    fn = _as_function(operator)
    if isinstance(operator, Tensor) and solver.requires_symmetric and solver.looks:
        _check_symmetric(operator.detach(), solver)
    with full_precision(right):
        return _solve(fn, structure, right, start, params, solver, symmetric, adjoint.rule, on_failure)


def _solve(
    fn: Callable[..., Any],
    structure: Structure,
    b: Tensor,
    x0: Tensor | None,
    params: tuple[Any, ...],
    solver: LinearSolver,
    symmetric: bool,
    rule_for: Callable[[AdjointReport], AdjointRule],
    on_failure: Policy,
) -> Solution:
    start = torch.zeros_like(b).detach() if x0 is None else x0
    tensors, skeleton = flatten_tensors(params)
    function = UserFunction(fn, Equation("operator"), structure, skeleton, len(tensors), has_aux=False)
    found = function.examine(torch.zeros_like(start), tensors, touches_all=False, look=solver.looks)
    if solver.looks:
        _check_linear(fn, structure, b.detach(), params)
    inputs = [t.view_as(t) for t in (*tensors, *found.captured, b)]
    equation = function.equation(found, fixed_point=False)
    term = LinearTerm(equation.fn, equation.slots, symmetric)
    report = AdjointReport()
    condition = LinearEquation(term, len(inputs) - 1, solver, rule_for(report), warm=x0 is not None)
    outcome = Outcome(*ImplicitArgmin.apply(condition, start, *inputs))
    found.watch.arm()
    x = apply_policy(outcome, on_failure, f"The linear solve by {type(solver).__name__}", looks=solver.looks)
    stats = Stats(outcome.steps, outcome.residual, outcome.objective)
    return Solution(structure.unflatten(x), outcome.status, stats, None, report)


def _as_function(operator: Callable[..., Any] | Operator | Tensor) -> Callable[..., Any]:
    if isinstance(operator, Tensor):
        if operator.ndim != 2 or operator.shape[0] != operator.shape[1]:
            raise MisuseError(
                f"operator is a tensor of shape {tuple(operator.shape)}; pass a square matrix [n, n] (many at once "
                "with torch.vmap), or a function x -> A x."
            )
        return lambda x: operator @ x
    if not callable(operator):
        raise MisuseError(
            f"operator is a {type(operator).__name__}; pass a function x -> A x, a matrix or an Operator."
        )
    return operator


def _check_linear(fn: Callable[..., Any], structure: Structure, b: Tensor, params: tuple[Any, ...]) -> None:
    def value(x: Tensor) -> Tensor:
        return all_lanes(structure.flatten(fn(structure.unflatten(x), *params), "what the operator returned"))

    with torch.no_grad():
        constant, once, twice = (value(x) for x in (torch.zeros_like(b), b, 2 * b))
    if bool((constant != 0).any()):
        raise MisuseError(
            f"the operator maps 0 to a vector of norm {float(constant.norm()):.3g}, so it is not linear; leave out the "
            "constant part and subtract it from b, or take il.root for an equation."
        )
    # Doubling is exact, so a linear operator errs by the rounding of a dot product at most. NaN is the solve's to name.
    bent = norm(twice - 2 * once) > torch.finfo(b.dtype).eps ** 0.5 * norm(twice)
    if bool(bent.any()):
        raise MisuseError(
            "the operator maps 2b to something else than twice what it maps b to, so it is not linear; take il.root "
            "for an equation that is not linear in x."
        )


def _check_symmetric(matrix: Tensor, solver: LinearSolver) -> None:
    if bool(asymmetric(matrix := all_lanes(matrix)).any()):
        raise MisuseError(
            f"{type(solver).__name__} solves symmetric systems only, and the matrix differs from its transpose by "
            f"up to {float((matrix - matrix.mT).abs().max()):.3g}; pass solver=GMRES(), BiCGStab() or Dense()."
        )


@dataclass(frozen=True)
class LinearTerm(Term):
    """x ↦ A(θ) x.

    Attributes:
        fn: ``(x, *params) -> A x``.
        slots: see `Term`.
        symmetric: whether A = Aᵀ.
    """

    fn: Callable[..., Tensor]
    slots: tuple[int, ...]
    symmetric: bool  # type: ignore[misc]

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return self.fn(x, *params)

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return self.fn(y, *params)

    def transposed(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        if self.symmetric:
            return self.fn(y, *params)
        return pullback(lambda z: self.fn(z, *params), [torch.zeros_like(y)], y)[0]

    def linearize(
        self, x: Tensor, params: Sequence[Tensor], lanes: Lanes, *, transposed: bool = False
    ) -> Callable[[Tensor], Tensor]:
        fn, given = batched(self.fn, lanes), [p.detach() for p in params]
        if self.symmetric or not transposed:
            return lambda y: fn(y, *given)
        return tape.transposed_jacobian(lambda z: fn(z, *given), torch.zeros_like(x))


@dataclass(frozen=True)
class LinearEquation(Condition):
    """A(θ) x - b = 0.

    Attributes:
        term: A.
        b: the slot of the right-hand side.
        solver: solves it.
        rule: how the systems of the derivatives are solved.
        warm: whether the start is more than zero.
        lanes: see `Condition`.
    """

    term: LinearTerm
    b: int
    solver: LinearSolver
    rule: AdjointRule
    warm: bool
    lanes: Lanes = ()

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.term, RightHandSide((self.b,)))

    def solve(self, x0: Tensor, tensors: Sequence[Tensor]) -> Outcome:
        bound = Posed((self.term,)).bind(tensors, self.lanes)
        other = None if self.term.symmetric else Late(lambda: bound.linearize(x0, transposed=True))
        operator = Operator(bound.linearize(x0), self.term.symmetric, apply_transpose=other)
        b = aligned(tensors[self.b], [level[self.b] for level in self.lanes]).expand_as(x0)
        solution = self.solver.solve(operator, b, x0 if self.warm else None)
        residual = solution.residual * norm(b)
        return Outcome(solution.x, solution.status, solution.steps, residual, torch.full_like(residual, torch.nan))

    def linear_system(self, *, transposed: bool) -> LinearSystem:
        return LinearSystem((self.term,), self.rule, tuple((0, 0, *level) for level in self.lanes), transposed)

    def with_lanes(self, lanes: Lanes) -> LinearEquation:
        return replace(self, lanes=lanes)
