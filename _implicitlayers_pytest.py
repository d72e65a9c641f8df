"""What implicitlayers adds to pytest and Hypothesis; loaded by their entry points.

It stands outside of the package, and imports neither torch nor Hypothesis: every test run in an environment with
implicitlayers loads it, also those that have nothing to do with layers.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest

__all__ = ["float64", "register_profiles"]


def register_profiles() -> None:
    """Register the profiles ``implicitlayers-ci`` and ``implicitlayers-deep``; Hypothesis calls this when imported.

    ``implicitlayers-ci`` runs the same 25 examples every time. ``implicitlayers-deep`` runs 1,000 random ones. Neither
    is made the current profile: that is for ``--hypothesis-profile`` or `hypothesis.settings.load_profile`.
    """
    settings = sys.modules["hypothesis"].settings
    settings.register_profile("implicitlayers-ci", deadline=None, derandomize=True, max_examples=25, print_blob=True)
    settings.register_profile("implicitlayers-deep", deadline=None, max_examples=1000, print_blob=True)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default type of new tensors for one test."""
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """Print the gradient report of a failing test in a section of its own, and only there."""
    found = [] if call.excinfo is None else list(_mismatches(call.excinfo.value))
    texts = list(dict.fromkeys(str(error) for error in found))
    for error in found:
        error.args = (f"{str(error).partition(chr(10))[0]} See the gradient report.",)
    report = yield
    report.sections += [("gradient report", text) for text in texts]
    return report


def _mismatches(error: BaseException) -> Iterator[BaseException]:
    """The kit's own failures in an exception; Hypothesis raises several at once as a group."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _mismatches(inner)
    kit = sys.modules.get("implicitlayers.testing.report")
    if kit is not None and isinstance(error, (kit.GradientMismatch, kit.InconclusiveGradients)):
        yield error
