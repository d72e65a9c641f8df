"""The user's function as a term: examined once, its captured tensors lifted, its unknown flat."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitlayers.closure import Probe, Watch, substituted
from implicitlayers.flat import Skeleton, Structure, flatten_tensors, join_tensors
from implicitlayers.functorch import all_lanes
from implicitlayers.problem import Term
from implicitlayers.status import MisuseError
from implicitlayers.terms import Composite, ObjectiveTerm, ResidualTerm

__all__ = ["Equation", "Examined", "Objective", "Residuals", "Role", "Summand", "UserFunction", "check_like"]


class Role(ABC):
    """What a user's function stands for, and so what it must return.

    Attributes:
        noun: what it is called in messages.
        signature: what to pass.
    """

    noun: str
    signature: str

    @abstractmethod
    def check(self, out: Any, structure: Structure) -> None:
        """Raise `MisuseError` unless `out` is what this role returns at one lane."""

    @abstractmethod
    def flat(self, out: Any, structure: Structure) -> Tensor:
        """All numbers of `out` as one tensor."""


class Summand(Role):
    """A function that is a summand of the optimality condition, itself or by its gradient."""

    @abstractmethod
    def term(self, function: UserFunction, found: Examined) -> Term:
        """The function as a term of the optimality condition."""


@dataclass(frozen=True)
class Objective(Summand):
    """A scalar to be minimized.

    Attributes:
        noun: see `Role`.
    """

    noun: str = "objective"
    signature = "(x, *params) -> scalar"

    def check(self, out: Any, structure: Structure) -> None:
        if not isinstance(out, Tensor):
            hint = " (an objective may return (value, aux), with has_aux=True)" if isinstance(out, tuple) else ""
            raise MisuseError(
                f"the {self.noun} returned {type(out).__name__}, not a tensor; return a 0-d tensor{hint}."
            )
        if out.ndim != 0:
            raise MisuseError(
                f"the {self.noun} returned shape {tuple(out.shape)}, and only a scalar can be minimized; reduce it "
                "with .sum() or .mean(), or solve many problems at once with torch.vmap."
            )
        check_like(self.noun, out, structure)

    def flat(self, out: Any, structure: Structure) -> Tensor:
        return out

    def term(self, function: UserFunction, found: Examined) -> Term:
        return function.objective(found)


class Residuals(Summand):
    """Any tree of numbers whose squares are summed and minimized."""

    noun = "residuals function"
    signature = "(x, *params) -> residuals"

    def check(self, out: Any, structure: Structure) -> None:
        leaves = pytree.tree_leaves(out)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise MisuseError(
                f"the residuals function returned {type(out).__name__}; return a tensor, or a tree of tensors, of "
                "residuals (has_aux=True if it is (residuals, aux))."
            )
        for leaf in leaves:
            check_like("residuals function", leaf, structure)

    def flat(self, out: Any, structure: Structure) -> Tensor:
        return torch.cat([leaf.reshape(leaf.numel()) for leaf in pytree.tree_leaves(out)])

    def term(self, function: UserFunction, found: Examined) -> Term:
        return function.sum_of_squares(found)


@dataclass(frozen=True)
class Equation(Summand):
    """As many numbers as there are unknowns: a residual that shall be zero, or a mapping that shall return them.

    Attributes:
        noun: see `Role`.
        fixed_point: whether it is a mapping.
    """

    noun: str = "residual"
    fixed_point: bool = False
    signature = "(x, *params) -> a tree like x"

    def check(self, out: Any, structure: Structure) -> None:
        leaves, spec = pytree.tree_flatten(out)
        wanted = [tuple(shape) for shape in structure.shapes]
        if spec != structure.spec or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise MisuseError(
                f"the {self.noun} returned {_shapes(out)}, but the unknown is {structure.spec} with shapes {wanted}; "
                "return a tree like it (has_aux=True if it is (tree, aux))."
            )
        if [tuple(leaf.shape) for leaf in leaves] != wanted:
            raise MisuseError(
                f"the {self.noun} returned shapes {_shapes(leaves)}, but the unknown has {wanted}; as "
                "many equations as unknowns are needed. For more equations than unknowns take least_squares."
            )
        for leaf in leaves:
            check_like(self.noun, leaf, structure)

    def flat(self, out: Any, structure: Structure) -> Tensor:
        return structure.flatten(out, f"what the {self.noun} returned")

    def term(self, function: UserFunction, found: Examined) -> Term:
        return function.equation(found, fixed_point=self.fixed_point)


@dataclass(frozen=True)
class Examined:
    """What one look at a function found.

    Attributes:
        captured: tensors that it captures and that must become inputs.
        uses_unknown: whether it looks at its unknown at all.
        watch: holds the first evaluation after the solve against this one.
    """

    captured: list[Tensor]
    uses_unknown: bool
    watch: Watch


@dataclass(frozen=True)
class UserFunction:
    """The user's function, seen as a function of one flat vector and a list of tensors."""

    fn: Callable[..., Any]
    role: Role
    structure: Structure
    skeleton: Skeleton
    count: int
    has_aux: bool

    def examine(self, start: Tensor, tensors: Sequence[Tensor], *, touches_all: bool, look: bool) -> Examined:
        """Evaluate at the start and check what comes back.

        Args:
            start: ``[n]``.
            tensors: the params'.
            touches_all: whether every leaf of the unknown must be used.
            look: whether values may be looked at, so that a second evaluation is compared with the first.
        """
        # Copies, so that a tensor that is both passed and captured is seen as captured.
        x = self.structure.unflatten(start.detach().clone())
        copies = [t.detach() for t in tensors]
        leaves, _ = flatten_tensors(x)
        with torch.no_grad(), Probe([*leaves, *copies]) as probe:
            out = self._evaluate(x, copies)
            again = self._evaluate(x, copies) if look else out
        noun = self.role.noun
        if probe.changed():
            raise MisuseError(
                f"the {noun} changes a tensor that it captures, in place, so that every evaluation is of another "
                "function. Batch normalization does so in training mode: call module.eval(), or let it keep no running "
                "statistics."
            )
        if self.has_aux and (not isinstance(out, tuple) or len(out) != 2):
            raise MisuseError(f"has_aux=True, but the {noun} returned {type(out).__name__}; return (value, aux).")
        self.role.check(self._value(out), self.structure)
        if look:
            self._check_repeatable(out, again)
        untouched = [p for p, leaf in zip(self.structure.paths, leaves, strict=True) if not probe.touched(leaf)]
        # What no torch operation made may depend on anything.
        opaque = not all(probe.made(t) for t in pytree.tree_leaves(self._value(out)))
        if untouched and touches_all and not opaque:
            raise MisuseError(
                f"the {noun} does not use {', '.join(untouched)}, so any value there is a solution and none has a "
                "derivative; take it out of x0, or add a regularizer."
            )
        return Examined(probe.captured, len(untouched) < len(leaves) or opaque, probe.watch(noun))

    def objective(self, found: Examined) -> ObjectiveTerm:
        """The objective as a term whose tensors are the params', then the captured ones."""
        slots = tuple(range(self.count + len(found.captured)))
        whole = self.flat(found)
        if not isinstance(self.fn, Composite):
            return ObjectiveTerm(whole, slots, uses_unknown=found.uses_unknown)
        model_of, loss_of = (
            substituted(getattr(self.fn, part), found.captured, found.watch, part) for part in ("model", "loss")
        )

        def model(x: Tensor, *values: Tensor) -> Any:
            params = join_tensors(values[: self.count], self.skeleton)
            return model_of(values[self.count :], self.structure.unflatten(x), *params)

        def loss(z: Any, *values: Tensor) -> Tensor:
            return self._value(loss_of(values[self.count :], z, *join_tensors(values[: self.count], self.skeleton)))

        return ObjectiveTerm(whole, slots, model, loss, found.uses_unknown)

    def sum_of_squares(self, found: Examined) -> ObjectiveTerm:
        """Half the sum of squares of residuals, with its Gauss-Newton split."""
        slots = tuple(range(self.count + len(found.captured)))
        model = self.flat(found)

        def loss(z: Tensor, *_: Tensor) -> Tensor:
            return z.square().sum() / 2

        return ObjectiveTerm(lambda x, *values: loss(model(x, *values)), slots, model, loss, found.uses_unknown)

    def equation(self, found: Examined, *, fixed_point: bool) -> ResidualTerm:
        """F = residual, or x - mapping(x)."""
        slots = tuple(range(self.count + len(found.captured)))
        fn = self.flat(found)
        return ResidualTerm((lambda x, *values: x - fn(x, *values)) if fixed_point else fn, slots)

    def flat(self, found: Examined) -> Callable[..., Tensor]:
        """The function of the flat unknown, then of the params' tensors, then of the captured ones."""
        value = substituted(self.fn, found.captured, found.watch)

        def flat(x: Tensor, *values: Tensor) -> Tensor:
            params = join_tensors(values[: self.count], self.skeleton)
            out = value(values[self.count :], self.structure.unflatten(x), *params)
            return self.role.flat(self._value(out), self.structure)

        return flat

    def _evaluate(self, x: Any, tensors: list[Tensor]) -> Any:
        try:
            return self.fn(x, *join_tensors(tensors, self.skeleton))
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise MisuseError(
                f"the {self.role.noun} differentiates by torch.autograd.grad or backward, which needs a tape that is "
                "not there inside a solve; use torch.func.grad, jvp or vjp inside it."
            ) from error

    def _value(self, out: Any) -> Any:
        return out[0] if self.has_aux else out

    def _check_repeatable(self, out: Any, again: Any) -> None:
        first, second = (all_lanes(self.role.flat(self._value(o), self.structure)) for o in (out, again))
        # Parallel sums may differ by rounding from call to call; dropout and fresh batches differ by far more.
        tolerance = torch.finfo(first.dtype).eps ** 0.5 * torch.maximum(first.abs(), second.abs())
        differs = (first - second).abs() > tolerance
        if bool(differs.any()):
            a, b = (float(t[differs].flatten()[0]) for t in (first, second))
            raise MisuseError(
                f"the {self.role.noun} is not deterministic: two calls at x0 gave {a} and {b}, so there is "
                "nothing to solve. Switch dropout off (module.eval()), and draw batches and noise before the call."
            )


def check_like(noun: str, out: Tensor, structure: Structure) -> None:
    """Raise `MisuseError` unless `out` has the unknown's dtype and device."""
    if out.dtype != structure.dtype:
        raise MisuseError(
            f"the {noun} is {out.dtype} but x0 is {structure.dtype}: params or data of another dtype entered; convert "
            "one side, e.g. x0.to(data.dtype)."
        )
    if out.device != structure.device:
        raise MisuseError(f"the {noun} lies on {out.device} but x0 on {structure.device}; move one of them.")


def _shapes(out: Any) -> str:
    return repr(pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf), out))
