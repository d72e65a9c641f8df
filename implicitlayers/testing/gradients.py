"""Is the gradient of a layer right? The question, and the assertion that answers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitlayers.testing.compare import Comparing, Mode
from implicitlayers.testing.report import Comparison, GradientMismatch, GradientReport, InconclusiveGradients
from implicitlayers.testing.subject import Subject

__all__ = ["MODES", "assert_gradients_match", "compare_gradients", "expect_tolerance", "tolerance"]

MODES: tuple[Mode, ...] = ("reverse", "forward", "vmap")

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Relative tolerance by type, about eps^0.4: some hundred times what a well-conditioned computation loses."""


def assert_gradients_match(
    layer: Callable[..., Any],
    *inputs: Any,
    order: Literal[1, 2] = 1,
    modes: Sequence[Mode] = MODES,
    tol: float | None = None,
    reference: Callable[..., Any] | None = None,
    seed: int = 0,
) -> GradientReport:
    """Raise unless the derivatives of `layer` at `inputs` match finite differences of `layer`.

    |⟨Jᵀv, d⟩ - ⟨v, f'(x) d⟩| ≤ tol·size + floor

    for a random cotangent v and a random direction d in every floating tensor of the inputs, where the difference
    quotient f'(x) d comes with its measured error, the floor. No comparison passes whose floor is above the tolerance:
    it is inconclusive. No comparison fails that a second difference quotient with other steps does not confirm.

    Choose it over `torch.autograd.gradcheck` for layers that solve something: it finds its own steps, measures the
    noise of the solve, and checks vmap, second derivatives and float32.

    Args:
        layer: function of tensors and trees of them, or an `nn.Module`, whose parameters are then inputs as well.
        *inputs: where. If some floating tensors in them require a gradient, only those are tested; otherwise all are.
        order: 2 checks first and second derivatives; these against differences of the layer's first derivative.
        modes: "reverse" (the tape; twice for order 2), "forward" (dual numbers; over reverse and over forward for
            order 2), "vmap" (values and gradients of two lanes against a loop over them).
        tol: relative tolerance; by default 1e-6 in float64 and 1e-3 in float32.
        reference: the same function by other means, for instance solved more tightly, of which differences are taken;
            by default the layer itself, in float64 where it allows that.
        seed: of the random directions.

    Returns:
        The report; ``print(report)`` shows the closest call.

    Raises:
        GradientMismatch: a derivative disagrees. An AssertionError whose message names the worst entry.
        InconclusiveGradients: none disagrees, but some could not be told from wrong ones. Also an AssertionError.
        TypeError: there is nothing to differentiate, or with respect to nothing.
        ValueError: `tol` is not positive and finite.

    Examples:
        >>> report = assert_gradients_match(torch.linalg.inv, torch.tensor([[2.0, 1.0], [0.0, 3.0]]).double())
        >>> report.verdict
        'agree'
    """
    __tracebackhide__ = True  # pytest shows the caller's line.
    report = compare_gradients(layer, *inputs, order=order, modes=modes, tol=tol, reference=reference, seed=seed)
    if report.verdict == "disagree":
        raise GradientMismatch(report)
    if report.verdict == "inconclusive":
        raise InconclusiveGradients(report)
    return report


# Under the caller's inference mode there would be no tape at all.
@torch.inference_mode(False)
def compare_gradients(
    layer: Callable[..., Any],
    *inputs: Any,
    order: Literal[1, 2] = 1,
    modes: Sequence[Mode] = MODES,
    tol: float | None = None,
    reference: Callable[..., Any] | None = None,
    seed: int = 0,
) -> GradientReport:
    """As `assert_gradients_match`, but return the report whatever it says."""
    return compare(Subject.of(layer, inputs), inputs, order, modes, tol, reference, seed)


def compare(
    subject: Subject,
    inputs: Sequence[Any],
    order: int,
    modes: Sequence[Mode],
    tol: float | None,
    reference: Any,
    seed: int,
) -> GradientReport:
    """`compare_gradients` of what is taken apart already."""
    unknown = [mode for mode in modes if mode not in MODES]
    if isinstance(modes, str) or unknown or not modes:
        raise TypeError(f'modes is {modes!r}; pass a tuple of "reverse", "forward", "vmap".')
    if order not in (1, 2):
        raise TypeError(f"order is {order!r}; pass 1, or 2 to check second derivatives as well.")
    expect_tolerance(tol)
    tol = tolerance(subject) if tol is None else tol
    if not all(sum(t.numel() for t in leaves) for leaves in (subject.leaves, subject.here.leaves)):
        nothing = "Nothing to compare: there is no number in what goes in, or none in what comes out."
        return GradientReport((Comparison("all derivatives", "nothing", "agree", reason=nothing),))
    oracle = _reference(subject) if reference is None else _given(reference, subject, inputs)
    return GradientReport(Comparing(subject, oracle, tol, seed).run(modes, order))


def expect_tolerance(tol: float | None) -> None:
    """Raise a ValueError for a tolerance that nothing meets, or everything; None stands for the default."""
    if tol is not None and not 0 < tol < float("inf"):
        raise ValueError(f"tol is {tol!r}, but relative tolerances are positive and finite; pass 1e-6 or so.")


def tolerance(subject: Subject) -> float:
    """The default tolerance of the coarsest type that goes in or comes out."""
    return max(TOLERANCES[t.dtype] for t in (*subject.leaves, *subject.here.leaves))


def _doubled(tree: Any) -> Any:
    return pytree.tree_map(
        lambda t: t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree
    )


def _reference(subject: Subject) -> Subject:
    """The layer on float64 inputs, if it takes them and answers in kind; otherwise as it is."""
    out = subject.here.leaves
    if all(t.dtype == torch.float64 for t in (*subject.leaves, *out)):
        return subject
    tree = _doubled(subject.inputs.tree)
    leaves = [pytree.tree_leaves(tree)[i] for i in subject.inputs.where]
    double = dataclasses.replace(subject, inputs=dataclasses.replace(subject.inputs, leaves=leaves, tree=tree))
    try:
        answer = double.here.leaves
    except Exception:  # Layers have exceptions of their own for types that they do not take.
        return subject
    if [t.shape for t in answer] != [t.shape for t in out] or any(t.dtype != torch.float64 for t in answer):
        return subject
    return double


def _given(reference: Callable[..., Any], subject: Subject, inputs: Sequence[Any]) -> Subject:
    other = Subject.of(reference, inputs)
    if [t.shape for t in other.leaves] != [t.shape for t in subject.leaves]:
        raise TypeError(
            f"reference is differentiable in {other.names}, but layer in {subject.names}; pass a function of the same "
            "inputs."
        )
    return other
