"""A layer under vmap against a loop over the lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from implicitlayers.testing.quotients import Oracle, Quotients, Vector, filled, negligible, stack
from implicitlayers.testing.report import Comparison, left_out, named
from implicitlayers.testing.subject import Subject
from implicitlayers.testing.vectors import flat, generator, largest, normal_like, resolution

__all__ = ["MAPPED", "lanes"]

MAPPED = "vmap, values"
LOOP = "a loop over the lanes"


class Settle(Protocol):
    """Compare what a layer returns with an oracle; see `Comparing.settle`."""

    def __call__(
        self, what: str, product: Callable[[], Tensor], oracle: Oracle, entry: Callable[[int], str]
    ) -> Comparison: ...


def lanes(subject: Subject, v: Vector, tol: float, seed: int, order: int, settle: Settle) -> Iterator[Comparison]:
    """Values and gradients of two lanes under vmap, against a loop over them by routes compared elsewhere.

    Args:
        subject: the layer.
        v: vectors like its outputs.
        tol: relative tolerance.
        seed: of the random cotangents and directions.
        order: 2 for second derivatives as well.
        settle: what compares.
    """
    x, count = subject.lanes, len(subject.lanes[0])
    v = normal_like(stack([v] * count), generator(seed + 4))
    w = normal_like(x, generator(seed + 5))

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
    least = negligible(resolution([*subject.leaves, *subject.here.leaves]), tol)
    for k, (what, (vmapped, alone, names)) in enumerate(together.items()):
        try:
            expected = stack([alone(lane) for lane in range(count)])
        except Exception as error:  # Whatever a layer raises here; the loop needs the tape.
            yield Comparison.raised(what, LOOP, left_out(what.replace(" through vmap", "")), error)
            continue
        where = [f" in lane {lane} of {name}" for name in names for lane in range(count)]
        oracle, shapes = _exact(expected, least, subject.natural(k))
        entry = functools.partial(named, where, shapes)
        settled = settle(what, lambda vmapped=vmapped: flat(list(vmapped())), lambda _, o=oracle: o, entry)
        yield replace(settled, oracle=LOOP)


def _exact(expected: Vector, least: float, natural: float) -> tuple[Quotients, list[torch.Size]]:
    """Tensors ``[lanes, ...]`` of known numbers as quotients without an error, and the shape of each of their lanes.

    Args:
        expected: the tensors.
        least: which fraction of the others' size is negligible.
        natural: what such numbers amount to.
    """
    each = [lane for tensor in expected for lane in tensor]
    scale = flat([torch.full_like(lane, largest([lane.nan_to_num()])) for lane in each])
    scale = scale.clamp_min(least * max(float(scale.max()), natural))
    truth = flat(expected)
    return Quotients.exact(truth, scale), [lane.shape for lane in each]
