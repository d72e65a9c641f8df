"""Groups of coordinates, each with its own norm or its own constraint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implicitlayers.flat import Structure, Tree
from implicitlayers.status import MisuseError

__all__ = ["Groups", "safe_norm"]


@dataclass(frozen=True)
class Groups:
    """How an unknown falls into groups: every leaf is one, or the vectors along one dimension of every leaf are.

    Attributes:
        structure: of the unknown.
        dim: the dimension along which a group runs; None if a leaf is a group.
    """

    structure: Structure
    dim: int | None

    @classmethod
    def of(cls, structure: Structure, dim: int | None, name: str) -> Groups:
        """The groups of an unknown; every leaf must have the dimension, and elements along it."""
        for path, shape in zip(structure.paths, structure.shapes, strict=True):
            if dim is not None and not -len(shape) <= dim < len(shape):
                raise MisuseError(
                    f"{name}(dim={dim}): {path} has shape {tuple(shape)} and no such dimension; pass one that every "
                    "leaf has, or dim=None, where a leaf is a group."
                )
            if (shape.numel() if dim is None else shape[dim]) == 0:
                raise MisuseError(
                    f"{name}: {path} has shape {tuple(shape)}, and a group without elements has neither norm nor "
                    "projection; leave the leaf out of the unknown."
                )
        return cls(structure, dim)

    @property
    def shapes(self) -> list[torch.Size]:
        """The shape of every leaf with one number a group left: what a strength or a radius may broadcast to."""
        if self.dim is None:
            return [torch.Size([1] * len(shape)) for shape in self.structure.shapes]
        full = [list(shape) for shape in self.structure.shapes]
        for shape in full:
            shape[self.dim] = 1
        return [torch.Size(shape) for shape in full]

    def broadcast(self, tree: Tree, name: str) -> Tensor:
        """Lay a strength or a radius out: 0-d where one number serves all, else one number a group."""
        return replace(self.structure, shapes=tuple(self.shapes)).broadcast(tree, name)

    def rows(self, x: Tensor) -> list[Tensor]:
        """The groups of ``x [n]`` as the rows of one matrix ``[groups, size]`` a leaf."""
        leaves = [p.reshape(s) for p, s in zip(x.split(self.structure.sizes), self.structure.shapes, strict=True)]
        if self.dim is None:
            return [leaf.reshape(1, leaf.numel()) for leaf in leaves]
        return [leaf.movedim(self.dim, -1).reshape(-1, leaf.shape[self.dim]) for leaf in leaves]

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """What `rows` came from, ``[n]``."""
        if self.dim is None:
            return torch.cat([r.reshape(-1) for r in rows])
        leaves = []
        for r, shape in zip(rows, self.structure.shapes, strict=True):
            moved = list(shape)
            moved.append(moved.pop(self.dim))
            leaves.append(r.reshape(moved).movedim(-1, self.dim))
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    def pieces(self, numbers: Tensor) -> list[Tensor]:
        """What `broadcast` returned, leaf by leaf, each to be multiplied with the rows."""
        shapes = self.shapes
        if numbers.ndim == 0:
            return [numbers] * len(shapes)
        return [piece.unsqueeze(-1) for piece in numbers.split([shape.numel() for shape in shapes])]


def safe_norm(rows: Tensor) -> Tensor:
    """Euclidean norm of every row, ``[groups, 1]``, that neither overflows nor underflows; its derivative at 0 is 0.

    Every row is divided by its largest entry. As the norm does not depend on what it is divided by, that entry may
    count as a constant in all derivatives.
    """
    largest = rows.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    squares = (rows / largest).square().sum(-1, keepdim=True)
    zero = squares == 0
    # The square root is sanitised at its input: its slope at 0 is infinite, and infinity times zero NaN.
    root = torch.where(zero, torch.ones_like(squares), squares).sqrt()
    return torch.where(zero, torch.zeros_like(squares), largest * root)
