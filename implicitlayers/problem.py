"""What is solved: an optimality condition F(x, params) = 0, as a sum of terms.

Every problem of this library is one `Condition`. Its unknown is a flat vector ``x [n]`` and its parameters are a flat
list of tensors; each `Term` says which of them it depends on (its `slots`), so that a derivative with respect to the
anchor of a regularizer never runs the network that the objective is made of.

All functions of a term are written for *one* lane. Lanes are added from outside, by `functorch.batched`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from implicitlayers.functorch import batched

__all__ = [
    "Bound",
    "Bounded",
    "Condition",
    "Kind",
    "Lanes",
    "Linearization",
    "Nonsmooth",
    "Outcome",
    "Posed",
    "Potential",
    "Term",
    "aligned",
    "select",
]

Lanes = tuple[tuple[int | None, ...], ...]
"""One entry a vmap level, the innermost first: for every tensor, 0 where it has that lane dimension, None where not."""


class Kind(Enum):
    """What a solver is faced with."""

    MINIMUM = "a smooth objective"
    COMPOSITE = "a smooth objective plus a part that has kinks or constraints"
    ROOT = "an equation without an objective"


class Outcome(NamedTuple):
    """What a solve returns, in flat form and with lanes: the unknown, then the report on it."""

    x: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    objective: Tensor


class Term(ABC):
    """One summand of an optimality condition, for one lane.

    Attributes:
        slots: positions in the problem's list of tensors of those this term depends on; the methods below take exactly
            these tensors.
        symmetric: whether ∂residual/∂x is a symmetric matrix, as that of a gradient is.
    """

    slots: tuple[int, ...]
    symmetric: ClassVar[bool] = True

    @abstractmethod
    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        """Contribution to F, ``[n]``; differentiable in all arguments, any number of times."""

    @abstractmethod
    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        """(∂residual/∂x) y, ``[n]``; differentiable in all arguments, any number of times."""

    def transposed(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        """(∂residual/∂x)ᵀ y, likewise."""
        return self.product(y, x, *params)

    def linearize(
        self, x: Tensor, params: Sequence[Tensor], lanes: Lanes, *, transposed: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Return y ↦ (∂residual/∂x) y, or its transpose, on all lanes.

        Where it pays, what does not depend on y is computed once.
        """
        product = batched(self.transposed if transposed else self.product, tuple((0, *level) for level in lanes))
        return lambda y: product(y, x, *params)

    def diagonal(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> Tensor | None:
        """The diagonal ``[*lanes, n or 1]`` of ∂residual/∂x where that is a diagonal matrix, else None."""
        return None

    def with_gauss_newton(self) -> Term:
        """The same term, its products with the Gauss-Newton matrix where the term declares one."""
        return self


class Potential(Term):
    """A term whose residual is the gradient of a scalar, which is a summand of the objective."""

    @abstractmethod
    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        """Contribution to the objective, 0-d."""

    @abstractmethod
    def value_and_residual(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> tuple[Tensor, Tensor]:
        """Value ``[*lanes]`` and residual ``[*lanes, n]`` on all lanes."""

    def accumulate(
        self, value: Tensor, F: Tensor, x: Tensor, params: Sequence[Tensor], lanes: Lanes
    ) -> tuple[Tensor, Tensor]:
        """Add value and residual on all lanes to ``value [*lanes]`` and ``F [*lanes, n]``."""
        own_value, own_residual = self.value_and_residual(x, params, lanes)
        return value + own_value, F + own_residual


class Nonsmooth(ABC):
    """The part of an objective that has kinks or is infinite outside a set, for one lane; known by its proximal map.

    Attributes:
        slots: as those of a `Term`.
    """

    slots: tuple[int, ...]

    @abstractmethod
    def prox(self, y: Tensor, step: Tensor, *params: Tensor) -> Tensor:
        """argmin_x value(x) + ‖x - y‖²/(2 step), ``[n]``; differentiable almost everywhere in y and params."""

    @abstractmethod
    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        """Contribution to the objective, 0-d; for a constraint 0, at x that satisfy it."""


class Bounded(Nonsmooth):
    """The indicator of a box, which some methods take as bounds."""

    @abstractmethod
    def bounds(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds, each ``[n]`` like x; infinite where there is none."""


def aligned(t: Tensor, has: Sequence[int | None]) -> Tensor:
    """Give ``t [*some lanes, ...]`` a dimension of size one for every lane it lacks; `has` is innermost level first."""
    for dim, present in enumerate(reversed(has)):
        if present is None:
            t = t.unsqueeze(dim)
    return t


def select(tensors: Sequence[Tensor], lanes: Lanes, slots: Sequence[int]) -> tuple[list[Tensor], Lanes]:
    """The tensors a term depends on, and their lanes."""
    return [tensors[s] for s in slots], tuple(tuple(level[s] for s in slots) for level in lanes)


class Condition(ABC):
    """An optimality condition F(x, tensors) = Σ terms = 0 together with how it is solved.

    Attributes:
        lanes: the vmap levels the unknown has been lifted over so far.
    """

    lanes: Lanes

    @property
    @abstractmethod
    def terms(self) -> Sequence[Term]:
        """The summands of F."""

    @abstractmethod
    def solve(self, x0: Tensor, tensors: Sequence[Tensor]) -> Outcome:
        """Solve for all lanes ``[*lanes, n]``, without recording a graph."""

    @abstractmethod
    def linear_system(self, *, transposed: bool) -> Condition:
        """The condition A u - v = 0 with A = ∂F/∂x or its transpose, whose tensors are ``(v, x, *tensors)``."""

    @abstractmethod
    def with_lanes(self, lanes: Lanes) -> Condition:
        """The same condition over more lanes."""


@dataclass(frozen=True)
class Posed:
    """A problem without its tensors.

    Attributes:
        terms: the smooth part, in which the objective comes first.
        nonsmooth: the part with kinks, if there is one.
    """

    terms: tuple[Term, ...]
    nonsmooth: Nonsmooth | None = None

    @property
    def kind(self) -> Kind:
        """What a solver is faced with."""
        if self.nonsmooth is not None:
            return Kind.COMPOSITE
        return Kind.MINIMUM if all(isinstance(term, Potential) for term in self.terms) else Kind.ROOT

    def bind(self, tensors: Sequence[Tensor], lanes: Lanes = ()) -> Bound:
        """Fill in the tensors."""
        return Bound(self, tuple(tensors), lanes)


@dataclass(frozen=True)
class Bound:
    """A problem with its tensors filled in, over all lanes: what a solver sees.

    Attributes:
        posed: the problem.
        tensors: what the slots of its terms count.
        lanes: of the tensors.
    """

    posed: Posed
    tensors: tuple[Tensor, ...]
    lanes: Lanes

    @property
    def kind(self) -> Kind:
        """What a solver is faced with."""
        return self.posed.kind

    def value_and_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Objective ``[*lanes]`` and F ``[*lanes, n]`` of the smooth part at x; ½‖F‖² where there is no objective."""
        potentials = [term for term in self.posed.terms if isinstance(term, Potential)]
        if len(potentials) < len(self.posed.terms):
            F = self.residual(x)
            return (F * F).sum(-1) / 2, F
        first, *rest = potentials
        value, F = first.value_and_residual(x, *select(self.tensors, self.lanes, first.slots))
        for term in rest:
            value, F = term.accumulate(value, F, x, *select(self.tensors, self.lanes, term.slots))
        return value, F

    def residual(self, x: Tensor) -> Tensor:
        """F ``[*lanes, n]`` of the smooth part at x, without an objective."""
        parts = []
        for term in self.posed.terms:
            params, lanes = select(self.tensors, self.lanes, term.slots)
            parts.append(batched(term.residual, lanes)(x, *params))
        return sum(parts[1:], parts[0])

    def prox(self, y: Tensor, step: Tensor) -> Tensor:
        """The proximal map ``[*lanes, n]`` of the nonsmooth part; `step` is ``[*lanes]``."""
        assert self.posed.nonsmooth is not None
        params, lanes = select(self.tensors, self.lanes, self.posed.nonsmooth.slots)
        return batched(self.posed.nonsmooth.prox, lanes, leading=2)(y, step, *params)

    def nonsmooth_value(self, x: Tensor) -> Tensor:
        """The nonsmooth part of the objective ``[*lanes]``."""
        assert self.posed.nonsmooth is not None
        params, lanes = select(self.tensors, self.lanes, self.posed.nonsmooth.slots)
        return batched(self.posed.nonsmooth.value, lanes)(x, *params)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Lower and upper bounds, each ``[*lanes, n]`` like x, where the nonsmooth part is a box; else None."""
        nonsmooth = self.posed.nonsmooth
        if not isinstance(nonsmooth, Bounded):
            return None
        params, lanes = select(self.tensors, self.lanes, nonsmooth.slots)
        return batched(nonsmooth.bounds, lanes)(x, *params)

    def gauss_newton(self) -> Bound:
        """The same problem, its curvature products those of Gauss and Newton where a term declares them."""
        return replace(self, posed=replace(self.posed, terms=tuple(t.with_gauss_newton() for t in self.posed.terms)))

    def linearize(self, x: Tensor, damping: float = 0.0, *, transposed: bool = False) -> Linearization:
        """Return y ↦ A y with A = ∂F/∂x + damping·I at x, or its transpose, of the smooth part."""
        return Linearization(self, x, damping, transposed)


class Linearization:
    """The product y ↦ A y on all lanes, or A itself; A = ∂F/∂x + damping·I at x, or its transpose, of the smooth part.

    What does not depend on y is computed once.

    Args:
        bound: the problem.
        x: ``[*lanes, n]``.
        damping: added to the diagonal.
        transposed: whether A is the transpose.
    """

    def __init__(self, bound: Bound, x: Tensor, damping: float, transposed: bool) -> None:
        self._bound, self._x, self._transposed = bound, x, transposed
        self._terms: list[tuple[Term, Sequence[Tensor], Lanes]] = []
        self._products: list[Callable[[Tensor], Tensor]] = []
        # Filled where it lies: x.new_tensor would be a copy from the host, which is waited for.
        self._diagonal = torch.full((), damping, dtype=x.dtype, device=x.device)
        self._plus_diagonal = bool(damping)
        for term in bound.posed.terms:
            params, lanes = select(bound.tensors, bound.lanes, term.slots)
            own = term.diagonal(x, params, lanes)
            if own is None:
                self._terms.append((term, params, lanes))
                self._products.append(term.linearize(x, params, lanes, transposed=transposed))
            else:
                self._diagonal, self._plus_diagonal = self._diagonal + own, True

    def __call__(self, y: Tensor) -> Tensor:
        """A y."""
        if not self._products:
            return self._diagonal * y
        out = self._products[0](y)
        for product in self._products[1:]:
            out = out + product(y)
        return torch.addcmul(out, self._diagonal, y) if self._plus_diagonal else out

    def dense_by_lane(self, like: Tensor) -> Tensor | None:
        """A as ``[*lanes, n, n]`` for y like this; None where there are no lanes, or y has other lanes than x.

        Each lane maps its products over the basis by itself: what it multiplies its vectors with then meets all of them
        in one product of matrices. Mapped from outside, over all lanes at once, it would be copied for every vector.
        """
        if not self._bound.lanes or like.shape != self._x.shape:
            return None
        A = torch.diag_embed(self._diagonal.expand_as(self._x))
        basis = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        for term, params, lanes in self._terms:
            product = term.transposed if self._transposed else term.product
            A = A + batched(_over(basis, product), lanes)(self._x, *params).mT
        return A


def _over(basis: Tensor, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *params: vmap(lambda e: product(e, x, *params))(basis)
