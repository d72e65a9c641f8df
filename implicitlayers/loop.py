"""The only loop, and the only place where the value of a tensor decides what Python does next.

Solvers, line searches and linear solvers are `Algorithm`s: pure steps on a state whose tensors lead with the lanes. The
loop runs them until every lane is done, and freezes each lane the moment it is: its state stays bit for bit what it
was, whatever the others still do. With ``look=False`` a fixed number of steps is run and no value is ever looked at,
so that nothing waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitlayers.functorch import all_lanes, carries_derivative
from implicitlayers.status import RUNNING, MisuseError, Status

__all__ = [
    "Algorithm",
    "Finished",
    "begin",
    "check_tolerances",
    "dot",
    "freeze",
    "go_on",
    "iterate",
    "norm",
    "not_finite",
    "per_lane",
    "repeat",
    "run",
    "unlooked",
]

# Where one lane no longer fits the caches, a product that is written and read again takes twice the time of BLAS. Up to
# there its sums are those of many lanes to the bit.
_LONG = 1 << 16

P = TypeVar("P")
S = TypeVar("S")


class Algorithm(ABC, Generic[P, S]):
    """A method as pure functions; it never loops, counts or raises."""

    @abstractmethod
    def init(self, problem: P, x: Tensor) -> S:
        """The state before the first step; `x` is ``[*lanes, n]``."""

    @abstractmethod
    def step(self, problem: P, state: S) -> S:
        """One step on every lane. Lanes are independent, and a lane that is broken must not disturb the others."""

    @abstractmethod
    def terminate(self, problem: P, state: S) -> Tensor:
        """int64 ``[*lanes]``: RUNNING, or the `Status` a lane has reached."""


class Finished(NamedTuple):
    """What the loop returns: the last state, and per lane its status and the steps it took."""

    state: Any
    status: Tensor
    steps: Tensor


def per_lane(mask: Tensor, like: Tensor) -> Tensor:
    """Give a ``[*lanes]`` mask trailing dimensions so that it broadcasts against a state tensor."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def freeze(running: Tensor, new: Any, old: Any) -> Any:
    """The new state where a lane is running, the old one bit for bit where it is not."""

    def pick(fresh: Any, stale: Any) -> Any:
        if not isinstance(fresh, Tensor) or fresh is stale:
            return fresh
        return torch.where(per_lane(running, fresh), fresh, stale)

    return pytree.tree_map(pick, new, old)


def run(algorithm: Algorithm[P, S], problem: P, state: S, steps: int) -> S:
    """Take exactly this many steps, looking at nothing."""
    for _ in range(steps):
        state = algorithm.step(problem, state)
    return state


def unlooked(algorithm: Algorithm[P, S], problem: P, state: S, steps: int) -> Finished:
    """End a run that did not look: a lane that broke says so, the others were not checked."""
    status = algorithm.terminate(problem, state)
    unchecked = (status == RUNNING) | (status == Status.CONVERGED) | (status == Status.STALLED)
    status = torch.where(unchecked, torch.full_like(status, Status.NOT_CHECKED), status)
    return Finished(state, status, torch.full_like(status, steps))


def iterate(algorithm: Algorithm[P, S], problem: P, x: Tensor, max_steps: int, *, look: bool) -> Finished:
    """Run an algorithm to the end on all lanes.

    Args:
        algorithm: the step to repeat.
        problem: what it is handed.
        x: start, ``[*lanes, n]``.
        max_steps: limit on the steps, or their exact number with ``look=False``.
        look: whether to ask the algorithm after each step which lanes are done. Costs one synchronization a step.
    """
    state = algorithm.init(problem, x)
    if not look:
        return unlooked(algorithm, problem, run(algorithm, problem, state, max_steps), max_steps)
    end = go_on(algorithm, problem, begin(algorithm, problem, state), max_steps)
    running = end.status == RUNNING
    return end._replace(status=torch.where(running, torch.full_like(end.status, Status.MAX_STEPS), end.status))


def begin(algorithm: Algorithm[P, S], problem: P, state: S) -> Finished:
    """Before the first step of a run that looks: lanes that have nothing to do are done."""
    status = algorithm.terminate(problem, state)
    return Finished(state, status, torch.zeros_like(status))


