"""How the answer of a solve is differentiated: through the solution, through the path, or through its last steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from implicitlayers.checkpoint import iterate_in_stretches, run_in_stretches
from implicitlayers.implicit import ImplicitArgmin
from implicitlayers.linear.auto import Auto
from implicitlayers.linear.solve import LinearSolver
from implicitlayers.linearized import AdjointRule, WarmStart
from implicitlayers.loop import Finished, iterate, run, unlooked
from implicitlayers.optimality import Optimality, finish_forward, solve_forward
from implicitlayers.problem import Bound, Kind, Outcome, Posed
from implicitlayers.solver import Solver
from implicitlayers.status import AdjointReport, MisuseError, Policy, check_policy
from implicitlayers.terms import ObjectiveTerm

__all__ = ["Adjoint", "Implicit", "OneStep", "Unrolled"]


class Adjoint(ABC):
    """A way to differentiate the solution of a problem."""

    @abstractmethod
    def solve(
        self, posed: Posed, solver: Solver[Any], x0: Tensor, tensors: Sequence[Tensor], report: AdjointReport
    ) -> Outcome:
        """Solve so that the outcome's `x` is differentiable in `tensors`."""


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The implicit function theorem: memory and derivative do not depend on how the solution was found.

    The derivative is exact at an exact solution; after an inexact solve its error is proportional to the residual.

    Args:
        linear_solver: solves A u = v with A the curvature at the solution, or the transposed system of an equation.
            `Auto` takes `CG` where A is symmetric, and `Dense` or `GMRES` where it is not.
        damping: added to A, in its units; biases the derivative towards damping⁻¹ v.
        curvature: "hessian", or "gauss_newton" for objectives given as `Composite`: positive semidefinite where the
            loss is convex, cheaper, exact only where the residual curvature vanishes.
        warm_start: start the linear solve from the last solution of the same shape, kept in this object between calls:
            in training, where neighbouring outer steps have neighbouring adjoints, fewer products reach a tolerance.
            With a fixed number of products the derivative then depends on the calls before.
        on_failure: "raise", "warn", "ignore" or "nan" for lanes whose linear solve fails.
        gradient_tol: ε > 0, a bound aimed at for the relative error ‖û - u‖/‖û‖ of the adjoint solution: û is the
            computed one, u the exact one at the exact solution, for the same v = ∂L/∂x; it is the relative error of the
            gradient where ∂F/∂θ is a multiple of an isometry (see `AdjointReport`). Solver and linear solver first
            reach their own tolerances, then go on until each of their shares, as estimated, is below ε/2: the relative
            error of x and what it does to A for the former, the residual of A u = v for the latter. A lane that cannot
            get there is STALLED. Costs two more linear solves a measurement, at least once forward and once backward.
            ``math.inf`` measures, for ``adjoint.inner_error``, and enforces nothing. None does neither.
    """

    linear_solver: LinearSolver = field(default_factory=Auto)
    damping: float = 0.0
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    warm_start: bool = False
    on_failure: Policy = "warn"
    gradient_tol: float | None = None
    # An argument of the constructor, so that `dataclasses.replace` hands it on.
    _last: WarmStart = field(default_factory=WarmStart, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_policy(self.on_failure, "Implicit's on_failure")
        if not isinstance(self.damping, (int, float)) or not self.damping >= 0:
            raise MisuseError(f"Implicit(damping={self.damping}): pass a number >= 0.")
        if self.curvature not in ("hessian", "gauss_newton"):
            raise MisuseError(f'Implicit(curvature={self.curvature!r}): pass "hessian" or "gauss_newton".')
        if self.gradient_tol is not None and not self.gradient_tol > 0:
            raise MisuseError(f"Implicit(gradient_tol={self.gradient_tol}): pass a positive number, or None.")

    def solve(
        self, posed: Posed, solver: Solver[Any], x0: Tensor, tensors: Sequence[Tensor], report: AdjointReport
    ) -> Outcome:
        if self.curvature == "gauss_newton" and any(
            isinstance(t, ObjectiveTerm) and t.model is None for t in posed.terms
        ):
            raise MisuseError(
                'curvature="gauss_newton" needs to know where the model ends and the loss begins, and the objective is '
                "a plain function; pass Composite(model, loss)."
            )
        if posed.kind is not Kind.MINIMUM and self.linear_solver.requires_symmetric:
            name = type(self.linear_solver).__name__
            raise MisuseError(
                f"Implicit({name}()): {name} solves symmetric systems only, and the Jacobian of {posed.kind.value} "
                "is not symmetric; pass Implicit(GMRES()), Implicit(Dense()), or leave the choice to Implicit()."
            )
        self._check_looks(solver)
        return Outcome(*ImplicitArgmin.apply(Optimality(posed, solver, self.rule(report)), x0, *tensors))

    def _check_looks(self, solver: Solver[Any]) -> None:
        if self.gradient_tol is None or self.gradient_tol == math.inf:
            return
        for what in (solver, self.linear_solver):
            if not what.looks:
                raise MisuseError(
                    f"gradient_tol={self.gradient_tol:g} with a {type(what).__name__} that runs a fixed number of "
                    "steps: it cannot go on until a tolerance is met; give it an rtol, or pass gradient_tol=math.inf "
                    "to have the error measured only."
                )

    def rule(self, report: AdjointReport) -> AdjointRule:
        """The same in the terms of the linear system, for one call."""
        return AdjointRule(
            self.linear_solver,
            self.damping,
            self.curvature == "gauss_newton",
            self.on_failure,
            report,
            self._last if self.warm_start else None,
            gradient_tol=self.gradient_tol,
        )


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Differentiate through the solver's steps, all or the last few.

    Choose it for a derivative of the path itself (MAML), as an oracle, or where the solution is far from stationary.
    Memory grows with the recorded steps T, with `checkpoint` only as √T, for the time of taking the steps twice. ``x0``
    gets a gradient unless the recording is truncated. A linear system within a step, that of Newton's direction, is
    differentiated as if it had been solved: with a few steps of CG for it the result is not the path's derivative.

    Args:
        last: record only this many steps at the end; None for all.
        checkpoint: keep the states between stretches of about √T steps, and take the steps of a stretch again when it
            is differentiated. The derivatives are the same to rounding, of every order and under every transform;
            second derivatives need the memory of all steps again.
    """

    last: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise MisuseError(
                f"Unrolled(last={self.last}): nothing would be differentiated; pass a positive integer or None."
            )

    def solve(
        self, posed: Posed, solver: Solver[Any], x0: Tensor, tensors: Sequence[Tensor], report: AdjointReport
    ) -> Outcome:
        _check_recordable(self, solver)
        bound = posed.bind(tensors)
        if self.last is None:
            # A solver that has nothing to do returns its start, which belongs to the caller.
            return self._all(solver, bound, x0.clone())
        if solver.looks:
            raise MisuseError(
                f"Unrolled(last={self.last}) with a solver that stops at a tolerance: which steps will be the last is "
                "not known in advance. Run a fixed number (rtol=atol=None), or use OneStep(steps) to record steps "
                "taken from the solution."
            )
        recorded = min(self.last, solver.max_steps)
        frozen = posed.bind([t.detach() for t in tensors])
        state = run(solver, frozen, solver.init(frozen, x0.detach()), solver.max_steps - recorded)
        state = self._record(solver, bound, solver.resume(bound, state), recorded)
        return finish_forward(solver, bound, unlooked(solver, bound, state, solver.max_steps))

    def _all(self, solver: Solver[Any], bound: Bound, x0: Tensor) -> Outcome:
        if not solver.looks:
            state = self._record(solver, bound, solver.init(bound, x0), solver.max_steps)
            return finish_forward(solver, bound, unlooked(solver, bound, state, solver.max_steps))
        if self.checkpoint:
            return finish_forward(solver, bound, iterate_in_stretches(solver, bound, x0))
        return solve_forward(solver, bound, x0)

    def _record(self, solver: Solver[Any], bound: Bound, state: Any, steps: int) -> Any:
        return (run_in_stretches if self.checkpoint else run)(solver, bound, state, steps)


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Jacobian-free: differentiate a few solver steps taken from the solution (Fung et al. 2022; Bolte et al. 2023).

    The derivative is that of a truncated Neumann series (gradient descent), or exact to first order (Newton, which
    converges quadratically), also where F is zero to the last bit. Choose it where the linear solve of `Implicit` is
    too dear or does not converge.

    Known limit: an L-BFGS or Broyden step has the curvature of the pairs gathered on the way. In directions that the
    solve never went along its derivative is that of a scaled gradient or Picard step; use `Implicit`, or Newton.

    Args:
        steps: recorded steps.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise MisuseError(f"OneStep(steps={self.steps}): nothing would be differentiated; pass a positive integer.")

    def solve(
        self, posed: Posed, solver: Solver[Any], x0: Tensor, tensors: Sequence[Tensor], report: AdjointReport
    ) -> Outcome:
        _check_recordable(self, solver)
        bound = posed.bind(tensors)
        frozen = posed.bind([t.detach() for t in tensors])
        end = iterate(solver, frozen, x0.detach(), solver.max_steps, look=solver.looks)
        solver = solver.at_solution()
        state = run(solver, bound, solver.resume(bound, end.state), self.steps)
        return finish_forward(solver, bound, Finished(state, end.status, end.steps))


def _check_recordable(adjoint: Adjoint, solver: Solver[Any]) -> None:
    if not solver.recordable:
        raise MisuseError(
            f"{type(adjoint).__name__} differentiates the solver's steps, and those of {type(solver).__name__} leave "
            "no graph behind: they are another program's, or a choice among them. Differentiate the solution instead, "
            "with adjoint=Implicit()."
        )
