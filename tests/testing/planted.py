"""Layers with a bug each, of the kind that other libraries have shipped, and the check that must see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch

from implicitlayers.testing import check_layer, strategies

F32, F64 = torch.float32, torch.float64


def function(forward: Callable[..., Any], backward: Callable[..., Any], jvp: Callable[..., Any] | None = None) -> Any:
    """An autograd Function of ``forward(*inputs)``, ``backward(v, out, *inputs)``, ``jvp(out, inputs, tangents)``."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output, *inputs)
        ctx.save_for_forward(output, *inputs)

    def pull(ctx, v):
        return backward(v, *ctx.saved_tensors)

    def push(ctx, *tangents):
        out, *inputs = ctx.saved_tensors
        zeros = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)]
        return jvp(out, inputs, zeros)

    members = {
        "forward": staticmethod(forward), "setup_context": staticmethod(setup_context),
        "backward": staticmethod(pull), "generate_vmap_rule": True,
    }  # fmt: skip
    if jvp is not None:
        members["jvp"] = staticmethod(push)
    return type("Layer", (torch.autograd.Function,), members).apply


def outer(a, b):
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def mv(A, x):
    return (A @ x.unsqueeze(-1)).squeeze(-1)


# --- x = A⁻¹b, whose adjoint solves Aᵀu = v -------------------------------------------------------


def linear(adjoint: Callable[..., Any], jvp: Callable[..., Any] | None = None) -> Any:
    """x = A⁻¹b with u = adjoint(A, v)."""

    def backward(v, x, A, b):
        u = adjoint(A, v)
        return -outer(u, x), u

    return function(lambda A, b: torch.linalg.solve(A, b), backward, jvp)


def transposed(A, v):
    return torch.linalg.solve(A.mT, v)


def tangent(out, inputs, tangents):
    return torch.linalg.solve(inputs[0], tangents[1] - mv(tangents[0], out))


def conjugate_gradients(A, v, *, previous=False, residual_unscaled=False, steps=None):
    """The textbook's method, with three of the bugs it has had."""
    x, r = torch.zeros_like(v), v
    p, before = r, x
    for _ in range(len(v) if steps is None else steps):
        Ap = A @ p
        rr = r @ r
        if rr <= 1e-30 * (v @ v):
            break
        alpha = rr / (p @ Ap)
        before, x = x, x + alpha * p
        r = r - (Ap if residual_unscaled else alpha * Ap)
        p = r + (r @ r) / rr * p
    return before if previous else x


def descent(A, v, steps=20):
    """Steps of gradient descent, and no look at whether they were enough."""
    u = torch.zeros_like(v)
    for _ in range(steps):
        u = u + (v - A.mT @ u) / 20
    return u


def normalized(A, v):
    """The norm of a float32 cotangent of size 1e-22 is zero, and 0/0 is NaN."""
    size = (v * v).sum().sqrt()
    return torch.linalg.solve(A.mT, v / size) * size


def forgotten_when_small(A, v):
    return transposed(A, v) if (v * v).sum() > 0 else torch.zeros_like(v)


# --- x = (A + λI)⁻¹(b + λθ) -----------------------------------------------------------------------


def shifted(A, lam):
    return A + lam * torch.eye(A.shape[-1], dtype=A.dtype)


def proximal(sign=1.0, regularized=True) -> Any:
    """The proximal quadratic in λ and θ for a fixed A and b."""

    def forward(A, b, lam, theta):
        return torch.linalg.solve(shifted(A, lam), b + lam * theta)

    def backward(v, x, A, b, lam, theta):
        u = torch.linalg.solve(shifted(A, lam) if regularized else A, v)
        return -outer(u, x), u, sign * (u * (theta - x)).sum(-1), lam * u

    return function(forward, backward)


# --- elementwise: x from ½(x + x²/2 - θ)² + ½x², and from x³ + x = θ ------------------------------


def newton(F, dF, theta):
    x = torch.zeros_like(theta)
    for _ in range(60):
        x = x - F(x, theta) / dF(x, theta)
    return x


def curved(curvature: Callable[..., Any]) -> Any:
    """argmin ½(g(x) - θ)² + ½x² with g(x) = x + x²/2, for θ where it is convex."""
    return function(
        lambda theta: newton(lambda x, t: (1 + x) * (x + x * x / 2 - t) + x, hessian, theta),
        lambda v, x, theta: v * (1 + x) / curvature(x, theta),
    )


def hessian(x, theta):
    return (1 + x) ** 2 + (x + x * x / 2 - theta) + 1


def gauss_newton(x, theta):
    return (1 + x) ** 2 + 1


def cubic(held: Callable[..., Any], scale=1.0) -> Any:
    """x³ + x = θ, with x as the backward holds it, and forward mode scaled."""
    return function(
        lambda theta: newton(lambda x, t: x**3 + x - t, lambda x, t: 3 * x * x + 1, theta),
        lambda v, x, theta: v / (3 * held(x) ** 2 + 1),
        lambda out, inputs, tangents: scale * tangents[0] / (3 * out * out + 1),
    )


def same(x):
    return x


# --- trees, captured tensors, starts, lanes -------------------------------------------------------


def tree_layer(drop: bool) -> Callable[..., Any]:
    root = cubic(same)
    return lambda tree: root(tree["w"] * (tree["b"].detach() if drop else tree["b"]))


def capturing(drop: bool) -> Callable[..., Any]:
    """(1 + λ)x = b, solved by a Function that captures λ and so knows of b only; or told both."""

    def layer(b, lam):
        if drop:
            return function(lambda b: b / (1 + lam.detach()), lambda v, x, b: v / (1 + lam.detach()))(b)
        return function(lambda b, lam: b / (1 + lam), lambda v, x, b, lam: (v / (1 + lam), -(v @ x) / (1 + lam)))(
            b, lam
        )

    return layer