def go_on(algorithm: Algorithm[P, S], problem: P, at: Finished, steps: int) -> Finished:
    """Take up to this many steps more on the lanes that are still RUNNING, and look after each."""
    state, status, taken = at
    for _ in range(steps):
        running = status == RUNNING
        # Lanes of surrounding vmaps are looked at together; what each of them does stays its own, by the mask.
        everywhere = all_lanes(running)
        left = int(everywhere.sum())
        if left == 0:
            break
        new = algorithm.step(problem, state)
        state = new if left == everywhere.numel() else freeze(running, new, state)
        taken = taken + running
        status = torch.where(running, algorithm.terminate(problem, state), status)
    return Finished(state, status, taken)


def repeat(algorithm: Algorithm[P, S], problem: P, state: S, taken: Tensor) -> S:
    """Take the steps of an earlier run again, ``taken [*lanes]`` in each lane, whatever would be decided now."""
    everywhere = all_lanes(taken)
    for done in range(int(everywhere.max())):
        new = algorithm.step(problem, state)
        state = new if int(everywhere.min()) > done else freeze(taken > done, new, state)
    return state


def _is_number(value: Any, *, optional: bool) -> bool:
    return (value is None and optional) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def check_tolerances(owner: Any, least_steps: int = 1) -> None:
    """Validate the fields ``rtol``, ``atol`` and ``max_steps`` of a configuration object."""
    name = type(owner).__name__
    for field in fields(owner):
        value, declared = getattr(owner, field.name), str(field.type)
        if declared.split(" ")[0] in ("float", "int") and not _is_number(value, optional="None" in declared):
            raise MisuseError(
                f"{name}({field.name}={value!r}): settings are plain Python numbers, which no derivative reaches; pass "
                "a number, from a tensor t float(t)."
            )
    if (owner.rtol is None) != (owner.atol is None):
        raise MisuseError(
            f"{name}(rtol={owner.rtol}, atol={owner.atol}): one is None and the other is not; pass two numbers, "
            "or None for both to run exactly max_steps steps without looking."
        )
    for field in ("rtol", "atol"):
        value = getattr(owner, field)
        if value is not None and not value >= 0:
            raise MisuseError(f"{name}({field}={value}): a tolerance cannot be negative or NaN; pass a number >= 0.")
    if not isinstance(owner.max_steps, int) or owner.max_steps < least_steps:
        raise MisuseError(
            f"{name}(max_steps={owner.max_steps!r}): at least one step is needed; pass a positive integer."
        )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per lane, accumulated in float32 for half types."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return (a.float() * b.float()).sum(-1)
    if a.ndim == b.ndim == 1 and len(a) >= _LONG:
        return torch.dot(a, b)
    return (a * b).sum(-1)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm per lane that neither overflows nor underflows.

    Its derivative is a/‖a‖, and 0 at 0, where there is none; those of that are 0 as well.
    """
    if not carries_derivative(a):
        return _length(a)
    zero = (a.detach() == 0).all(-1)
    # Any other vector in the place of zero: the second derivative of its length is infinite, and NaN times nothing.
    length = _length(torch.where(zero.unsqueeze(-1), torch.ones_like(a), a))
    return torch.where(zero, torch.zeros_like(length), length)


def _length(a: Tensor) -> Tensor:
    if a.dtype != torch.float64 and a.device.type != "mps":
        # The square of any shorter number is a float64; MPS has none.
        return torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64).to(a.dtype)
    # The largest entry is divided out, and multiplied back, so that no derivative passes through it.
    largest = torch.linalg.vector_norm(a.detach(), torch.inf, dim=-1)
    # Division multiplies by the reciprocal, which is infinite for subnormal numbers.
    safe = torch.where(torch.isfinite(largest), largest.clamp_min(torch.finfo(a.dtype).tiny), 1.0)
    return torch.linalg.vector_norm(a / safe.unsqueeze(-1), dim=-1) * safe


def not_finite(*quantities: Tensor) -> Tensor:
    """Mask of the lanes in which any of these per-lane quantities is NaN or infinite."""
    bad = ~torch.isfinite(quantities[0])
    for q in quantities[1:]:
        bad = bad | ~torch.isfinite(q)
    return bad
