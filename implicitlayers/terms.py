"""The terms that user functions become: the gradient of an objective, an equation, a proximal fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad

from implicitlayers import tape
from implicitlayers.closure import bound_now
from implicitlayers.functorch import batched, pullback, pushforward, tape_is_free
from implicitlayers.problem import Lanes, Nonsmooth, Potential, Term, select
from implicitlayers.status import MisuseError

__all__ = ["Composite", "ObjectiveTerm", "ProximalTerm", "ResidualTerm"]


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

    def bound_now(self) -> Composite:
        """The same with the parameters that its modules have now; see `closure.bound_now`."""
        return Composite(bound_now(self.model), bound_now(self.loss))


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
        # Lanes are independent, so the gradient of all their values is pulled back at once: one transform less on every
        # operation than mapping a gradient over the lanes.
        fn = batched(self.fn, lanes)
        if not tape_is_free(x):

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

    def with_gauss_newton(self) -> ObjectiveTerm:
        return replace(self, gauss_newton=self.model is not None)

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

    def linearize(
        self, x: Tensor, params: Sequence[Tensor], lanes: Lanes, *, transposed: bool = False
    ) -> Callable[[Tensor], Tensor]:
        if not tape_is_free(x):
            return super().linearize(x, params, lanes)
        given = [p.detach() for p in params]
        if not self.gauss_newton:
            fn = batched(self.fn, lanes)
            return tape.hessian(lambda z: fn(z, *given).sum(), x)
        assert self.model is not None and self.loss is not None
        model, loss = batched(self.model, lanes), batched(self.loss, lanes)
        return tape.gauss_newton(lambda z: model(z, *given), lambda o: loss(o, *given).sum(), x)


@dataclass(frozen=True)
class ResidualTerm(Term):
    """An equation F(x, params) = 0 given as a function of the flat unknown; nothing is known of ∂F/∂x.

    Attributes:
        fn: ``(x, *params) -> F``, ``[n]`` to ``[n]``.
        slots: see `Term`.
    """

    fn: Callable[..., Tensor]
    slots: tuple[int, ...]
    symmetric: ClassVar[bool] = False

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return self.fn(x, *params)

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return pushforward(lambda z: self.fn(z, *params), [x], [y])

    def transposed(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        return pullback(lambda z: self.fn(z, *params), [x], y)[0]

    def linearize(
        self, x: Tensor, params: Sequence[Tensor], lanes: Lanes, *, transposed: bool = False
    ) -> Callable[[Tensor], Tensor]:
        if not tape_is_free(x):
            return super().linearize(x, params, lanes, transposed=transposed)
        fn, given = batched(self.fn, lanes), [p.detach() for p in params]
        return (tape.transposed_jacobian if transposed else tape.jacobian)(lambda z: fn(z, *given), x)


@dataclass(frozen=True)
class ProximalTerm(Term):
    """x - prox(x - ∇f(x)) = 0, which holds where x minimizes f plus a nonsmooth part (Combettes & Wajs 2005).

    With P = ∂prox and H = ∇²f its Jacobian is I - P (I - H): not symmetric, though P and H are. The step inside the map
    is 1, whatever a solver's is: any positive number has the same zeros, and a Krylov method is indifferent to it.

    Attributes:
        smooth: the terms whose sum is ∇f.
        nonsmooth: the rest of the objective.
        count: length of the list of tensors, all of which this term takes.
    """

    smooth: tuple[Term, ...]
    nonsmooth: Nonsmooth
    count: int
    symmetric: ClassVar[bool] = False

    @property
    def slots(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(self.count))

    def residual(self, x: Tensor, *params: Tensor) -> Tensor:
        return x - self._prox(self._forward(x, params), params)

    def product(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        moved = y - self._sum([t.product(y, x, *_pick(t, params)) for t in self.smooth])
        return y - pushforward(lambda z: self._prox(z, params), [self._forward(x, params)], [moved])

    def transposed(self, y: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        w = pullback(lambda z: self._prox(z, params), [self._forward(x, params)], y)[0]
        return y - w + self._sum([t.transposed(w, x, *_pick(t, params)) for t in self.smooth])

    def linearize(
        self, x: Tensor, params: Sequence[Tensor], lanes: Lanes, *, transposed: bool = False
    ) -> Callable[[Tensor], Tensor]:
        if not tape_is_free(x):
            return super().linearize(x, params, lanes, transposed=transposed)
        forward = batched(lambda z, *p: self._forward(z, p), lanes)
        prox, given = batched(lambda z, *p: self._prox(z, p), lanes), [p.detach() for p in params]
        build = tape.transposed_jacobian if transposed else tape.jacobian
        P = build(lambda z: prox(z, *given), forward(x, *params))
        parts = [t.linearize(x, *select(params, lanes, t.slots), transposed=transposed) for t in self.smooth]

        def H(y: Tensor) -> Tensor:
            return self._sum([part(y) for part in parts])

        def transposed_product(y: Tensor) -> Tensor:
            w = P(y)
            return y - w + H(w)

        return transposed_product if transposed else lambda y: y - P(y - H(y))

    def with_gauss_newton(self) -> ProximalTerm:
        return replace(self, smooth=tuple(term.with_gauss_newton() for term in self.smooth))

    def _forward(self, x: Tensor, params: Sequence[Tensor]) -> Tensor:
        return x - self._sum([t.residual(x, *_pick(t, params)) for t in self.smooth])

    def _prox(self, z: Tensor, params: Sequence[Tensor]) -> Tensor:
        return self.nonsmooth.prox(z, torch.ones_like(z[0]), *_pick(self.nonsmooth, params))

    @staticmethod
    def _sum(parts: Sequence[Tensor]) -> Tensor:
        return sum(parts[1:], parts[0])


def _pick(part: Term | Nonsmooth, params: Sequence[Tensor]) -> list[Tensor]:
    return [params[slot] for slot in part.slots]
