"""Problems with sparse answers: values against scikit-learn, derivatives against closed forms on a fixed support."""

import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression
from torch.func import hessian, jacfwd, jacrev

import implicitlayers as il
from implicitlayers.testing import assert_gradients_match
from tests.helpers.problems import F64, normal
from tests.helpers.proximal import PROXIMAL, prox, solve

M, N = 30, 6
X = normal(M, N, seed=1)
TRUTH = torch.tensor([1.5, -2.0, 0.0, 0.0, 0.8, 0.0], dtype=F64)
Y = X @ TRUTH + 0.3 * normal(M, seed=2)
LABELS = (X @ TRUTH + normal(M, seed=3) > 0).to(F64)
LAM = torch.tensor(0.25, dtype=F64)


def assert_near(ours, expected, tol=1e-9):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def squares(w, X, y):
    return (X @ w - y).square().mean() / 2


def start():
    return torch.zeros(N, dtype=F64)


def lasso(X, y, lam):
    return solve(squares, start(), X, y, regularizer=il.Lasso(lam))


def lasso_on(S, signs, X, y, lam):
    """X_SᵀX_S β = X_Sᵀy - mλ sign(β), and 0 off S."""
    beta = torch.linalg.solve(X[:, S].T @ X[:, S], X[:, S].T @ y - len(y) * lam * signs)
    return torch.zeros(X.shape[1], dtype=F64).index_put((S.nonzero()[:, 0],), beta)


def test_lasso_by_scikit_learn():
    theirs = Lasso(alpha=0.25, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X.numpy(), Y.numpy())
    ours = lasso(X, Y, LAM)
    assert_near(ours, torch.from_numpy(theirs.coef_))
    assert 0 < (ours == 0).sum() < N


def test_elastic_net_by_scikit_learn():
    alpha, ratio = 0.3, 0.6
    model = ElasticNet(alpha=alpha, l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=100_000)
    theirs = torch.from_numpy(model.fit(X.numpy(), Y.numpy()).coef_)
    l1, l2 = alpha * ratio, alpha * (1 - ratio)
    for regularizer in (il.ElasticNet(l1, l2), il.Lasso(l1) + il.Ridge(l2), il.Ridge(l2) + il.Lasso(l1)):
        assert_near(solve(squares, start(), X, Y, regularizer=regularizer), theirs)
    assert 0 < (theirs == 0).sum() < N


def test_sparse_logistic_regression_with_an_intercept_by_scikit_learn():
    # scikit-learn: C Σ loss + ‖w‖₁, where the intercept goes free.
    C = 0.4
    model = LogisticRegression(l1_ratio=1, C=C, solver="saga", tol=1e-12, max_iter=100_000)
    model.fit(X.numpy(), LABELS.numpy())

    def objective(p):
        logits = X @ p["w"] + p["b"]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, LABELS, reduction="sum")

    x0 = {"w": start(), "b": torch.zeros((), dtype=F64)}
    ours = solve(objective, x0, regularizer=il.Lasso({"w": 1 / C, "b": 0.0}))
    theirs = torch.cat([torch.from_numpy(model.coef_[0]), torch.from_numpy(model.intercept_)])
    # SAGA is stochastic, and stops where an epoch moves nothing by more than its own tolerance.
    assert_near(ours, theirs, tol=1e-8)
    assert 0 < (ours == 0).sum() < N


def test_the_objective_reported_is_that_of_smooth_and_nonsmooth_part():
    solution = il.argmin(squares, start(), X, Y, regularizer=il.Lasso(LAM) + il.Ridge(0.1), solver=PROXIMAL)
    w = solution.value
    assert_near(solution.stats.objective, squares(w, X, Y) + 0.25 * w.abs().sum() + 0.05 * w.square().sum())


def test_lasso_derivatives_on_a_fixed_support():
    beta = lasso(X, Y, LAM)
    S, signs = beta != 0, beta.sign()[beta != 0]
    oracle = lambda X, y, lam: lasso_on(S, signs, X, y, lam)  # noqa: E731
    assert_near(beta, oracle(X, Y, LAM))
    # The closed form by hand: dβ_S/dλ = -m (X_SᵀX_S)⁻¹ sign(β_S).
    by_hand = torch.zeros(N, dtype=F64)
    by_hand[S] = -M * torch.linalg.solve(X[:, S].T @ X[:, S], signs)
    for mode in (jacrev, jacfwd):
        assert_near(mode(lasso, argnums=2)(X, Y, LAM), by_hand)
        for argnum in (0, 1):
            assert_near(mode(lasso, argnums=argnum)(X, Y, LAM), jacrev(oracle, argnums=argnum)(X, Y, LAM))


