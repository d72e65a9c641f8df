"""The derivatives of a layer, route by route, against difference quotients along random directions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from implicitlayers.testing.finite_difference import reach
from implicitlayers.testing.lanes import MAPPED, lanes
from implicitlayers.testing.quotients import Oracle, Quotients, Setting, Vector, contract, filled, quotients
from implicitlayers.testing.report import LOOSE, RANDOM, Comparison, judge, left_out, named, remedy
from implicitlayers.testing.subject import Subject
from implicitlayers.testing.vectors import flat, generator, largest, normal_like
from implicitlayers.testing.worst_entry import worst_entry

__all__ = ["Comparing", "Mode", "functional"]

Mode = Literal["reverse", "forward", "vmap"]

SMALL = 100_000
"""Most numbers in the inputs of a layer that is evaluated at many points at once: it takes twenty times the memory."""

FIRST, SECOND_OPINION = (3.0, 1.0), (2.0, 2.0**-12)
"""Ratios of the steps, and the largest of them relative to the inputs. A disagreement is believed when differences with
other steps see it, too: much shorter ones, for a layer that changes within much less than the size of its inputs."""

SMOOTHLY = 1e-2
"""A relative difference below which it may be a loose solve, whose error is smooth, that finite differences see."""

OWN_ERROR = 32.0
"""How many times the error of a value, over the size of the inputs, the error of a derivative may be."""


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
        if self.subject.is_random(self.tol):
            return (draws(self.subject.scatter),)
        if "vmap" in modes:
            # What is mapped is the gradient by the tape.
            modes = (*modes, "reverse")
        found = [*lanes(self.subject, self.v, self.tol, self.seed, order, self.settle)] if "vmap" in modes else []
        # Where the layer maps, the oracle may map it as well; a second opinion never does.
        fast = any(c.what == MAPPED and c.verdict == "agree" for c in found)
        comparing = replace(self, mapping=fast and sum(leaf.numel() for leaf in self.x) <= SMALL)
        found = [*comparing.firsts(modes), *(comparing.seconds(modes) if order == 2 else []), *found]
        return functional(self.subject, found, self.tol)

    @functools.cached_property
    def x(self) -> Vector:
        """Where the layer is examined."""
        return self.subject.leaves

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The coarsest type of what goes in and comes out."""
        return max((t.dtype for t in (*self.x, *self.subject.here.leaves)), key=lambda dtype: torch.finfo(dtype).eps)

    @functools.cached_property
    def error(self) -> float:
        """How far the layer's own values are from the reference's, where that is the same layer in float64."""
        if self.reference.function is not self.subject.function:
            return 0.0
        pairs = zip(self.subject.here.leaves, self.reference.here.leaves, strict=True)
        return largest([(a.double() - b.double()).nan_to_num() for a, b in pairs])

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

        def of_steps(steps: tuple[float, float]) -> Quotients:
            together = many if self.mapping and steps == FIRST else None
            arrow = [d.to(leaves[i])]
            setting = Setting(*steps, self.tol, self.dtype)
            found = quotients(moved, together, [leaves[i]], arrow, weights, setting)
            return found.blurred(OWN_ERROR * self.error / reach([leaves[i]], arrow))

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
        # One cotangent for each output, so that none hides behind a larger one.
        reverse = [
            functools.cache(lambda k=k: self.subject.recorded.pull(self.cotangent(k))) for k in range(len(self.v))
        ]
        for i, name in enumerate(self.subject.names):
            oracle = self.values_along(i, self.d[i])
            if "reverse" in modes:

                def product(i: int = i) -> Tensor:
                    return torch.cat([contract([pulled()[i]], [self.d[i]], 1) for pulled in reverse])

                comparison = self.settle(
                    f"reverse mode, derivative in {name}",
                    product,
                    lambda steps, o=oracle: o(steps).part(self.contracted),
                    self.output_of,
                )
                yield self.localized(comparison, i, reverse)
            if "forward" in modes:
                comparison = self.settle(
                    f"forward mode, derivative in {name}",
                    # The others are constants, as they often are in use.
                    lambda i=i: flat(
                        self.subject.forward(self.x, [self.d[i] if i == j else None for j in range(len(self.x))])
                    ),
                    lambda steps, o=oracle: o(steps).part(slice(self.contracted.start)),
                    functools.partial(named, *self.outputs),
                )
                yield self.hinted(comparison)

    @property
    def contracted(self) -> slice:
        """Where the contractions with each output's cotangent are among the quotients of the values."""
        return slice(-len(self.v) - 1, -1)

    def cotangent(self, k: int) -> Vector:
        """The random cotangent of the k-th output alone."""
        return [v if j == k else torch.zeros_like(v) for j, v in enumerate(self.v)]

    def output_of(self, k: int) -> str:
        """Which contraction the k-th is."""
        return "along a random direction" + (f", output{self.subject.here.paths[k]}" if len(self.v) > 1 else "")

    def hinted(self, comparison: Comparison) -> Comparison:
        """With what a small difference may be: the solve's, not the derivative's."""
        small = comparison.difference <= SMOOTHLY * abs(comparison.expected)
        given = self.reference.function is not self.subject.function
        return replace(comparison, reason=LOOSE) if comparison.is_wrong and small and not given else comparison

    def seconds(self, modes: Sequence[Mode]) -> Iterator[Comparison]:
        """Second derivatives ⟨v, f''(x)[w, d]⟩, against differences of the layer's first ones."""
        if not {"reverse", "forward"} & set(modes):
            return
        by_tape = "reverse" in modes
        subject, x, v, w = self.subject, self.x, self.v, self.w
        weights = w if by_tape else v
        twice = functools.cache(lambda: subject.reverse_twice(x, v, w))
        for i, name in enumerate(subject.names):

            def along(d: Tensor, i: int = i) -> Oracle:
                oracle = self.along(*self.first_derivative(by_tape), i, d, weights)
                return lambda steps: oracle(steps).part(slice(-1, None))

            routes: dict[str, Callable[[Tensor], Tensor]] = {}
            if by_tape:
                routes["reverse over reverse"] = lambda d, i=i: contract([twice()[i]], [d], 1)
            if by_tape and "forward" in modes:
                routes["forward over reverse"] = lambda d, i=i: contract(
                    subject.forward_of_reverse(x, v, self.only(i, d)), w, 1
                )
            if "forward" in modes:
                routes["forward over forward"] = lambda d, i=i: contract(
                    subject.forward_twice(x, w, self.only(i, d)), v, 1
                )
            oracle = along(self.d[i])
            for route, product in routes.items():
                what = f"{route}, second derivative in {name}"
                found = self.settle(what, lambda p=product, i=i: p(self.d[i]), oracle, of="the first derivative")
                if found.is_wrong:
                    of = "⟨Jᵀv, w⟩" if by_tape else "⟨v, Jw⟩"
                    found = worst_entry(
                        found, name, x[i], lambda d, a=along: a(d)(FIRST), product, [f"the gradient of {of}"], self.tol
                    )
                yield found

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
        verdict, k = judge(found, q, self.tol)
        reason = ""
        if verdict != "agree":
            again = oracle(SECOND_OPINION)
            second, at = judge(found, again, self.tol)
            # What longer steps saw to be wrong is not right for being lost in the noise of shorter ones.
            if second == "agree" and not bool(q.contradicted(found, self.tol).any()):
                verdict, k, q = second, at, again
            elif verdict == "disagree" and second != "disagree":
                verdict, reason = "inconclusive", "Two quotients with different steps contradict each other. "
        if verdict == "inconclusive":
            reason += remedy(q, k, self.tol)
        numbers = (float(t[k]) for t in (found, q.expected, q.floor, self.tol * q.scale))
        return Comparison(what, source, verdict, entry(k), *numbers, reason=reason)

    def localized(
        self, comparison: Comparison, i: int, reverse: Sequence[Callable[[], Sequence[Tensor | None]]]
    ) -> Comparison:
        """The same disagreement at the worst single entry of Jᵀv that is looked at, if it is there."""
        if not comparison.is_wrong:
            return comparison
        gradients = [pulled()[i] for pulled in reverse]
        paths = [f", output{path}" for path in self.subject.here.paths] if len(self.v) > 1 else [""]
        at_entry = worst_entry(
            comparison, self.subject.names[i], self.x[i],
            lambda unit: self.values_along(i, unit)(FIRST).part(self.contracted),
            lambda unit: torch.cat([contract([g], [unit], 1) for g in gradients]),
            [f"Jᵀv{path}" for path in paths], self.tol,
        )  # fmt: skip
        if all(g is None for g in gradients):
            return replace(at_entry, reason="No gradient reaches this input.")
        return self.hinted(at_entry)


def functional(subject: Subject, found: Sequence[Comparison], tol: float) -> tuple[Comparison, ...]:
    """What was found, or, where something is wrong, that the layer is no function: it may have drawn the same twice."""
    if any(c.is_wrong for c in found):
        scatter = subject.scatter_again()
        if subject.is_random(tol, scatter):
            return (draws(scatter),)
    return tuple(found)


def draws(scatter: tuple[float, float]) -> Comparison:
    """That two evaluations differ."""
    difference, size = scatter
    reason = f"They differ by {difference:.1e}, and are of size {size:.1e}. {RANDOM}"
    return Comparison("values, evaluated again", "those of before", "inconclusive", reason=reason)
