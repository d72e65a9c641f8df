"""Trees of tensors as vectors: what finite differences and dot products need of them, and nothing more."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "Floating", "flat", "generator", "inner", "largest", "normal_like", "reached", "resolution",
    "seed_of",
]  # fmt: skip


@dataclass(frozen=True)
class Floating:
    """The floating tensors of a tree, taken out; everything else stays in place.

    Attributes:
        leaves: the floating tensors, in the order of the tree.
        paths: how each is reached, as a suffix such as ``['w'][0]``.
        where: their positions among all leaves.
        tree: what they were taken out of.
    """

    leaves: list[Tensor]
    paths: list[str]
    where: list[int]
    tree: Any

    @classmethod
    def of(cls, tree: Any, what: str, chosen: Callable[[str, Tensor], bool] = lambda path, leaf: True) -> Floating:
        """Take the floating tensors out of `tree`, or those of them that are `chosen` by how they are reached.

        `what` names the tree in errors.
        """
        found = [
            (i, path, leaf)
            for i, (path, leaf) in enumerate(reached(tree))
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) and chosen(path, leaf)
        ]
        for _, path, leaf in found:
            if leaf.is_complex():
                raise TypeError(
                    f"{what}{path} is complex, and directional derivatives are taken of real tensors; let the layer "
                    "take and return torch.view_as_real(...) of it."
                )
            if leaf.layout != torch.strided:
                raise TypeError(
                    f"{what}{path} is sparse ({leaf.layout}), and directional derivatives are taken of full tensors: "
                    "let the layer take and return its values(), or .to_dense(). A sparse constant is left alone where "
                    "those inputs require a gradient that are to be tested."
                )
        if not found:
            raise TypeError(f"{what} holds no floating tensor ({tree!r}), so it has no derivative; pass at least one.")
        where, paths, leaves = (list(column) for column in zip(*found, strict=True))
        return cls(leaves, paths, where, tree)

    def put(self, leaves: Sequence[Any]) -> Any:
        """The tree with other leaves in the place of those taken out."""
        old, spec = pytree.tree_flatten(self.tree)
        for position, leaf in zip(self.where, leaves, strict=True):
            old[position] = leaf
        return pytree.tree_unflatten(old, spec)

    def moved(self, step: float, direction: Sequence[Tensor]) -> Any:
        """The tree at leaves + step·direction."""
        return self.put([x + step * d for x, d in zip(self.leaves, direction, strict=True)])


def reached(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree, each with how it is reached: by its number in a node that gives its children no names."""

    def below(node: Any) -> bool:
        return node is not tree

    children, spec = pytree.tree_flatten(tree, is_leaf=below)
    if spec.is_leaf():
        yield path, tree
        return
    try:
        steps = [pytree.keystr(step) for step, _ in pytree.tree_flatten_with_path(tree, is_leaf=below)[0]]
    except ValueError:  # Nodes may be registered without names.
        steps = [f"[{i}]" for i in range(len(children))]
    for step, child in zip(steps, children, strict=True):
        yield from reached(child, path + step)


def flat(leaves: Sequence[Tensor]) -> Tensor:
    """All leaves as one float64 vector on the CPU, without a graph."""
    return torch.cat([leaf.detach().cpu().double().reshape(-1) for leaf in leaves])


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """⟨a, b⟩ over all leaves, accumulated in float64."""
    return float(torch.dot(flat(a), flat(b)))


def largest(leaves: Sequence[Tensor]) -> float:
    """Largest magnitude of any entry; 0 for empty leaves."""
    vector = flat(leaves)
    return float(vector.abs().amax()) if len(vector) else 0.0


def generator(seed: int) -> torch.Generator:
    """A source of random numbers of its own, so that no check depends on what ran before it."""
    return torch.Generator().manual_seed(seed)


def seed_of(tree: Any) -> int:
    """A seed that follows from the numbers of a tree, so that an example keeps its own while others come and go."""
    numbers = [t.detach().to_dense().tolist() for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
    return zlib.crc32(repr(numbers).encode())


def normal_like(leaves: Sequence[Tensor], source: torch.Generator) -> list[Tensor]:
    """Standard normal tensors of the same shapes, types and devices."""
    return [torch.randn(x.shape, generator=source, dtype=torch.float64).to(x) for x in leaves]


def resolution(leaves: Sequence[Tensor]) -> float:
    """The coarsest machine epsilon among the leaves."""
    return max(torch.finfo(leaf.dtype).eps for leaf in leaves)
