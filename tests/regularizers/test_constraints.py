"""Constrained problems: closed forms, SciPy's solver with bounds, derivatives that follow the active set."""

import scipy.optimize
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitlayers as il
from implicitlayers.problem import Posed
from implicitlayers.terms import ObjectiveTerm
from implicitlayers.testing import assert_gradients_match
from tests.helpers.problems import F64, each, normal, quadratic, spd
from tests.helpers.proximal import nonsmooth_of, prox, solve

N = 5
A, B = spd(N), 3 * normal(N, seed=1)
BATCH = 3 * normal(3, N, seed=2)


def assert_near(ours, expected, tol=1e-9):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def layer(b, regularizer):
    return solve(quadratic, torch.full((N,), 0.1, dtype=F64), A, b, regularizer=regularizer)


def projected(b, regularizer):
    """With the identity for A the minimizer is the projection of b."""
    near = lambda x, b: (x - b).square().sum() / 2  # noqa: E731
    return solve(near, torch.zeros(N, dtype=F64), b, regularizer=regularizer)


def test_box_by_scipy():
    lower, upper = -0.3, 0.8
    bounds = [(lower, upper)] * N
    theirs = scipy.optimize.minimize(
        lambda x: x @ A.numpy() @ x / 2 - B.numpy() @ x,
        [0.1] * N,
        jac=lambda x: A.numpy() @ x - B.numpy(),
        method="trust-constr",
        bounds=bounds,
        options={"gtol": 1e-13, "xtol": 1e-15, "barrier_tol": 1e-13, "maxiter": 2000},
    ).x
    # An interior point method stays off the bounds by its last barrier.
    assert_near(layer(B, il.Box(lower, upper)), torch.from_numpy(theirs), tol=1e-8)


def box_oracle(x, b, lower, upper):
    """With the active set of x: the free coordinates solve A_FF x_F = b_F - A_FH x_H."""
    low, high = x == lower, x == upper
    free = ~(low | high)
    at = torch.where(low, lower, torch.where(high, upper, torch.zeros_like(b)))
    F = free.to(F64)
    matrix = F[:, None] * A * F + torch.diag(1 - F)
    return torch.linalg.solve(matrix, F * (b - A @ at)) + (1 - F) * at


def test_box_follows_its_active_set():
    lower, upper = torch.linspace(-0.5, -0.1, N, dtype=F64), torch.linspace(0.2, 0.9, N, dtype=F64)

    def ours(b, lower, upper):
        return layer(b, il.Box(lower, upper))

    x = ours(B, lower, upper)
    assert (x == lower).any()
    assert (x == upper).any()
    assert ((x > lower) & (x < upper)).any()
    oracle = lambda b, lower, upper: box_oracle(x, b, lower, upper)  # noqa: E731
    assert_near(x, oracle(B, lower, upper))
    for argnum in range(3):
        expected = jacrev(oracle, argnums=argnum)(B, lower, upper)
        for mode in (jacrev, jacfwd):
            assert_near(mode(ours, argnums=argnum)(B, lower, upper), expected)


def test_jacobians_of_projections_are_projectors():
    b = torch.tensor([1.0, 0.7, -0.4, 0.2, -2.0], dtype=F64)
    for regularizer in (il.Box(-0.5, 0.5), il.NonNegative(), il.Simplex(), il.L1Ball(1.0), il.L2Ball(1.0)):
        expected = jacrev(lambda b, r=regularizer: prox(r, b))(b)
        assert_near(projected(b, regularizer), prox(regularizer, b))
        assert_near(jacrev(lambda b, r=regularizer: projected(b, r))(b), expected)
        assert_near(jacfwd(lambda b, r=regularizer: projected(b, r))(b), expected)
    S = (projected(b, il.Simplex()) > 0).to(F64)
    assert 1 < S.sum() < N
    assert_near(jacrev(lambda b: projected(b, il.Simplex()))(b), torch.diag(S) - torch.outer(S, S) / S.sum())


