"""The face: thin entry points that check what they are given, hand over to an adjoint, and raise once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitlayers.adjoints import Adjoint, Implicit, Unrolled
from implicitlayers.closure import Probe, substituted
from implicitlayers.flat import Structure, Tree, flatten_tensors, join_tensors
from implicitlayers.functorch import all_lanes, carries_derivative, graph_leaves, is_wrapped, opaque_to_compile
from implicitlayers.problem import Composite, ObjectiveTerm, Outcome, Term
from implicitlayers.regularizers import Regularizer
from implicitlayers.solver import Solver
from implicitlayers.solvers.lbfgs import LBFGS
from implicitlayers.status import (
    AdjointReport,
    MisuseError,
    Policy,
    Solution,
    SolveError,
    SolveWarning,
    Stats,
    check_policy,
    describe_failures,
    failed,
    warn_caller,
)  # fmt: skip

__all__ = ["argmin"]


# torch.compile breaks its graph here: tracing a solve gains nothing, and compiled autograd Functions have known faults
# that change gradients silently (pytorch#183604, #193279).
@opaque_to_compile
def argmin(
    objective: Callable[..., Any],
    x0: Tree,
    *params: Any,
    regularizer: Regularizer | None = None,
    solver: Solver[Any] | None = None,
    adjoint: Adjoint | None = None,
    has_aux: bool = False,
    on_failure: Policy = "raise",
) -> Solution:
    """Minimize a function, and differentiate the minimizer.

    x*(θ) = argmin_x  f(x, θ) + r(x)

    The optimality condition is F(x, θ) = ∇ₓf(x, θ) + ∇r(x) = 0, and dx*/dθ = -(∇²f + ∇²r)⁻¹ ∂F/∂θ. Derivatives of every
    order reach the params, the regularizer's tensors, and every tensor that `objective` captures.

    Args:
        objective: ``(x, *params) -> scalar``; a function, a module, or a `Composite`. Must be deterministic and must
            not change what it captures. It is called again by the backward: data that a loop rebinds or overwrites
            until then must be params, not captured.
        x0: where to start; a tensor or any tree of tensors of one floating dtype. Gets no gradient under `Implicit`.
        *params: what the objective depends on; trees of tensors and anything else.
        regularizer: added to the objective.
        solver: how to minimize; `LBFGS()` by default.
        adjoint: how to differentiate; `Implicit()` by default.
        has_aux: whether the objective returns ``(value, aux)``.
        on_failure: what to do about lanes that the solver could not finish: "raise", "warn", "ignore" (look at
            ``solution.status`` yourself) or "nan" (their value becomes NaN).

    Returns:
        The solution; ``solution.value`` is a tree like ``x0``.

    Raises:
        MisuseError: the call cannot mean what it says.
        SolveError: some lanes failed and ``on_failure="raise"``.

    Example:
        >>> A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> b = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> x = argmin(lambda x, b: x @ A @ x / 2 - b @ x, torch.zeros(2, dtype=torch.float64), b).value
        >>> torch.allclose(torch.autograd.grad(x[0], b)[0], torch.linalg.inv(A)[0])
        True
    """
    solver = LBFGS() if solver is None else solver
    adjoint = Implicit() if adjoint is None else adjoint
    _check_arguments(objective, regularizer, solver, adjoint, on_failure)
    if torch.is_inference_mode_enabled():
        # The tape that the solver's gradients need is off in inference mode; without a derivative that is all there is.
        with torch.inference_mode(False), torch.no_grad():
            return _argmin(objective, x0, params, regularizer, solver, adjoint, has_aux, on_failure)
    return _argmin(objective, x0, params, regularizer, solver, adjoint, has_aux, on_failure)


def _argmin(
    objective: Callable[..., Any],
    x0: Tree,
    params: tuple[Any, ...],
    regularizer: Regularizer | None,
    solver: Solver[Any],
    adjoint: Adjoint,
    has_aux: bool,
    on_failure: Policy,
) -> Solution:
    structure = Structure.of(x0)
    start = structure.flatten(solver.start(x0), "the solver's start")
    tensors, skeleton = flatten_tensors(params)
    problem = _Objective(objective, structure, skeleton, len(tensors), has_aux)
    captured, used = problem.examine(start, tensors, touches_all=regularizer is None, look=solver.looks)
    # The copies are views made by a torch operation, so that a surrounding argmin's substitution reaches them too.
    inputs = [t.view_as(t) for t in (*tensors, *captured)]
    terms: list[Term] = [problem.term(captured, used)]
    if regularizer is not None:
        more, their_tensors = regularizer.terms(structure, len(inputs))
        terms, inputs = terms + more, inputs + their_tensors
    if not isinstance(adjoint, Unrolled):
        _check_start(start, inputs)
        start = start.detach()
    # Tensors made in inference mode cannot go on a tape; their copies can.
    start, *inputs = (t.clone() if t.is_inference() else t for t in (start, *inputs))
    report = AdjointReport()
    outcome = adjoint.solve(tuple(terms), solver, start, inputs, report)
    x = _apply_policy(outcome, on_failure, solver)
    value = structure.unflatten(x)
    aux = objective(value, *params)[1] if has_aux else None
    return Solution(value, outcome.status, Stats(outcome.steps, outcome.residual, outcome.objective), aux, report)


@dataclass(frozen=True)
class _Objective:
    """The user's objective, seen as a function of one flat vector and a list of tensors."""

    fn: Callable[..., Any]
    structure: Structure
    skeleton: Any
    count: int
    has_aux: bool

    def examine(
        self, start: Tensor, tensors: list[Tensor], *, touches_all: bool, look: bool
    ) -> tuple[list[Tensor], bool]:
        """Evaluate, check what comes back; return captured tensors that must become inputs, and whether x is used."""
        # Copies, so that a tensor that is both passed and captured is seen as captured.
        x = self.structure.unflatten(start.detach().clone())
        copies = [t.detach() for t in tensors]
        leaves, _ = flatten_tensors(x)
        with torch.no_grad(), Probe([*leaves, *copies]) as probe:
            out = self.fn(x, *join_tensors(copies, self.skeleton))
            again = self.fn(x, *join_tensors(copies, self.skeleton)) if look else out
        if probe.changed():
            raise MisuseError(
                "the objective changes a tensor that it captures, in place, so that every evaluation is of another "
                "function. Batch normalization does so in training mode: call module.eval(), or let it keep no running "
                "statistics."
            )
        self._check_output(out)
        if look:
            self._check_repeatable(out, again)
        untouched = [p for p, leaf in zip(self.structure.paths, leaves, strict=True) if not probe.touched(leaf)]
        if untouched and touches_all:
            raise MisuseError(
                f"the objective does not use {', '.join(untouched)}, so any value there is a minimizer and none has a "
                "derivative; take it out of x0, or add a regularizer."
            )
        return probe.captured, len(untouched) < len(leaves)

    def term(self, captured: list[Tensor], uses_unknown: bool) -> ObjectiveTerm:
        """The objective as a term whose tensors are the params', then the captured ones."""
        slots = tuple(range(self.count + len(captured)))
        value = substituted(self.fn, captured)

        def flat(x: Tensor, *values: Tensor) -> Tensor:
            out = value(
                values[self.count :], self.structure.unflatten(x), *join_tensors(values[: self.count], self.skeleton)
            )
            return out[0] if self.has_aux else out

        if not isinstance(self.fn, Composite):
            return ObjectiveTerm(flat, slots, uses_unknown=uses_unknown)
        model_of, loss_of = substituted(self.fn.model, captured), substituted(self.fn.loss, captured)

        def model(x: Tensor, *values: Tensor) -> Any:
            params = join_tensors(values[: self.count], self.skeleton)
            return model_of(values[self.count :], self.structure.unflatten(x), *params)

        def loss(z: Any, *values: Tensor) -> Tensor:
            out = loss_of(values[self.count :], z, *join_tensors(values[: self.count], self.skeleton))
            return out[0] if self.has_aux else out

        return ObjectiveTerm(flat, slots, model, loss, uses_unknown)

    def _check_repeatable(self, out: Any, again: Any) -> None:
        first, second = (all_lanes(o[0] if self.has_aux else o) for o in (out, again))
        # Parallel sums may differ by rounding from call to call; dropout and fresh batches differ by far more.
        tolerance = torch.finfo(first.dtype).eps ** 0.5 * torch.maximum(first.abs(), second.abs())
        if bool(((first - second).abs() > tolerance).any()):
            raise MisuseError(
                f"the objective is not deterministic: two calls at x0 gave {first.flatten()[0].item()} and "
                f"{second.flatten()[0].item()}, so it has no minimizer. Switch dropout off (module.eval()), "
                "and draw batches and noise before the call."
            )

    def _check_output(self, out: Any) -> None:
        if self.has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise MisuseError(
                    f"has_aux=True, but the objective returned {type(out).__name__}; return (value, aux)."
                )
            out = out[0]
        if not isinstance(out, Tensor):
            hint = " (has_aux=True if it is (value, aux))" if isinstance(out, tuple) else ""
            raise MisuseError(f"the objective returned {type(out).__name__}, not a tensor; return a 0-d tensor{hint}.")
        if out.ndim != 0:
            raise MisuseError(
                f"the objective returned shape {tuple(out.shape)}, and only a scalar can be minimized; reduce it with "
                ".sum() or .mean(), or solve many problems at once with torch.vmap."
            )
        if out.dtype != self.structure.dtype:
            raise MisuseError(
                f"the objective is {out.dtype} but x0 is {self.structure.dtype}: params or data of another dtype "
                "entered; convert one side, e.g. x0.to(data.dtype)."
            )
        if out.device != self.structure.device:
            raise MisuseError(
                f"the objective lies on {out.device} but x0 on {self.structure.device}; move one of them."
            )


