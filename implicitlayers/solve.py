"""From a user's call to a solution: what all problems have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitlayers.adjoints import Adjoint, Unrolled
from implicitlayers.closure import bound_now
from implicitlayers.flat import Structure, Tree, flatten_tensors
from implicitlayers.functorch import all_lanes, carries_derivative, full_precision, graph_leaves, recorded
from implicitlayers.policy import apply_policy
from implicitlayers.pose import Summand, UserFunction
from implicitlayers.problem import Kind, Posed
from implicitlayers.regularizers import Regularizer
from implicitlayers.solver import Solver
from implicitlayers.status import AdjointReport, MisuseError, Policy, Solution, Stats, check_policy
from implicitlayers.terms import Composite

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """A call of an entry point.

    Attributes:
        fn: the user's function.
        role: what it stands for.
        x0: where to start.
        params: what fn depends on.
        regularizer: added to the objective.
        solver: how to solve.
        adjoint: how to differentiate.
        has_aux: whether fn returns ``(value, aux)``.
        on_failure: policy of the forward solve.
    """

    fn: Callable[..., Any]
    role: Summand
    x0: Tree
    params: tuple[Any, ...]
    regularizer: Regularizer | None
    solver: Solver[Any]
    adjoint: Adjoint
    has_aux: bool
    on_failure: Policy

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise MisuseError(
                f"{self.role.noun} is a {type(self.fn).__name__}, not a function; pass {self.role.signature}."
            )
        for what, name, kind in (
            (self.regularizer, "regularizer", Regularizer),
            (self.solver, "solver", Solver),
            (self.adjoint, "adjoint", Adjoint),
        ):
            if isinstance(what, type):
                raise MisuseError(f"{name} is the class {what.__name__}; pass an instance, {what.__name__}(...).")
            if not isinstance(what, kind) and not (name == "regularizer" and what is None):
                raise MisuseError(f"{name} is {what!r}, which is no {kind.__name__}.")
        check_policy(self.on_failure, "on_failure")

    def run(self) -> Solution:
        """Pose the problem, solve it, apply the policy."""
        if torch.is_inference_mode_enabled():
            # The tape that the solver's gradients need is off in inference mode; without a derivative that is all
            # there is.
            with torch.inference_mode(False), torch.no_grad():
                return self._run()
        return self._run()

    def _run(self) -> Solution:
        structure = Structure.of(self.x0)
        start = structure.flatten(self.solver.start(self.x0), "what the solver starts from")
        with full_precision(start):
            return self._solve(structure, start)

    def _solve(self, structure: Structure, start: Tensor) -> Solution:
        tensors, skeleton = flatten_tensors(self.params)
        fn = self.fn.bound_now() if isinstance(self.fn, Composite) else bound_now(self.fn)
        function = UserFunction(fn, self.role, structure, skeleton, len(tensors), self.has_aux)
        found = function.examine(start, tensors, touches_all=self.regularizer is None, look=self.solver.looks)
        # The copies are views made by a torch operation, so that a surrounding solve's substitution reaches them too.
        inputs = [t.view_as(t) for t in (*tensors, *found.captured)]
        posed, watches = Posed((self.role.term(function, found),)), (found.watch,)
        if self.regularizer is not None:
            pieces = self.regularizer.pose(structure, start, len(inputs))
            posed = Posed((*posed.terms, *pieces.terms), pieces.nonsmooth)
            inputs, watches = inputs + pieces.tensors, (*watches, *pieces.watches)
        self._check_kind(posed.kind)
        if not isinstance(self.adjoint, Unrolled):
            _check_start(start, inputs)
            start = start.detach()
        # Tensors made in inference mode cannot go on a tape; their copies can.
        start, *inputs = (t.clone() if t.is_inference() else t for t in (start, *inputs))
        report = AdjointReport()
        outcome = self.adjoint.solve(posed, self.solver, start, inputs, report)
        what = f"The solve by {type(self.solver).__name__}"
        if report.inner_error is not None and self.solver.looks and report.inner_error.numel():
            worst = float(all_lanes(report.inner_error).max())
            what = f"{what}, whose error leaves the gradient with an estimated relative error of {worst:.3g},"
        for watch in watches:
            watch.arm()
        value = structure.unflatten(apply_policy(outcome, self.on_failure, what, looks=self.solver.looks))
        aux = self.fn(value, *self.params)[1] if self.has_aux else None
        return Solution(value, outcome.status, Stats(outcome.steps, outcome.residual, outcome.objective), aux, report)

    def _check_kind(self, kind: Kind) -> None:
        if kind in self.solver.handles:
            return
        remedy = {
            Kind.MINIMUM: "LBFGS(), Newton() or GradientDescent()",
            Kind.COMPOSITE: "ProximalGradient(), or a smooth regularizer",
            Kind.ROOT: "Newton(), Broyden(), Anderson() or FixedPointIteration(); to minimize, take argmin",
        }[kind]
        raise MisuseError(
            f"{type(self.solver).__name__} is not made for {kind.value}, which this problem is; pass {remedy}."
        )


def _check_start(start: Tensor, inputs: list[Tensor]) -> None:
    """Diagnose a derivative that is asked for with respect to the start alone: it is zero, and never meant."""
    if not recorded(start) or not carries_derivative(start):
        return
    alone = not any(carries_derivative(t) for t in inputs)
    if alone or not graph_leaves([start]) <= graph_leaves(inputs):
        what = "x0 carries a derivative but nothing else does" if alone else "a tensor enters only through x0"
        raise MisuseError(
            f"{what}: a solution does not depend on where the search starts, so its gradient would be zero. Let what "
            "you differentiate enter the objective or the regularizer (in iMAML: regularizer=Proximal(anchor=theta, "
            "lam=...)), pass x0.detach() if no gradient is meant, or differentiate the path with adjoint=Unrolled()."
        )
