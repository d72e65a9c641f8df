"""The layer under test, as a function of a list of tensors, and its derivatives by the routes PyTorch has.

Everything is contracted with one cotangent v and directions, so that each route ends in numbers that a difference
quotient of ⟨v, f⟩ has to match. The plain tape is used where it can be: layers of other libraries often know nothing of
torch.func.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.autograd.forward_ad as dual
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.utils import _pytree as pytree

from implicitlayers.status import Solution
from implicitlayers.testing.quotients import negligible
from implicitlayers.testing.recorded import Leaves, Recorded, fresh, pair, pulled
from implicitlayers.testing.vectors import Floating, largest, resolution

__all__ = ["Subject", "copied"]

LANES = (1.0, 1.0 + 1 / 32)
"""What the inputs are multiplied by to make lanes of them: positive definite, sparse or symmetric stays what it is."""

AGAIN = 16
"""How often a layer is evaluated anew before its numbers count as those of a function, and as wrong."""


@dataclass(frozen=True)
class Subject:
    """A layer at a point.

    Attributes:
        function: tree of inputs to anything; the tree is (parameters, state of a module that stays as it is,
            arguments).
        inputs: where, with the tensors that are differentiated taken out.
        names: what these tensors are called in a report.
    """

    function: Callable[[Any], Any]
    inputs: Floating
    names: list[str]

    @classmethod
    def of(cls, layer: Callable[..., Any], inputs: Sequence[Any]) -> Subject:
        """A layer at its inputs; the parameters of a module are inputs as well."""
        if not callable(layer):
            raise TypeError(f"layer is {layer!r}, which cannot be called; pass a function of tensors or an nn.Module.")
        parameters: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        if isinstance(layer, nn.Module):
            state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
            parameters = {name: t for name, t in state.items() if isinstance(t, nn.Parameter) and t.requires_grad}
            state = {name: t for name, t in state.items() if name not in parameters}
        # A module's own parameters require a gradient and must not hide that the inputs do not.
        some = any(t.requires_grad for t in pytree.tree_leaves(tuple(inputs)) if isinstance(t, Tensor))

        def function(tree: Any) -> Any:
            learned, kept, arguments = tree
            if isinstance(layer, nn.Module):
                return functional_call(layer, {**learned, **kept}, arguments)
            return layer(*arguments)

        def chosen(path: str, leaf: Tensor) -> bool:
            return path.startswith("[0]") or (path.startswith("[2]") and (leaf.requires_grad or not some))

        taken = Floating.of((parameters, state, tuple(inputs)), "the inputs", chosen)
        names = [("parameter" if p.startswith("[0]") else "input") + p[3:] for p in taken.paths]
        return cls(function, taken, names)

    @functools.cached_property
    def leaves(self) -> list[Tensor]:
        """The point, without a graph."""
        return [own(leaf.detach()) for leaf in self.inputs.leaves]

    @functools.cached_property
    def here(self) -> Floating:
        """The output at the point, without a graph."""
        with torch.no_grad():
            return self.outputs(self.leaves)

    @functools.cached_property
    def recorded(self) -> Recorded:
        """The layer at the point, on the tape."""
        return Recorded.of(self.at, self.leaves)

    @functools.cached_property
    def scatter(self) -> tuple[float, float]:
        """How far a second evaluation is from the first, and the size of the values, of the output that differs most.

        Of a layer that draws random numbers the one is as large as the other.
        """
        return self.apart(lambda: self.recorded.values)

    def scatter_again(self) -> tuple[float, float]:
        """The same of several more evaluations, where two may have been equal by chance."""
        again = [self.apart(lambda: self.at(self.leaves)) for _ in range(AGAIN)]
        return max(again, key=relative)

    def apart(self, evaluated: Callable[[], Leaves]) -> tuple[float, float]:
        """How far another evaluation is from the first, and the size of the values."""
        try:
            with torch.no_grad():
                pairs = [*zip(self.here.leaves, evaluated(), strict=True)]
        except Exception:  # It says what it raises where it is asked for a gradient.
            return 0.0, 1.0
        both = [[t.double().nan_to_num() for t in pair] for pair in pairs]
        return max(((largest([a - b]), max(largest([a]), largest([b]))) for a, b in both), key=relative)

    def is_random(self, tol: float, scatter: tuple[float, float] | None = None) -> bool:
        """Whether its values change between two evaluations by more than rounding and what is negligible."""
        difference, size = self.scatter if scatter is None else scatter
        least = negligible(resolution([*self.leaves, *self.here.leaves]), tol)
        return difference > tol * max(size, least * max(self.natural(0), largest(self.leaves)))

    def natural(self, order: int) -> float:
        """What its derivatives of an order amount to, unless what they are made of cancels: values over powers of x.

        A value of zero may be what is left of numbers as large as x.
        """
        value = largest([value.nan_to_num() for value in self.here.leaves]) or largest(self.leaves)
        return value / max(largest(self.leaves), 2.0**-7) ** order

    @functools.cached_property
    def rows(self) -> list[Recorded]:
        """The layer at x and next to it, one after the other; twice at x where it is not defined next to it."""
        return self.rows_in(range(len(self.leaves)))

    def rows_in(self, which: Collection[int]) -> list[Recorded]:
        """The same, with some of the leaves moved and the others in place."""
        first = self.recorded

        def moved(factor: float) -> list[Tensor]:
            return [leaf * factor if i in which else leaf for i, leaf in enumerate(self.leaves)]

        try:
            rows = [first, *(Recorded.of(self.at, moved(factor)) for factor in LANES[1:])]
        except Exception:  # Layers have exceptions of their own for where they are not defined.
            rows = []
        inside = all(bool(torch.isfinite(value).all()) for row in rows for value in row.values)
        return rows if rows and inside else [first] * len(LANES)

    @functools.cached_property
    def lanes(self) -> list[Tensor]:
        """The points of the rows, as lanes; twice x where the layer cannot be recorded."""
        try:
            points = [row.given for row in self.rows]
        except Exception:  # It says what it raises where it is asked for a gradient.
            points = [self.leaves] * len(LANES)
        return [torch.stack([leaf.detach() for leaf in column]) for column in zip(*points, strict=True)]

    @functools.cached_property
    def mapped(self) -> Recorded:
        """The layer at all lanes under vmap."""
        return Recorded.of(lambda leaves: self.vmapped()(*leaves), self.lanes)

    def at(self, leaves: Leaves) -> list[Tensor]:
        """Floating tensors of the output."""
        return self.outputs(leaves).leaves

    def outputs(self, leaves: Leaves) -> Floating:
        """The output with its floating tensors taken out.

        A layer that differentiates its own input, such as a force from an energy, needs the tape for its value.
        """
        try:
            return self.evaluated(leaves)
        except Exception:  # A layer has exceptions of its own; if this is one, it comes again.
            if torch.is_grad_enabled():
                raise
        with torch.enable_grad():
            out = self.evaluated([fresh(leaf) for leaf in leaves])
        values = [value.detach() for value in out.leaves]
        return replace(out, leaves=values, tree=out.put(values))

    def evaluated(self, leaves: Leaves) -> Floating:
        """The output as it comes. A layer that changes what it is given changes copies."""
        out = self.function(copied(self.inputs.put(leaves)))
        return Floating.of(pytree.tree_map(answer, out, is_leaf=solved), "the layer's output")

    @property
    def batch_size(self) -> int:
        """First dimension of the first argument that has one; 0 where none has."""
        dimensions = (len(t) for t in pytree.tree_leaves(self.inputs.tree[2]) if isinstance(t, Tensor) and t.ndim)
        return next(dimensions, 0)

    def element(self, k: int) -> Subject:
        """The layer at the k-th element of the batch, as a batch of one.

        Every tensor of the arguments with the batch in its first dimension is cut, labels and frozen data as well; a
        number without dimensions and the parameters belong to all elements.
        """
        size = self.batch_size
        parameters, state, arguments = self.inputs.tree

        def cut(t: Any) -> Any:
            return t[k : k + 1] if isinstance(t, Tensor) and t.ndim and len(t) == size else t

        tree = (parameters, state, pytree.tree_map(cut, arguments))
        leaves = pytree.tree_leaves(tree)
        return replace(self, inputs=replace(self.inputs, leaves=[leaves[i] for i in self.inputs.where], tree=tree))

    def contracted(self, v: Leaves) -> Callable[[Leaves], Tensor]:
        """⟨v, f⟩ as a function of the leaves."""
        return lambda leaves: pair(self.at(leaves), v)

    def reverse(self, leaves: Leaves, v: Leaves, *, record: bool = False) -> list[Tensor | None]:
        """Jᵀ v by the tape; None for a leaf that no gradient reaches."""
        with torch.enable_grad():
            given = [leaf if record and leaf.requires_grad else fresh(leaf) for leaf in leaves]
            return pulled(self.at(given), given, v, record=record)

    def reverse_twice(self, leaves: Leaves, v: Leaves, w: Leaves) -> list[Tensor | None]:
        """∂/∂x ⟨Jᵀ v, w⟩ by the tape, through its own backward."""
        with torch.enable_grad():
            given = [fresh(leaf) for leaf in leaves]
            return pulled([pair(self.reverse(given, v, record=True), w)], given, None)

    def forward(self, leaves: Leaves, d: Sequence[Tensor | None]) -> list[Tensor]:
        """J d by dual numbers; by those of torch.func, which nest, where a layer differentiates inside.

        A leaf whose tangent is None is a constant.
        """

        def raw() -> list[Tensor]:
            with torch.no_grad(), dual.dual_level():
                pairs = zip(leaves, d, strict=True)
                given = [leaf if t is None else dual.make_dual(leaf, t) for leaf, t in pairs]
                return [tangent(o) for o in self.evaluated(given).leaves]

        def nested() -> list[Tensor]:
            varying = {i: t for i, t in enumerate(d) if t is not None}

            def function(*some: Tensor) -> tuple[Tensor, ...]:
                given = dict(zip(varying, some, strict=True))
                return tuple(self.evaluated([given.get(i, leaf) for i, leaf in enumerate(leaves)]).leaves)

            return list(jvp(function, tuple(leaves[i] for i in varying), tuple(varying.values()))[1])

        return first_of(raw, nested)

    def forward_of_reverse(self, leaves: Leaves, v: Leaves, d: Leaves) -> list[Tensor]:
        """∂/∂d of Jᵀ v by dual numbers through the tape; by those of torch.func as in `forward`."""

        def raw() -> list[Tensor]:
            with torch.enable_grad(), dual.dual_level():
                given = [dual.make_dual(fresh(leaf), t) for leaf, t in zip(leaves, d, strict=True)]
                first = pulled(self.at(given), given, v, record=True)
                zeros = [torch.zeros_like(leaf) for leaf in leaves]
                return [zero if g is None else tangent(g).detach() for g, zero in zip(first, zeros, strict=True)]

        def gradient(*given: Tensor) -> tuple[Tensor, ...]:
            return vjp(lambda *x: tuple(self.evaluated(x).leaves), *given)[1](tuple(v))

        return first_of(raw, lambda: list(jvp(gradient, tuple(leaves), tuple(d))[1]))

    def forward_twice(self, leaves: Leaves, w: Leaves, d: Leaves) -> list[Tensor]:
        """∂/∂d of J w, forward over forward by torch.func, which alone nests dual numbers."""

        def once(*given: Tensor) -> tuple[Tensor, ...]:
            return jvp(lambda *x: tuple(self.at(x)), given, tuple(w))[1]

        return list(jvp(once, tuple(leaves), tuple(d))[1])

    def vmapped(self, dimensions: Any = 0) -> Callable[..., tuple[Tensor, ...]]:
        """The layer over a dimension of all leaves, the leading one by default, or of each its own, or none."""
        return vmap(lambda *leaves: tuple(self.at(leaves)), in_dims=dimensions)

    def vmapped_reverse(self, lanes: Leaves, v: Leaves, *, record: bool = False) -> list[Tensor | None]:
        """Jᵀ v of all lanes, by the tape around vmap."""
        with torch.enable_grad():
            given = [leaf if record else fresh(leaf) for leaf in lanes]
            return pulled(list(self.vmapped()(*given)), given, v, record=record)

    def vmapped_reverse_twice(self, lanes: Leaves, v: Leaves, w: Leaves) -> list[Tensor | None]:
        """∂/∂x ⟨Jᵀ v, w⟩ of all lanes."""
        with torch.enable_grad():
            given = [fresh(leaf) for leaf in lanes]
            return pulled([pair(self.vmapped_reverse(given, v, record=True), w)], given, None)


def relative(scatter: tuple[float, float]) -> float:
    """A difference over the size of what differs."""
    return scatter[0] / max(scatter[1], 1e-300)


def own(t: Tensor) -> Tensor:
    """A copy with an entry of its own for every index: an expanded tensor has fewer, and cannot be changed in place."""
    return t.clone(memory_format=torch.contiguous_format) if t.layout == torch.strided else t.clone()


def copied(tree: Any) -> Any:
    """The tree with copies of its tensors, of which gradients still reach the originals."""

    def copy(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        # A contiguous copy has the lanes of vmap in front, and their place may be what a layer mistakes.
        return own(t) if t.layout == torch.strided and 0 in t.stride() else t.clone()

    return pytree.tree_map(copy, tree)


def solved(node: Any) -> bool:
    """Whether it is what this library's entry points return."""
    return isinstance(node, Solution)


def answer(node: Any) -> Any:
    """What is differentiable in a `Solution`; its status and stats report on it."""
    if not solved(node):
        return node
    return {"value": node.value} if node.aux is None else {"value": node.value, "aux": node.aux}


def first_of(way: Callable[[], list[Tensor]], other: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What one way returns, or the other where it raises; where both do, what the first raised."""
    try:
        return way()
    except Exception as error:  # Whatever a layer raises.
        try:
            return other()
        except Exception:
            raise error from None


def tangent(t: Tensor) -> Tensor:
    """The tangent of a dual tensor, zero where there is none."""
    found = dual.unpack_dual(t).tangent
    return torch.zeros_like(t) if found is None else found
