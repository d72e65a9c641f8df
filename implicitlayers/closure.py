"""Captured tensors: what a function uses without being handed it.

An objective is usually a closure: it uses a module's parameters, an anchor, a data set of the surrounding scope.
Autograd Functions and torch.func know explicit inputs only, so a captured tensor would get no gradient, silently.
Therefore one probe run under a `TorchFunctionMode` notes every tensor that reaches an operation without having been
passed in or computed on the way; those for which a derivative is asked become explicit inputs, and a second mode puts
the explicit values in their place whenever the function runs.

Known limit: a tensor that reaches a custom ``torch.autograd.Function`` as a direct argument meets no torch operation
on the way and cannot be replaced there; pass such a tensor as a param.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from implicitlayers.functorch import carries_derivative, is_wrapped

__all__ = ["Probe", "substituted"]


class Probe(TorchFunctionMode):
    """Notes which tensors a function touches.

    Attributes:
        captured: tensors used without having been passed or computed, for which a derivative is asked, or which live
            inside a transform.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.captured: list[Tensor] = []
        self._used: set[int] = set()
        self._known = {id(t) for t in given}
        self._versions: list[tuple[Tensor, int]] = []
        # An id is only unique among living objects, so everything seen is kept alive until the probe is dropped.
        self._alive: list[Tensor] = list(given)

    def touched(self, t: Tensor) -> bool:
        """Whether `t` was an argument of any operation."""
        return id(t) in self._used

    def changed(self) -> bool:
        """Whether a tensor of the surroundings was changed in place."""
        return any(t._version != version for t, version in self._versions)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in pytree.tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self._used.add(id(t))
                if self._remember(t):
                    if is_wrapped(t) or carries_derivative(t) or t.is_inference():
                        self.captured.append(t)
                    if not t.is_inference():
                        self._versions.append((t, t._version))
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self._remember(t)
        return out

    def _remember(self, t: Tensor) -> bool:
        if id(t) in self._known:
            return False
        self._known.add(id(t))
        self._alive.append(t)
        return True


class _Substitute(TorchFunctionMode):
    def __init__(self, table: dict[int, Tensor]) -> None:
        super().__init__()
        self._table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(t: Any) -> Any:
            return self._table.get(id(t), t) if isinstance(t, Tensor) else t

        args, kwargs = pytree.tree_map(swap, (args, kwargs or {}))
        return func(*args, **kwargs)


def substituted(fn: Callable[..., Any], captured: Sequence[Tensor]) -> Callable[..., Any]:
    """Return ``pure(values, *args)``, which runs ``fn(*args)`` with `values` in the place of the `captured` tensors."""

    def pure(values: Sequence[Tensor], *args: Any) -> Any:
        if not captured:
            return fn(*args)
        with _Substitute({id(c): v for c, v in zip(captured, values, strict=True)}):
            return fn(*args)

    return pure
