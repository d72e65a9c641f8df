"""What an objective may be, and what is said of one that may not."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.problems import F64

ZERO = torch.zeros(5, dtype=F64)


def lasso(seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(20, 5, generator=generator, dtype=F64)
    y = X @ torch.tensor([2.0, -1, 0, 0, 0], dtype=F64) + 0.1 * torch.randn(20, generator=generator, dtype=F64)
    return lambda w: (X @ w - y).square().mean() / 2 + 0.3 * w.abs().sum()


@pytest.mark.parametrize("solver", [il.LBFGS(), il.Newton()], ids=["lbfgs", "newton"])
@pytest.mark.parametrize("seed", range(6))
def test_a_kink_does_not_pass_for_convergence(solver, seed):
    # The gradient of an absolute value jumps, so the secant over a tiny step across it is as large as one likes.
    solution = il.argmin(lasso(seed), ZERO, solver=solver, on_failure="ignore")
    assert solution.stats.residual > 1e-2
    assert solution.status != il.Status.CONVERGED


def test_complex_captured_tensors_get_their_gradient():
    c = torch.tensor(1 + 2j, dtype=torch.complex128, requires_grad=True)
    x = il.argmin(lambda x: (x - c).abs().square(), torch.tensor(0.0, dtype=F64)).value
    torch.testing.assert_close(torch.autograd.grad(x, c)[0], torch.tensor(1 + 0j, dtype=torch.complex128))


def test_tensors_captured_from_inference_mode():
    with torch.inference_mode():
        target = torch.arange(5, dtype=F64)
    value = il.argmin(lambda x: (x - target).square().sum(), ZERO).value
    torch.testing.assert_close(value, target.clone())


def test_what_is_captured_must_not_be_changed():
    normalization, X = torch.nn.BatchNorm1d(5).double(), torch.randn(8, 5, dtype=F64)
    with pytest.raises(il.MisuseError, match=r"changes a tensor that it captures(?s:.*)module\.eval\(\)"):
        il.argmin(lambda w: (normalization(X) @ w - 1).square().sum() + w.square().sum(), ZERO)
    normalization.eval()
    il.argmin(lambda w: (normalization(X) @ w - 1).square().sum() + w.square().sum(), ZERO)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(il.MisuseError, match=r"too coarse for a solution(?s:.*)x0\.float\(\)"):
        il.argmin(lambda x: x.square().sum(), ZERO.to(dtype))


def test_regularizers_take_the_unknowns_dtype():
    strength, anchor = torch.tensor([1.0, 2.0], dtype=F64), torch.ones(2, dtype=F64)
    regularizer = il.Ridge(strength) + il.Proximal(anchor, 1.0)
    x = il.argmin(lambda x: (x - 3).square().sum() / 2, torch.zeros(2), regularizer=regularizer).value
    torch.testing.assert_close(x, torch.tensor([4 / 3, 1.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", ["a", None, {"w": 1.0}, torch.tensor([1j, 1j])])
def test_strengths_that_are_none(strength):
    with pytest.raises(il.MisuseError, match="Ridge's lam"):
        il.argmin(lambda x: x.square().sum(), torch.zeros(2, dtype=F64), regularizer=il.Ridge(strength))


def test_unrolled_returns_a_tensor_of_its_own():
    start = torch.ones(2, dtype=F64)
    il.argmin(lambda x: (x - 1).square().sum(), start, adjoint=il.Unrolled()).value.add_(1)
    assert torch.equal(start, torch.ones(2, dtype=F64))


def test_a_start_that_requires_a_gradient_nobody_records():
    start = torch.zeros(2, dtype=F64, requires_grad=True)
    with torch.no_grad():
        value = il.argmin(lambda x: (x - 1).square().sum(), start).value
    torch.testing.assert_close(value, torch.ones(2, dtype=F64))


def test_a_linear_objective_has_a_singular_curvature():
    solver = il.Newton(il.Dense(), max_steps=5)
    solution = il.argmin(lambda x: x.sum(), torch.zeros(2, dtype=F64), solver=solver, on_failure="ignore")
    assert solution.status != il.Status.CONVERGED
