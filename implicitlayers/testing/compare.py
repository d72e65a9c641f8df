"""The derivatives of a layer, route by route, against difference quotients along random directions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from implicitlayers.testing.quotients import Oracle, Quotients, Vector, contract, filled, negligible, quotients, stack
from implicitlayers.testing.report import DUAL, MAP, TAPE, Comparison, judge
from implicitlayers.testing.subject import Subject
from implicitlayers.testing.vectors import flat, generator, largest, normal_like, resolution

__all__ = ["Comparing", "Mode"]

Mode = Literal["reverse", "forward", "vmap"]

ENTRIES = 24
"""Most entries of a leaf that are looked at one by one to find the worst."""

MAPPED = "vmap, values"

SMALL = 100_000
"""Most numbers in the inputs of a layer that is evaluated at many points at once: it takes twenty times the memory."""

FIRST, SECOND_OPINION = 3.0, 2.0
"""Ratios of the steps. A disagreement is believed when differences with other steps see it, too."""


@dataclass(frozen=True, eq=False)
class Comparing:
    """One layer at one point: what is compared with what.

    Attributes:
        subject: the layer.
        reference: the function whose differences are believed.
        tol: relative tolerance.
        seed: of the random vectors.
        mapping: whether the points that a difference quotient needs are evaluated together, by vmap.
    """

    subject: Subject
    reference: Subject
    tol: float
    seed: int
    mapping: bool = False

    def run(self, modes: Sequence[Mode], order: int) -> tuple[Comparison, ...]:
        """Everything asked for."""
        if "vmap" in modes:
            # What is mapped is the gradient by the tape.
            modes = (*modes, "reverse")
        found = [*self.lanes(order)] if "vmap" in modes else []
        # Where the layer maps, the oracle may map it as well; a second opinion never does.
        fast = any(c.what == MAPPED and c.verdict == "agree" for c in found)
        comparing = replace(self, mapping=fast and sum(leaf.numel() for leaf in self.x) <= SMALL)
        found = [*comparing.firsts(modes), *(comparing.seconds(modes) if order == 2 else []), *found]
        return tuple(found)

    @functools.cached_property
    def x(self) -> Vector:
        """Where the layer is examined."""
        return self.subject.leaves

    @functools.cached_property
    def eps(self) -> float:
        """The coarsest machine epsilon of what goes in and comes out."""
        return resolution([*self.x, *self.subject.here.leaves])

    @functools.cached_property
    def v(self) -> Vector:
        """A random cotangent of the layer's outputs."""
        return normal_like(self.subject.here.leaves, generator(self.seed + 1))

    @functools.cached_property
    def w(self) -> Vector:
        """A second random direction of the inputs, for second derivatives."""
        return normal_like(self.x, generator(self.seed + 2))

    @functools.cached_property
    def d(self) -> Vector:
        """The random direction of the inputs along which derivatives are taken."""
        return normal_like(self.x, generator(self.seed + 3))

    @functools.cached_property
    def outputs(self) -> tuple[list[str], list[torch.Size]]:
        """Names and shapes of the output's tensors."""
        out = self.subject.here
        return [f" of J d, output{path}" for path in out.paths], [leaf.shape for leaf in out.leaves]

    def only(self, i: int, d: Tensor) -> Vector:
        """A direction in one leaf alone, so that it does not hide behind a larger one."""
        return [d if i == j else torch.zeros_like(leaf) for j, leaf in enumerate(self.x)]

    def along(
        self,
        function: Callable[[Vector], Vector],
        mapped: Callable[[Vector], Sequence[Tensor]],
        i: int,
        d: Tensor,
        weights: Vector,
    ) -> Oracle:
        """Quotients of a function of the reference's leaves, which `mapped` maps, along a direction in one of them."""
        leaves = self.reference.leaves

        def moved(leaf: Vector) -> Vector:
            return function([*leaves[:i], *leaf, *leaves[i + 1 :]])

        def many(leaf: Vector) -> Vector:
            others = [other.expand(len(leaf[0]), *other.shape) for other in leaves]
            return list(mapped([*others[:i], *leaf, *others[i + 1 :]]))

        def of_steps(ratio: float) -> Quotients:
            together = many if self.mapping and ratio == FIRST else None
            return quotients(moved, together, [leaves[i]], [d.to(leaves[i])], weights, ratio, self.tol, self.eps)

        return functools.cache(of_steps)

    def values_along(self, i: int, d: Tensor) -> Oracle:
        """Quotients of the reference itself."""
        return self.along(self.reference.at, lambda leaves: self.reference.vmapped()(*leaves), i, d, self.v)

    @property
    def source(self) -> str:
        """What the oracle is called."""
        if self.reference is self.subject:
            return "finite differences"
        same = self.reference.function is self.subject.function
        return "finite differences " + ("in float64" if same else "of the reference")

    def firsts(self, modes: Sequence[Mode]) -> Iterator[Comparison]:
        """First derivatives, one direction for each leaf."""
        reverse = functools.cache(lambda: self.subject.recorded.pull(self.v))
        for i, name in enumerate(self.subject.names):
            oracle = self.values_along(i, self.d[i])
            if "reverse" in modes:
                what = f"reverse mode, derivative in {name}"

                def product(i: int = i) -> Tensor:
                    return contract([reverse()[i]], [self.d[i]], 1)

                comparison = self.settle(what, product, lambda r, o=oracle: o(r).part(slice(-1, None)))
                if comparison.verdict == "disagree" and not comparison.reason:
                    comparison = self.localized(comparison, i, reverse()[i])
                yield comparison
            if "forward" in modes:
                yield self.settle(
                    f"forward mode, derivative in {name}",
                    lambda i=i: flat(self.subject.forward(self.x, self.only(i, self.d[i]))),
                    lambda r, o=oracle: o(r).part(slice(-1)),
                    functools.partial(named, *self.outputs),
                )

    def seconds(self, modes: Sequence[Mode]) -> Iterator[Comparison]:
        """Second derivatives ⟨v, f''(x)[w, d]⟩, against differences of the layer's first ones."""
        if not {"reverse", "forward"} & set(modes):
            return
        by_tape = "reverse" in modes
        subject, x, v, w = self.subject, self.x, self.v, self.w
        weights = w if by_tape else v
        twice = functools.cache(lambda: subject.reverse_twice(x, v, w))
        for i, name in enumerate(subject.names):
            d = self.only(i, self.d[i])
            oracle = self.along(*self.first_derivative(by_tape), i, self.d[i], weights)
            routes: dict[str, Callable[[], Tensor]] = {}
            if by_tape:
                routes["reverse over reverse"] = lambda i=i: contract([twice()[i]], [self.d[i]], 1)
            if by_tape and "forward" in modes:
                routes["forward over reverse"] = lambda d=d: contract(subject.forward_of_reverse(x, v, d), w, 1)
            if "forward" in modes:
                routes["forward over forward"] = lambda d=d: contract(subject.forward_twice(x, w, d), v, 1)
            for route, product in routes.items():
                what = f"{route}, second derivative in {name}"
                yield self.settle(
                    what, product, lambda r, o=oracle: o(r).part(slice(-1, None)), of="the first derivative"
                )

    def first_derivative(
        self, by_tape: bool
    ) -> tuple[Callable[[Vector], Vector], Callable[[Vector], Sequence[Tensor]]]:
        """Jᵀ v or J w of the reference, as a function of its leaves, and the same mapped."""
        other = self.reference
        v, w = ([t.to(leaf) for t, leaf in zip(vs, ls, strict=True)] for vs, ls in self._cast())

        def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
            return torch.func.jvp(lambda *x: tuple(other.at(x)), leaves, tuple(w))[1]

        def reverse(leaves: Vector) -> Vector:
            lanes = [t.expand(len(leaves[0]), *t.shape) for t in v]
            return filled(other.vmapped_reverse(leaves, lanes), leaves)

        if not by_tape:
            return lambda leaves: other.forward(leaves, w), lambda leaves: torch.vmap(forward)(*leaves)
        return lambda leaves: filled(other.reverse(leaves, v), leaves), reverse

    def _cast(self) -> tuple[tuple[Vector, Vector], tuple[Vector, Vector]]:
        leaves = self.reference.leaves
        return (self.v, self.reference.here.leaves), (self.w, leaves)

    def lanes(self, order: int) -> Iterator[Comparison]:
        """Values and gradients of two lanes under vmap, against a loop over them by routes compared elsewhere."""
        subject = self.subject
        x, count = subject.lanes, len(subject.lanes[0])
        v = normal_like(stack([self.v] * count), generator(self.seed + 4))
        w = normal_like(x, generator(self.seed + 5))

        def row(vectors: Vector, k: int) -> Vector:
            return [t[k] for t in vectors]

        def gradient(k: int) -> Vector:
            return filled(subject.rows[k].pull(row(v, k)), row(x, k))

        def second(k: int) -> Vector:
            return filled(subject.reverse_twice(row(x, k), row(v, k), row(w, k)), row(x, k))

        outputs = [f"output{path}" for path in subject.here.paths]
        together: dict[str, tuple[Callable[[], Sequence[Tensor]], Callable[[int], Vector], list[str]]] = {
            MAPPED: (lambda: subject.mapped.values, lambda k: subject.rows[k].values, outputs),
            "reverse mode through vmap": (lambda: filled(subject.mapped.pull(v), x), gradient, subject.names),
        }
        if order == 2:
            twice = "reverse over reverse through vmap"
            together[twice] = (lambda: filled(subject.vmapped_reverse_twice(x, v, w), x), second, subject.names)
        # A derivative is of the size of a value over that of the inputs, unless what it is made of cancels.
        natural = largest([value.nan_to_num() for value in subject.here.leaves])
        for what, (vmapped, alone, names) in together.items():
            yield self.against_loop(what, vmapped, alone, names, natural)
            natural /= max(largest(self.x), 2.0**-7)

    def against_loop(
        self,
        what: str,
        vmapped: Callable[[], Sequence[Tensor]],
        alone: Callable[[int], Vector],
        names: list[str],
        natural: float,
    ) -> Comparison:
        """Compare tensors ``[lanes, ...]`` with those of each lane alone; `natural` is the size of such numbers."""
        try:
            expected = stack([alone(k) for k in range(len(self.subject.lanes[0]))])
        except Exception as error:  # As in `settle`: the loop needs the tape.
            return Comparison.raised(what, "a loop over the lanes", left_out(what.replace(" through vmap", "")), error)
        sizes = [torch.full_like(lane, largest([lane.nan_to_num()])) for tensor in expected for lane in tensor]
        shapes = [lane.shape for tensor in expected for lane in tensor]
        where = [f" in lane {k} of {name}" for name in names for k in range(len(self.subject.lanes[0]))]
        scale = flat(sizes)
        scale = scale.clamp_min(negligible(self.eps, self.tol) * max(float(scale.max()), natural))
        truth = flat(expected)
        oracle = Quotients(truth, torch.zeros_like(truth), scale, 0.0)
        entry = functools.partial(named, where, shapes)
        settled = self.settle(what, lambda: flat(list(vmapped())), lambda _: oracle, entry)
        return replace(settled, oracle="a loop over the lanes")

    def settle(
        self,
        what: str,
        product: Callable[[], Tensor],
        oracle: Oracle,
        entry: Callable[[int], str] = lambda k: "along a random direction",
        of: str = "",
    ) -> Comparison:
        """Compare; ask for a second opinion before saying "disagree"."""
        source = self.source + (f" of {of}" if of else "")
        try:
            found = product()
        except Exception as error:  # Whatever a layer raises here is a finding about the layer.
            return Comparison.raised(what, source, left_out(what), error)
        q = oracle(FIRST)
        verdict, k = judge(found, q.expected, q.floor, scale=q.scale, natural=q.natural, tol=self.tol)
        reason = ""
        if verdict == "disagree":
            again = oracle(SECOND_OPINION)
            if judge(found, *again[:2], scale=again.scale, natural=again.natural, tol=self.tol)[0] != "disagree":
                verdict, reason = (
                    "inconclusive",
                    "Two difference quotients with different steps contradict each other. ",
                )
        if verdict == "inconclusive":
            reason += remedy(float(q.floor[k]), float(q.scale[k]), self.tol)
        numbers = (float(t[k]) for t in (found, q.expected, q.floor, self.tol * q.scale))
        return Comparison(what, source, verdict, entry(k), *numbers, reason=reason)

    def localized(self, comparison: Comparison, i: int, gradient: Tensor | None) -> Comparison:
        """The same disagreement at the worst single entry of Jᵀv."""
        leaf = self.x[i]
        chosen = torch.linspace(0, leaf.numel() - 1, min(leaf.numel(), ENTRIES)).round().long().tolist()
        rows = []
        for j in chosen:
            basis = torch.zeros_like(leaf).reshape(-1)
            basis[j] = 1
            rows.append(self.values_along(i, basis.reshape(leaf.shape))(FIRST).part(slice(-1, None)))
        expected, floor = (torch.cat([row[k] for row in rows]) for k in range(2))
        # A small entry is held to the size of the gradient that it is part of, as in a random direction.
        allowed = self.tol * max(float(row.scale[0]) for row in rows)
        found = torch.zeros_like(expected) if gradient is None else flat([gradient])[chosen]
        excess = ((found - expected).abs() / (floor + allowed).clamp_min(1e-300)).nan_to_num(nan=torch.inf)
        excess = torch.where(torch.isfinite(expected), excess, 0.0)
        k = int(excess.argmax())
        return replace(
            comparison, entry=f"{self.subject.names[i]}{index(chosen[k], leaf.shape)} of Jᵀv", found=float(found[k]),
            expected=float(expected[k]), floor=float(floor[k]), allowed=allowed,
            reason="" if gradient is not None else "No gradient reaches this input.",
        )  # fmt: skip


