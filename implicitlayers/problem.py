"""What is solved: an optimality condition F(x, params) = 0, as a sum of terms.

Every problem of this library is one `Condition`. Its unknown is a flat vector ``x [n]`` and its parameters are a flat
list of tensors; each `Term` says which of them it depends on (its `slots`), so that a derivative with respect to the
anchor of a regularizer never runs the network that the objective is made of.

All functions of a term are written for *one* lane. Lanes are added from outside, by `functorch.batched`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from implicitlayers import tape
from implicitlayers.functorch import batched, is_wrapped, pullback, pushforward
from implicitlayers.status import MisuseError

__all__ = [
    "Bound",
    "Composite",
    "Condition",
    "Lanes",
    "ObjectiveTerm",
    "Outcome",
    "Potential",
    "Term",
    "aligned",
    "select",
]

Lanes = tuple[tuple[int | None, ...], ...]
"""One entry a vmap level, the innermost first: for every tensor, 0 where it has that lane dimension, None where not."""


class Composite:
    """An objective ``loss(model(x, *params), *params)`` that declares its two parts.

    The split is what Gauss-Newton curvature needs: with J = ∂model/∂x and B = ∂²loss/∂z², the matrix JᵀBJ is positive
    semidefinite wherever the loss is convex in the model's output z (squared error, cross entropy), also where the
    Hessian is not, and its products are cheaper.

    Args:
        model: ``(x, *params) -> z``, any tensor or tree of tensors.
        loss: ``(z, *params) -> scalar``, convex in z.
    """

    def __init__(self, model: Callable[..., Any], loss: Callable[..., Any]) -> None:
        self.model = model
        self.loss = loss

    def __call__(self, x: Any, *params: Any) -> Any:
        """Evaluate the objective."""
        return self.loss(self.model(x, *params), *params)


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
    """

    slots: tuple[int, ...]

    @abstractmethod
    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        """Contribution to F, ``[n]``; differentiable in all arguments, any number of times."""

    @abstractmethod
    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        """(∂residual/∂x) y, ``[n]``; differentiable in all arguments, any number of times. Symmetric."""

    def linearize(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> Callable[[Tensor], Tensor]:
        """Return y ↦ (∂residual/∂x) y on all lanes; where it pays, what does not depend on y is computed once."""
        product = batched(self.product, tuple((0, *level) for level in lanes))
        return lambda y: product(y, x, *params)

    def diagonal(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> Tensor | None:
        """The diagonal ``[*lanes, n or 1]`` of ∂residual/∂x where that is a diagonal matrix, else None."""
        return None


class Potential(Term):
    """A term whose residual is the gradient of a scalar, which is a summand of the objective."""

    @abstractmethod
    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        """Contribution to the objective, 0-d."""

    @abstractmethod
    def accumulate(
        self, value: Tensor, F: Tensor, x: Tensor, params: Sequence[Tensor], lanes: Lanes
    ) -> tuple[Tensor, Tensor]:
        """Add value and residual on all lanes to ``value [*lanes]`` and ``F [*lanes, n]``."""


@dataclass(frozen=True)
class ObjectiveTerm(Potential):
    """The gradient of an objective given as a function of the flat unknown.

    Attributes:
        fn: ``(x, *params) -> scalar``.
        slots: see `Term`.
        model: ``(x, *params) -> z`` where the objective declares the split.
        loss: ``(z, *params) -> scalar``.
        uses_unknown: whether fn looks at x at all; one that does must be differentiable in it.
        gauss_newton: whether `product` and `linearize` use JᵀBJ instead of the Hessian.
    """

    fn: Callable[..., Tensor]
    slots: tuple[int, ...]
    model: Callable[..., Any] | None = None
    loss: Callable[..., Tensor] | None = None
    uses_unknown: bool = True
    gauss_newton: bool = False

    def value(self, x: Tensor, *params: Tensor) -> Tensor:
        return self.fn(x, *params)

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return grad(self.fn)(x, *params)

    def value_and_residual(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> tuple[Tensor, Tensor]:
        """Objective ``[*lanes]`` and its gradient ``[*lanes, n]``."""
        # Lanes are independent, so the gradient of all their values is pulled back at once: one transform less on every
        # operation than mapping a gradient over the lanes.
        fn = batched(self.fn, lanes)
        if _recorded(x):

            def total(z: Tensor) -> tuple[Tensor, Tensor]:
                value = fn(z, *params)
                return value.sum(), value

            gradient, value = grad(total, has_aux=True)(x)
            return value, gradient
        # PyTorch's own tape costs half of what a transform costs in Python.
        z, given = x.detach().requires_grad_(), [p.detach() for p in params]
        with torch.enable_grad():
            value = fn(z, *given)
            total_value = value.sum()
        if self.uses_unknown and not total_value.requires_grad:
            raise MisuseError(
                "the objective uses x but returns a value that carries no derivative with respect to it; leave out "
                ".detach(), .item(), numpy and torch.no_grad(), or non-differentiable operations such as argmax."
            )
        gradient = tape.gradient(total_value, z)
        return value.detach(), gradient

    def accumulate(
        self, value: Tensor, F: Tensor, x: Tensor, params: Sequence[Tensor], lanes: Lanes
    ) -> tuple[Tensor, Tensor]:
        own_value, own_residual = self.value_and_residual(x, params, lanes)
        return value + own_value, F + own_residual

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        if not self.gauss_newton:
            # The Hessian is symmetric, so the product is a vector-Jacobian product of the gradient: plain reverse mode.
            return pullback(lambda z: self.residual(z, *params), [x], y)[0]
        assert self.model is not None and self.loss is not None
        model, loss = self.model, self.loss

        def at(w: Tensor) -> Any:
            return model(w, *params)

        Jy = pushforward(at, [x], [y])
        BJy = pullback(lambda o: grad(loss)(o, *params), [at(x)], Jy)[0]
        return pullback(at, [x], BJy)[0]

    def linearize(self, x: Tensor, params: Sequence[Tensor], lanes: Lanes) -> Callable[[Tensor], Tensor]:
        if _recorded(x):
            return super().linearize(x, params, lanes)
        given = [p.detach() for p in params]
        if not self.gauss_newton:
            fn = batched(self.fn, lanes)
            return tape.hessian(lambda z: fn(z, *given).sum(), x)
        assert self.model is not None and self.loss is not None
        model, loss = batched(self.model, lanes), batched(self.loss, lanes)
        return tape.gauss_newton(lambda z: model(z, *given), lambda o: loss(o, *given).sum(), x)


def _recorded(x: Tensor) -> bool:
    """Whether what is computed from x may be differentiated from outside: not inside a Function's forward."""
    return torch.is_grad_enabled() or is_wrapped(x)


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
    def linear_system(self) -> Condition:
        """The condition A u - v = 0 with A = ∂F/∂x, whose tensors are ``(v, x, *tensors)``."""

    @abstractmethod
    def with_lanes(self, lanes: Lanes) -> Condition:
        """The same condition over more lanes."""


@dataclass(frozen=True)
class Bound:
    """Terms with their tensors filled in, over all lanes: what a solver sees."""

    terms: tuple[Term, ...]
    tensors: tuple[Tensor, ...]
    lanes: Lanes

    def value_and_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Objective ``[*lanes]`` and F ``[*lanes, n]`` at x."""
        first, *rest = [term for term in self.terms if isinstance(term, Potential)]
        params, lanes = select(self.tensors, self.lanes, first.slots)
        if isinstance(first, ObjectiveTerm):
            value, F = first.value_and_residual(x, params, lanes)
        else:
            value, F = first.accumulate(torch.zeros_like(x[..., 0]), torch.zeros_like(x), x, params, lanes)
        for term in rest:
            value, F = term.accumulate(value, F, x, *select(self.tensors, self.lanes, term.slots))
        return value, F

    def linearize(self, x: Tensor, damping: float = 0.0) -> Callable[[Tensor], Tensor]:
        """Return y ↦ A y with A = ∂F/∂x + damping·I at x; what does not depend on y is computed once."""
        products, diagonal = [], x.new_tensor(damping)
        for term in self.terms:
            params, lanes = select(self.tensors, self.lanes, term.slots)
            own = term.diagonal(x, params, lanes)
            if own is None:
                products.append(term.linearize(x, params, lanes))
            else:
                diagonal = diagonal + own

        def apply(y: Tensor) -> Tensor:
            if not products:
                return diagonal * y
            out = products[0](y)
            for product in products[1:]:
                out = out + product(y)
            return torch.addcmul(out, diagonal, y) if plus_diagonal else out

        plus_diagonal = bool(damping) or len(products) < len(self.terms)
        return apply
