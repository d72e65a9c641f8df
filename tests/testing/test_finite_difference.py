"""Finite differences, and above all their error estimates."""

import math

import pytest
import torch

from implicitlayers.testing import finite_difference
from tests.testing.study import NOISES, Functions, noisy, ours, quantized, summarize

F64 = torch.float64
ONE = torch.tensor(1.0, dtype=F64)


@pytest.fixture(scope="module")
def functions():
    return Functions(10_000, seed=1)


@pytest.mark.parametrize("ratio", [2.0, 3.0])
@pytest.mark.parametrize("level", NOISES)
def test_true_error_is_below_the_estimate_in_99_percent(functions, level, ratio):
    row = summarize("", "", *ours(noisy(functions, level, 7), ONE, ratio), functions.slope(ONE))
    assert row.covered >= 0.99
    assert row.ratio <= 100


def test_values_of_few_digits_are_seen_to_be_so(functions):
    row = summarize("", "", *ours(quantized(functions, 1e-9), ONE, 3.0), functions.slope(ONE))
    assert row.covered >= 0.99


# At 1e-6 the domain ends within the first steps, and the noise can be measured roughly only.
@pytest.mark.parametrize(("size", "bound"), [(1e-6, 1e-5), (1e-2, 1e-8), (1.0, 1e-8), (1e4, 1e-8)])
def test_steps_find_the_size_of_x(size, bound):
    x = torch.tensor(size, dtype=F64)
    slope, error = finite_difference(torch.log, x, ONE * size)
    assert abs(slope - 1) <= error < bound


def test_trees_and_directions():
    x = {"a": torch.tensor([1.0, 2.0], dtype=F64), "n": 3, "b": (torch.tensor(0.5, dtype=F64),)}
    d = {"a": torch.tensor([1.0, -1.0], dtype=F64), "n": 0, "b": (torch.tensor(2.0, dtype=F64),)}
    slope, error = finite_difference(lambda t: {"y": t["a"] ** t["n"] * t["b"][0]}, x, d)
    expected = torch.tensor([3 * 1 * 0.5 + 1 * 2, -3 * 4 * 0.5 + 8 * 2], dtype=F64)
    torch.testing.assert_close(slope["y"], expected, rtol=0, atol=1e-10)
    assert error["y"].shape == (2,)
    assert (error["y"] < 1e-9).all()


class SolverError(Exception):
    """As solvers have them, for themselves."""


@pytest.mark.parametrize("error", [ValueError, SolverError])
def test_steps_out_of_the_domain_are_left_out(error):
    def picky(x):
        if x > 1.2:
            raise error("outside")
        return x.sqrt()

    slope, floor = finite_difference(picky, ONE, ONE)
    assert abs(slope - 0.5) <= floor < 1e-8


def test_no_quotient_has_an_infinite_error():
    def only_here(x):
        if x != 1:
            raise RuntimeError("outside")
        return x

    _, error = finite_difference(only_here, ONE, ONE)
    assert math.isinf(error)


def test_enough_stops_early():
    calls = []

    def f(x):
        calls.append(x)
        return x.sin()

    finite_difference(f, ONE, ONE)
    everything = len(calls)
    calls.clear()
    slope, error = finite_difference(f, ONE, ONE, enough=1e-6)
    assert len(calls) < everything
    assert abs(slope - math.cos(1)) <= error <= 1e-6


@pytest.mark.parametrize(
    ("x", "direction", "words"),
    [
        (torch.tensor(1), ONE, "x holds no floating tensor"),
        (ONE, torch.ones(2, dtype=F64), "direction has leaves of shapes"),
        (torch.tensor(1j), ONE, "view_as_real"),
    ],
)
def test_what_has_no_derivative_is_refused(x, direction, words):
    with pytest.raises(TypeError, match=words):
        finite_difference(lambda t: t, x, direction)


@pytest.mark.parametrize(
    ("kinked", "low", "high"),
    [(torch.abs, -1.0, 1.0), (lambda t: t.relu() + t.exp(), 1.0, 2.0), (lambda t: 1e-6 * t.abs() + t.sin(), 1.0, 1.0)],
)
def test_at_a_kink_the_estimate_covers_both_slopes(kinked, low, high):
    slope, error = finite_difference(kinked, torch.tensor(0.0).double(), torch.tensor(1.0).double())
    assert slope - error <= low
    assert high <= slope + error


def test_evaluating_many_points_at_once_changes_nothing():
    x, d = torch.tensor([0.5, 2.0]).double(), torch.tensor([1.0, -1.0]).double()
    calls = []

    def f(t):
        calls.append(t.shape)
        return t.sin() * t.flip(0)

    one_by_one = finite_difference(f, x, d)
    sequential, together = len(calls), finite_difference(f, x, d, vectorized=torch.vmap(f))
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))
    assert len(calls) - sequential <= 4 < sequential


def test_a_point_outside_the_domain_does_not_spoil_the_others():
    def f(t):
        if bool((t < 0.9).any()):
            raise ValueError("not defined here")
        return t.log()

    here, d = torch.tensor(1.0).double(), torch.tensor(1.0).double()
    slope, error = finite_difference(f, here, d, vectorized=f)
    assert abs(slope - 1) <= error < 1e-6
