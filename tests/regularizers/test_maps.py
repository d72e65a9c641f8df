"""The proximal maps themselves: closed forms, SciPy, the laws of proximal maps, and their derivatives."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import jacfwd, jacrev, vmap

import implicitlayers as il
from implicitlayers.testing import assert_gradients_match
from tests.helpers.cases import flat
from tests.helpers.problems import F64, each, normal
from tests.helpers.proximal import nonsmooth_of, projected_onto_simplex, prox, value

N, STEP = 5, 0.7
Y = 2 * normal(N, seed=1)
POINTS = 2 * normal(20, N, seed=2)
LAM = torch.tensor([0.5, 1.5, 0.2, 0.9, 0.0], dtype=F64)


def assert_near(ours, expected, tol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


REGULARIZERS = {
    "lasso": il.Lasso(0.8),
    "lasso-elementwise": il.Lasso(LAM),
    "elastic-net": il.ElasticNet(LAM, 0.6),
    "group-lasso": il.GroupLasso(1.3),
    "box": il.Box(-0.4, LAM),
    "below": il.Box(upper=0.3),
    "non-negative": il.NonNegative(),
    "simplex": il.Simplex(1.7),
    "l1-ball": il.L1Ball(1.2),
    "l2-ball": il.L2Ball(1.2),
    "prox": il.Prox(lambda y, step: y / (1 + step), lambda x: x.square().sum() / 2),
}
CONSTRAINTS = ("box", "below", "non-negative", "simplex", "l1-ball", "l2-ball")
EVERY = pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=REGULARIZERS.keys())


def feasible(name, z):
    """A point of the set, made of any point by other means than its projection."""
    length = z.norm()
    return {
        "box": lambda: -0.4 + (LAM + 0.4) * z.sigmoid(),
        "below": lambda: 0.3 - z.square(),
        "non-negative": lambda: z.square(),
        "simplex": lambda: 1.7 * (3 * z).softmax(0),
        "l1-ball": lambda: 1.2 * z / z.abs().sum() * length.sigmoid(),
        "l2-ball": lambda: 1.2 * z / length * length.sigmoid(),
    }[name]()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_no_point_is_better_than_the_maps_by_less_than_strong_convexity_asks(name):
    # φ(z) = r(z) + ‖z - y‖²/(2s) is 1/s-strongly convex: φ(z) ≥ φ(x) + ‖z - x‖²/(2s) for all z only at its minimizer x.
    regularizer = REGULARIZERS[name]

    def phi(z, y):
        return value(regularizer, z) + (z - y).square().sum() / (2 * STEP)

    for y in POINTS[:6]:
        x = prox(regularizer, y, STEP)
        for z in POINTS:
            for share in (1.0, 1e-3):
                z_near = x + share * ((feasible(name, z) if name in CONSTRAINTS else z) - x)
                gap = phi(z_near, y) - phi(x, y) - (z_near - x).square().sum() / (2 * STEP)
                assert gap > -1e-12


@EVERY
def test_firmly_nonexpansive(regularizer):
    images = each(lambda y: prox(regularizer, y, STEP), POINTS)
    for i in range(len(POINTS)):
        moved, by = images - images[i], POINTS - POINTS[i]
        assert bool(((moved * by).sum(-1) >= (moved * moved).sum(-1) - 1e-12).all())


def constrained(y, **constraints):
    """The projection of y by sequential quadratic programming."""
    start = np.full(len(y), 0.1)
    options = {"ftol": 1e-15, "maxiter": 500}
    distance = lambda x: ((x - y) ** 2).sum() / 2  # noqa: E731
    found = scipy.optimize.minimize(
        distance, start, jac=lambda x: x - y, method="SLSQP", options=options, **constraints
    )
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("y", [Y, Y / 10, POINTS[0], POINTS[1]], ids=str)
def test_projections_by_scipy(y):
    point = y.numpy()
    total = {"type": "eq", "fun": lambda x: x.sum() - 1.7}
    round_ball = {"type": "ineq", "fun": lambda x: 1.44 - (x * x).sum()}
    # SLSQP stops where its objective, a squared distance, changes by rounding: half the digits.
    tol = 1e-7
    assert_near(prox(REGULARIZERS["simplex"], y), constrained(point, bounds=[(0, None)] * N, constraints=total), tol)
    assert_near(prox(REGULARIZERS["l2-ball"], y), constrained(point, constraints=round_ball), tol)
    bounds = list(zip([-0.4] * N, LAM.tolist(), strict=True))
    assert_near(prox(REGULARIZERS["box"], y), constrained(point, bounds=bounds), tol)
    assert_near(prox(REGULARIZERS["non-negative"], y), constrained(point, bounds=[(0, None)] * N), tol)
    # |x| = p + q with x = p - q, which is smooth in (p, q).
    split = scipy.optimize.minimize(
        lambda v: ((v[:N] - v[N:] - point) ** 2).sum() / 2,
        np.full(2 * N, 0.05),
        jac=lambda v: np.concatenate([v[:N] - v[N:] - point, point - v[:N] + v[N:]]),
        method="SLSQP",
        bounds=[(0, None)] * (2 * N),
        constraints={"type": "ineq", "fun": lambda v: 1.2 - v.sum(), "jac": lambda v: -np.ones(2 * N)},
        options={"ftol": 1e-15, "maxiter": 500},
    ).x
    assert_near(prox(REGULARIZERS["l1-ball"], y), torch.from_numpy(split[:N] - split[N:]), tol)


def test_simplex_by_trying_every_support():
    for y in POINTS:
        assert_near(prox(il.Simplex(0.9), y), projected_onto_simplex(y, 0.9))
        outside = y if y.abs().sum() > 1.2 else 3 * y
        assert_near(prox(il.L1Ball(1.2), outside), outside.sign() * projected_onto_simplex(outside.abs(), 1.2))


def test_closed_forms():
    shrunk = Y.sign() * (Y.abs() - STEP * LAM).clamp_min(0)
    assert_near(prox(il.Lasso(LAM), Y, STEP), shrunk)
    assert_near(prox(il.ElasticNet(LAM, 0.6), Y, STEP), shrunk / (1 + STEP * 0.6))
    assert_near(prox(il.GroupLasso(1.3), Y, STEP), Y * (1 - STEP * 1.3 / Y.norm()))
    assert_near(prox(il.GroupLasso(1.3, weighted=True), Y, STEP), Y * (1 - STEP * 1.3 * N**0.5 / Y.norm()))
    assert_near(prox(il.Box(-0.4, LAM), Y), Y.clamp(torch.full_like(Y, -0.4), LAM))
    assert_near(prox(il.L2Ball(1.2), Y), 1.2 * Y / Y.norm())
    assert_near(prox(il.L2Ball(9.0), Y), Y, tol=0)
    assert_near(prox(il.L1Ball(99.0), Y), Y, tol=0)


def test_values():
    assert_near(value(il.Lasso(LAM), Y), (LAM * Y.abs()).sum())
    assert_near(value(il.ElasticNet(LAM, 0.6), Y), (LAM * Y.abs()).sum() + 0.3 * Y.square().sum())
    assert_near(value(il.GroupLasso(1.3), Y), 1.3 * Y.norm())
    assert_near(value(il.GroupLasso(1.3, weighted=True), Y), 1.3 * N**0.5 * Y.norm())
    for name in CONSTRAINTS:
        assert value(REGULARIZERS[name], prox(REGULARIZERS[name], Y)) == 0


@pytest.mark.parametrize("y", [Y, Y / 10], ids=["far", "near"])
def test_moreau(y):
    # prox_{s r}(y) = y - s prox_{r*/s}(y/s), where r* is the indicator of the dual norm's ball, or of a polar cone.
    assert_near(prox(il.Lasso(LAM), y, STEP), y - STEP * prox(il.Box(-LAM, LAM), y / STEP))
    assert_near(prox(il.GroupLasso(1.3), y, STEP), y - STEP * prox(il.L2Ball(1.3), y / STEP))
    assert_near(prox(il.NonNegative(), y), y - prox(il.Box(upper=0.0), y))


def test_what_is_off_the_support_is_exactly_zero():
    assert (prox(il.Lasso(LAM), Y / 10)[LAM > 0.3] == 0).all()
    assert (prox(il.GroupLasso(9.0), Y) == 0).all()
    x = prox(il.Simplex(), 3 * Y)
    assert (x == 0).sum() > 1
    assert abs(float(x.sum()) - 1) < 1e-15
    assert bool((x >= 0).all())
    x = prox(il.L1Ball(0.5), Y)
    assert (x == 0).sum() > 1
    assert abs(float(x.abs().sum()) - 0.5) < 1e-15


def test_jacobians_are_projectors_on_what_is_free():
    eye = torch.eye(N, dtype=F64)
    S = prox(il.Lasso(LAM), Y) != 0
    assert_near(jacrev(lambda y: prox(il.Lasso(LAM), y))(Y), torch.diag(S.to(F64)))
    lower, diagonal = torch.full_like(Y, -0.4), lambda mask: torch.diag(mask.to(F64))
    below, above = lower > Y, Y > LAM
    assert_near(jacrev(lambda y: prox(REGULARIZERS["box"], y))(Y), diagonal(~below & ~above))
    assert_near(jacrev(lambda lower: prox(il.Box(lower, LAM), Y))(lower), diagonal(below))
    assert_near(jacrev(lambda upper: prox(il.Box(lower, upper), Y))(LAM), diagonal(above))
    x = prox(il.Simplex(1.7), Y)
    s = (x > 0).to(F64)
    assert 1 < s.sum() < N
    assert_near(jacrev(lambda y: prox(il.Simplex(1.7), y))(Y), torch.diag(s) - torch.outer(s, s) / s.sum())
    x = prox(il.L1Ball(1.2), Y)
    s = x.sign()
    assert 1 < s.abs().sum() < N
    assert_near(jacrev(lambda y: prox(il.L1Ball(1.2), y))(Y), torch.diag(s * s) - torch.outer(s, s) / s.abs().sum())
    assert_near(jacrev(lambda r: prox(il.L1Ball(r), Y))(torch.tensor(1.2, dtype=F64)), s / s.abs().sum())
    u = Y / Y.norm()
    assert_near(jacrev(lambda y: prox(il.L2Ball(1.2), y))(Y), 1.2 / Y.norm() * (eye - torch.outer(u, u)))
    assert_near(jacrev(lambda r: prox(il.L2Ball(r), Y))(torch.tensor(1.2, dtype=F64)), u)


LEARNABLE = {
    "lasso": (lambda s: il.Lasso(s), LAM + 0.1),
    "elastic-net": (lambda s: il.ElasticNet(s, s / 2), LAM + 0.1),
    "group-lasso": (lambda s: il.GroupLasso(s, weighted=True), torch.tensor(0.6, dtype=F64)),
    "box": (lambda s: il.Box(-s, s), LAM + 0.1),
    "simplex": (lambda s: il.Simplex(s), torch.tensor(1.7, dtype=F64)),
    "l1-ball": (lambda s: il.L1Ball(s), torch.tensor(1.2, dtype=F64)),
    "l2-ball": (lambda s: il.L2Ball(s), torch.tensor(1.2, dtype=F64)),
}


@pytest.mark.parametrize("name", LEARNABLE)
@pytest.mark.parametrize("where", [Y, Y / 20], ids=["far", "near"])
def test_derivatives_by_finite_differences(name, where):
    make, strength = LEARNABLE[name]

    def layer(y, s):
        return prox(make(s), y, STEP)

    assert_gradients_match(layer, where, strength, order=2, modes=("reverse", "forward"))


@pytest.mark.parametrize("name", LEARNABLE)
def test_lanes_with_their_own_point_or_strength_or_neither(name):
    make, strength = LEARNABLE[name]
    strengths = strength * torch.linspace(0.5, 2, 4, dtype=F64).reshape(4, *[1] * strength.ndim)

    def layer(y, s):
        return prox(make(s), y, STEP)

    for dims in ((0, 0), (0, None), (None, 0)):
        y, s = POINTS[:4] if dims[0] == 0 else Y, strengths if dims[1] == 0 else strength
        for f in (layer, jacrev(layer), jacfwd(layer, argnums=1)):
            pairs = [(y[i] if dims[0] == 0 else y, s[i] if dims[1] == 0 else s) for i in range(4)]
            assert_near(vmap(f, in_dims=dims)(y, s), torch.stack([f(*pair) for pair in pairs]))


# At a kink no derivative exists. What is returned is that of the side on which the unknown is free.
ONE_OF_TWO = torch.tensor([1.0, 0.0], dtype=F64)
KINKS = {
    "lasso": (il.Lasso(1.0), torch.tensor([1.0, -1.0], dtype=F64), torch.eye(2)),
    "lasso of strength 0": (il.Lasso(0.0), torch.zeros(2, dtype=F64), torch.eye(2)),
    "group-lasso": (il.GroupLasso(1.0), ONE_OF_TWO, torch.diag(torch.tensor([1.0, 0.0]))),
    "group-lasso of strength 0": (il.GroupLasso(0.0), torch.zeros(2, dtype=F64), torch.eye(2)),
    "box": (il.Box(0.0, 1.0), ONE_OF_TWO, torch.eye(2)),
    "non-negative": (il.NonNegative(), torch.zeros(2, dtype=F64), torch.eye(2)),
    "simplex": (il.Simplex(), ONE_OF_TWO, torch.tensor([[0.5, -0.5], [-0.5, 0.5]])),
    "l1-ball": (il.L1Ball(1.0), ONE_OF_TWO, torch.eye(2)),
    "l2-ball": (il.L2Ball(1.0), ONE_OF_TWO, torch.eye(2)),
}


@pytest.mark.parametrize(("regularizer", "y", "jacobian"), KINKS.values(), ids=KINKS.keys())
def test_the_derivative_at_a_kink_is_that_of_the_free_side(regularizer, y, jacobian):
    for mode in (jacrev, jacfwd):
        assert_near(mode(lambda y: prox(regularizer, y))(y), jacobian.to(F64))


@EVERY
def test_derivatives_are_finite_everywhere_and_nan_stays_nan(regularizer):
    f = lambda y: prox(regularizer, y, STEP)  # noqa: E731
    for y in (torch.zeros(N, dtype=F64), torch.ones(N, dtype=F64), Y * 1e-200, Y * 1e200, Y * 1e-310):
        assert torch.isfinite(f(y)).all()
        assert torch.isfinite(jacrev(f)(y)).all()
        assert torch.isfinite(jacfwd(jacrev(f))(y)).all()
    broken = Y.clone()
    broken[2] = torch.nan
    assert f(broken).isnan()[2]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_large_and_small_numbers(scale):
    y = (Y * scale).float()
    u = Y / Y.norm()
    r = float(y.double().norm() / 2)
    for regularizer in (il.L2Ball(r), il.GroupLasso(r)):
        torch.testing.assert_close(prox(regularizer, y).double(), r * u, rtol=1e-6, atol=0)
    assert_near(prox(il.Simplex(), Y * 1e30), torch.eye(N, dtype=F64)[Y.argmax()], tol=0)


TREE = {"w": normal(3, 4, seed=5), "v": [normal(2, 4, seed=6)]}


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize(
    "make",
    [
        lambda dim: il.GroupLasso(0.9, dim=dim),
        lambda dim: il.GroupLasso(0.4, dim=dim, weighted=True),
        lambda dim: il.Simplex(1.3, dim=dim),
        lambda dim: il.L1Ball(0.7, dim=dim),
        lambda dim: il.L2Ball(0.7, dim=dim),
    ],
    ids=["group-lasso", "group-lasso-weighted", "simplex", "l1-ball", "l2-ball"],
)
def test_groups_are_leaves_or_run_along_a_dimension(make, dim):
    leaves = [TREE["w"], TREE["v"][0]]
    if dim is None:
        groups = [[leaf.reshape(-1)] for leaf in leaves]
        join = lambda parts, leaf: parts[0].reshape(leaf.shape)  # noqa: E731
    else:
        across = 1 if dim == 0 else 0
        groups = [leaf.unbind(across) for leaf in leaves]
        join = lambda parts, leaf: torch.stack(parts, across)  # noqa: E731
    expected = [join([prox(make(None), g) for g in parts], leaf) for parts, leaf in zip(groups, leaves, strict=True)]
    assert_near(prox(make(dim), TREE), flat(expected))
    assert_near(value(make(dim), TREE), sum(value(make(None), g) for parts in groups for g in parts))


def test_a_number_for_every_leaf_or_group():
    per_group = {"w": torch.tensor([[0.3], [0.6], [0.9]], dtype=F64), "v": [torch.tensor(0.2, dtype=F64)]}
    ours = prox(il.L2Ball(per_group, dim=1), TREE)
    expected = {
        "w": torch.stack([prox(il.L2Ball(float(r)), g) for r, g in zip(per_group["w"], TREE["w"], strict=True)]),
        "v": [torch.stack([prox(il.L2Ball(0.2), g) for g in TREE["v"][0]])],
    }
    assert_near(ours, flat(expected))
    nonsmooth, (r,) = nonsmooth_of(il.GroupLasso({"w": 0.5, "v": [2.0]}), TREE)
    assert_near(nonsmooth.value(flat(TREE), r), 0.5 * TREE["w"].norm() + 2 * TREE["v"][0].norm())
