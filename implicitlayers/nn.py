"""Modules over the entry points, for models that are built of `torch.nn.Module`s."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitlayers.adjoints import Adjoint
from implicitlayers.api import argmin, fixed_point, least_squares, root
from implicitlayers.flat import Tree
from implicitlayers.functorch import is_wrapped
from implicitlayers.regularizers import Regularizer
from implicitlayers.solver import Solver
from implicitlayers.status import MisuseError, Policy, Solution
from implicitlayers.terms import Composite

__all__ = ["ArgminLayer", "FixedPointLayer", "LeastSquaresLayer", "RootLayer"]


class _Layer(torch.nn.Module):
    """What the layers share: the start as buffers, the function as a submodule, the report of the last call.

    Attributes:
        solution: of the last call, detached, with its reports; None before, and after a call inside a torch.func
            transform. It is neither copied nor pickled with the module.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        x0: Tree | Callable[..., Tree],
        *,
        solver: Solver[Any] | None = None,
        adjoint: Adjoint | None = None,
        has_aux: bool = False,
        on_failure: Policy = "raise",
    ) -> None:
        super().__init__()
        self.function = function
        if isinstance(function, Composite):
            # A Composite is no module: its parts are registered beside it, so that their parameters are found.
            self.parts = torch.nn.ModuleList(
                m for m in (function.model, function.loss) if isinstance(m, torch.nn.Module)
            )
        self.solver, self.adjoint, self.has_aux, self.on_failure = solver, adjoint, has_aux, on_failure
        self.solution: Solution | None = None
        self._make_x0 = x0 if callable(x0) and not isinstance(x0, Tensor) else None
        # The tree of the buffers' names: a tree's own description cannot be pickled.
        self._x0_names = None if self._make_x0 is not None else pytree.tree_map(self._register_start, x0)

    def _register_start(self, leaf: Any) -> str:
        if not isinstance(leaf, Tensor):
            raise MisuseError(
                f"x0 holds a {type(leaf).__name__}; pass a tensor, a tree of tensors, or a function of the params that "
                "returns one."
            )
        name = f"_x0_{len(self._buffers)}"
        # A start is no state: it moves with .to(), and is not saved.
        self.register_buffer(name, leaf.detach(), persistent=False)
        return name

    def forward(self, *params: Any) -> Any:
        """Solve for these params.

        Args:
            *params: handed on to the function.

        Returns:
            The solution's value, differentiable; ``(value, aux)`` with ``has_aux``.
        """
        solution = self._entry(self.function, self._start(params), *params, **self._options(params))
        self._keep(solution)
        return (solution.value, solution.aux) if self.has_aux else solution.value

    def extra_repr(self) -> str:
        """What is not a submodule: the shape of the start, and the choices that were made."""
        names = self._x0_names
        shapes = pytree.tree_map(lambda name: tuple(getattr(self, name).shape), names) if names is not None else "made"
        choices = [("solver", self.solver), ("adjoint", self.adjoint)]
        return ", ".join([f"x0={shapes}", *(f"{name}={choice!r}" for name, choice in choices if choice is not None)])

    @property
    @abstractmethod
    def _entry(self) -> Callable[..., Solution]:
        """The entry point that the layer calls."""

    def _options(self, params: tuple[Any, ...]) -> dict[str, Any]:
        """What the entry point takes by name."""
        names = ("solver", "adjoint", "has_aux", "on_failure")
        return {name: getattr(self, name) for name in names}

    def _start(self, params: tuple[Any, ...]) -> Tree:
        if self._make_x0 is not None:
            return self._make_x0(*params)
        return pytree.tree_map(lambda name: getattr(self, name), self._x0_names)

    def _keep(self, solution: Solution) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(solution) if isinstance(leaf, Tensor)]
        if any(is_wrapped(leaf) for leaf in leaves):
            self.solution = None
            return
        value, aux = pytree.tree_map(
            lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (solution.value, solution.aux)
        )
        self.solution = replace(solution, value=value, aux=aux)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "solution": None}


class _Minimizing(_Layer):
    def __init__(
        self,
        function: Callable[..., Any],
        x0: Tree | Callable[..., Tree],
        *,
        regularizer: Regularizer | Callable[..., Regularizer] | None = None,
        solver: Solver[Any] | None = None,
        adjoint: Adjoint | None = None,
        has_aux: bool = False,
        on_failure: Policy = "raise",
    ) -> None:
        super().__init__(function, x0, solver=solver, adjoint=adjoint, has_aux=has_aux, on_failure=on_failure)
        held = pytree.tree_leaves(list(vars(regularizer).values())) if isinstance(regularizer, Regularizer) else []
        if any(isinstance(leaf, torch.nn.Parameter) for leaf in held):
            raise MisuseError(
                f"{type(regularizer).__name__} holds an nn.Parameter, which the layer could neither move nor hand to "
                "an optimizer; pass a module whose forward(*params) returns the regularizer, and let it own it."
            )
        self.regularizer = regularizer

    def _options(self, params: tuple[Any, ...]) -> dict[str, Any]:
        given = self.regularizer
        made = given if given is None or isinstance(given, Regularizer) else given(*params)
        return {**super()._options(params), "regularizer": made}


class ArgminLayer(_Minimizing):
    """`argmin` as a module: ``layer(*params)`` is argmin_x objective(x, *params) + regularizer(x).

    Works in ``nn.Sequential``, with ``state_dict``, ``.to()``, DistributedDataParallel, ``torch.func.functional_call``
    and autocast (the solve itself stays in the dtype of x0); copies and pickles where the objective does.

    Args:
        function: the objective, as for `argmin`; an ``nn.Module``, or a `Composite` of modules, contributes its
            parameters.
        x0: where to start; a tree of tensors, which become buffers that are not saved, or a function ``(*params) ->
            tree``, for starts whose size depends on the input.
        regularizer: added to the objective; or a function ``(*params) -> Regularizer``: a module that owns learnable
            strengths, say.
        solver: see `argmin`.
        adjoint: see `argmin`.
        has_aux: whether the objective returns ``(value, aux)``; the layer then returns ``(solution, aux)``.
        on_failure: see `argmin`.

    Attributes:
        solution: of the last call, detached, with its reports.

    Raises:
        MisuseError: the arguments cannot mean what they say.

    Examples:
        >>> layer = ArgminLayer(lambda x, b: (x - b).square().sum(), torch.zeros(3))
        >>> torch.nn.Sequential(torch.nn.Linear(2, 3), layer)(torch.ones(2)).shape
        torch.Size([3])
    """

    @property
    def _entry(self) -> Callable[..., Solution]:
        return argmin


class LeastSquaresLayer(_Minimizing):
    """`least_squares` as a module: ``layer(*params)`` is argmin_x ½‖residuals(x, *params)‖² + regularizer(x).

    Args and attributes are those of `ArgminLayer`; the function is that of the residuals.
    """

    @property
    def _entry(self) -> Callable[..., Solution]:
        return least_squares


class RootLayer(_Layer):
    """`root` as a module: ``layer(*params)`` solves residual(x, *params) = 0.

    Args and attributes are those of `ArgminLayer` without regularizer; the function is the residual.
    """

    @property
    def _entry(self) -> Callable[..., Solution]:
        return root


class FixedPointLayer(_Layer):
    """`fixed_point` as a module: ``layer(*params)`` solves x = mapping(x, *params), a deep equilibrium layer.

    Args and attributes are those of `ArgminLayer` without regularizer; the function is the mapping.
    """

    @property
    def _entry(self) -> Callable[..., Solution]:
        return fixed_point