def simplex_oracle(x, b, total):
    """On the support: A_SS x + ν1 = b_S, 1ᵀx = total."""
    S = x > 0
    k = int(S.sum())
    K = torch.zeros(k + 1, k + 1, dtype=F64)
    K[:k, :k], K[k, :k], K[:k, k] = A[S][:, S], 1, 1
    return torch.zeros(N, dtype=F64).index_put(
        (S.nonzero()[:, 0],), torch.linalg.solve(K, torch.cat([b[S], total[None]]))[:k]
    )


def test_simplex_by_its_kkt_system():
    total = torch.tensor(1.5, dtype=F64)
    ours = lambda b, total: layer(b, il.Simplex(total))  # noqa: E731
    x = ours(B, total)
    assert 1 < (x > 0).sum() < N
    oracle = lambda b, total: simplex_oracle(x, b, total)  # noqa: E731
    assert_near(x, oracle(B, total))
    for argnum in (0, 1):
        expected = jacrev(oracle, argnums=argnum)(B, total)
        assert_near(jacrev(ours, argnums=argnum)(B, total), expected)
        assert_near(jacfwd(ours, argnums=argnum)(B, total), expected)


def test_l2_ball_is_ridge_with_the_multiplier_as_strength():
    r = torch.tensor(0.8, dtype=F64)
    ours = lambda b, r: layer(b, il.L2Ball(r))  # noqa: E731
    x = ours(B, r)
    assert_near(x.norm(), r)
    # KKT: (A + μI) x = b and ‖x‖² = r²; both differentiated.
    mu = ((B - A @ x) @ x) / r**2
    K = torch.zeros(N + 1, N + 1, dtype=F64)
    K[:N, :N], K[:N, N], K[N, :N] = A + mu * torch.eye(N, dtype=F64), x, x
    inverse = torch.linalg.inv(K)
    assert_near((A + mu * torch.eye(N, dtype=F64)) @ x, B)
    for mode in (jacrev, jacfwd):
        assert_near(mode(ours)(B, r), inverse[:N, :N])
        assert_near(mode(ours, argnums=1)(B, r), inverse[:N, N] * r)


def test_l2_ball_second_derivatives():
    # min -bᵀx over the ball: x = r b/‖b‖, curved in b. A little curvature keeps the solution the same.
    def ours(b, r):
        linear = lambda x, b: (0.1 * x @ x / 2) - b @ x  # noqa: E731
        return solve(linear, torch.full((N,), 0.1, dtype=F64), b, regularizer=il.L2Ball(r))

    oracle = lambda b, r: r * b / b.norm()  # noqa: E731
    r = torch.tensor(0.8, dtype=F64)
    assert_near(ours(B, r), oracle(B, r))
    total = lambda f: lambda b, r: f(b, r).sin().sum()  # noqa: E731
    for argnums in ((0, 0), (0, 1), (1, 1)):
        expected = jacrev(jacrev(total(oracle), argnums=argnums[0]), argnums=argnums[1])(B, r)
        assert_near(jacfwd(jacrev(total(ours), argnums=argnums[0]), argnums=argnums[1])(B, r), expected)


def test_l1_ball_by_finite_differences():
    r = torch.tensor(1.1, dtype=F64)
    x = layer(B, il.L1Ball(r))
    assert_near(x.abs().sum(), r)
    assert 0 < (x.abs() > 1e-12).sum() < N
    assert_gradients_match(lambda b, r: layer(b, il.L1Ball(r)), B, r, modes=("reverse",))


