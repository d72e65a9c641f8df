"""Quadratic programs: the entry point, and the condition that its answer fulfils."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicitlayers.adjoints import Adjoint, Implicit
from implicitlayers.flat import check_dense
from implicitlayers.functorch import all_lanes, full_precision, opaque_to_compile
from implicitlayers.implicit import ImplicitArgmin
from implicitlayers.kkt import KKTPoint, KKTTerm, Program
from implicitlayers.linear.dense import Dense
from implicitlayers.linear.operator import asymmetric
from implicitlayers.linearized import AdjointRule, LinearSystem
from implicitlayers.loop import iterate
from implicitlayers.policy import apply_policy
from implicitlayers.problem import Condition, Lanes, Outcome, aligned
from implicitlayers.solvers.active_set import ActiveSet
from implicitlayers.solvers.interior_point import InteriorPoint
from implicitlayers.status import AdjointReport, MisuseError, Policy, Solution, Stats, Status, check_policy

__all__ = ["PrimalDual", "quadratic_program"]

# The set of active constraints changes once or twice after the interior-point method, if at all.
_ACTIVE_SETS = 5


class PrimalDual(NamedTuple):
    """The solution of a quadratic program.

    Attributes:
        x: the minimizer ``[*lanes, n]``.
        equality: multipliers ν ``[*lanes, p]`` of Ax = b, of either sign.
        inequality: multipliers λ ≥ 0 ``[*lanes, m]`` of Gx ≤ h, zero where a constraint is not active.
    """

    x: Tensor
    equality: Tensor
    inequality: Tensor


@opaque_to_compile
def quadratic_program(
    Q: Tensor,
    q: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    solver: InteriorPoint | None = None,
    adjoint: Implicit | None = None,
    on_failure: Policy = "raise",
) -> Solution:
    """Solve a convex quadratic program, and differentiate its solution and its multipliers.

    min_x  ½ xᵀQx + qᵀx   subject to   Ax = b,  Gx ≤ h

    With the Lagrangian L = ½ xᵀQx + qᵀx + νᵀ(Ax - b) + λᵀ(Gx - h), the optimality condition is that of Karush, Kuhn and
    Tucker, F(x, ν, λ) = (Qx + q + Aᵀν + Gᵀλ, Ax - b, λ ∘ (Gx - h)) = 0 with λ ≥ 0 and Gx ≤ h, and (x, ν, λ) is
    differentiated as its root (Amos & Kolter 2017). Derivatives of every order reach all six tensors. So ν and λ are
    prices: ∂(optimal value)/∂b = -ν and ∂(optimal value)/∂h = -λ.

    Choose it for small and middle-sized dense problems (n, p and m up to a few hundred), many at once. Q may be
    singular or zero (a linear program) as long as the solution is unique; the solve itself needs not even that. The
    derivative exists where the active constraints are linearly independent, each of them has λ > 0 (strict
    complementarity), and Q is positive definite on the directions that they leave free. Where it does not exist, as for
    an equation stated twice or an inequality that holds as an equation without a multiplier, the solve succeeds and the
    linear solve of the derivative says SINGULAR.

    Every tensor may have leading lane dimensions; they broadcast, and each lane is solved for itself. A tensor without
    them is shared and gets the sum of the lanes' derivatives. `torch.vmap` adds lanes from outside.

    Args:
        Q: ``[..., n, n]``, positive semidefinite. Its symmetric part ½(Q + Qᵀ) is meant, which is all that the
            objective sees: the derivative in Q is a symmetric matrix.
        q: ``[..., n]``.
        A: ``[..., p, n]``; with `b`, or without both.
        b: ``[..., p]``.
        G: ``[..., m, n]``; with `h`, or without both.
        h: ``[..., m]``, finite; for no bound leave the row out, or pass a number far beyond any solution.
        solver: `InteriorPoint()` by default. It is followed by a search for the active set, which makes the solution
            exact to rounding.
        adjoint: how to differentiate; ``Implicit(Dense())`` by default, which factorizes the matrix of n + p + m rows.
        on_failure: what to do about lanes that could not be solved; see `argmin`. INFEASIBLE, UNBOUNDED and INDEFINITE
            say which of the assumptions does not hold in a lane.

    Returns:
        The solution; ``solution.value`` is ``(x, equality, inequality)``, see `PrimalDual`. ``stats.residual`` is the
        norm of F, ``stats.objective`` the optimal value, ``stats.steps`` those of the interior-point method.

    Raises:
        MisuseError: the call cannot mean what it says.
        SolveError: some lanes failed and ``on_failure="raise"``.

    Examples:
        >>> Q = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> value = quadratic_program(Q, one, one[None], one[:1], -torch.eye(2, dtype=torch.float64), zero).value
        >>> value.x, value.equality
        (tensor([0.2500, 0.7500], dtype=torch.float64), tensor([-2.7500], dtype=torch.float64))
    """
    solver = InteriorPoint() if solver is None else solver
    adjoint = Implicit(Dense()) if adjoint is None else adjoint
    _check_arguments(solver, adjoint, on_failure)
    tensors, lanes, sizes = _laid_out(_complete(Q, q, A, b, G, h, look=solver.looks))
    p, m = tensors[2].shape[-2], tensors[4].shape[-2]
    report = AdjointReport()
    start = torch.zeros(*sizes, tensors[1].shape[-1] + p + m, dtype=q.dtype, device=q.device)
    condition = _Optimality(KKTTerm(p, m), solver, adjoint.rule(report), lanes)
    with full_precision(start):
        outcome = Outcome(*ImplicitArgmin.apply(condition, start, *tensors))
    z = apply_policy(outcome, on_failure, "The quadratic program", looks=solver.looks)
    value, stats = PrimalDual(*KKTPoint.split(z, p, m)), Stats(outcome.steps, outcome.residual, outcome.objective)
    return Solution(value, outcome.status, stats, adjoint=report)


@dataclass(frozen=True)
class _Optimality(Condition):
    """The conditions of Karush, Kuhn and Tucker, solved by an interior-point method and then to rounding."""

    term: KKTTerm
    solver: InteriorPoint
    rule: AdjointRule
    lanes: Lanes

    @property
    def terms(self) -> tuple[KKTTerm]:
        return (self.term,)

    def solve(self, x0: Tensor, tensors: Sequence[Tensor]) -> Outcome:
        given = Program(*(aligned(t, [level[i] for level in self.lanes]) for i, t in enumerate(tensors)))
        given = given._replace(Q=(given.Q + given.Q.mT) / 2)
        broken = ~given.finite()
        program, scales = given.with_zeros(broken).scaled()
        end = iterate(self.solver, program, x0, self.solver.max_steps, look=self.solver.looks)
        z = end.state.z.join()
        polished = iterate(ActiveSet(), program, z, _ACTIVE_SETS, look=self.solver.looks).state
        # Rounding may leave a multiplier of an active constraint just below zero.
        z = scales.undo(polished.best._replace(lam=polished.best.lam.clamp_min(0)))
        z = KKTPoint(*(torch.where(broken.unsqueeze(-1), torch.full_like(t, torch.nan), t) for t in z))
        unfinished = (end.status == Status.MAX_STEPS) | (end.status == Status.STALLED)
        met = unfinished & (polished.violation <= self.solver.tolerances(x0.dtype)[1])
        status = torch.where(met, torch.full_like(end.status, Status.CONVERGED), end.status)
        status = torch.where(broken, torch.full_like(status, Status.NON_FINITE), status)
        steps = torch.where(broken, torch.zeros_like(end.steps), end.steps)
        return Outcome(z.join(), status, steps, given.residual(z), given.objective(z.x))

    def linear_system(self, *, transposed: bool) -> LinearSystem:
        return LinearSystem(self.terms, self.rule, tuple((0, 0, *level) for level in self.lanes), transposed)

    def with_lanes(self, lanes: Lanes) -> _Optimality:
        return replace(self, lanes=lanes)


def _check_arguments(solver: InteriorPoint, adjoint: Adjoint, on_failure: str) -> None:
    for what, name, kind in ((solver, "solver", InteriorPoint), (adjoint, "adjoint", Adjoint)):
        if isinstance(what, type):
            raise MisuseError(f"{name} is the class {what.__name__}; pass an instance, {what.__name__}(...).")
        if not isinstance(what, kind):
            raise MisuseError(f"{name} is {what!r}, which is no {kind.__name__}.")
    check_policy(on_failure, "on_failure")
    if not isinstance(adjoint, Implicit):
        raise MisuseError(
            f"adjoint is {type(adjoint).__name__}: the steps of an interior-point method are not recorded, and its "
            "solution is exact; pass Implicit(...)."
        )
    if adjoint.linear_solver.requires_symmetric:
        name = type(adjoint.linear_solver).__name__
        raise MisuseError(
            f"Implicit({name}()): {name} solves symmetric systems only, and the linearized conditions of a quadratic "
            "program are not symmetric; pass Implicit(Dense()) or Implicit(GMRES())."
        )
    if adjoint.curvature == "gauss_newton":
        raise MisuseError('curvature="gauss_newton": a quadratic program is no Composite; leave curvature out.')


def _complete(
    Q: Tensor, q: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None, *, look: bool
) -> Program:
    """Check types, shapes and, with `look`, values; put constraints without rows where there are none."""
    if not isinstance(q, Tensor) or q.ndim == 0:
        raise MisuseError("q is no vector; pass a tensor [..., n].")
    check_dense("q", q)
    if q.dtype not in (torch.float32, torch.float64):
        raise MisuseError(f"q is {q.dtype}, and quadratic programs are solved in float32 or float64; convert all six.")
    n = q.shape[-1]
    if n == 0:
        raise MisuseError(f"q has no elements (shape {tuple(q.shape)}), so there is nothing to solve for.")
    for matrix, side, names in ((A, b, "A and b"), (G, h, "G and h")):
        if (matrix is None) != (side is None):
            raise MisuseError(f"one of {names} is None and the other is not; pass both, or neither.")
    A, G = (q.new_zeros(0, n) if M is None else M for M in (A, G))
    b, h = (q.new_zeros(0) if t is None else t for t in (b, h))
    program = Program(Q, q, A, b, G, h)
    for name, t in zip(Program._fields, program, strict=True):
        if not isinstance(t, Tensor):
            raise MisuseError(f"{name} is a {type(t).__name__}, not a tensor; pass torch.tensor(..., dtype={q.dtype}).")
        check_dense(name, t)
    p, m = (M.shape[-2] if M.ndim > 1 else 1 for M in (A, G))
    for name, t, expected in zip(Program._fields, program, ((n, n), (n,), (p, n), (p,), (m, n), (m,)), strict=True):
        if tuple(t.shape[max(t.ndim - len(expected), 0) :]) != expected:
            shape = ", ".join(map(str, ("...", *expected)))
            raise MisuseError(
                f"{name} has shape {tuple(t.shape)}, which does not fit q and its partner; pass [{shape}]."
            )
        if t.dtype != q.dtype or t.device != q.device:
            raise MisuseError(
                f"{name} is {t.dtype} on {t.device}, but q is {q.dtype} on {q.device}; all six need one dtype and one "
                "device."
            )
    if look:
        _check_symmetric(Q)
    return program


def _laid_out(program: Program) -> tuple[list[Tensor], Lanes, torch.Size]:
    """The six tensors without dimensions of size one that broadcast, which of them has which lane, and the lanes."""
    batches = [t.shape[: t.ndim - (2 if name in "QAG" else 1)] for name, t in program._asdict().items()]
    try:
        sizes = torch.broadcast_shapes(*batches)
    except RuntimeError:
        shown = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(Program._fields, batches, strict=True))
        raise MisuseError(f"the leading dimensions do not broadcast: {shown}; make them equal or one.") from None
    if 0 in sizes:
        raise MisuseError(f"the leading dimensions are {tuple(sizes)}, so there is no problem to solve.")
    levels, tensors = [], []
    for back in range(1, len(sizes) + 1):
        size = sizes[-back]
        levels.append(tuple(0 if len(shape) >= back and shape[-back] == size else None for shape in batches))
    for i, t in enumerate(program):
        shared = [d for d in range(len(batches[i])) if levels[len(batches[i]) - d - 1][i] is None]
        # A view made by a torch operation, so that a surrounding solve's substitution reaches it; and a copy of what
        # was made in inference mode, which cannot go on a tape.
        tensors.append((t.clone() if t.is_inference() else t).squeeze(shared).view_as(t.squeeze(shared)))
    return tensors, tuple(levels), sizes


def _check_symmetric(Q: Tensor) -> None:
    """Diagnose a triangle or a factor of Q in its place."""
    Q = all_lanes(Q)
    wrong = asymmetric(Q)
    if bool(wrong.any()):
        raise MisuseError(
            f"Q is not symmetric{'' if Q.ndim == 2 else f' in {int(wrong.sum())} lanes'}, and of a quadratic form "
            "only the symmetric part counts: a triangle of the matrix would lose half of its off-diagonal entries, a "
            "factor L is not L Lᵀ. Pass the full matrix, or (Q + Q.mT) / 2 if that is meant."
        )
