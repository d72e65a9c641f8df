"""Any optimizer of torch.optim as a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from implicitlayers.loop import check_tolerances, norm
from implicitlayers.problem import Bound
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.lanes import each_lane, lane_of
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = ["TorchOptimizer"]

# Their update of an entry depends on nothing but that entry, so that all lanes can share one instance.
_ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD, torch.optim.RMSprop, torch.optim.Rprop,
)  # fmt: skip


@dataclass(frozen=True)
class _Runs:
    """The optimizers with their parameters, by lane. They keep state of their own, which the loop does not see."""

    lanes: dict[tuple[int, ...], tuple[Tensor, torch.optim.Optimizer]]


class _State(NamedTuple):
    x: Tensor
    objective: Tensor
    F: Tensor
    progress: Progress | None
    still: Tensor
    runs: _Runs


@dataclass(frozen=True)
class TorchOptimizer(Solver[_State]):
    """Minimize with an optimizer of `torch.optim`, or any subclass of `torch.optim.Optimizer`.

    Choose it to keep an optimizer you rely on; `GradientDescent`, `Adam` and `LBFGS` have the same updates, can be
    recorded, and run on lanes at full speed. The optimizer's ``step`` is handed a closure that evaluates objective and
    gradient, as LBFGS requires.

    Lanes: the optimizers of `torch.optim` that work entry by entry (SGD, Adam and their relatives) get one parameter
    ``[*lanes, n]``. Any other may couple the entries of a parameter, as LBFGS with its line search does, or a clipping
    of the gradient's norm; every lane then has its own instance and parameter ``[n]``, and its own evaluations beyond
    the first of a step. Optimizers that take other shapes than vectors (Muon) do not apply.

    An optimizer that stops by tolerances of its own (LBFGS: tolerance_grad, tolerance_change) before `rtol` is reached
    ends the lane with STALLED. The steps change state in place and cannot be differentiated: use `Implicit`.

    Args:
        factory: ``params -> optimizer``, as in ``lambda params: torch.optim.SGD(params, lr=0.1)``; params is a list
            with one parameter.
        rtol: see `Solver`.
        atol: see `Solver`.
        max_steps: limit on the calls of the optimizer's ``step``, or their exact number with ``rtol=atol=None``.
    """

    recordable: ClassVar[bool] = False

    factory: Callable[[list[Tensor]], torch.optim.Optimizer]
    rtol: float | None = 1e-6
    atol: float | None = 0.0
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_tolerances(self)
        if isinstance(self.factory, torch.optim.Optimizer) or not callable(self.factory):
            raise MisuseError(
                f"TorchOptimizer({type(self.factory).__name__}): an optimizer needs the unknown as its parameter, and "
                "that exists only inside the solve; pass a function, lambda params: torch.optim.SGD(params, lr=0.1)."
            )

    def init(self, problem: Bound, x: Tensor) -> _State:
        runs, moves = self._prepare(x), torch.zeros_like(x[..., 0], dtype=torch.bool)
        if not self.looks:
            # A fixed number of steps evaluates before each move and never after the last one.
            unseen = torch.full_like(x[..., 0], torch.nan)
            return _State(x, unseen, torch.full_like(x, torch.nan), None, moves, runs)
        objective, F = problem.value_and_residual(x)
        return _State(x, objective, F, Progress.begin(problem, x, objective, F), moves, runs)

    def step(self, problem: Bound, state: _State) -> _State:
        objective, F = state.objective, state.F
        if state.progress is None:
            objective, F = problem.value_and_residual(state.x)
        x = state.x.clone()
        running = self.terminate(problem, state) == RUNNING
        for index, (parameter, optimizer) in state.runs.lanes.items():
            # Without a tolerance nothing is looked at, not even whether all lanes of an optimizer are broken.
            if not self.looks or bool(running[index].any()):
                own = lane_of(problem, index) if index else problem
                x[index] = _advance(own, parameter, optimizer, (state.x[index], objective[index], F[index]))
        if state.progress is None:
            return state._replace(x=x, objective=objective, F=F)
        new = problem.value_and_residual(x)
        progress = state.progress.advance((state.x, F), (x, new[1]), new[0])
        return _State(x, *new, progress, (x == state.x).all(-1), state.runs)

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        if state.progress is not None:
            status = state.progress.verdict(self)
            # An optimizer that has its own idea of the end, as LBFGS with its tolerances, stands still from then on.
            return torch.where((status == RUNNING) & state.still, torch.full_like(status, Status.STALLED), status)
        running = torch.full_like(state.objective, RUNNING, dtype=torch.int64)
        return torch.where(torch.isfinite(state.x).all(-1), running, torch.full_like(running, Status.NON_FINITE))

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        return state.x, norm(state.F), state.objective

    def _prepare(self, x: Tensor) -> _Runs:
        together = self._start(x)
        if x.ndim == 1 or type(together[1]) in _ELEMENTWISE:
            return _Runs({(): together})
        return _Runs({index: self._start(x[index]) for index in each_lane(x.shape[:-1])})

    def _start(self, x: Tensor) -> tuple[Tensor, torch.optim.Optimizer]:
        parameter = x.detach().clone().requires_grad_()
        optimizer: Any = self.factory([parameter])
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise MisuseError(
                f"TorchOptimizer's factory returned {type(optimizer).__name__}; return a torch.optim.Optimizer made "
                "from the params it is given."
            )
        if not any(p is parameter for group in optimizer.param_groups for p in group["params"]):
            raise MisuseError(
                "the optimizer that TorchOptimizer's factory returned does not hold the params it was given, and would "
                "move something else; pass them on, e.g. lambda params: torch.optim.SGD(params, lr=0.1)."
            )
        return parameter, optimizer


def _advance(
    problem: Bound, parameter: Tensor, optimizer: torch.optim.Optimizer, known: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """One step of the optimizer from a point whose objective and F are known; returns the new point."""
    pending = [known[1:]]

    def closure() -> Tensor:
        objective, F = pending.pop() if pending else problem.value_and_residual(parameter.detach())
        parameter.grad = F.clone()
        return objective.sum()

    with torch.no_grad():
        # A frozen lane must not drift on with the others that share its optimizer.
        parameter.copy_(known[0])
    optimizer.step(closure)  # type: ignore[call-overload, arg-type]  # torch's own closures return tensors
    return parameter.detach().clone()
