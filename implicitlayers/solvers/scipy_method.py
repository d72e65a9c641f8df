"""The methods of scipy.optimize as solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor
from torch.func import jacrev
from torch.utils import _pytree as pytree

from implicitlayers.linear.operator import Operator
from implicitlayers.loop import check_tolerances
from implicitlayers.problem import Bound, Kind
from implicitlayers.solver import Progress, Solver
from implicitlayers.solvers.lanes import each_lane, lane_of
from implicitlayers.solvers.mapping import begin, forward_backward, total
from implicitlayers.status import RUNNING, MisuseError, Status
from implicitlayers.terms import ObjectiveTerm

__all__ = ["Scipy"]


class _Options(NamedTuple):
    """How a method is told when to stop: the options that take the tolerance, and those that must not stop it before.

    `euclidean` is whether the tolerance is on the Euclidean norm of F, and not on its largest entry.
    """

    tolerance: tuple[str, ...]
    never: Mapping[str, float] = {}
    limit: str = "maxiter"
    euclidean: bool = False
    second: str = ""


_ROUNDING = 1e-15
_MINIMIZE: dict[str, _Options] = {
    "CG": _Options(("gtol",)),
    "BFGS": _Options(("gtol",)),
    # Its step, not its gradient, ends this method: it runs until no step helps, and the gradient is judged afterwards.
    "Newton-CG": _Options((), {"xtol": _ROUNDING}, second="hessp"),
    "L-BFGS-B": _Options(("gtol",), {"ftol": 0.0, "maxfun": 10**9}),
    "TNC": _Options(("gtol",), {"ftol": 0.0, "xtol": 0.0}, limit="maxfun"),
    "SLSQP": _Options((), {"ftol": _ROUNDING}),
    "trust-constr": _Options(("gtol",), {"xtol": _ROUNDING}, second="hessp"),
    "dogleg": _Options(("gtol",), euclidean=True, second="hess"),
    "trust-ncg": _Options(("gtol",), euclidean=True, second="hessp"),
    "trust-exact": _Options(("gtol",), euclidean=True, second="hess"),
    "trust-krylov": _Options(("gtol",), euclidean=True, second="hessp"),
}  # fmt: skip
_ROOT: dict[str, _Options] = {
    "hybr": _Options((), {"xtol": _ROUNDING}, limit="maxfev", second="jac"),
    "lm": _Options((), {"xtol": _ROUNDING, "ftol": _ROUNDING}, second="jac"),
    **dict.fromkeys(("broyden1", "broyden2", "anderson", "linearmixing", "diagbroyden", "excitingmixing", "krylov"),
                    _Options(("fatol",))),
    "df-sane": _Options(("fatol",), {"ftol": 0.0}, limit="maxfev", euclidean=True),
}  # fmt: skip
_LEAST_SQUARES = ("trf", "dogbox", "lm")
_TAKE_BOUNDS = ("L-BFGS-B", "TNC", "SLSQP", "trust-constr", "trf", "dogbox")
_METHODS = tuple(dict.fromkeys([*_MINIMIZE, *_ROOT, *_LEAST_SQUARES]))
_COUNTS = {"maxfev": "nfev", "maxfun": "nfev", "maxiter": "nit"}
_GRADIENT_FREE = ("Nelder-Mead", "Powell", "COBYLA", "COBYQA")


class _State(NamedTuple):
    x: Tensor
    progress: Progress
    status: Tensor
    taken: Tensor


class _End(NamedTuple):
    """What a method of SciPy made of one lane."""

    x: np.ndarray
    steps: int
    exhausted: bool


@dataclass(frozen=True)
class Scipy(Solver[_State]):
    """Minimize or solve with a method of `scipy.optimize`, one lane after the other, on the CPU and in float64.

    Choose it as a second opinion, or for a method that this library lacks. Objective and gradient are evaluated in the
    dtype and on the device of the unknown; what SciPy computes with them is float64. To minimize, the methods are those
    of `minimize` that take gradients (CG, BFGS, Newton-CG, L-BFGS-B, TNC, SLSQP, trust-constr, dogleg, trust-ncg,
    trust-exact, trust-krylov; with products of the Hessian where they take them), and those of `least_squares` (trf,
    dogbox, lm) for an objective that is a `Composite` with the loss ½‖z‖². A regularizer that is a box becomes their
    bounds, where they take bounds: L-BFGS-B, TNC, SLSQP, trust-constr, trf, dogbox. For an equation they are those of
    `root` (hybr and lm, with the Jacobian; broyden1, broyden2, anderson, linearmixing, diagbroyden, excitingmixing,
    krylov, df-sane).

    SciPy's own verdict is not taken over: a lane has converged where ‖F‖ is below the tolerance, as for every solver
    here, and has otherwise reached the limit (MAX_STEPS) or was given up by the method (STALLED). The steps reported
    are SciPy's iterations, or evaluations where it does not count those. Nothing can be recorded: use `Implicit`.

    Args:
        method: name, as SciPy spells it.
        rtol: see `Solver`, with the scale of the start. None is refused, because SciPy always looks.
        atol: see `Solver`.
        max_steps: limit on SciPy's iterations (for TNC, hybr, df-sane and `least_squares`, evaluations).
        options: further options of the method; they take precedence.
    """

    handles: ClassVar[frozenset[Kind]] = frozenset(Kind)
    recordable: ClassVar[bool] = False

    method: str = "L-BFGS-B"
    rtol: float | None = 1e-8
    atol: float | None = 0.0
    max_steps: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tolerances(self)
        if self.rtol is None:
            raise MisuseError(
                "Scipy(rtol=None, atol=None): SciPy's methods look at values to choose their steps, so that a fixed "
                "number of steps without looking cannot be had; pass two numbers."
            )
        if self.method in _GRADIENT_FREE:
            raise MisuseError(
                f"Scipy({self.method!r}): this method takes no gradients, and would leave a solution too rough to be "
                f"differentiated at; pass one of {_METHODS}."
            )
        if self.method not in _METHODS:
            raise MisuseError(f"Scipy({self.method!r}): no such method is known; pass one of {_METHODS}.")

    def init(self, problem: Bound, x: Tensor) -> _State:
        self._check_kind(problem, x)
        objective, F = problem.value_and_residual(x)
        progress = begin(problem, x, objective, F, torch.ones_like(objective))
        status = torch.full_like(progress.residual, RUNNING, dtype=torch.int64)
        return _State(x, progress, status, torch.zeros_like(status))

    def step(self, problem: Bound, state: _State) -> _State:
        x, taken, status = state.x.clone(), state.taken.clone(), state.status.clone()
        tolerance = state.progress.tolerance(self)
        running = self.terminate(problem, state) == RUNNING
        for index in each_lane(x.shape[:-1]):
            if not bool(running[index]):
                continue
            end = self._solve(lane_of(problem, index), x[index], float(tolerance[index]))
            x[index] = torch.as_tensor(end.x, dtype=x.dtype, device=x.device)
            taken[index] = end.steps
            status[index] = Status.MAX_STEPS if end.exhausted else Status.STALLED
        old, new = (_residual_at(problem, at) for at in (state.x, x))
        progress = state.progress.advance((state.x, old[1]), (x, new[1]), new[0])
        return _State(x, progress, status, taken)

    def terminate(self, problem: Bound, state: _State) -> Tensor:
        # The step is the whole solve, so that a lane that is not done after it is given up.
        ours = state.progress.verdict(self)
        return torch.where(ours == RUNNING, state.status, ours)

    def postprocess(self, problem: Bound, state: _State) -> tuple[Tensor, Tensor, Tensor]:
        objective = state.progress.objective
        objective = torch.full_like(objective, torch.nan) if problem.kind is Kind.ROOT else objective
        return state.x, state.progress.residual, objective

    def count(self, state: _State, steps: Tensor) -> Tensor:
        return state.taken

    def _solve(self, problem: Bound, x: Tensor, tolerance: float) -> _End:
        spread = max(tolerance / x.numel() ** 0.5, np.finfo(np.float64).tiny)
        lane = _Lane(problem, x)
        try:
            with np.errstate(all="ignore"):
                if problem.kind is Kind.ROOT:
                    options = _ROOT[self.method]
                    return self._root(lane, options, tolerance if options.euclidean else spread)
                if self.method in _LEAST_SQUARES:
                    return self._least_squares(lane, spread)
                options = _MINIMIZE[self.method]
                return self._minimize(lane, options, tolerance if options.euclidean else spread)
        except (np.linalg.LinAlgError, ArithmeticError):
            # A matrix that a factorization refuses, an overflow: the other lanes must not hear of it.
            return _End(lane.start, 0, False)
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            return _End(lane.start, 0, False)

    def _minimize(self, lane: _Lane, method: _Options, tolerance: float) -> _End:
        options = self._told(method, tolerance)
        if self.method == "trust-constr" and lane.bounds is not None:
            # Its tolerance would end it at the first barrier, far from the bounds.
            options = {**options, "gtol": _ROUNDING, **self.options}
        second = {"": {}, "hessp": {"hessp": lane.product}, "hess": {"hess": lane.matrix}}[method.second]
        found = scipy.optimize.minimize(
            lane.value_and_gradient, lane.start, jac=True, method=self.method, options=options,
            bounds=None if lane.bounds is None else np.stack(lane.bounds, -1), **second,
        )  # fmt: skip
        return _End(found.x, int(found.nit), int(found[_COUNTS[method.limit]]) >= self.max_steps)

    def _root(self, lane: _Lane, method: _Options, tolerance: float) -> _End:
        # SciPy's mixing and quasi-Newton methods move along +F first, so that they want a fixed point as g(x) - x.
        found = scipy.optimize.root(
            lambda z: -lane.residual(z), lane.start, jac=(lambda z: -lane.matrix(z)) if method.second else None,
            method=self.method, options=self._told(method, tolerance),
        )  # fmt: skip
        taken = int(found.get("nit", found.get("nfev", 0)))
        return _End(np.asarray(found.x), taken, int(found.get(_COUNTS[method.limit], taken)) >= self.max_steps)

    def _told(self, method: _Options, tolerance: float) -> dict[str, Any]:
        options = {**dict.fromkeys(method.tolerance, tolerance), **method.never, method.limit: self.max_steps}
        return {**options, **self.options}

    def _check_kind(self, problem: Bound, x: Tensor) -> None:
        suited = _ROOT if problem.kind is Kind.ROOT else (*_MINIMIZE, *_LEAST_SQUARES)
        if problem.kind is Kind.COMPOSITE:
            suited = _TAKE_BOUNDS
            if problem.bounds(x) is None:
                raise MisuseError(
                    f"Scipy({self.method!r}): SciPy's methods take bounds, and the regularizer has other kinks or "
                    "constraints; pass Box, a smooth regularizer, or take ProximalGradient."
                )
        if self.method not in suited:
            raise MisuseError(
                f"Scipy({self.method!r}) is not made for {problem.kind.value}, which this problem is; pass one of "
                f"{tuple(suited)}."
            )

    def _least_squares(self, lane: _Lane, tolerance: float) -> _End:
        residuals = lane.residuals()
        eps = np.finfo(np.float64).eps
        # In SciPy's Levenberg-Marquardt gtol is the cosine between residuals and columns, and None is not allowed.
        stop = {"ftol": eps, "xtol": eps, "gtol": eps} if self.method == "lm" else {"ftol": None, "xtol": eps}
        options = {**stop, "max_nfev": self.max_steps, **({} if self.method == "lm" else {"gtol": tolerance})}
        found = scipy.optimize.least_squares(
            lambda z: lane.numpy(residuals(lane.tensor(z))), lane.start,
            jac=lambda z: lane.numpy(jacrev(residuals)(lane.tensor(z))),  # type: ignore[arg-type]
            method=self.method, bounds=(-np.inf, np.inf) if lane.bounds is None else lane.bounds,
            **{**options, **self.options},
        )  # fmt: skip
        return _End(found.x, int(found.nfev), found.status == 0)


def _residual_at(problem: Bound, x: Tensor) -> tuple[Tensor, Tensor]:
    """The whole objective, and F or the gradient mapping that stands for it."""
    smooth, F = problem.value_and_residual(x)
    return total(problem, x, smooth), forward_backward(problem, x, F, torch.ones_like(smooth))[1]


@dataclass(frozen=True)
class _Lane:
    """One lane as SciPy wants it: functions of arrays in float64."""

    problem: Bound
    x: Tensor

    @property
    def start(self) -> np.ndarray:
        # Where there are bounds, SciPy wants a start inside.
        return self.numpy(self.x) if self.bounds is None else np.clip(self.numpy(self.x), *self.bounds)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        found = self.problem.bounds(self.x)
        return None if found is None else (self.numpy(found[0]), self.numpy(found[1]))

    def residual(self, z: np.ndarray) -> np.ndarray:
        return self.numpy(self.problem.residual(self.tensor(z)))

    def tensor(self, z: np.ndarray) -> Tensor:
        return torch.as_tensor(np.array(z, copy=True), dtype=self.x.dtype, device=self.x.device)

    @staticmethod
    def numpy(t: Tensor) -> np.ndarray:
        return t.detach().cpu().double().numpy()

    def value_and_gradient(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        value, F = self.problem.value_and_residual(self.tensor(z))
        return float(value), self.numpy(F)

    def product(self, z: np.ndarray, p: np.ndarray) -> np.ndarray:
        return self.numpy(self.problem.linearize(self.tensor(z))(self.tensor(p)))

    def matrix(self, z: np.ndarray) -> np.ndarray:
        x = self.tensor(z)
        return self.numpy(Operator(self.problem.linearize(x), symmetric=False).dense(x))

    def residuals(self) -> Callable[[Tensor], Tensor]:
        """The model's output as one vector, where the objective is half its square and nothing else."""
        term, *others = self.problem.posed.terms
        if others or not isinstance(term, ObjectiveTerm) or term.model is None:
            raise MisuseError(
                "Scipy's least-squares methods need an objective ½‖r(x)‖² given as a Composite, and no regularizer; "
                "write the regularizer's square root as further residuals, or use a method of minimize, e.g. 'BFGS'."
            )
        model, tensors = term.model, [self.problem.tensors[slot] for slot in term.slots]

        def residuals(x: Tensor) -> Tensor:
            return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(model(x, *tensors))])

        half, value = residuals(self.x).square().sum() / 2, self.problem.value_and_residual(self.x)[0]
        if not bool((half - value).abs() <= 1e-4 * value.abs()):
            raise MisuseError(
                f"Scipy's least-squares methods minimize ½‖r(x)‖², which is {half.item():g} at the start for the "
                f"Composite's model, but its loss is {value.item():g}; use a method of minimize, e.g. 'BFGS'."
            )
        return residuals
