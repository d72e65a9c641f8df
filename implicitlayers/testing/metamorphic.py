"""What is true of every differentiable layer, whatever it computes: properties that need no oracle.

Each function returns comparisons in which one thing the layer said is held against another thing it said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from implicitlayers.status import MisuseError
from implicitlayers.testing.quotients import Quotients, contract, filled, negligible
from implicitlayers.testing.recorded import Recorded, fresh, pulled
from implicitlayers.testing.report import DUAL, MAP, TAPE, Comparison, judge
from implicitlayers.testing.subject import Subject
from implicitlayers.testing.vectors import Floating, flat, generator, largest, normal_like, resolution

__all__ = [
    "cancelled", "equal", "error_falls", "forward_is_reverse", "independent_of_start", "lanes_are_independent",
    "lanes_permute", "linear_in_cotangent", "second_derivative_is_symmetric", "tiny_factor",
]  # fmt: skip

Tensors = Sequence[Tensor]


SMALL = "A backward that squares its cotangent, or solves to an absolute tolerance, loses small ones."

CHANGING = "Either the backward changes what it has saved, or the layer draws random numbers."

ROUNDING = 1e-6
"""A number of unknown origin that is smaller counts as what is left of larger ones that cancelled."""


def equal(
    what: str,
    oracle: str,
    found: Tensors,
    expected: Tensors,
    tol: float,
    scale: float | None = None,
    least: float = ROUNDING,
) -> Comparison:
    """Whether two lists of tensors are equal up to tol times the largest entry of each tensor, or times `scale`.

    A tensor of numbers below `least` is held to that size.
    """
    sizes = [torch.full_like(e.double(), largest([e.nan_to_num()]) if scale is None else scale) for e in expected]
    sizes = [size.clamp_min(least) for size in sizes]
    a, b, s = flat(found), flat(expected), flat(sizes)
    if not len(b) and not len(a):
        return Comparison(what, oracle, "agree", "nothing to compare")
    verdict, k = judge(a, Quotients.exact(b, s), tol)
    return Comparison(what, oracle, verdict, f"entry {k}", float(a[k]), float(b[k]), 0.0, tol * float(s[k]))


def cancelled(subject: Subject, order: int, tol: float, numbers: Tensors = ()) -> float:
    """The size below which derivatives of an order are left of larger ones that cancelled, such as these `numbers`."""
    largest_of_all = max([largest([t.nan_to_num()]) for t in numbers], default=0.0)
    resolved = resolution([*subject.leaves, *subject.here.leaves])
    return negligible(resolved, tol) * max(subject.natural(order), largest_of_all)


def attempted(what: str, compare: Callable[[], Comparison], without: str = "") -> Comparison:
    """The comparison, or the error that the layer answered with; `without` is how not to ask for it."""
    try:
        return compare()
    except Exception as error:  # Whatever a layer raises here is a finding about the layer.
        return Comparison.raised(what, "itself", without, error)


def linear_in_cotangent(subject: Subject, tol: float, seed: int = 0) -> Iterator[Comparison]:
    """Jᵀ(2v - 3w) = 2 Jᵀv - 3 Jᵀw, Jᵀ(εv) = ε Jᵀv for an ε whose square underflows, and Jᵀv = Jᵀv when asked again.

    A layer that squares a cotangent to measure it loses small ones: a gradient that is zero, or NaN. A backward that
    changes what it has saved is right once.
    """
    x, out = subject.leaves, subject.here.leaves
    v, w = (normal_like(out, generator(seed + k)) for k in (11, 12))

    def gradient(cotangent: Tensors) -> list[Tensor]:
        return filled(subject.recorded.pull(cotangent), x)

    def sums() -> Comparison:
        gv, gw = gradient(v), gradient(w)
        found = gradient([2 * a - 3 * b for a, b in zip(v, w, strict=True)])
        expected = [2 * a - 3 * b for a, b in zip(gv, gw, strict=True)]
        size = max(largest([t.nan_to_num()]) for t in (*gv, *gw))
        least = cancelled(subject, 1, tol)
        return equal("linear in the cotangent", "sums of gradients", found, expected, tol, 5 * size, least)

    def small() -> Comparison:
        epsilon = tiny_factor([*x, *out])
        found = [g.double() / epsilon for g in gradient([epsilon * t for t in v])]
        what, expected = f"cotangents of size {epsilon:.0e}", gradient(v)
        least = cancelled(subject, 1, tol, expected)
        compared = equal(what, "those of size 1", found, expected, tol, least=least)
        return compared if compared.verdict == "agree" else replace(compared, reason=SMALL)

    def again() -> Comparison:
        fresh_graph = Recorded.of(subject.at, x)
        once, twice = filled(fresh_graph.pull(v), x), filled(fresh_graph.pull(v), x)
        # The graph at hand has been asked before.
        found, least = [*twice, *gradient(v)], cancelled(subject, 1, tol, once)
        compared = equal("gradient, asked again", "the first time", found, [*once, *once], tol, least=least)
        return compared if compared.verdict == "agree" else replace(compared, reason=CHANGING)

    yield attempted("linear in the cotangent", sums, TAPE)
    yield attempted("gradient, asked again", again, TAPE)
    yield attempted("small cotangents", small, TAPE)


def tiny_factor(tensors: Tensors) -> float:
    """A power of two whose square underflows in float32, but which leaves room for small numbers times it.

    In float64 the same: cotangents whose squares underflow there, 1e-170, are met by nobody.
    """
    return 2.0**-10 if any(t.dtype == torch.float16 for t in tensors) else 2.0**-80


def forward_is_reverse(subject: Subject, tol: float, seed: int = 0) -> Iterator[Comparison]:
    """⟨v, J d⟩ = ⟨Jᵀv, d⟩: the dot test."""
    x = subject.leaves
    v, d = normal_like(subject.here.leaves, generator(seed + 13)), normal_like(x, generator(seed + 14))

    def dots() -> Comparison:
        Jd, Jtv = subject.forward(x, d), subject.recorded.pull(v)
        size = max(_length(Jd, v), _length(filled(Jtv, x), d))
        return equal(
            "forward mode ⟨v, J d⟩", "reverse mode ⟨Jᵀv, d⟩", [contract(Jd, v, 1)], [contract(Jtv, d, 1)], tol, size,
            cancelled(subject, 1, tol),
        )  # fmt: skip

    yield attempted("forward mode = reverse mode", dots, DUAL)


def second_derivative_is_symmetric(subject: Subject, tol: float, seed: int = 0) -> Iterator[Comparison]:
    """⟨v, f''[w, d]⟩ = ⟨v, f''[d, w]⟩."""
    x = subject.leaves
    v = normal_like(subject.here.leaves, generator(seed + 15))
    w, d = (normal_like(x, generator(seed + k)) for k in (16, 17))

    def swapped() -> Comparison:
        one, other = filled(subject.reverse_twice(x, v, w), x), filled(subject.reverse_twice(x, v, d), x)
        size = max(_length(one, d), _length(other, w))
        return equal(
            "second derivative in [w, d]", "in [d, w]", [contract(one, d, 1)], [contract(other, w, 1)], tol, size,
            cancelled(subject, 2, tol),
        )  # fmt: skip

    yield attempted("symmetric second derivative", swapped, "pass order=1")


def _length(a: Tensors, b: Tensors) -> float:
    """Length of the vector of the summands of ⟨a, b⟩."""
    return float((flat(a) * flat(b)).norm())


def lanes_permute(subject: Subject, tol: float, seed: int = 0) -> Iterator[Comparison]:
    """Vmap over other lanes, in another order and in the last dimension, returns the same for each, and its gradient.

    They are one more than before, since two lanes are a special case: there the second is the last.
    """
    count = len(subject.lanes[0])
    order = torch.arange(-1, count) % count

    def shuffle() -> Recorded:
        # The last dimension of a tensor that has one more.
        lanes = [leaf[order].movedim(0, -1) for leaf in subject.lanes]
        return Recorded.of(lambda leaves: subject.vmapped(-1)(*leaves), lanes)

    shuffled = functools.cache(shuffle)

    def values() -> Comparison:
        found, expected = shuffled().values, [t[order] for t in subject.mapped.values]
        least = cancelled(subject, 0, tol, expected)
        return equal("vmap, lanes in another order", "those lanes", found, expected, tol, least=least)

    def gradients() -> Comparison:
        v = normal_like(subject.mapped.values, generator(seed + 18))
        found = filled(shuffled().pull([t[order] for t in v]), shuffled().given)
        found = [t.movedim(-1, 0) for t in found]
        expected = [t[order] for t in filled(subject.mapped.pull(v), subject.lanes)]
        least = cancelled(subject, 1, tol, expected)
        return equal("gradient of vmap, lanes in another order", "those", found, expected, tol, least=least)

    yield attempted("vmap, lanes in another order", values, MAP)
    yield attempted("gradient of vmap, lanes in another order", gradients, MAP)


def lanes_are_independent(subject: Subject, tol: float, seed: int = 0) -> Iterator[Comparison]:
    """A layer that takes batches returns for each element what it returns for it alone, values and gradients.

    What all elements share, such as the parameters of a module, has the sum of their gradients.
    """
    size = subject.batch_size
    if size < 2:
        raise ValueError(
            f"batched=True holds a batch against its elements, but the inputs have a batch of {size}; draw batches of "
            "two or more, such as strategies.tensors((3, 2))."
        )
    v = normal_like(subject.here.leaves, generator(seed + 19))
    alone = functools.cache(lambda: [subject.element(k).recorded for k in range(size)])

    def values() -> Comparison:
        for path, leaf in zip(subject.here.paths, subject.here.leaves, strict=True):
            if not leaf.ndim or len(leaf) != size:
                raise ValueError(f"output{path} {[*leaf.shape]} does not have the batch of {size} in dimension 0.")
        columns = zip(*(row.values for row in alone()), strict=True)
        found, expected = subject.here.leaves, [torch.cat(column) for column in columns]
        return equal("batch", "a loop over it", found, expected, tol, least=cancelled(subject, 0, tol, expected))

    def gradients() -> Comparison:
        rows = [filled(row.pull([t[k : k + 1] for t in v]), row.given) for k, row in enumerate(alone())]
        expected = [
            torch.stack(column).sum(0) if column[0].shape == leaf.shape else torch.cat(column)
            for leaf, column in zip(subject.leaves, zip(*rows, strict=True), strict=True)
        ]
        found = filled(subject.recorded.pull(v), subject.leaves)
        least = cancelled(subject, 1, tol, expected)
        return equal("gradient of a batch", "a loop over it", found, expected, tol, least=least)

    yield attempted("batch = loop", values)
    yield attempted("gradient of a batch = loop", gradients)


def independent_of_start(
    at_start: Callable[[Any], Subject], starts: tuple[Any, Any], tol: float, seed: int = 0
) -> Iterator[Comparison]:
    """Value and gradient do not depend on where the search begins, and no gradient flows to the start."""
    one, other = (at_start(start) for start in starts)
    v = normal_like(one.here.leaves, generator(seed + 20))

    def values() -> Comparison:
        return equal("from another start", "the first start", other.here.leaves, one.here.leaves, tol)

    def gradients() -> Comparison:
        found, expected = (filled(s.recorded.pull(v), s.leaves) for s in (other, one))
        return equal("gradient from another start", "the first start", found, expected, tol)

    def through() -> Comparison:
        what, start = "gradient in the start", Floating.of(starts[0], "x0")
        begin, zeros = [fresh(leaf) for leaf in start.leaves], [torch.zeros_like(leaf) for leaf in start.leaves]
        try:
            with torch.enable_grad():
                out = at_start(start.put(begin)).at([fresh(leaf) for leaf in one.leaves])
        except MisuseError as error:  # A gradient in the start is never meant, and a layer may say so.
            return Comparison(what, "zero", "agree", reason=f"refused: {type(error).__name__}")
        return equal(what, "zero", filled(pulled(out, begin, v), zeros), zeros, tol, 1.0)

    yield attempted("from another start", values)
    yield attempted("gradient from another start", gradients)
    yield attempted("gradient in the start", through)


def error_falls(
    at_tolerance: Callable[[float], Callable[[], Tensors]], tolerances: Sequence[float], truth: Tensors, tol: float
) -> Iterator[Comparison]:
    """A tighter tolerance is never much worse, and the tightest is right, and better than the loosest if that was not.

    An error of a tenth of what is allowed is as small as it needs to be.
    """
    size = max(largest(truth), 1.0)
    floor = 1e3 * resolution(truth) * size
    enough = max(tol * size / 10, floor)
    errors: list[float] = []
    for tolerance in tolerances:
        what, previous = f"error at tolerance {tolerance:.0e}", errors[-1] if errors else float("inf")
        try:
            found = at_tolerance(tolerance)()
            errors.append(largest([a.double() - b.double() for a, b in zip(found, truth, strict=True)]))
        except Exception as error:  # Whatever a layer raises here is a finding about the layer.
            yield Comparison.raised(what, "the truth", "", error)
            return
        verdict = "agree" if errors[-1] <= max(2 * previous, enough) else "disagree"
        yield Comparison(what, "at the looser one", verdict, "", errors[-1], previous)
    right = errors[-1] <= max(tol * size, floor)
    reason = f"It does not fall: it was {errors[0]:.1e} at tolerance {tolerances[0]:.0e}."
    fallen = errors[-1] <= max(errors[0] / 10, enough)
    yield Comparison(
        f"error at tolerance {tolerances[-1]:.0e}", "zero", "agree" if right and fallen else "disagree", "largest",
        errors[-1], 0.0, floor, tol * size, reason="" if fallen else reason,
    )  # fmt: skip
