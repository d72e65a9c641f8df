"""The implicit function theorem, once, for every problem of this library.

Let x(θ) satisfy F(x(θ), θ) = 0 with A = ∂F/∂x regular. Differentiating in θ,

    A dx + (∂F/∂θ) dθ = 0        so        dx = -A⁻¹ (∂F/∂θ) dθ                       (forward mode, `jvp`)
    vᵀdx = -(A⁻ᵀv)ᵀ (∂F/∂θ) dθ   so    ∂L/∂θ = -(∂F/∂θ)ᵀ u   with   Aᵀu = v = ∂L/∂x   (reverse mode, `backward`)

(Krantz & Parks 2013; for argmin layers Gould et al. 2016; Blondel et al. 2022). Only the solution enters, not the path
to it, so nothing of the solve is recorded.

The linear system is itself an optimality condition, A(x, θ) u - v = 0 in the unknown u with parameters (v, x, θ), and
is solved by the same Function. Hence its derivatives follow the same rule and every order of derivative is right, if
three things are kept, each of which fails silently otherwise:

- the backward works on the *saved output* x, which carries the derivative dx/dθ, never on a detached copy;
- inside `jvp` forward mode is switched on again, because PyTorch switches it off there;
- tangents are pushed through F by a double transpose, because PyTorch's dual numbers do not nest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from implicitlayers.functorch import (
    batched,
    forward_ad_enabled,
    full_precision,
    over_legacy_lanes,
    primal,
    pullback,
    pushforward,
)
from implicitlayers.problem import Condition, Lanes, Term, select
from implicitlayers.status import Status

__all__ = ["ImplicitArgmin"]


class ImplicitArgmin(Function):
    """Solve F(x, tensors) = 0, differentiably.

    ``apply(condition, x0, *tensors) -> (x, status, steps, residual, objective)``. `condition` is a `Condition` and
    holds no tensor; ``x0 [n]`` is only a start and gets no gradient. Only the first output is differentiable. Works
    under backward of any order, forward-mode AD and every torch.func transform.
    """

    @staticmethod
    def forward(condition: Condition, x0: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not x0.numel():
            # A vmap without lanes: much of PyTorch cannot compute with nothing.
            none = x0.new_zeros(x0.shape[:-1])
            return x0.clone(), none.long(), none.long(), none, none
        outcome = condition.solve(x0, tensors)
        # PyTorch refuses an output that is an input, which a solver that has nothing to do may return.
        return (outcome.x.clone() if outcome.x is x0 else outcome.x, *outcome[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.condition = inputs[0]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[:2], *inputs[2:])
        ctx.save_for_forward(*output[:2], *inputs[2:])

    @staticmethod
    def backward(ctx: Any, v: Tensor, *_: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, status, *tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def pull(v: Tensor) -> Sequence[Tensor]:
            # A lane that diverged and that the loss leaves out, v = 0, contributes nothing; but zero times infinity is
            # NaN, and would reach every tensor that lanes share.
            dead = (status == Status.NON_FINITE) & (v == 0).all(-1)
            at = torch.where(dead.unsqueeze(-1), torch.zeros_like(x), x)
            with full_precision(at):
                return ImplicitArgmin._pull(ctx.condition, v, at, tensors, wanted)

        grads: list[Tensor | None] = [None] * len(tensors)
        for i, pulled in zip(wanted, over_legacy_lanes(pull, v), strict=True):
            grads[i] = pulled
        return None, None, *grads

    @staticmethod
    def _pull(
        condition: Condition, v: Tensor, x: Tensor, tensors: Sequence[Tensor], wanted: Sequence[int]
    ) -> Sequence[Tensor]:
        if not x.numel():
            return [torch.zeros_like(tensors[i]) for i in wanted]
        u = _solve_linearized(condition, v, x, tensors, transposed=True)
        grads: dict[int, Tensor] = {}
        for term in condition.terms:
            slots = set(term.slots)
            inside = [i for i in wanted if i in slots]
            if inside:
                residual = _residual_of(term, condition.lanes, x, tensors, inside)
                pulled = pullback(residual, [tensors[i] for i in inside], u)
                for i, g in zip(inside, pulled, strict=True):
                    grads[i] = -g if i not in grads else grads[i] - g
        return [grads[i] if i in grads else torch.zeros_like(tensors[i]) for i in wanted]

    @staticmethod
    def jvp(ctx: Any, _condition: Any, _x0: Any, *tangents: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, _, *tensors = (primal(t) for t in ctx.saved_tensors)
        condition: Condition = ctx.condition
        given = [i for i, t in enumerate(tangents) if t is not None and x.numel()]
        with forward_ad_enabled():
            dF = torch.zeros_like(x)
            for term in condition.terms:
                inside = [i for i in given if i in term.slots]
                if inside:
                    residual = _residual_of(term, condition.lanes, x, tensors, inside)
                    dF = dF + pushforward(residual, [tensors[i] for i in inside], [tangents[i] for i in inside])  # type: ignore[misc]
            dx = -_solve_linearized(condition, dF, x, tensors, transposed=False)
            return dx, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], condition: Condition, x0: Tensor, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        def front(t: Tensor, dim: int | None) -> Tensor:
            return t if dim is None else t.movedim(dim, 0)

        x0 = x0.expand(info.batch_size, *x0.shape) if in_dims[1] is None else front(x0, in_dims[1])
        level = tuple(None if dim is None else 0 for dim in in_dims[2:])
        lifted = condition.with_lanes((*condition.lanes, level))
        return ImplicitArgmin.apply(lifted, x0, *map(front, tensors, in_dims[2:])), (0, 0, 0, 0, 0)


def _residual_of(term: Term, lanes: Lanes, x: Tensor, tensors: Sequence[Tensor], which: Sequence[int]) -> Any:
    """The term's residual on all lanes as a function of the tensors in the slots `which` alone."""
    _, term_lanes = select(tensors, lanes, term.slots)
    residual = batched(term.residual, term_lanes)

    def f(*chosen: Tensor) -> Tensor:
        values = dict(zip(which, chosen, strict=True))
        return residual(x, *[values.get(slot, tensors[slot]) for slot in term.slots])

    return f


def _solve_linearized(
    condition: Condition, v: Tensor, x: Tensor, tensors: Sequence[Tensor], *, transposed: bool
) -> Tensor:
    system = condition.linear_system(transposed=transposed)
    return ImplicitArgmin.apply(system, torch.zeros_like(v), v, x, *tensors)[0]
