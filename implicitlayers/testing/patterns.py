"""Patterns in which a layer is used: some of its inputs constant, some mapped, some of its outputs asked for.

A layer with several inputs may be right when all of them require a gradient, and wrong when one does not: it counts
what it returns by `needs_input_grad`, or has a rule for vmap that takes every input to be mapped. Each function
compares such a use with the full one, whose derivatives are compared with difference quotients elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from implicitlayers.testing.metamorphic import attempted, cancelled, equal
from implicitlayers.testing.quotients import filled
from implicitlayers.testing.recorded import Recorded
from implicitlayers.testing.report import Comparison
from implicitlayers.testing.subject import Subject
from implicitlayers.testing.vectors import generator, normal_like

__all__ = ["some_constant", "some_cotangents", "some_mapped"]


def some_of(count: int, seed: int) -> list[int]:
    """Some of several things, neither none nor all of them, by the seed."""
    chosen = (torch.rand(count, generator=generator(seed + 21)) < 0.5).tolist()
    if len(set(chosen)) == 1:
        chosen[seed % count] = not chosen[0]
    return [i for i, is_chosen in enumerate(chosen) if is_chosen]


def some_constant(subject: Subject, tol: float, seed: int = 0) -> Iterator[Comparison]:
    """The gradient in some of the inputs is the same where the others do not require one."""
    x, count = subject.leaves, len(subject.leaves)
    if count < 2:
        return
    chosen = some_of(count, seed)
    what = f"gradient in {_listed(subject, chosen)} alone"
    try:
        full, partial = subject.recorded, Recorded.of(subject.at, x, chosen)
    except Exception:  # A layer that differentiates inside may need its input to require a gradient.
        return

    def compare() -> Comparison:
        v = normal_like(subject.here.leaves, generator(seed + 22))
        found, expected = (filled(recorded.pull(v), x) for recorded in (partial, full))
        found, expected = ([tensors[i] for i in chosen] for tensors in (found, expected))
        least = cancelled(subject, 1, tol, expected)
        return equal(what, "that with the others", found, expected, tol, least=least)

    yield attempted(what, compare)


def some_cotangents(subject: Subject, tol: float, seed: int = 0) -> Iterator[Comparison]:
    """A cotangent that is one number in all places, as of a sum, or for one of the outputs alone, is like any other."""
    x, values = subject.leaves, subject.here.leaves
    try:
        plain = filled(subject.recorded.pull([torch.ones_like(value) for value in values]), x)
    except Exception:  # It says what it raises where it is asked for a gradient.
        return
    least = cancelled(subject, 1, tol, plain)

    def of_a_sum() -> Comparison:
        # One number in memory, with strides of zero.
        ones = [value.new_ones(()).expand(value.shape) for value in values]
        found = filled(subject.recorded.pull(ones), x)
        return equal("gradient of a sum, an expanded cotangent", "that of ones", found, plain, tol, least=least)

    def of_one_output() -> Comparison:
        k = seed % len(values)
        v = normal_like(values, generator(seed + 23))
        zeros = [t if i == k else torch.zeros_like(t) for i, t in enumerate(v)]
        nothing = [t if i == k else None for i, t in enumerate(v)]
        found, expected = (filled(subject.recorded.pull(cotangent), x) for cotangent in (nothing, zeros))
        what = f"gradient of output{subject.here.paths[k]} alone"
        return equal(what, "cotangents of zero for the others", found, expected, tol, least=least)

    yield attempted("gradient of a sum, an expanded cotangent", of_a_sum)
    if len(values) > 1:
        yield attempted("gradient of one output alone", of_one_output)


def some_mapped(subject: Subject, tol: float, seed: int = 0) -> Iterator[Comparison]:
    """Vmap over some of the inputs, the others the same in all lanes, is a loop as well."""
    x, count = subject.leaves, len(subject.leaves)
    if count < 2:
        return
    chosen = some_of(count, seed)
    try:
        # Three lanes of two points; the last is only looked at for whether there is a vmap at all.
        rows, _ = [*subject.rows_in(chosen), subject.recorded], subject.mapped
    except Exception:  # It says what it raises where all are mapped.
        return
    lanes = [torch.stack([row.given[i].detach() for row in rows]) if i in chosen else x[i] for i in range(count)]
    dimensions = tuple(0 if i in chosen else None for i in range(count))
    what = f"vmap over {_listed(subject, chosen)} alone"

    @functools.cache
    def recorded() -> Recorded:
        return Recorded.of(lambda leaves: subject.vmapped(dimensions)(*leaves), lanes)

    def compare() -> Comparison:
        found = recorded().values
        expected = [torch.stack(column) for column in zip(*(row.values for row in rows), strict=True)]
        least = cancelled(subject, 0, tol, expected)
        return equal(what, "a loop over the lanes", found, expected, tol, least=least)

    def compare_gradients() -> Comparison:
        v = normal_like([torch.stack([t] * len(rows)) for t in subject.here.leaves], generator(seed + 24))
        each = [filled(row.pull([t[k] for t in v]), x) for k, row in enumerate(rows)]
        columns: Sequence[Tensor] = [torch.stack(column) for column in zip(*each, strict=True)]
        # What all lanes share has the sum of their gradients.
        expected = [t if i in chosen else t.sum(0) for i, t in enumerate(columns)]
        found = filled(recorded().pull(v), lanes)
        least = cancelled(subject, 1, tol, columns)
        return equal(f"gradient of {what}", "a loop over the lanes", found, expected, tol, least=least)

    yield attempted(what, compare)
    yield attempted(f"gradient of {what}", compare_gradients)


def _listed(subject: Subject, chosen: Sequence[int]) -> str:
    return ", ".join(subject.names[i] for i in chosen)
