"""Pytrees and flat vectors: the only module that knows how a nested unknown is laid out in memory.

Solvers see one vector per lane, ``[*lanes, n]``. Users see the tree they passed. A `Structure` is the bridge: it is
made once from ``x0`` and holds no tensor, so that it can live in a closure under every transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitlayers.status import MisuseError

__all__ = ["Structure", "Tree", "check_dense", "flatten_tensors", "join_tensors"]

Tree = Any
"""A tensor, or any nesting of dicts, lists, tuples and named tuples with tensors at the leaves."""


@dataclass(frozen=True)
class Structure:
    """How the leaves of one pytree lie in a flat vector of length `n`."""

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    paths: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def sizes(self) -> list[int]:
        """Number of elements of every leaf."""
        return [shape.numel() for shape in self.shapes]

    @property
    def n(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    @classmethod
    def of(cls, tree: Tree, name: str = "x0") -> Structure:
        """Describe `tree`, all of whose leaves must be real floating tensors of one dtype and device."""
        keyed, spec = pytree.tree_flatten_with_path(tree)
        paths = tuple(name + pytree.keystr(path) for path, _ in keyed)
        leaves = [leaf for _, leaf in keyed]
        if not leaves:
            raise MisuseError(
                f"{name} has no leaves ({tree!r}), so there is nothing to solve for; pass a tensor or a tree of them."
            )
        for path, leaf in zip(paths, leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise MisuseError(
                    f"{path} is a {type(leaf).__name__}, not a tensor; pass torch.tensor(...) of a floating dtype."
                )
            if not leaf.is_floating_point():
                hint = (
                    "solve for real and imaginary parts"
                    if leaf.is_complex()
                    else "convert it with .double() or .float(), or hand it over as a param"
                )
                raise MisuseError(
                    f"{path} has dtype {leaf.dtype}, and only floating tensors can be solved for; {hint}."
                )
            if leaf.dtype in (torch.float16, torch.bfloat16):
                raise MisuseError(
                    f"{path} has dtype {leaf.dtype}, too coarse for a solution; solve in float32 or float64 "
                    "(x0.float()) and convert the result."
                )
        first = leaves[0]
        for path, leaf in zip(paths, leaves, strict=True):
            if leaf.dtype != first.dtype or leaf.device != first.device:
                raise MisuseError(
                    f"{path} is {leaf.dtype} on {leaf.device}, but {paths[0]} is {first.dtype} on {first.device}; "
                    "all leaves of the unknown need one dtype and one device."
                )
        for path, leaf in zip(paths, leaves, strict=True):
            check_dense(path, leaf)
        shapes = tuple(leaf.shape for leaf in leaves)
        if sum(shape.numel() for shape in shapes) == 0:
            raise MisuseError(
                f"{name} has no elements (shapes {[tuple(s) for s in shapes]}), so there is nothing to solve for."
            )
        return cls(spec, shapes, paths, first.dtype, first.device)

    def flatten(self, tree: Tree, name: str) -> Tensor:
        """Lay `tree`, which must have this structure, out as one vector ``[n]``."""
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise MisuseError(
                f"{name} has the structure {spec}, but the unknown has {self.spec}; both must be the same tree."
            )
        for path, leaf, shape in zip(self.paths, leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                given = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise MisuseError(
                    f"the leaf of {name} at {path} is {given}, but the unknown's has shape {tuple(shape)}."
                )
        return self._join([leaf.to(self.dtype) for leaf in leaves])

    def broadcast(self, tree: Tree, name: str) -> Tensor:
        """Lay a strength out: a scalar stays 0-d; scalars per leaf and elementwise weights become a vector ``[n]``."""
        options = {"dtype": self.dtype, "device": self.device}
        if isinstance(tree, (int, float)):
            # Filled where it lies; torch.tensor would lay it out on the host, and the copy to a device is waited for.
            return torch.full((), float(tree), **options)
        if isinstance(tree, Tensor) and tree.ndim == 0:
            return tree.to(self.dtype)
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise MisuseError(
                f"{name} has the structure {spec}, but the unknown has {self.spec}; pass a number, a 0-d tensor, "
                "or a tree like the unknown with a number or a tensor for every leaf."
            )
        wide = []
        for path, leaf, shape in zip(self.paths, leaves, self.shapes, strict=True):
            if not isinstance(leaf, (Tensor, int, float)) or (isinstance(leaf, Tensor) and leaf.is_complex()):
                raise MisuseError(f"{name} at {path} is {leaf!r}; pass a real number or a real tensor.")
            leaf = leaf.to(self.dtype) if isinstance(leaf, Tensor) else torch.full((), float(leaf), **options)
            if leaf.ndim > len(shape) or any(
                have not in (1, want) for have, want in zip(reversed(leaf.shape), reversed(shape), strict=False)
            ):
                raise MisuseError(
                    f"{name} at {path} has shape {tuple(leaf.shape)}, which does not broadcast to {tuple(shape)}."
                )
            wide.append(leaf.expand(shape))
        return self._join(wide)

    def unflatten(self, vector: Tensor) -> Tree:
        """Turn one lane's vector ``[n]`` back into the tree."""
        if len(self.shapes) == 1:
            return pytree.tree_unflatten([vector.reshape(self.shapes[0])], self.spec)
        pieces = vector.split(self.sizes)
        return pytree.tree_unflatten(
            [p.reshape(shape) for p, shape in zip(pieces, self.shapes, strict=True)], self.spec
        )

    def _join(self, leaves: list[Tensor]) -> Tensor:
        # Not reshape(-1), whose length is anyone's guess where a vmap has no lanes.
        vectors = [leaf.reshape(leaf.numel()) for leaf in leaves]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


@dataclass(frozen=True)
class Skeleton:
    """What is left of a tree when its tensors are taken out: everything that is not a tensor, in place."""

    spec: pytree.TreeSpec
    others: tuple[Any, ...]
    is_tensor: tuple[bool, ...]


def flatten_tensors(tree: Tree) -> tuple[list[Tensor], Skeleton]:
    """Take the tensors out of a tree; numbers, modules, strings and None stay in the skeleton."""
    leaves, spec = pytree.tree_flatten(tree)
    is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
    for leaf, here in zip(leaves, is_tensor, strict=True):
        if here:
            check_dense("a param", leaf)
    others = tuple(None if here else leaf for leaf, here in zip(leaves, is_tensor, strict=True))
    return [leaf for leaf, here in zip(leaves, is_tensor, strict=True) if here], Skeleton(spec, others, is_tensor)


def check_dense(name: str, t: Tensor) -> None:
    """Raise `MisuseError` unless `t` has values, one for every index."""
    if t.layout != torch.strided:
        raise MisuseError(
            f"{name} is a sparse tensor ({t.layout}), which transforms cannot handle; pass the tensor of its values "
            "and assemble it inside the function, or capture it if it needs no derivative."
        )
    if t.is_meta:
        raise MisuseError(f"{name} lies on the meta device and has no values; nothing can be solved with it.")


def join_tensors(tensors: list[Tensor] | tuple[Tensor, ...], skeleton: Skeleton) -> Tree:
    """Put tensors back where `flatten_tensors` took them out."""
    supply = iter(tensors)
    leaves = [next(supply) if here else other for other, here in zip(skeleton.others, skeleton.is_tensor, strict=True)]
    return pytree.tree_unflatten(leaves, skeleton.spec)
