"""Numbers, tensors, matrices and trees that shrink to small and readable ones.

Numbers are drawn as eighths between -3 and 3, so that a shrunk example can be read and typed.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

__all__ = ["Device", "at_least", "eighths", "expect_strategy", "matrices", "spd_matrices", "tensors", "trees"]

Device = torch.device | str


def expect_strategy(name: str, given: Any, hint: str) -> SearchStrategy[Any]:
    """Return `given` if it is a strategy; otherwise say what to write instead."""
    if isinstance(given, SearchStrategy):
        return given
    if callable(given):
        raise TypeError(f"{name} is {given!r}, which makes strategies but is none; call it: {name}={hint}.")
    raise TypeError(
        f"{name} is {given!r}, a {type(given).__name__}, but a Hypothesis strategy is needed; pass {hint}, or "
        f"st.just({given!r}) for this one value."
    )


def at_least(name: str, given: Any, least: float) -> Any:
    """Return a number, or raise a ValueError if it is smaller, or none."""
    if not given >= least:
        raise ValueError(f"{name} is {given!r}, but has to be at least {least}; pass {least} or more.")
    return given


def expect_floating(dtype: torch.dtype, otherwise: str = "") -> None:
    """Raise a TypeError for a type that cannot hold the numbers that are drawn."""
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, but real floating numbers are drawn; pass torch.float64{otherwise}.")


def sizes(name: str, n: int | SearchStrategy[int] | None, max_size: int, min_size: int = 1) -> SearchStrategy[int]:
    """A strategy for a length, given as a number, as a strategy, or only by its limit."""
    if n is None:
        return st.integers(min_size, at_least("max_size", max_size, min_size))
    if isinstance(n, int) and not isinstance(n, bool):
        return st.just(at_least(name, n, min_size))
    return expect_strategy(name, n, "st.integers(1, 5)")


def limits(condition: float | SearchStrategy[float]) -> SearchStrategy[float]:
    """A strategy for a largest condition number, given as a number or as a strategy."""
    if isinstance(condition, (int, float)):
        return st.just(at_least("condition", condition, 1))
    return expect_strategy("condition", condition, "st.floats(1, 100)")


def eighths(low: float = -3.0, high: float = 3.0) -> SearchStrategy[float]:
    """Multiples of 1/8, exact in every floating type; they shrink to 0."""
    return st.integers(round(8 * low), round(8 * high)).map(lambda k: k / 8)


@st.composite
def tensors(
    draw: DrawFn,
    shape: tuple[int, ...] | SearchStrategy[tuple[int, ...]] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
    max_size: int = 4,
    elements: SearchStrategy[float] | None = None,
) -> Tensor:
    """Tensors of small readable numbers.

    Args:
        draw: given by Hypothesis; leave it out.
        shape: a tuple, a strategy for tuples, or None for up to two dimensions.
        dtype: of the tensor.
        device: of the tensor.
        max_size: largest dimension where the shape is drawn.
        elements: strategy for the numbers; eighths between -3 and 3 by default.

    Examples:
        >>> tensors((2,)).example().shape
        torch.Size([2])
    """
    if elements is None:
        expect_floating(dtype, ", or elements=st.integers(0, 3) for integers")
        elements = eighths()
    elements = expect_strategy("elements", elements, "st.floats(-1, 1)")
    if shape is None:
        shape = st.lists(sizes("shape", None, max_size), max_size=2).map(tuple)
    if not isinstance(shape, tuple):
        shape = draw(expect_strategy("shape", shape, "st.tuples(st.integers(1, 4))"))
    assert isinstance(shape, tuple)
    count = torch.Size(shape).numel()
    numbers = draw(st.lists(elements, min_size=count, max_size=count))
    return torch.tensor(numbers, dtype=dtype, device=device).reshape(shape)


def trees(
    leaves: SearchStrategy[Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
    max_size: int = 4,
    max_leaves: int = 4,
) -> SearchStrategy[Any]:
    """Trees of tensors: dicts, lists and tuples of them, nested, or a tensor alone. They shrink to a number, 0-d.

    Args:
        leaves: strategy for the leaves; `tensors` of the `dtype` on the `device` by default.
        dtype: of the default leaves.
        device: of the default leaves.
        max_size: largest dimension of the default leaves.
        max_leaves: about how many there are at most.

    Examples:
        >>> leaves = torch.utils._pytree.tree_leaves(trees().example())
        >>> all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        True
    """
    if leaves is None:
        leaves = tensors(dtype=dtype, device=device, max_size=max_size)
    leaves = expect_strategy("leaves", leaves, "strategies.tensors()")
    names = st.sampled_from(["w", "b", "scale"])

    def grow(children: SearchStrategy[Any]) -> SearchStrategy[Any]:
        several = st.lists(children, min_size=1, max_size=3)
        return several | several.map(tuple) | st.dictionaries(names, children, min_size=1, max_size=3)

    return st.recursive(leaves, grow, max_leaves=max_leaves)


def _reflection(draw: DrawFn, n: int) -> Tensor:
    """An orthogonal matrix I - 2vvᵀ/‖v‖², dense where v is; it shrinks to diag(-1, 1, …, 1)."""
    v = torch.tensor([1.0, *draw(st.lists(st.integers(-3, 3), min_size=n - 1, max_size=n - 1))], dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)


@st.composite
def spd_matrices(
    draw: DrawFn,
    n: int | SearchStrategy[int] | None = None,
    condition: float | SearchStrategy[float] = 10.0,
    dtype: torch.dtype = torch.float64,
    *,
    device: Device = "cpu",
    max_size: int = 5,
) -> Tensor:
    """Symmetric positive definite matrices Q diag(λ) Qᵀ with eigenvalues between 1 and `condition`.

    They shrink to the identity.

    Args:
        draw: given by Hypothesis; leave it out.
        n: size, a strategy for it, or None for anything up to `max_size`.
        condition: largest condition number, or a strategy for it.
        dtype: of the matrix.
        device: of the matrix.
        max_size: largest size where `n` is None.

    Examples:
        >>> A = spd_matrices(3, condition=100.0).example()
        >>> bool(torch.linalg.cond(A) < 100.01)
        True
    """
    expect_floating(dtype)
    size = draw(sizes("n", n, max_size))
    limit = draw(limits(condition))
    exponents = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    eigenvalues = limit ** (torch.tensor(exponents, dtype=torch.float64) / 8)
    Q = _reflection(draw, size)
    A = Q @ torch.diag(eigenvalues) @ Q.mT
    return ((A + A.mT) / 2).to(dtype=dtype, device=device)


@st.composite
def matrices(
    draw: DrawFn,
    n: int | SearchStrategy[int] | None = None,
    condition: float | SearchStrategy[float] = 10.0,
    dtype: torch.dtype = torch.float64,
    *,
    device: Device = "cpu",
    max_size: int = 5,
) -> Tensor:
    """Regular matrices, not symmetric, with singular values between 1 and `condition`. They shrink to diagonal ones.

    Args:
        draw: given by Hypothesis; leave it out.
        n: size, a strategy for it, or None for anything up to `max_size`.
        condition: largest condition number, or a strategy for it.
        dtype: of the matrix.
        device: of the matrix.
        max_size: largest size where `n` is None.

    Examples:
        >>> bool(torch.linalg.matrix_rank(matrices(3).example()) == 3)
        True
    """
    expect_floating(dtype)
    size = draw(sizes("n", n, max_size))
    exponents = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    values = draw(limits(condition)) ** (torch.tensor(exponents, dtype=torch.float64) / 8)
    A = _reflection(draw, size) @ torch.diag(values) @ _reflection(draw, size).mT
    return A.to(dtype=dtype, device=device)
