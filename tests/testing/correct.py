"""Layers that are right: this library's, PyTorch's, closed forms, and the hand-written ones without their bug."""

from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st

from implicitlayers.testing import check_layer, problems, strategies
from tests.testing import library_layers, torch_layers
from tests.testing.library_layers import Check, Rows
from tests.testing.planted import PLANTED, run


def closed_forms() -> Rows:
    """The formulas themselves, in the param that is differentiated."""
    # Small enough to stay on the same active set.
    small = st.integers(-4, 4).map(lambda k: k / 256)
    for name, problem in problems.CLOSED_FORMS.items():
        near = problem.params[problem.argnum]

        def layer(p: Any, problem: Any = problem) -> Any:
            before, after = problem.params[: problem.argnum], problem.params[problem.argnum + 1 :]
            return problem.solution(*before, p, *after)

        nudges = strategies.tensors(tuple(near.shape), elements=small)
        yield f"closed form: {name}", partial(_tape_only, layer, nudges.map(near.__add__))


def by_hand() -> Rows:
    """The layers of the planted bugs, without them."""
    for name, (_, right, inputs, options) in PLANTED.items():
        yield f"by hand, without: {name}", partial(run, right, inputs, options)


def _tape_only(layer: Any, inputs: Any, examples: int) -> Any:
    """Solutions that look at values, and so have no vmap, nor a derivative through their Newton steps."""
    return check_layer(layer, inputs, modes=("reverse",), max_examples=examples)


_TABLES = {
    "by hand": by_hand, "closed forms": closed_forms, "functions of PyTorch": torch_layers.functions,
    **library_layers.TABLES,
}  # fmt: skip

CORRECT: dict[str, dict[str, Check]] = {group: dict(rows()) for group, rows in _TABLES.items()}
"""Every right layer by group and name, with the check that it must pass on any number of examples."""
