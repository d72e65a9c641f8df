"""Penalty and Prox: the user's own functions, what they capture, and what is checked of them."""

import pytest
import torch
from torch import nn
from torch.func import hessian, jacfwd, jacrev, vmap

import implicitlayers as il
from tests.helpers.cases import ADJOINT, TIGHT, flat
from tests.helpers.problems import F64, each, normal, quadratic, spd
from tests.helpers.proximal import PROXIMAL, solve

N = 3
A, B = spd(N), normal(N, seed=1)
X0 = {"a": torch.zeros(2, dtype=F64), "b": [torch.zeros((), dtype=F64)]}
THETA = torch.tensor([0.7, -0.4, 1.1], dtype=F64)
LBFGS = il.LBFGS(**TIGHT)


def assert_near(ours, expected, tol=1e-9):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def objective(x):
    return quadratic(flat(x), A, B)


def minimizer(regularizer):
    return flat(il.argmin(objective, X0, regularizer=regularizer, solver=LBFGS, adjoint=ADJOINT).value)


def curved(v, theta):
    return (v - theta).cosh().sum()


def penalized(theta):
    return minimizer(il.Penalty(lambda x: curved(flat(x), theta)))


def written_inside(theta):
    whole = lambda x, t: objective(x) + curved(flat(x), t)  # noqa: E731
    return flat(il.argmin(whole, X0, theta, solver=LBFGS, adjoint=ADJOINT).value)


def test_a_penalty_is_as_good_as_its_place_in_the_objective():
    assert_near(penalized(THETA), written_inside(THETA))
    for mode in (jacrev, jacfwd):
        assert_near(mode(penalized)(THETA), mode(written_inside)(THETA))
    total = lambda f: lambda t: f(t).sin().sum()  # noqa: E731
    assert_near(hessian(total(penalized))(THETA), hessian(total(written_inside))(THETA))
    thetas = normal(3, N, seed=2)
    assert_near(vmap(penalized)(thetas), each(written_inside, thetas))
    assert_near(vmap(jacrev(penalized))(thetas), each(jacrev(written_inside), thetas))


def test_a_quadratic_penalty_is_ridge():
    lam = torch.tensor(0.6, dtype=F64)
    ours = lambda lam: minimizer(il.Penalty(lambda x: lam * flat(x).square().sum() / 2))  # noqa: E731
    ridge = lambda lam: minimizer(il.Ridge(lam))  # noqa: E731
    assert_near(ours(lam), ridge(lam))
    assert_near(jacrev(ours)(lam), jacrev(ridge)(lam))


def test_penalties_add_to_each_other_and_to_constraints():
    one, two = THETA[:1].clone().requires_grad_(), THETA[1:].clone().requires_grad_()
    regularizer = (
        il.Penalty(lambda x: curved(flat(x)[:1], one))
        + il.NonNegative()
        + il.Penalty(lambda x: curved(flat(x)[1:], two))
    )
    x = solve(objective, X0, regularizer=regularizer)
    x.sin().sum().backward()
    joint = THETA.clone().requires_grad_()
    y = solve(objective, X0, regularizer=il.NonNegative() + il.Penalty(lambda x: curved(flat(x), joint)))
    y.sin().sum().backward()
    assert 0 < (x == 0).sum() < N
    assert_near(x, y)
    assert_near(torch.cat([one.grad, two.grad]), joint.grad)


def test_parameters_of_a_module_get_gradients_from_a_penalty():
    module = nn.Linear(N, 2, dtype=F64)
    x = minimizer(il.Penalty(lambda x: module(flat(x)).square().sum() / 2))
    x.sum().backward()
    W, b = module.weight.detach(), module.bias.detach()
    oracle = lambda W, b: torch.linalg.solve(A + W.T @ W, B - W.T @ b).sum()  # noqa: E731
    assert_near(module.weight.grad, jacrev(oracle)(W, b))
    assert_near(module.bias.grad, jacrev(oracle, argnums=1)(W, b))


def test_gauss_newton_takes_a_penalty_that_declares_its_parts():
    model, loss = (lambda x: flat(x).sinh()), (lambda z, *_: z.square().sum() / 2)
    adjoint = il.Implicit(curvature="gauss_newton", on_failure="raise")
    data = il.Composite(lambda x, b: flat(x) - b, loss)

    def layer(b, penalty):
        return flat(il.argmin(data, X0, b, regularizer=penalty, solver=LBFGS, adjoint=adjoint).value)

    x = layer(B, il.Penalty(il.Composite(model, loss)))
    assert_near(x - B + x.sinh() * x.cosh(), torch.zeros(N, dtype=F64))
    # JᵀJ of the penalty is cosh², without the sinh² of its Hessian.
    slope = jacrev(lambda b: layer(b, il.Penalty(il.Composite(model, loss))))(B)
    assert_near(slope, torch.diag(1 / (1 + x.cosh() ** 2)))
    with pytest.raises(il.MisuseError, match="gauss_newton"):
        layer(B, il.Penalty(lambda x: loss(model(x))))


