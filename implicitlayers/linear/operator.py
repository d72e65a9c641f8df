"""Linear operators, matrix-free first: a product is all that is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import vmap

from implicitlayers.problem import Linearization
from implicitlayers.status import MisuseError

__all__ = ["Late", "Operator", "asymmetric"]

# Relative to the largest entry. A finite difference in one entry of a symmetric matrix stays below it.
_ASYMMETRY = 1e-2


def asymmetric(matrix: Tensor) -> Tensor:
    """Mask ``[...]`` of the matrices ``[..., n, n]`` that were not meant to be symmetric."""
    return (matrix - matrix.mT).abs().amax((-2, -1)) > _ASYMMETRY * matrix.abs().amax((-2, -1))


@dataclass(frozen=True)
class Operator:
    """A square linear map on every lane, y ``[*lanes, n]`` ↦ A y ``[*lanes, n]``.

    What is known of A decides which linear solver may be used; claim only what is certain.

    Attributes:
        apply: the product.
        symmetric: whether A = Aᵀ is known.
        minimizing: whether A is the curvature of a problem that is being minimized, so that a solver must not take an
            indefinite A for granted: the solution would lead to a saddle.
        apply_transpose: the product with Aᵀ; a symmetric operator needs none.
        positive_definite: whether A is known, not merely hoped, to be symmetric positive definite.
        indefinite: whether A is known to be symmetric with eigenvalues of both signs, as a saddle-point matrix is.

    Raises:
        MisuseError: where the claims contradict each other.
    """

    apply: Callable[[Tensor], Tensor]
    symmetric: bool
    minimizing: bool = False
    apply_transpose: Callable[[Tensor], Tensor] | None = None
    positive_definite: bool = False
    indefinite: bool = False

    def __post_init__(self) -> None:
        if (self.positive_definite or self.indefinite) and not self.symmetric:
            claim = "positive_definite" if self.positive_definite else "indefinite"
            raise MisuseError(
                f"Operator(symmetric=False, {claim}=True): the definiteness meant here is that of a symmetric matrix; "
                f"pass symmetric=True, or leave {claim} out."
            )
        if self.positive_definite and self.indefinite:
            raise MisuseError(
                "Operator(positive_definite=True, indefinite=True): no matrix is both; pass the one that is known."
            )

    def __call__(self, y: Tensor) -> Tensor:
        """A y."""
        return self.apply(y)

    @property
    def T(self) -> Operator:
        """The transposed operator; a symmetric one is its own.

        Raises:
            MisuseError: where the product with Aᵀ is needed and was not given.
        """
        if self.symmetric:
            return self
        if self.apply_transpose is None:
            raise MisuseError(
                "the transpose of an operator is needed, and this one is not symmetric and has no apply_transpose; "
                "pass Operator(apply, symmetric=False, apply_transpose=...), or symmetric=True if A = Aᵀ is known."
            )
        return replace(self, apply=self.apply_transpose, apply_transpose=self.apply)

    def dense(self, like: Tensor) -> Tensor:
        """The matrices ``[*lanes, n, n]``, from n products done at once; `like` is any ``[*lanes, n]``."""
        A = self.apply.dense_by_lane(like) if isinstance(self.apply, Linearization) else None
        if A is not None:
            return A
        n = like.shape[-1]
        basis = torch.eye(n, dtype=like.dtype, device=like.device)
        # The lane is moved afterwards: out_dims=-1 returns garbage for a product that does not depend on e.
        return vmap(lambda e: self.apply(e.expand_as(like)))(basis).movedim(0, -1)


class Late:
    """A product that is linearized when it is first asked for, since most linear solvers never do."""

    def __init__(self, make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
        self._make = make
        self._made: Callable[[Tensor], Tensor] | None = None

    def __call__(self, y: Tensor) -> Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made(y)
