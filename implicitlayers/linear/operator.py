"""Linear operators, matrix-free first: a product is all that is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

__all__ = ["Operator"]


@dataclass(frozen=True)
class Operator:
    """A square linear map on every lane, y ``[*lanes, n]`` ↦ A y ``[*lanes, n]``.

    Attributes:
        apply: the product.
        symmetric: whether A = Aᵀ is known.
        minimizing: whether A is the curvature of a problem that is being minimized, so that a solver must not take an
            indefinite A for granted: the solution would lead to a saddle.
    """

    apply: Callable[[Tensor], Tensor]
    symmetric: bool
    minimizing: bool = False

    def __call__(self, y: Tensor) -> Tensor:
        """A y."""
        return self.apply(y)

    def dense(self, like: Tensor) -> Tensor:
        """The matrices ``[*lanes, n, n]``, from n products done at once; `like` is any ``[*lanes, n]``."""
        n = like.shape[-1]
        basis = torch.eye(n, dtype=like.dtype, device=like.device)
        # The lane is moved afterwards: out_dims=-1 returns garbage for a product that does not depend on e.
        return vmap(lambda e: self.apply(e.expand_as(like)))(basis).movedim(0, -1)