def test_entropy_on_the_simplex_is_softmax():
    theta = torch.tensor([0.5, -1.0, 0.3, 1.2], dtype=F64)

    def ours(theta):
        objective = lambda p, theta: torch.xlogy(p, p).sum() - theta @ p  # noqa: E731
        return solve(objective, torch.full((4,), 0.25, dtype=F64), theta, regularizer=il.Simplex())

    p = theta.softmax(0)
    assert_near(ours(theta), p)
    assert_near(jacrev(ours)(theta), torch.diag(p) - torch.outer(p, p))
    assert_near(jacfwd(ours)(theta), torch.diag(p) - torch.outer(p, p))
    ours_total, total = (lambda f: lambda t: f(t).sin().sum())(ours), lambda t: t.softmax(0).sin().sum()
    assert_near(hessian(ours_total)(theta), jacrev(jacrev(total))(theta))
    thetas = torch.stack([theta, -theta, theta / 2])
    assert_near(vmap(ours)(thetas), thetas.softmax(1))
    assert_near(vmap(jacrev(ours))(thetas), each(jacrev(lambda t: t.softmax(0)), thetas))


def test_rows_on_a_simplex_each():
    scores = normal(3, 4, seed=7)
    objective = lambda P, s: (P - s).square().sum() / 2  # noqa: E731
    P = solve(objective, torch.zeros(3, 4, dtype=F64), scores, regularizer=il.Simplex(dim=-1)).reshape(3, 4)
    assert_near(P, each(lambda s: prox(il.Simplex(), s), scores))


def test_lanes_have_active_sets_of_their_own():
    bs, radii = BATCH, torch.tensor([0.3, 0.9, 2.0], dtype=F64)
    ours = lambda b, r: layer(b, il.Box(-r, r))  # noqa: E731
    pairs = list(zip(bs, radii, strict=True))
    expected = torch.stack([ours(b, r) for b, r in pairs])
    assert len({tuple(row) for row in (expected.abs() == radii[:, None]).tolist()}) == 3
    assert_near(vmap(ours)(bs, radii), expected)
    slopes = torch.stack([jacrev(ours, argnums=1)(b, r) for b, r in pairs])
    assert_near(vmap(jacrev(ours, argnums=1))(bs, radii), slopes)
    assert_near(grad(lambda r: vmap(ours)(bs, r).sin().sum())(radii), (expected.cos() * slopes).sum(1))


def test_a_smooth_penalty_and_a_constraint_add():
    x = layer(B, il.NonNegative() + il.Ridge(0.7))
    F = (x > 0).to(F64)
    matrix = F[:, None] * (A + 0.7 * torch.eye(N, dtype=F64)) * F + torch.diag(1 - F)
    assert 0 < F.sum() < N
    assert_near(x, torch.linalg.solve(matrix, F * B))
    assert (A @ x - B >= -1e-9)[F == 0].all()


def test_solvers_can_ask_for_the_bounds():
    x, upper = torch.zeros(2, 3, dtype=F64), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=F64)
    term = ObjectiveTerm(lambda x: x.sum(), ())

    def bounds(regularizer, lanes=()):
        nonsmooth, tensors = nonsmooth_of(regularizer, x[0])
        return Posed((term,), nonsmooth).bind(tensors, lanes).bounds(x if lanes else x[0])

    lower, above = bounds(il.Box(-1.0, upper[0]))
    assert_near(lower, torch.full((3,), -1.0, dtype=F64), tol=0)
    assert_near(above, upper[0], tol=0)
    lower, above = bounds(il.NonNegative())
    assert (lower == 0).all()
    assert (above == torch.inf).all()
    assert lower.shape == above.shape == (3,)
    assert bounds(il.Simplex()) is None
    nonsmooth, (one, _) = nonsmooth_of(il.Box(-1.0, upper[0]), x[0])
    lower, above = Posed((term,), nonsmooth).bind([one, upper], ((None, 0),)).bounds(x)
    assert_near(lower, torch.full((2, 3), -1.0, dtype=F64), tol=0)
    assert_near(above, upper, tol=0)
    assert Posed((term,)).bind([]).bounds(x[0]) is None
