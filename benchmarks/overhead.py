"""What does the library cost on top of the arithmetic that it is asked for?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import implicitlayers as il
from applications.imaml.device import keep_freed_memory
from benchmarks.report import Report, fastest_seconds

Tree = Mapping[str, Tensor]

SIZES = (10, 1_000, 100_000, 1_000_000, 10_000_000)
# From here on the arithmetic should be all that counts.
LARGE = 100_000
BATCH, STEPS, PRODUCTS = 512, 8, 5
LAM, LR = 1.0, 0.1
# Few steps and many, of a problem so small that nothing but the constants is left.
FEW, MANY = 4, 36


@dataclass(frozen=True)
class Given:
    """A network with two layers of weights, the unknown, regularized towards θ.

    Attributes:
        theta: the anchor, which is also the start.
        X: ``[BATCH, width]``.
        Y: ``[BATCH, width]``.
        v: a cotangent like theta.
    """

    theta: Tree
    X: Tensor
    Y: Tensor
    v: Tree


def run(device: str, repeats: int) -> Report:
    """Time `argmin` and its backward against the same by hand: a loop, and bare Hessian-vector products.

    The products are those of one kept graph. What the library does beyond them (conjugate gradients, statuses, one flat
    vector) counts as overhead.

    Args:
        device: where to run.
        repeats: timed runs of each; the fastest counts, because what else the machine does only slows it.
    """
    keep_freed_memory()
    rows = [_row(n, device, repeats) for n in SIZES]
    large = [row for row in rows if row["n"] >= LARGE]
    forward, backward = (max(row[f"{way} ratio"] for row in large) for way in ("forward", "backward"))
    call, step = _constants(_forward, _loop, device, repeats)
    back_call, back_step = _constants(_backward_of, _products, device, repeats)
    return Report(
        f"n unknowns of a network, {BATCH} rows of data, float32: {STEPS} gradient steps, {PRODUCTS} products",
        rows,
        f"from n = {LARGE} up at most {forward:.2f} times the loop and {backward:.2f} times the products (must: 1.15); "
        f"at n = {SIZES[0]} a call costs {call:.0f} µs more than a loop and {step:.0f} µs more a step, its backward "
        f"{back_call:.0f} µs more than the products and {back_step:.0f} µs more a product",
    )


def _row(n: int, device: str, repeats: int) -> dict[str, Any]:
    given = _given(n, device)
    seconds = fastest_seconds(
        {
            "loop": lambda: _loop(given, STEPS),
            "argmin": lambda: _forward(given, STEPS),
            "products": _products(given, PRODUCTS),
            "backward": _backward_of(given, PRODUCTS),
        },
        device,
        repeats,
    )
    return {
        "n": sum(t.numel() for t in given.theta.values()),
        "loop ms": 1e3 * seconds["loop"],
        "argmin ms": 1e3 * seconds["argmin"],
        "forward ratio": seconds["argmin"] / seconds["loop"],
        "products ms": 1e3 * seconds["products"],
        "backward ms": 1e3 * seconds["backward"],
        "backward ratio": seconds["backward"] / seconds["products"],
    }


def _constants(
    ours: Callable[[Given, int], Any], by_hand: Callable[[Given, int], Any], device: str, repeats: int
) -> tuple[float, float]:
    """Microseconds more than by hand: once, and for every step."""
    given = _given(SIZES[0], device)
    candidates: dict[str, Callable[[], Any]] = {}
    for name, way in (("ours", ours), ("by hand", by_hand)):
        for steps in (FEW, MANY):
            prepared = way(given, steps) if way in (_products, _backward_of) else None
            candidates[f"{name} {steps}"] = prepared or (lambda way=way, steps=steps: way(given, steps))
    seconds = fastest_seconds(candidates, device, 4 * repeats)
    few, many = (seconds[f"ours {k}"] - seconds[f"by hand {k}"] for k in (FEW, MANY))
    step = (many - few) / (MANY - FEW)
    return 1e6 * (few - FEW * step), 1e6 * step


def loss(phi: Tree, X: Tensor, Y: Tensor) -> Tensor:
    """Mean squared error of the network."""
    return F.mse_loss(torch.tanh(X @ phi["first"]) @ phi["second"], Y)


def _forward(given: Given, steps: int, products: int = PRODUCTS) -> Tree:
    return il.argmin(
        loss,
        given.theta,
        given.X,
        given.Y,
        regularizer=il.Proximal(given.theta, LAM),
        solver=il.GradientDescent(lr=LR, rtol=None, atol=None, max_steps=steps),
        adjoint=il.Implicit(il.CG(rtol=None, atol=None, max_steps=products), on_failure="ignore"),
    ).value


def _backward_of(given: Given, products: int) -> Callable[[], Sequence[Tensor]]:
    value, theta = _forward(given, STEPS, products), list(given.theta.values())
    return lambda: torch.autograd.grad(list(value.values()), theta, list(given.v.values()), retain_graph=True)


def _loop(given: Given, steps: int) -> list[Tensor]:
    names, theta = list(given.theta), [t.detach() for t in given.theta.values()]
    phi = theta
    for _ in range(steps):
        leaves = [p.detach().requires_grad_() for p in phi]
        slopes = torch.autograd.grad(loss(dict(zip(names, leaves, strict=True)), given.X, given.Y), leaves)
        with torch.no_grad():
            pulled = zip(leaves, slopes, theta, strict=True)
            phi = [p - LR * (g + LAM * (p - t)) for p, g, t in pulled]
    return phi


def _products(given: Given, products: int) -> Callable[[], Sequence[Tensor]]:
    names, phi = list(given.theta), _loop(given, STEPS)

    def repeat() -> Sequence[Tensor]:
        leaves = [p.detach().requires_grad_() for p in phi]
        value = loss(dict(zip(names, leaves, strict=True)), given.X, given.Y)
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        v = list(given.v.values())
        for _ in range(products):
            curved = torch.autograd.grad(slopes, leaves, v, retain_graph=True)
            v = [h + LAM * y for h, y in zip(curved, v, strict=True)]
        return v

    return repeat


def _given(n: int, device: str) -> Given:
    width = max(1, round((n / 2) ** 0.5))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator).to(device)

    theta = {name: normal(width, width, scale=width**-0.5).requires_grad_() for name in ("first", "second")}
    v = {name: normal(width, width) for name in theta}
    return Given(theta, normal(BATCH, width), normal(BATCH, width), v)
