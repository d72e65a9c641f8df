"""Captured tensors: what a function uses without being handed it.

An objective is usually a closure: it uses a module's parameters, an anchor, a data set of the surrounding scope.
Autograd Functions and torch.func know explicit inputs only, so a captured tensor would get no gradient, silently.
Therefore one probe run under a `TorchFunctionMode` notes every tensor that reaches an operation without having been
passed in or computed on the way; those for which a derivative is asked become explicit inputs, and a second mode puts
the explicit values in their place whenever the function runs.

A closure also sees what its names mean *when it is called*, and a backward calls it again, later: in a loop over tasks
a captured loop variable has moved on by then, and the derivative would be that of another problem. The first evaluation
after a solve is therefore watched: it must use the same tensors, unchanged.

Known limit: a tensor that reaches a custom ``torch.autograd.Function`` as a direct argument meets no torch operation
on the way and cannot be replaced there; pass such a tensor as a param.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from implicitlayers.functorch import carries_derivative, is_wrapped
from implicitlayers.status import MisuseError

__all__ = ["Probe", "Watch", "bound_now", "substituted"]


class _Onlooker(TorchFunctionMode):
    """Sees every tensor that reaches an operation; tells those that come from outside from those made on the way."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {id(t) for t in known}
        # An id is only unique among living objects, so everything seen is kept alive until the mode is dropped.
        self._alive: list[Tensor] = list(known)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self._used(t)
                if self._remember(t):
                    self._found(t)
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and self._remember(t):
                self._made(t)
        return out

    def _remember(self, t: Tensor) -> bool:
        if id(t) in self._known:
            return False
        self._known.add(id(t))
        self._alive.append(t)
        return True

    def _used(self, t: Tensor) -> None:
        """Called for every argument of an operation."""

    def _found(self, t: Tensor) -> None:
        """Called the first time that a tensor comes from outside."""

    def _made(self, t: Tensor) -> None:
        """Called for every new result."""


class Probe(_Onlooker):
    """Notes which tensors a function touches.

    Attributes:
        captured: tensors used without having been passed or computed, for which a derivative is asked, or which live
            inside a transform.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__(given)
        self.captured: list[Tensor] = []
        self._touched: set[int] = set()
        self._touched_before: set[int] | None = None
        self._outside: list[tuple[Tensor, int | None]] = []
        self._results: list[weakref.ref[Tensor]] = []

    def touched(self, t: Tensor) -> bool:
        """Whether `t` was an argument of any operation of the last run."""
        return id(t) in self._touched

    def changed(self) -> bool:
        """Whether a tensor of the surroundings was changed in place."""
        return any(_version(t) != version for t, version in self._outside)

    def again(self) -> None:
        """The function is about to run a second time."""
        self._touched_before, self._touched = self._touched, set()

    def watch(self, noun: str) -> Watch:
        """What a later evaluation is held against; `noun` names the function in messages."""
        plain = [(t, version) for t, version in self._outside if not any(t is c for c in self.captured)]
        # What a custom Function returns was made by no torch operation and looks as if it came from outside; but it is
        # another tensor each time, while the surroundings stay. Where there is such a thing strangers mean nothing.
        before = self._touched_before
        told = before is not None and all(id(t) in before and id(t) in self._touched for t, _ in self._outside)
        return Watch(noun, plain, self._results, tells_strangers=told)

    def _used(self, t: Tensor) -> None:
        self._touched.add(id(t))

    def _found(self, t: Tensor) -> None:
        if is_wrapped(t) or carries_derivative(t) or t.is_inference():
            self.captured.append(t)
        self._outside.append((t, _version(t)))

    def _made(self, t: Tensor) -> None:
        self._results.append(weakref.ref(t))


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


class Watch:
    """Holds one evaluation, the first after the solve, against what the function used before it.

    Args:
        noun: the function, in messages.
        outside: tensors that it took from its surroundings and their versions, without those that became inputs.
        results: what it computed; a module may have kept some of it for later calls.
        tells_strangers: whether tensors from outside can be told from those made on the way.
    """

    def __init__(
        self,
        noun: str,
        outside: Sequence[tuple[Tensor, int | None]],
        results: Sequence[weakref.ref[Tensor]],
        *,
        tells_strangers: bool,
    ) -> None:
        self._noun, self._outside, self._results, self._tells = noun, outside, results, tells_strangers
        self._armed = False

    def arm(self) -> None:
        """The solve is over: watch the next evaluation."""
        self._armed = True

    def run(self, fn: Callable[..., Any], given: Sequence[Tensor], *args: Any) -> Any:
        """Evaluate ``fn(*args)``, whose tensors and substitutes are `given`; once, after `arm`, watched."""
        if not self._armed:
            return fn(*args)
        self._armed = False
        for t, version in self._outside:
            if _version(t) != version:
                raise MisuseError(
                    f"the {self._noun} captures a tensor of shape {tuple(t.shape)} that was changed in place after the "
                    "solve, and the derivative evaluates it again; pass it as a param, or change a copy."
                )
        if not self._tells:
            return fn(*args)
        kept = [t for t in (ref() for ref in self._results) if t is not None]
        leaves = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        with _Strangers([*given, *leaves, *kept, *(t for t, _ in self._outside)]) as mode:
            out = fn(*args)
        missing = any(id(t) not in mode.seen for t, _ in self._outside)
        for t in mode.strangers:
            if carries_derivative(t) or missing:
                raise MisuseError(
                    f"the {self._noun} now uses a tensor of shape {tuple(t.shape)} that it did not use before the "
                    "solve, so the derivative would be that of another problem: a captured loop variable may have "
                    "moved on, or another branch been taken. Pass it as a param: (x, tensor) -> ..."
                )
        return out


class _Strangers(_Onlooker):
    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__(known)
        self.strangers: list[Tensor] = []
        self.seen: set[int] = set()

    def _used(self, t: Tensor) -> None:
        self.seen.add(id(t))

    def _found(self, t: Tensor) -> None:
        self.strangers.append(t)


class _Substitute(TorchFunctionMode):
    def __init__(self, table: dict[int, Tensor]) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(t: Any) -> Any:
            return self._table.get(id(t), t) if isinstance(t, Tensor) else t

        args, kwargs = pytree.tree_map(swap, (args, kwargs or {}))
        return func(*args, **kwargs)


def bound_now(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A module with the parameters and buffers that it has now, whatever it has when it is called; else `fn` itself.

    A backward calls the module again when ``torch.func.functional_call`` around the solve has long put the module's own
    parameters back.
    """
    if not isinstance(fn, torch.nn.Module):
        return fn
    tensors = {**dict(fn.named_parameters()), **dict(fn.named_buffers())}
    return lambda *args: torch.func.functional_call(fn, tensors, args)


def substituted(fn: Callable[..., Any], captured: Sequence[Tensor], watch: Watch) -> Callable[..., Any]:
    """Return ``pure(values, *args)``, which runs ``fn(*args)`` with `values` in the place of the `captured` tensors."""

    def swapped(values: Sequence[Tensor], *args: Any) -> Any:
        if not captured:
            return fn(*args)
        with _Substitute({id(c): v for c, v in zip(captured, values, strict=True)}):
            return fn(*args)

    return lambda values, *args: watch.run(swapped, values, values, *args)