def _check_arguments(objective: Any, regularizer: Any, solver: Any, adjoint: Any, on_failure: str) -> None:
    if not callable(objective):
        raise MisuseError(f"objective is a {type(objective).__name__}, not a function; pass (x, *params) -> scalar.")
    for what, name, kind in (
        (regularizer, "regularizer", Regularizer),
        (solver, "solver", Solver),
        (adjoint, "adjoint", Adjoint),
    ):
        if isinstance(what, type):
            raise MisuseError(f"{name} is the class {what.__name__}; pass an instance, {what.__name__}(...).")
        if not isinstance(what, kind) and not (name == "regularizer" and what is None):
            raise MisuseError(f"{name} is {what!r}, which is no {kind.__name__}.")
    check_policy(on_failure, "on_failure")


def _check_start(start: Tensor, inputs: list[Tensor]) -> None:
    """Diagnose a derivative that is asked for with respect to the start alone: it is zero, and never meant."""
    recording = torch.is_grad_enabled() or is_wrapped(start)
    if not recording or not carries_derivative(start):
        return
    alone = not any(carries_derivative(t) for t in inputs)
    if alone or not graph_leaves([start]) <= graph_leaves(inputs):
        what = "x0 carries a derivative but nothing else does" if alone else "a tensor enters only through x0"
        raise MisuseError(
            f"{what}: a minimizer does not depend on where the search starts, so its gradient would be zero. Let what "
            "you differentiate enter the objective or the regularizer (in iMAML: regularizer=Proximal(anchor=theta, "
            "lam=...)), pass x0.detach() if no gradient is meant, or differentiate the path with adjoint=Unrolled()."
        )


def _apply_policy(outcome: Outcome, on_failure: Policy, solver: Solver[Any]) -> Tensor:
    if on_failure == "nan":
        return torch.where(failed(outcome.status).unsqueeze(-1), torch.full_like(outcome.x, torch.nan), outcome.x)
    if on_failure in ("raise", "warn") and solver.looks:
        status = all_lanes(outcome.status)
        if bool(failed(status).any()):
            message = describe_failures(
                f"The solve by {type(solver).__name__}", status, all_lanes(outcome.steps), all_lanes(outcome.residual)
            )
            if on_failure == "raise":
                raise SolveError(message)
            warn_caller(SolveWarning(message))
    return outcome.x