def soft_threshold(lam):
    """The lasso, as a user would write it."""

    def prox(y, step):
        shrink = lambda t: torch.where(t.abs() < step * lam, 0 * t, t - step * lam * t.sign())  # noqa: E731
        return {"a": shrink(y["a"]), "b": [shrink(y["b"][0])]}

    return il.Prox(prox, lambda x: lam * flat(x).abs().sum())


def test_a_prox_is_as_good_as_the_regularizer_that_it_rewrites():
    lam = torch.tensor(0.4, dtype=F64)
    ours = lambda lam: solve(objective, X0, regularizer=soft_threshold(lam))  # noqa: E731
    lasso = lambda lam: solve(objective, X0, regularizer=il.Lasso(lam))  # noqa: E731
    assert 0 < (lasso(lam) == 0).sum() < N
    assert_near(ours(lam), lasso(lam))
    assert_near(jacrev(ours)(lam), jacrev(lasso)(lam))
    assert_near(jacfwd(ours)(lam), jacrev(lasso)(lam))
    lams = torch.tensor([0.2, 0.4, 0.9], dtype=F64)
    assert_near(vmap(ours)(lams), each(lasso, lams))
    assert_near(vmap(jacrev(ours))(lams), each(jacrev(lasso), lams))
    one, two = (
        il.argmin(objective, X0, regularizer=r, solver=PROXIMAL).stats.objective
        for r in (soft_threshold(lam), il.Lasso(lam))
    )
    assert_near(one, two)


def test_a_prox_without_value_is_a_constraint():
    center = THETA.clone().requires_grad_()

    def onto_line(y, step):
        # {t·c}: y ↦ c cᵀy/‖c‖².
        return center * (center @ y) / center.square().sum()

    smooth = lambda x: (x - B).square().sum() / 2  # noqa: E731
    solution = il.argmin(smooth, torch.zeros(N, dtype=F64), regularizer=il.Prox(onto_line), solver=PROXIMAL)
    oracle = lambda c: c * (c @ B) / c.square().sum()  # noqa: E731
    assert_near(solution.value, oracle(THETA))
    assert_near(solution.stats.objective, smooth(solution.value))
    v = normal(N, seed=4)
    solution.value.backward(v)
    assert_near(center.grad, v @ jacrev(oracle)(THETA))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: il.Penalty(3.0), r"Penalty\(fn=...\) is a float, not a function"),
        (lambda: il.Prox(3.0), r"Prox\(prox=...\) is a float"),
        (lambda: il.Prox(lambda y, s: y, 3.0), r"Prox\(value=...\) is a float"),
        (lambda: il.Penalty(lambda x: x), "the penalty returned dict"),
        (lambda: il.Penalty(lambda x: x["a"]), r"the penalty returned shape \(2,\)"),
        (lambda: il.Penalty(lambda x: x["a"].sum().float()), "the penalty is torch.float32"),
        (lambda: il.Penalty(lambda x: (1 + torch.rand((), dtype=F64)) * (x["a"] + 1).sum()), "penalty is not determ"),
        (lambda: il.Prox(lambda y, s: y["a"]), "what the proximal map returned has the structure"),
        (lambda: il.Prox(lambda y, s: {"a": y["a"][:1], "b": y["b"]}), r"returned at x0\['a'\] is \(1,\)"),
        (lambda: il.Prox(lambda y, s: {"a": y["a"].float(), "b": y["b"]}), "the proximal map is torch.float32"),
        (lambda: il.Prox(lambda y, s: y, lambda x: x["a"]), r"the value of a Prox returned shape \(2,\)"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(il.MisuseError, match=message):
        il.argmin(objective, X0, regularizer=make(), solver=PROXIMAL)


def test_a_penalty_whose_captured_tensor_moved_on_is_named():
    theta = THETA.clone().requires_grad_()
    scale = torch.ones(N, dtype=F64)
    x = minimizer(il.Penalty(lambda x: (scale * (flat(x) - theta).cosh()).sum()))
    scale *= 2
    with pytest.raises(il.MisuseError, match=r"the penalty captures a tensor .* changed in place"):
        x.sum().backward()