def test_lasso_second_derivatives_on_a_fixed_support():
    beta = lasso(X, Y, LAM)
    S, signs = beta != 0, beta.sign()[beta != 0]

    def scaled(f):
        return lambda s: f(X * s[0], Y * s[1], LAM * s[2]).sin().sum()

    ones = torch.ones(3, dtype=F64)
    ours = hessian(scaled(lasso))(ones)
    expected = jacrev(jacrev(scaled(lambda X, y, lam: lasso_on(S, signs, X, y, lam))))(ones)
    assert expected.abs().min() > 1e-3
    assert_near(ours, expected)


STRENGTHS = {
    "lasso": lambda s: il.Lasso(s),
    "lasso-elementwise": lambda s: il.Lasso(s * torch.linspace(0.5, 1.5, N, dtype=F64)),
    "elastic-net": lambda s: il.ElasticNet(s, s),
    "group-lasso": lambda s: il.GroupLasso(s),
    "anchored": lambda s: il.Lasso(0.2) + il.Proximal(s * TRUTH, 0.5 + s),
}


@pytest.mark.parametrize("make", STRENGTHS.values(), ids=STRENGTHS.keys())
def test_derivatives_in_strengths_by_finite_differences(make):
    def layer(s):
        return solve(squares, start(), X, Y, regularizer=make(s))

    assert jacrev(layer)(LAM).abs().max() > 0.1
    assert_gradients_match(layer, LAM, modes=("reverse", "forward"))


def test_anchor_of_a_soft_threshold():
    # argmin λ₂/2 ‖x - θ‖² + λ₁ ‖x‖₁ = S(θ, λ₁/λ₂), whose derivatives are known without any solve.
    theta = torch.tensor([1.0, -0.7, 0.1, 2.0], dtype=F64)
    l1, l2 = torch.tensor(0.6, dtype=F64), torch.tensor(2.0, dtype=F64)

    def layer(theta, l1, l2):
        zero = lambda x: 0.0 * x.sum()  # noqa: E731
        return solve(zero, torch.ones(4, dtype=F64), regularizer=il.Lasso(l1) + il.Proximal(theta, l2))

    def oracle(theta, l1, l2):
        return prox(il.Lasso(l1 / l2), theta)

    assert_near(layer(theta, l1, l2), oracle(theta, l1, l2))
    for argnum in range(3):
        expected = jacrev(oracle, argnums=argnum)(theta, l1, l2)
        assert_near(jacrev(layer, argnums=argnum)(theta, l1, l2), expected)
        assert_near(
            jacfwd(jacrev(layer, argnums=argnum), argnums=2)(theta, l1, l2),
            jacfwd(jacrev(oracle, argnums=argnum), argnums=2)(theta, l1, l2),
        )


def test_group_lasso_drops_features_and_keeps_their_derivatives_at_zero():
    targets = X @ torch.stack([TRUTH, TRUTH.flip(0) * (TRUTH != 0)], 1) + 0.3 * normal(M, 2, seed=5)

    def layer(lam):
        objective = lambda W: (X @ W - targets).square().sum() / (2 * M)  # noqa: E731
        return solve(objective, torch.zeros(N, 2, dtype=F64), regularizer=il.GroupLasso(lam, dim=1)).reshape(N, 2)

    lam = torch.tensor(0.4, dtype=F64)
    W, slope = layer(lam), jacrev(layer)(lam)
    dropped = (W == 0).all(1)
    assert 0 < dropped.sum() < N
    assert bool((W[~dropped] != 0).all())
    assert (slope[dropped] == 0).all()
    assert_gradients_match(layer, lam, modes=("reverse",))
    # Stationarity: the gradient balances λ times the unit vector of each kept group, and is shorter for dropped ones.
    G = X.T @ (X @ W - targets) / M
    assert_near(G[~dropped], -lam * W[~dropped] / W[~dropped].norm(dim=1, keepdim=True))
    assert (G[dropped].norm(dim=1) < lam).all()
