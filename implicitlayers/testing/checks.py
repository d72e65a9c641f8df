"""check_layer: a property test of a whole layer, with Hypothesis drawing the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from implicitlayers.testing import metamorphic, patterns
from implicitlayers.testing.compare import Mode, functional
from implicitlayers.testing.gradients import MODES, compare, expect_tolerance, tolerance
from implicitlayers.testing.report import Comparison, GradientMismatch, GradientReport, InconclusiveGradients, combined
from implicitlayers.testing.strategies.tensors import expect_strategy
from implicitlayers.testing.subject import Subject, copied
from implicitlayers.testing.vectors import Floating, seed_of

__all__ = ["Checked", "check_layer", "examine", "run_property"]


class Checked(NamedTuple):
    """What a check looked at.

    Attributes:
        examples: how many examples agreed.
        inconclusive: how many said nothing.
    """

    examples: int
    inconclusive: int


def run_property(
    strategy: SearchStrategy[Any], examine: Callable[[Any], GradientReport], max_examples: int | None = None
) -> Checked:
    """Examine examples until one disagrees, and shrink that.

    Raises:
        GradientMismatch: with the report on the smallest example that disagrees, which Hypothesis names.
        InconclusiveGradients: most examples said nothing.
    """
    __tracebackhide__ = True
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples is {max_examples!r}, which checks nothing; pass 1 or more, or None.")
    agreed, silent = [], []

    @settings(
        max_examples=settings.default.max_examples if max_examples is None else max_examples,  # type: ignore[union-attr]
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
        # Explaining which parts matter reruns the example, and a solve costs more than the explanation is worth.
        phases=[p for p in settings.default.phases if p is not Phase.explain],  # type: ignore[union-attr]
    )
    @given(strategy)
    def prop(example: Any) -> None:
        __tracebackhide__ = True
        with torch.inference_mode(False):
            report = examine(example)
        if report.verdict == "disagree":
            raise GradientMismatch(report)
        (agreed if report.agrees else silent).append(report)

    prop()
    if len(silent) > len(agreed):
        raise InconclusiveGradients(silent[-1])
    return Checked(len(agreed), len(silent))


def check_layer(
    layer: Callable[..., Any],
    inputs: SearchStrategy[Any],
    *,
    order: Literal[1, 2] = 1,
    modes: Sequence[Mode] = MODES,
    tol: float | None = None,
    reference: Callable[..., Any] | None = None,
    batched: bool = False,
    starts: SearchStrategy[Any] | None = None,
    at_tolerance: Callable[[float], Callable[..., Any]] | None = None,
    max_examples: int | None = None,
) -> Checked:
    """Check a layer on many inputs: its gradients against finite differences, and what holds for every right layer.

    The properties: the gradient is linear in the cotangent, also for tiny ones, and the same when asked again, for an
    expanded cotangent, for one of the outputs alone, and where some of the inputs are constants; forward mode is the
    transpose of reverse mode; the second derivative is symmetric (order 2); vmap is a loop, over all of the inputs or
    some, in any order of the lanes; and, where the layer has what they need, a batch is a loop (`batched`), the start
    does not matter (`starts`), and the error falls with the tolerance (`at_tolerance`).

    The random directions follow from the numbers drawn: they differ from example to example, and a shrunk example fails
    again.

    Args:
        layer: function of tensors and trees of them, or a module.
        inputs: strategy for the inputs: a tuple for several ones, anything else for a single one.
        order: as in `assert_gradients_match`.
        modes: as in `assert_gradients_match`; properties of modes that are left out are not checked.
        tol: as in `assert_gradients_match`.
        reference: as in `assert_gradients_match`.
        batched: whether the first dimension of every input is a batch whose elements do not know of each other. What
            has no dimensions, and the parameters of a module, belong to all elements. Draw batches of two or more.
        starts: strategy for where the layer's search starts, a tensor or a tree; the layer then takes it as the keyword
            ``x0``.
        at_tolerance: ``tolerance -> layer``: the layer, solved to a tolerance. Its errors are taken against `reference`
            where that is given, otherwise against `layer`.
        max_examples: how many inputs; as many as the Hypothesis profile says by default.

    Returns:
        How many examples agreed, and how many said nothing.

    Raises:
        GradientMismatch: with the smallest inputs at which something disagrees.
        InconclusiveGradients: most inputs said nothing.
        TypeError: `inputs` is no strategy.
        ValueError: `batched` without "reverse" in `modes`, or with a batch of one; `tol` is not positive and finite, or
            `max_examples` below one.

    Examples:
        >>> from implicitlayers.testing import strategies
        >>> check_layer(torch.linalg.inv, strategies.matrices(), max_examples=5)
        Checked(examples=5, inconclusive=0)
    """
    _expect_arguments(inputs, starts, tol, modes, batched)

    def examine_one(example: Any) -> GradientReport:
        arguments, begin = example if starts is not None else (example, None)
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)

        def bound(f: Callable[..., Any]) -> Callable[..., Any]:
            return f if starts is None else _from(f, begin)

        here = bound(layer)
        report = examine(here, arguments, order=order, modes=modes, tol=tol, reference=reference, batched=batched)
        more = [] if starts is None else [*_starts(layer, arguments, begin, tol)]
        if at_tolerance is not None:
            more += _tolerances(at_tolerance, bound, reference or here, arguments, tol)
        return combined([report, GradientReport(tuple(more))])

    drawn = inputs if starts is None else _pairs(inputs, starts)
    return run_property(drawn, examine_one, max_examples)


def _expect_arguments(inputs: Any, starts: Any, tol: float | None, modes: Sequence[Mode], batched: bool) -> None:
    expect_tolerance(tol)
    expect_strategy("inputs", inputs, "strategies.tensors((3,))")
    if starts is not None:
        expect_strategy("starts", starts, "strategies.tensors((3,))")
    if batched and "reverse" not in modes:
        raise ValueError(
            f'batched=True compares gradients by the tape, but modes is {modes!r}; add "reverse" or leave out batched.'
        )


def examine(
    layer: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    order: Literal[1, 2] = 1,
    modes: Sequence[Mode] = MODES,
    tol: float | None = None,
    reference: Callable[..., Any] | None = None,
    batched: bool = False,
) -> GradientReport:
    """Gradients and properties of a layer at one point, along directions that follow from its numbers."""
    subject, seed = Subject.of(layer, inputs), seed_of(inputs)
    report = compare(subject, inputs, order, modes, tol, reference, seed)
    tol = tolerance(subject) if tol is None else tol
    if subject.is_random(tol):
        # What is true of every layer is true of functions; this draws random numbers.
        return report
    properties = tuple(_properties(subject, order, modes, tol, batched, seed))
    return GradientReport(functional(subject, (*report.comparisons, *properties), tol))


def _properties(
    subject: Subject, order: int, modes: Sequence[Mode], tol: float, batched: bool, seed: int
) -> Iterator[Comparison]:
    if "reverse" in modes:
        yield from metamorphic.linear_in_cotangent(subject, tol, seed)
        yield from patterns.some_constant(subject, tol, seed)
        yield from patterns.some_cotangents(subject, tol, seed)
        if "forward" in modes:
            yield from metamorphic.forward_is_reverse(subject, tol, seed)
        if order == 2:
            yield from metamorphic.second_derivative_is_symmetric(subject, tol, seed)
        if batched:
            yield from metamorphic.lanes_are_independent(subject, tol, seed)
    if "vmap" in modes:
        yield from metamorphic.lanes_permute(subject, tol, seed)
        yield from patterns.some_mapped(subject, tol, seed)


def _pairs(inputs: SearchStrategy[Any], starts: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return inputs.flatmap(lambda drawn: starts.map(lambda start: (drawn, start)))


def _from(layer: Callable[..., Any], begin: Any) -> Callable[..., Any]:
    # A search may well move on from its start in place.
    return lambda *arguments: layer(*arguments, x0=copied(begin))


def _starts(layer: Callable[..., Any], inputs: Sequence[Any], begin: Any, tol: float | None) -> Iterator[Comparison]:
    tol = tolerance(Subject.of(_from(layer, begin), inputs)) if tol is None else tol
    start = Floating.of(begin, "starts")
    other = start.moved(0.5, [torch.ones_like(leaf) for leaf in start.leaves])
    yield from metamorphic.independent_of_start(
        lambda x0: Subject.of(_from(layer, x0), inputs), (begin, other), tol, seed_of(inputs)
    )


def _tolerances(
    at_tolerance: Callable[[float], Callable[..., Any]],
    bound: Callable[[Callable[..., Any]], Callable[..., Any]],
    truth: Callable[..., Any],
    inputs: Sequence[Any],
    tol: float | None,
) -> list[Comparison]:
    right = Subject.of(truth, inputs)
    tol = tolerance(right) if tol is None else tol

    def value(t: float) -> Callable[[], Sequence[Tensor]]:
        return lambda: Subject.of(bound(at_tolerance(t)), inputs).here.leaves

    return [*metamorphic.error_falls(value, (1e-2, 1e-4, 1e-6, 1e-8), right.here.leaves, tol)]
