"""The derivatives of a layer, route by route, against difference quotients along random directions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from implicitlayers.testing.finite_difference import OUTSIDE
from implicitlayers.testing.quotients import NEGLIGIBLE, Oracle, Quotients, Vector, contract, filled, quotients, stack
from implicitlayers.testing.report import Comparison, judge
from implicitlayers.testing.subject import LANES, Subject
from implicitlayers.testing.vectors import flat, generator, largest, normal_like

__all__ = ["Comparing", "Mode"]

Mode = Literal["reverse", "forward", "vmap"]

ENTRIES = 24
"""Most entries of a leaf that are looked at one by one to find the worst."""

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
    """

    subject: Subject
    reference: Subject
    tol: float
    seed: int

    def run(self, modes: Sequence[Mode], order: int) -> tuple[Comparison, ...]:
        """Everything asked for. What fails alike for several leaves is said once."""
        if "vmap" in modes:
            # What is mapped is the gradient by the tape.
            modes = (*modes, "reverse")
        found = [*self.firsts(modes)]
        if order == 2:
            found += self.seconds(modes)
        if "vmap" in modes:
            found += self.lanes(order)
        return tuple({(c.what if not c.reason else c.reason): c for c in reversed(found)}.values())[::-1]

    @functools.cached_property
    def x(self) -> Vector:
        """Where the layer is examined."""
        return self.subject.leaves

    @functools.cached_property
    def v(self) -> Vector:
        """A random cotangent of the layer's outputs."""
        return normal_like(self.subject.at(self.x), generator(self.seed + 1))

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
        out = self.subject.outputs(self.x)
        return [f" of J d, output{path}" for path in out.paths], [leaf.shape for leaf in out.leaves]

    def only(self, i: int, d: Tensor) -> Vector:
        """A direction in one leaf alone, so that it does not hide behind a larger one."""
        return [d if i == j else torch.zeros_like(leaf) for j, leaf in enumerate(self.x)]

    def along(self, function: Callable[[Vector], Vector], i: int, d: Tensor, weights: Vector) -> Oracle:
        """Quotients of a function of the reference's leaves along a direction in one of them."""
        leaves = self.reference.leaves

        def moved(leaf: Vector) -> Vector:
            return function([*leaves[:i], *leaf, *leaves[i + 1 :]])

        arrow = [d.to(leaves[i])]
        return functools.cache(lambda ratio: quotients(moved, [leaves[i]], arrow, weights, 1, ratio, self.tol))

    @property
    def source(self) -> str:
        """What the oracle is called."""
        if self.reference is self.subject:
            return "finite differences"
        same = self.reference.function is self.subject.function
        return "finite differences " + ("in float64" if same else "of the reference")

    def firsts(self, modes: Sequence[Mode]) -> Iterator[Comparison]:
        """First derivatives, one direction for each leaf."""
        reverse = functools.cache(lambda: self.subject.reverse(self.x, self.v))
        for i, name in enumerate(self.subject.names):
            oracle = self.along(self.reference.at, i, self.d[i], self.v)
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
                    lambda i=i: flat(self.subject.forward(self.x, self.only(i, self.d[i]))).cpu(),
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
            oracle = self.along(self.first_derivative(by_tape), i, self.d[i], weights)
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

    def first_derivative(self, by_tape: bool) -> Callable[[Vector], Vector]:
        """Jᵀ v or J w of the reference, as a function of its leaves."""
        other = self.reference
        v, w = ([t.to(leaf) for t, leaf in zip(vs, ls, strict=True)] for vs, ls in self._cast())
        if not by_tape:
            return lambda leaves: other.forward(leaves, w)
        return lambda leaves: filled(other.reverse(leaves, v), leaves)

    def _cast(self) -> tuple[tuple[Vector, Vector], tuple[Vector, Vector]]:
        leaves = self.reference.leaves
        return (self.v, self.reference.at(leaves)), (self.w, leaves)

    def lanes(self, order: int) -> Iterator[Comparison]:
        """Values and gradients of two lanes under vmap, against a loop over them by routes compared elsewhere."""
        subject, x, count = self.subject, self.lane_points(), len(LANES)
        v = normal_like(stack([self.v] * count), generator(self.seed + 4))
        w = normal_like(x, generator(self.seed + 5))

        def row(vectors: Vector, k: int) -> Vector:
            return [t[k] for t in vectors]

        def gradient(k: int) -> Vector:
            return filled(subject.reverse(row(x, k), row(v, k)), row(x, k))

        def second(k: int) -> Vector:
            return filled(subject.reverse_twice(row(x, k), row(v, k), row(w, k)), row(x, k))

        outputs = [f"output{path}" for path in subject.outputs(self.x).paths]
        together: dict[str, tuple[Callable[[], Sequence[Tensor]], Callable[[int], Vector], list[str]]] = {
            "vmap, values": (lambda: subject.vmapped()(*x), lambda k: subject.at(row(x, k)), outputs),
            "reverse mode through vmap": (lambda: filled(subject.vmapped_reverse(x, v), x), gradient, subject.names),
        }
        if order == 2:
            twice = "reverse over reverse through vmap"
            together[twice] = (lambda: filled(subject.vmapped_reverse_twice(x, v, w), x), second, subject.names)
        for what, (vmapped, alone, names) in together.items():
            yield self.against_loop(what, vmapped, alone, names)

    def against_loop(
        self, what: str, vmapped: Callable[[], Sequence[Tensor]], alone: Callable[[int], Vector], names: list[str]
    ) -> Comparison:
        """Compare tensors ``[lanes, ...]`` with those of each lane alone."""
        with torch.no_grad():
            expected = stack([alone(k) for k in range(len(LANES))])
        sizes = [torch.full_like(lane, largest([lane.nan_to_num()])) for tensor in expected for lane in tensor]
        shapes = [lane.shape for tensor in expected for lane in tensor]
        where = [f" in lane {k} of {name}" for name in names for k in range(len(LANES))]
        scale = flat(sizes).cpu()
        scale = scale.clamp_min(NEGLIGIBLE * float(scale.max()))
        truth = flat(expected).cpu()
        oracle = Quotients(truth, torch.zeros_like(truth), scale, 0.0)
        entry = functools.partial(named, where, shapes)
        settled = self.settle(what, lambda: flat(list(vmapped())).cpu(), lambda _: oracle, entry)
        return replace(settled, oracle="a loop over the lanes")

    def lane_points(self) -> Vector:
        """Two points as lanes, x and one next to it; twice x itself where the layer is not defined next to it."""
        points = [[leaf * factor for leaf in self.x] for factor in LANES]
        try:
            with torch.no_grad():
                inside = all(bool(torch.isfinite(flat(self.subject.at(point))).all()) for point in points)
        except OUTSIDE:
            inside = False
        return stack(points if inside else [self.x] * len(LANES))

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
            name, message = what.partition(",")[0], str(error).strip().partition("\n")[0]
            reason = (
                f"{name} raised {type(error).__name__}: {message} (If the layer is not meant to have it, leave it out "
                "of `modes`.)"
            )
            return Comparison(what, source, "disagree", reason=reason)
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
            rows.append(
                self.along(self.reference.at, i, basis.reshape(leaf.shape), self.v)(FIRST).part(slice(-1, None))
            )
        expected, floor = (torch.cat([row[k] for row in rows]) for k in range(2))
        # A small entry is held to the size of the gradient that it is part of, as in a random direction.
        allowed = self.tol * max(float(row.scale[0]) for row in rows)
        found = torch.zeros_like(expected) if gradient is None else flat([gradient]).cpu()[chosen]
        excess = ((found - expected).abs() / (floor + allowed).clamp_min(1e-300)).nan_to_num(nan=torch.inf)
        excess = torch.where(torch.isfinite(expected), excess, 0.0)
        k = int(excess.argmax())
        return replace(
            comparison, entry=f"{self.subject.names[i]}{index(chosen[k], leaf.shape)} of Jᵀv", found=float(found[k]),
            expected=float(expected[k]), floor=float(floor[k]), allowed=allowed,
            reason="" if gradient is not None else "No gradient reaches this input.",
        )  # fmt: skip


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
