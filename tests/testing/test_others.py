"""The kit on layers of others: PyTorch's linear algebra, SciPy behind a Function, and libraries where installed."""

import numpy as np
import pytest
import scipy.optimize
import torch

from implicitlayers.testing import (
    GradientMismatch,
    assert_gradients_match,
    check_layer,
    compare_gradients,
    strategies,
)
from tests.testing.planted import function, newton, systems

F64 = torch.float64
A = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 4.0]], dtype=F64)
B = torch.tensor([1.0, -0.5, 2.0], dtype=F64)


def test_linalg_solve_is_right_but_for_forward_over_forward():
    report = compare_gradients(torch.linalg.solve, A, B, order=2)
    wrong = [c for c in report.comparisons if c.verdict != "agree"]
    # Found by this kit in torch 2.13: jacfwd(jacfwd(f)) loses a part of the second derivative in A.
    assert [c.what for c in wrong] == ["forward over forward, second derivative in input[0]"]
    assert check_layer(torch.linalg.solve, systems(strategies.matrices(max_size=3)), max_examples=5).examples == 5


def test_eigh_is_right_for_symmetric_directions_only():
    assert compare_gradients(lambda M: torch.linalg.eigh(M)[0], A).verdict == "disagree"
    assert_gradients_match(lambda M: torch.linalg.eigh((M + M.mT) / 2)[0], A, order=2)


def test_functions_of_eigenvectors_are_right_and_signs_are_inconclusive():
    def projector(M):
        v = torch.linalg.eigh((M + M.mT) / 2)[1][:, 0]
        return torch.outer(v, v)

    assert_gradients_match(projector, A, order=2)
    assert compare_gradients(lambda M: torch.linalg.eigh((M + M.mT) / 2)[1], A).verdict == "inconclusive"


def _root(theta):
    found = [scipy.optimize.brentq(lambda x, t=t: x**3 + x - t, -10, 10, xtol=1e-14) for t in theta.tolist()]
    return torch.from_numpy(np.array(found))


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "agree"), (1.01, "disagree")])
def test_a_scipy_root_with_a_hand_written_backward(factor, verdict):
    layer = function(_root, lambda v, x, theta: factor * v / (3 * x * x + 1))
    assert compare_gradients(layer, B, modes=("reverse",)).verdict == verdict


# --- other libraries, whose own warnings are not ours ---------------------------------------------


def _cubic(x, theta):
    return x**3 + x - theta


def _torchopt(**options):
    torchopt = pytest.importorskip("torchopt")

    @torchopt.diff.implicit.custom_root(_cubic, argnums=1, **options)
    def solve(x, theta):
        return newton(_cubic, lambda x, t: 3 * x * x + 1, theta.detach())

    return lambda theta: solve(torch.zeros_like(theta), theta)


@pytest.mark.filterwarnings("ignore")
def test_torchopt_is_right_but_for_second_derivatives_and_small_cotangents():
    # Found by this kit in torchopt 0.7.3: its linear solves are differentiated through their iterations, which is right
    # for the direct one only; and they stop at an absolute tolerance.
    torchopt = pytest.importorskip("torchopt")
    assert_gradients_match(_torchopt(), B, modes=("reverse",))
    assert compare_gradients(_torchopt(), B, modes=("reverse",), order=2).verdict == "disagree"
    direct = _torchopt(solve=torchopt.linear_solve.solve_inv())
    assert_gradients_match(direct, B, modes=("reverse",), order=2)
    singles = strategies.tensors((2,), dtype=torch.float32)
    assert check_layer(direct, singles, modes=("reverse",), max_examples=3).examples == 3
    with pytest.raises(GradientMismatch, match="cotangents of size"):
        check_layer(_torchopt(), singles, modes=("reverse",), max_examples=3)


def _torchdeq(**options):
    torchdeq = pytest.importorskip("torchdeq")
    deq = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=200, f_tol=1e-14, **options)
    return lambda theta: deq(lambda z: 0.5 * z.tanh() + theta, torch.zeros_like(theta))[0][-1]


@pytest.mark.filterwarnings("ignore")
def test_torchdeq_is_right_to_first_order_by_implicit_differentiation():
    # Found by this kit in torchdeq 0.1.0: a second derivative by implicit differentiation is zero.
    report = compare_gradients(_torchdeq(ift=True, b_tol=1e-14), B[None], modes=("reverse",), order=2)
    assert [c.verdict for c in report.comparisons] == ["agree", "disagree"]
    assert report.worst.found == 0
    # Without it the last step alone is differentiated, which is an approximation and meant as one.
    assert compare_gradients(_torchdeq(), B[None], modes=("reverse",)).verdict == "disagree"


@pytest.mark.filterwarnings("ignore")
def test_cvxpylayers_is_right_to_first_order():
    cvxpy = pytest.importorskip("cvxpy")
    layers = pytest.importorskip("cvxpylayers.torch")
    x, theta = cvxpy.Variable(3), cvxpy.Parameter(3)

    def layer(objective, **options):
        made = layers.CvxpyLayer(cvxpy.Problem(cvxpy.Minimize(objective)), parameters=[theta], variables=[x])
        return lambda t: made(t, solver_args=options)[0]

    distance = layer(cvxpy.sum_squares(x - theta) + cvxpy.sum_squares(x), eps=1e-12)
    assert_gradients_match(distance, B, modes=("reverse",))
    # Found by this kit in cvxpylayers 1.2.0: a second derivative is zero. The solver leaves the values good to 1e-4.
    logarithm = layer(cvxpy.sum(cvxpy.exp(x)) - theta @ x)
    report = compare_gradients(logarithm, B.abs(), modes=("reverse",), order=2, reference=torch.log, tol=1e-3)
    assert [c.verdict for c in report.comparisons] == ["agree", "disagree"]
    assert report.worst.found == 0