def started(leak: bool) -> Callable[..., Any]:
    root = cubic(same)
    return lambda theta, x0: root(theta) + (x0 - x0.detach() if leak else 0 * theta)


def batch(gradient: Callable[..., Any]) -> Any:
    """x³ + x = θ on a batch, with something done to the batch's gradient."""
    return function(
        lambda theta: newton(lambda x, t: x**3 + x - t, lambda x, t: 3 * x * x + 1, theta),
        lambda v, x, theta: gradient(v / (3 * x * x + 1)),
    )


def without_last_lane(g):
    return torch.cat([g[:-1], torch.zeros_like(g[-1:])])


def mean_of_batch(theta):
    """Minimizes Σᵢ(xᵢ - θᵢ)²/B + Σxᵢ²: the weight of the data depends on who else is in the batch."""
    return theta / (1 + len(theta))


class ReversedLanes(torch.autograd.Function):
    """x = sin θ, whose vmap rule returns the lanes in the wrong order."""

    @staticmethod
    def forward(theta):
        return theta.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, v):
        return v * ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(info, in_dims, theta):
        return ReversedLanes.apply(theta.movedim(in_dims[0], 0).flip(0)), 0


# --- the table ------------------------------------------------------------------------------------


def systems(matrices: Any) -> Any:
    return matrices.flatmap(lambda A: st.tuples(st.just(A), strategies.tensors((len(A),), dtype=A.dtype)))


def positive(*shape: int) -> Any:
    return strategies.tensors(shape, elements=st.integers(1, 16).map(lambda k: k / 8))


def proximal_inputs() -> Any:
    def rest(A: Any) -> Any:
        vector = strategies.tensors((len(A),))
        return st.tuples(st.just(A), vector, positive(), vector)

    return strategies.spd_matrices().flatmap(rest)


VECTORS = strategies.tensors(st.sampled_from([(1,), (2,), (3,)]))
BATCHES = strategies.tensors(st.sampled_from([(2, 2), (3, 1), (3, 2)]))
SMALL = strategies.tensors((2,), elements=st.integers(-4, 4).map(lambda k: k / 8))
TREES = st.fixed_dictionaries({"w": positive(2), "b": positive(2)})
SPD, GENERAL = systems(strategies.spd_matrices()), systems(strategies.matrices())
SINGLE = systems(strategies.matrices(dtype=F32))
BACKWARD: dict[str, Any] = {"modes": ("reverse",)}
TAPED: dict[str, Any] = {"modes": ("reverse", "vmap")}

# name: (layer with the bug, the same without, inputs, options of check_layer)
PLANTED: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "wrong sign": (proximal(sign=-1.0), proximal(), proximal_inputs(), TAPED),
    "missing transpose": (linear(lambda A, v: torch.linalg.solve(A, v)), linear(transposed), GENERAL, TAPED),
    "regularizer dropped from the curvature": (proximal(regularized=False), proximal(), proximal_inputs(), TAPED),
    "Gauss-Newton passed off as Hessian": (curved(gauss_newton), curved(hessian), SMALL, TAPED),
    # Not in forward mode: PyTorch switches forward gradients off inside `Function.jvp`, so that every hand-written one
    # is wrong in forward over forward.
    "x detached in the backward": (cubic(torch.Tensor.detach), cubic(same), VECTORS, {**TAPED, "order": 2}),
    "CG returns the previous iterate": (
        linear(lambda A, v: conjugate_gradients(A, v, previous=True)), linear(conjugate_gradients), SPD, BACKWARD,
    ),
    "CG scales the step, not the residual": (
        linear(lambda A, v: conjugate_gradients(A, v, residual_unscaled=True)), linear(conjugate_gradients), SPD,
        BACKWARD,
    ),
    "no iterations for a 0-d unknown": (
        function(lambda a, b: b / a, lambda v, x, a, b: (-x * v * 0, v * 0)),
        function(lambda a, b: b / a, lambda v, x, a, b: (-x * v / a, v / a)),
        st.tuples(positive(), strategies.tensors(())), TAPED,
    ),
    "adjoint silently unconverged": (linear(descent), linear(lambda A, v: descent(A, v, 3000)), SPD, BACKWARD),
    "no gradient for one leaf of a tree": (tree_layer(True), tree_layer(False), TREES, {}),
    "no gradient for a captured tensor": (
        capturing(True), capturing(False), st.tuples(SMALL, positive()), BACKWARD,
    ),
    "no gradient for one lane": (batch(without_last_lane), batch(same), BATCHES, BACKWARD),
    "lanes swapped in the backward": (batch(lambda g: g.flip(0)), batch(same), BATCHES, BACKWARD),
    "lanes swapped by the vmap rule": (ReversedLanes.apply, torch.sin, VECTORS, TAPED),
    "float32 underflow to NaN": (linear(normalized), linear(transposed), SINGLE, BACKWARD),
    "float32 underflow to zero": (linear(forgotten_when_small), linear(transposed), SINGLE, BACKWARD),
    "forward mode scaled by 2": (cubic(same, scale=2.0), cubic(same), VECTORS, {}),
    "gradient through the start": (started(True), started(False), VECTORS, {"starts": True, "modes": ("reverse",)}),
    "normalizer depends on the batch size": (mean_of_batch, torch.tanh, BATCHES, {"batched": True}),
}  # fmt: skip


def run(layer: Any, inputs: Any, options: dict[str, Any], max_examples: int) -> Any:
    """check_layer with the row's options."""
    if options.get("starts"):
        inputs = inputs.filter(lambda t: t.shape == (2,))
        options = {**options, "starts": strategies.tensors((2,))}
    return check_layer(layer, inputs, max_examples=max_examples, **options)