def left_out(what: str) -> str:
    """How not to ask for a derivative."""
    if "vmap" in what or "forward" in what:
        return MAP if "vmap" in what else DUAL
    return "pass order=1" if " over " in what else TAPE


def named(names: Sequence[str], shapes: Sequence[torch.Size], k: int) -> str:
    """Where the k-th number of some tensors is."""
    for name, shape in zip(names, shapes, strict=True):
        if k < shape.numel():
            return f"entry {index(k, shape)}{name}"
        k -= shape.numel()
    raise IndexError(k)


def index(k: int, shape: torch.Size) -> str:
    """Where the k-th entry of a tensor is."""
    return str([int(i) for i in torch.unravel_index(torch.tensor(k), shape)]) if shape else ""


def remedy(floor: float, scale: float, tol: float) -> str:
    """What to do about an oracle that cannot see."""
    if floor == float("inf"):
        return "No difference quotient could be formed: the layer is not defined, or not finite, on both sides of x."
    return (
        f"Differences of the layer are good to {floor:.1e} only, against a derivative of size {scale:.1e}: its values "
        "scatter, or are not smooth near x. Solve more tightly (rtol, atol, max_steps) or in float64, move away from a "
        f"kink, pass a tighter function as `reference`, or a `tol` above {tol:.0e}."
    )
