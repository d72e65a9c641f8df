"""Regularizers of the user's own, from plain functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitlayers.flat import Structure, Tree, flatten_tensors
from implicitlayers.pose import Examined, Objective, Role, UserFunction, check_like
from implicitlayers.problem import Nonsmooth
from implicitlayers.regularizers.base import Pieces, Regularizer
from implicitlayers.status import MisuseError

__all__ = ["Penalty", "Prox"]


class Penalty(Regularizer):
    """Any smooth penalty, given as a function of the unknown.

    It is treated like the objective: tensors that it captures get gradients, and it must be deterministic. As a summand
    of its own it is left alone by derivatives that do not concern it; otherwise adding it inside the objective is the
    same.

    Args:
        fn: ``x -> scalar`` for a tree like ``x0``; twice differentiable. A `Composite` where Gauss-Newton curvature is
            asked for.

    Raises:
        MisuseError: what `fn` returns is no scalar, or not that of its first call.
    """

    def __init__(self, fn: Callable[[Any], Tensor]) -> None:
        _check_callable("Penalty", "fn", fn, "x -> scalar")
        self.fn = fn

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        function, found = _examine(self.fn, Objective("penalty"), structure, start)
        term = function.objective(found)
        slots = tuple(first_slot + slot for slot in term.slots)
        return Pieces([replace(term, slots=slots)], None, _views(found), (found.watch,))


class Prox(Regularizer):
    """A penalty with kinks, or a constraint, given by its proximal map.

    The map is argmin_x r(x) + ‖x - y‖²/(2 step). Solver and derivative use nothing else of r, and the derivative is
    that of `prox` as it is written: it should be differentiable almost everywhere, in y and in the tensors that it
    captures, which get gradients. For derivatives of order k it must be differentiable k times.

    Args:
        prox: ``(y, step) -> x``, trees like ``x0``; `step` is a 0-d tensor.
        value: ``x -> scalar``, r; None for a constraint, whose value is 0 where it holds.

    Raises:
        MisuseError: what `prox` returns is not a tree like ``x0``, or what `value` returns no scalar.

    Examples:
        >>> prox = Prox(lambda y, step: y / (1 + step), lambda x: x.square().sum() / 2)  # another Ridge(1.0)
    """

    smooth = False

    def __init__(self, prox: Callable[[Any, Tensor], Tree], value: Callable[[Any], Tensor] | None = None) -> None:
        _check_callable("Prox", "prox", prox, "(y, step) -> x")
        if value is not None:
            _check_callable("Prox", "value", value, "x -> scalar")
        self.prox, self.value = prox, value

    def pose(self, structure: Structure, start: Tensor, first_slot: int) -> Pieces:
        step = torch.ones((), dtype=structure.dtype, device=structure.device)
        function, found = _examine(self.prox, _ProximalMap(), structure, start, step)
        tensors, prox, value, count = _views(found), function.flat(found), None, len(found.captured)
        watches = (found.watch,)
        if self.value is not None:
            function, found = _examine(self.value, Objective("value of a Prox"), structure, start)
            tensors, value = tensors + _views(found), function.flat(found)
            watches = (*watches, found.watch)
        slots = tuple(range(first_slot, first_slot + len(tensors)))
        return Pieces([], _UserProx(slots, prox, value, count), tensors, watches)


class _ProximalMap(Role):
    """A map from trees to trees like them."""

    noun = "proximal map"
    signature = "(y, step) -> x"

    def check(self, out: Any, structure: Structure) -> None:
        self.flat(out, structure)
        for leaf in pytree.tree_leaves(out):
            check_like(self.noun, leaf, structure)

    def flat(self, out: Any, structure: Structure) -> Tensor:
        return structure.flatten(out, f"what the {self.noun} returned")


@dataclass(frozen=True)
class _UserProx(Nonsmooth):
    """The user's functions, flat; the first `count` parameters are those of the map, the rest the value's."""

    slots: tuple[int, ...]
    map: Callable[..., Tensor]
    height: Callable[..., Tensor] | None
    count: int

    def prox(self, y: Tensor, step: Tensor, *params: Tensor) -> Tensor:
        return self.map(y, step, *params[: self.count])

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        return torch.zeros_like(x[0]) if self.height is None else self.height(x, *params[self.count :])


def _check_callable(name: str, argument: str, given: Any, signature: str) -> None:
    if not callable(given):
        raise MisuseError(f"{name}({argument}=...) is a {type(given).__name__}, not a function; pass {signature}.")


def _examine(
    fn: Callable[..., Any], role: Role, structure: Structure, start: Tensor, *tensors: Tensor
) -> tuple[UserFunction, Examined]:
    """The function, and what one look at it found; it is called twice and compared where that waits for no device."""
    given, skeleton = flatten_tensors(tensors)
    function = UserFunction(fn, role, structure, skeleton, len(given), has_aux=False)
    look = structure.device.type == "cpu"
    return function, function.examine(start, given, touches_all=False, look=look)


def _views(found: Examined) -> list[Tensor]:
    # Made by a torch operation, so that a surrounding solve's substitution reaches them too.
    return [t.view_as(t) for t in found.captured]
