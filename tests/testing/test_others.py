"""The kit on layers of others: PyTorch's linear algebra, SciPy behind a Function, and libraries where installed."""

import numpy as np
import pytest
import scipy.optimize
import torch

from implicitlayers.testing import assert_gradients_match, check_layer, compare_gradients, strategies
from tests.testing.planted import function, systems

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


def test_torchopt_custom_root():
    torchopt = pytest.importorskip("torchopt")

    def optimality(x, theta):
        return x**3 + x - theta

    @torchopt.diff.implicit.custom_root(optimality, argnums=1)
    def solve(x, theta):
        return _root(theta.detach())

    assert_gradients_match(lambda theta: solve(torch.zeros(3, dtype=F64), theta), B, modes=("reverse",))


def test_torchdeq():
    torchdeq = pytest.importorskip("torchdeq")
    forward = {"f_solver": "fixed_point_iter", "f_max_iter": 200, "f_tol": 1e-14}
    deq = torchdeq.get_deq(ift=True, b_max_iter=200, b_tol=1e-14, **forward)

    def layer(theta):
        return deq(lambda z: 0.5 * z.tanh() + theta, torch.zeros(1, 3, dtype=F64))[0][-1]

    assert_gradients_match(layer, B[None], modes=("reverse",))


def test_cvxpylayers():
    cvxpy = pytest.importorskip("cvxpy")
    layers = pytest.importorskip("cvxpylayers.torch")
    x, theta = cvxpy.Variable(3), cvxpy.Parameter(3)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - theta) + cvxpy.sum_squares(x)))
    layer = layers.CvxpyLayer(problem, parameters=[theta], variables=[x])
    # The default solver stops at 1e-4 or so; whether its differences can be believed is for the kit to say.
    assert compare_gradients(lambda t: layer(t)[0], B, modes=("reverse",), tol=1e-3).verdict != "disagree"
