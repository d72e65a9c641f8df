"""The derivatives of a layer, route by route, against difference quotients along random directions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from implicitlayers.testing.finite_difference import OUTSIDE
from implicitlayers.testing.quotients import Oracle, Quotients, Vector, contract, filled, quotients, stack
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
        found = [*self.firsts(modes)]
        if order == 2:
            found += self.seconds(modes)
        if "vmap" in modes:
            found += self.lanes(order)
        return tuple({(c.what if not c.reason else c.reason): c for c in reversed(found)}.values())[::-1]

    @functools.cached_property
    def x(self) -> Vector:
        return self.subject.leaves

    @functools.cached_property
    def v(self) -> Vector:
        return normal_like(self.subject.at(self.x), generator(self.seed + 1))

    @functools.cached_property
    def w(self) -> Vector:
        return normal_like(self.x, generator(self.seed + 2))

    @functools.cached_property
    def d(self) -> Vector:
        return normal_like(self.x, generator(self.seed + 3))

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
                    lambda k: self.output_entry(k),
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
        """Values and derivatives of two lanes under vmap, against a loop over them."""
        x, count = self.lane_points(), len(LANES)
        v = normal_like(stack([self.v] * count), generator(self.seed + 4))
        w, d = (normal_like(x, generator(self.seed + k)) for k in (5, 6))
        points = [leaf.to(like) for leaf, like in zip(x, self.reference.leaves, strict=True)]
        arrow = [t.to(leaf) for t, leaf in zip(d, points, strict=True)]
        each = [t.to(o) for t, o in zip(v, self.reference.at(self.reference.leaves), strict=True)]

        def lane(k: int) -> str:
            return f"lane {k} of {count}"

        def one_by_one(leaves: Vector) -> Vector:
            return stack([self.reference.at([leaf[k] for leaf in leaves]) for k in range(count)])

        def gradients(leaves: Vector) -> Vector:
            rows = [([leaf[k] for leaf in leaves], [t[k] for t in each]) for k in range(count)]
            return stack([filled(self.reference.reverse(row, cotangent), row) for row, cotangent in rows])

        def oracle(function: Callable[[Vector], Vector], weights: Vector) -> Oracle:
            return lambda r: quotients(function, points, arrow, weights, count, r, self.tol).part(slice(-count, None))

        def values(_: float) -> Quotients:
            expected = flat(one_by_one(points)).cpu()
            scale = torch.full_like(expected, largest([expected.nan_to_num()]))
            return Quotients(expected, torch.zeros_like(expected), scale, 0.0)

        yield replace(
            self.settle("vmap, values", lambda: flat(list(self.subject.vmapped()(*x))).cpu(), values, self.lane_entry),
            oracle="a loop over the lanes",
        )
        yield self.settle(
            "reverse mode through vmap",
            lambda: contract(self.subject.vmapped_reverse(x, v), d, count),
            oracle(one_by_one, v), lane,
        )  # fmt: skip
        if order == 2:
            yield self.settle(
                "reverse over reverse through vmap",
                lambda: contract(self.subject.vmapped_reverse_twice(x, v, w), d, count),
                oracle(gradients, w), lane, of="the first derivative",
            )  # fmt: skip

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
        worst = replace(comparison, reason="" if gradient is not None else "No gradient reaches this input.")
        excess = 0.0
        for j in chosen:
            basis = torch.zeros_like(leaf).reshape(-1)
            basis[j] = 1
            q = self.along(self.reference.at, i, basis.reshape(leaf.shape), self.v)(FIRST).part(slice(-1, None))
            found = 0.0 if gradient is None else float(gradient.reshape(-1)[j])
            expected, floor, allowed = float(q.expected[0]), float(q.floor[0]), self.tol * float(q.scale[0])
            here = abs(found - expected) / max(floor + allowed, 1e-300)
            if here > excess or found != found:
                excess = here
                entry = f"{self.subject.names[i]}{index(j, leaf.shape)} of Jᵀv"
                worst = replace(worst, entry=entry, found=found, expected=expected, floor=floor, allowed=allowed)
        return worst

    def output_entry(self, k: int) -> str:
        """Name of the k-th number of the output."""
        out = self.subject.outputs(self.x)
        for path, leaf in zip(out.paths, out.leaves, strict=True):
            if k < leaf.numel():
                return f"output{path}{index(k, leaf.shape)} of J d"
            k -= leaf.numel()
        raise IndexError(k)

    def lane_entry(self, k: int) -> str:
        """Name of the k-th number of the outputs of all lanes."""
        out = self.subject.outputs(self.x)
        for path, leaf in zip(out.paths, out.leaves, strict=True):
            if k < len(LANES) * leaf.numel():
                lane, within = divmod(k, leaf.numel())
                return f"output{path}{index(within, leaf.shape)} in lane {lane}"
            k -= len(LANES) * leaf.numel()
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
