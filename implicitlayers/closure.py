"""Captured tensors: what a function uses without being handed it.

An objective is usually a closure: it uses a module's parameters, an anchor, a data set of the surrounding scope.
Autograd Functions and torch.func know explicit inputs only, so a captured tensor would get no gradient, silently.
Therefore one probe run under a `TorchFunctionMode` notes every tensor that reaches an operation without having been
passed in or computed on the way; those for which a derivative is asked become explicit inputs, and a second mode puts
the explicit values in their place whenever the function runs.

A closure also sees what its names mean *when it is called*, and a backward calls it again, later: in a loop over tasks
a captured loop variable has moved on by then, and the derivative would be that of another problem. Therefore the first
evaluation of every backward is watched: it must use the same tensors, unchanged.

Known limit: a tensor that reaches a custom ``torch.autograd.Function``, a transform or a scripted module directly meets
no torch operation on the way and cannot be replaced there. Where the solve's own tape runs into one that carries a
derivative, the call is refused; pass such a tensor as a param.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from implicitlayers.functorch import below, carries_derivative, current_level, graph_leaves, is_wrapped, stripped
from implicitlayers.status import MisuseError

__all__ = ["Probe", "Watch", "bound_now", "substituted"]


class _Onlooker(TorchFunctionMode):
    """Sees every tensor that reaches an operation; tells those that come from outside from those made on the way."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._level = current_level()
        self._known = {id(t) for t in known}
        # An id is only unique among living objects, so everything seen is kept alive until the mode is dropped.
        self._alive: list[Tensor] = list(known)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A transform inside the function, torch.func.grad for instance, wraps what it is handed.
        for t in _tensors((args, kwargs)):
            inner = below(t, self._level)
            self._used(inner)
            if self._remember(inner):
                self._found(inner)
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            inner = below(t, self._level)
            if self._remember(inner):
                self._made(inner)
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
        self._outside: list[tuple[Tensor, int | None]] = []
        self._results: list[weakref.ref[Tensor]] = []

    def touched(self, t: Tensor) -> bool:
        """Whether `t` was an argument of any operation."""
        return id(t) in self._touched

    def made(self, t: Tensor) -> bool:
        """Whether `t` came out of an operation that can be seen."""
        return any(ref() is t for ref in self._results)

    def changed(self) -> bool:
        """Whether a tensor of the surroundings was changed in place."""
        return any(_version(t) != version for t, version in self._outside)

    def watch(self, noun: str) -> Watch:
        """What a later evaluation is held against; `noun` names the function in messages."""
        lifted = {id(t) for t in self.captured}
        return Watch(noun, [(t, version) for t, version in self._outside if id(t) not in lifted], self._results)

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
    """Holds evaluations after the solve against what the function used before it.

    What a custom Function returns was made by no torch operation and looks as if it came from outside; but it is
    another tensor each time, while the surroundings stay. So the first evaluation of the solve, still at the start, is
    looked at as well: where it uses other tensors than the probe did, strangers mean nothing later on.

    Args:
        noun: the function, in messages.
        outside: tensors that it took from its surroundings and their versions, without those that became inputs.
        results: what it computed; a module may have kept some of it for later calls.
    """

    def __init__(
        self, noun: str, outside: Sequence[tuple[Tensor, int | None]], results: Sequence[weakref.ref[Tensor]]
    ) -> None:
        self._noun, self._outside, self._results = noun, outside, results
        self._armed = False
        self._tells: bool | None = None
        self._looked: dict[str, int] = {}
        self._used_by_model: tuple[set[int], list[Tensor]] = (set(), [])

    def arm(self) -> None:
        """The solve is over: watch the evaluations from now on."""
        self._armed = True

    def run(self, fn: Callable[..., Any], given: Sequence[Tensor], *args: Any, part: str = "whole") -> Any:
        """Evaluate ``fn(*args)``, whose tensors and substitutes are `given`, under watch where that is due.

        Args:
            fn: the function, or a part of it.
            given: tensors put in the place of captured ones.
            *args: of fn.
            part: "whole", or "model" and then "loss", which together are the whole.
        """
        if not self._armed:
            if self._tells is not None or part != "whole":
                return fn(*args)
            out, mode = self._look(fn, given, args)
            self._tells = not mode.strangers and not self._missing(mode.seen)
            self._check_hidden([*mode.strangers, *_tensors(out)], [*given, *_tensors(args)])
            return out
        self._check_unchanged()
        # Within one backward one look is enough.
        task = torch._C._current_graph_task_id()
        if not self._tells or self._looked.get(part) == task:
            return fn(*args)
        self._looked[part] = task
        out, mode = self._look(fn, given, args)
        seen, strangers = mode.seen, mode.strangers
        if part == "model":
            self._used_by_model = seen, strangers
            return out
        if part == "loss":
            before, self._used_by_model = self._used_by_model, (set(), [])
            seen, strangers = seen | before[0], strangers + before[1]
        self._check_strangers(strangers, self._missing(seen))
        return out

    def _look(self, fn: Callable[..., Any], given: Sequence[Tensor], args: Any) -> tuple[Any, _Strangers]:
        kept = [t for t in (ref() for ref in self._results) if t is not None]
        with _Strangers([*given, *_tensors(args), *kept, *(t for t, _ in self._outside)]) as mode:
            return fn(*args), mode

    def _missing(self, seen: set[int]) -> bool:
        return any(id(t) not in seen for t, _ in self._outside)

    def _check_unchanged(self) -> None:
        for t, version in self._outside:
            if _version(t) != version:
                raise MisuseError(
                    f"the {self._noun} captures a tensor of shape {tuple(t.shape)} that was changed in place after the "
                    "solve, and the derivative evaluates it again; pass it as a param, or change a copy."
                )

    def _check_strangers(self, strangers: Sequence[Tensor], missing: bool) -> None:
        for t in strangers:
            if carries_derivative(t) or missing:
                raise MisuseError(
                    f"the {self._noun} now uses a tensor of shape {tuple(t.shape)} that it did not use before the "
                    "solve, so the derivative would be that of another problem: a captured loop variable may have "
                    "moved on, or another branch been taken. Pass it as a param: (x, tensor) -> ..."
                )

    def _check_hidden(self, results: Sequence[Tensor], known: Sequence[Tensor]) -> None:
        """Refuse results that depend on a tensor which carries a derivative and is no input."""
        if graph_leaves([stripped(t) for t in results]) - graph_leaves([stripped(t) for t in known]):
            raise MisuseError(
                f"the {self._noun} captures a tensor that carries a derivative where no torch operation can be seen: "
                "inside a scripted module, or as an argument of a custom autograd Function or a torch.func transform. "
                "Its gradient would be missing; pass it as a param, or detach it if none is meant."
            )


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


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
    # A scripted module takes no parameters from outside.
    if not isinstance(fn, torch.nn.Module) or isinstance(fn, torch.jit.ScriptModule):
        return fn
    tensors = {**dict(fn.named_parameters()), **dict(fn.named_buffers())}
    return lambda *args: torch.func.functional_call(fn, tensors, args)


def substituted(
    fn: Callable[..., Any], captured: Sequence[Tensor], watch: Watch, part: str = "whole"
) -> Callable[..., Any]:
    """Return ``pure(values, *args)``, which runs ``fn(*args)`` with `values` in the place of the `captured` tensors.

    Args:
        fn: the function, or a part of it.
        captured: what is replaced.
        watch: of the whole function.
        part: see `Watch.run`.
    """

    def swapped(values: Sequence[Tensor], *args: Any) -> Any:
        if not captured:
            return fn(*args)
        with _Substitute({id(c): v for c, v in zip(captured, values, strict=True)}):
            return fn(*args)

    return lambda values, *args: watch.run(swapped, values, values, *args, part=part)
