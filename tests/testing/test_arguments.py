"""What the checks and strategies do not take, and what they take although there is nothing in it."""

import hypothesis.strategies as st
import pytest
import torch

import implicitlayers as il
from implicitlayers.testing import (
    Checked,
    check_adjoint,
    check_layer,
    check_linear_solver,
    check_solver,
    compare_gradients,
    strategies,
)

F64 = torch.float64
VECTORS = strategies.tensors((2,))
MODES = [("reverse",), ("forward",), ("vmap",), ("reverse", "forward", "vmap")]


@pytest.mark.parametrize("tol", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "check",
    [
        lambda tol: compare_gradients(torch.sin, torch.ones(2), tol=tol),
        lambda tol: check_layer(torch.sin, VECTORS, tol=tol),
        lambda tol: check_solver(il.LBFGS(), tol=tol),
        lambda tol: check_linear_solver(il.CG(), tol=tol),
        lambda tol: check_adjoint(il.Implicit(), tol=tol),
    ],
    ids=["compare_gradients", "check_layer", "check_solver", "check_linear_solver", "check_adjoint"],
)
def test_a_tolerance_is_positive_and_finite(check, tol):
    with pytest.raises(ValueError, match="relative tolerances are positive and finite"):
        check(tol)


@pytest.mark.parametrize("count", [0, -3])
def test_no_examples_check_nothing(count):
    with pytest.raises(ValueError, match="checks nothing"):
        check_layer(torch.sin, VECTORS, max_examples=count)


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: strategies.spd_matrices(0), "n is 0, but has to be at least 1"),
        (lambda: strategies.matrices(-1), "n is -1"),
        (lambda: strategies.spd_matrices(2, 0.5), "condition is 0.5"),
        (lambda: strategies.spd_matrices(2, float("nan")), "condition is nan"),
        (lambda: strategies.tensors(max_size=0), "max_size is 0"),
        (lambda: strategies.spd_matrices(max_size=0), "max_size is 0"),
        (lambda: strategies.strongly_convex_problems(max_size=0), "max_size is 0"),
        (lambda: strategies.contractions(rate=1.5), "rate is 1.5"),
    ],
)
def test_numbers_that_cannot_be_are_told(make, words):
    with pytest.raises(ValueError, match=words):
        make().example()


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: strategies.tensors((2,), dtype=torch.int64).example(), "elements=st.integers"),
        (lambda: strategies.matrices(dtype=torch.int64).example(), "dtype is torch.int64"),
        (lambda: strategies.spd_matrices(True).example(), "n is True"),
        (lambda: check_linear_solver(il.CG(), matrices=torch.eye(2)), "matrices is"),
        (lambda: check_solver(il.LBFGS(), problems=[1]), "problems is"),
        (lambda: check_adjoint(il.Implicit(), problems=[1]), "problems is"),
    ],
)
def test_what_is_of_the_wrong_kind_is_told(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_integers_are_drawn_where_they_are_asked_for():
    drawn = strategies.tensors((3,), dtype=torch.int64, elements=st.integers(0, 3)).example()
    assert drawn.dtype == torch.int64


# --- nothing in it --------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", MODES, ids=str)
def test_a_tensor_without_entries_agrees(modes):
    assert check_layer(torch.sin, strategies.tensors((0,)), modes=modes, max_examples=2) == Checked(1, 0)
    assert check_layer(lambda x: x[:0], VECTORS, modes=modes, max_examples=2).examples == 2


def test_a_tensor_without_entries_beside_another_agrees():
    inputs = st.tuples(strategies.tensors((0,)), VECTORS)
    assert check_layer(lambda x, y: {"a": x.sin(), "b": y.sin()}, inputs, order=2, max_examples=2).examples == 2
    assert not compare_gradients(
        lambda x, y: y.sin() + y.detach(), torch.zeros(0).double(), torch.ones(2).double()
    ).agrees
