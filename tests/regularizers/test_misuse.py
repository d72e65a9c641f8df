"""Strengths, radii and bounds that cannot be: refused where that can be seen, and a lane that ends alone where not."""

import math

import pytest
import torch
from torch.func import grad, vmap

import implicitlayers as il
from tests.helpers.cases import flat
from tests.helpers.problems import F64
from tests.helpers.proximal import PROXIMAL

TREE = {"w": torch.zeros(2, 3, dtype=F64), "b": torch.zeros((), dtype=F64)}


def solve(regularizer, x0=TREE, **options):
    objective = lambda x: (flat(x) - 1).square().sum() / 2  # noqa: E731
    return il.argmin(objective, x0, regularizer=regularizer, solver=PROXIMAL, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: il.Lasso(-1), r"Lasso\(lam=-1\): a negative strength rewards distance; pass a number >= 0"),
        (lambda: il.Lasso(math.nan), r"Lasso\(lam=nan\)"),
        (lambda: il.ElasticNet(-0.1, 1), r"ElasticNet\(l1=-0.1\)"),
        (lambda: il.ElasticNet(0.1, -1), r"ElasticNet\(l2=-1\)"),
        (lambda: il.GroupLasso(-1.0), r"GroupLasso\(lam=-1.0\)"),
        (lambda: il.Box(2, 1), r"Box\(lower=2, upper=1\): no number lies between"),
        (lambda: il.Box(math.nan, 1), r"Box\(lower=nan\)"),
        (lambda: il.Box(math.inf), r"Box\(lower=inf\)"),
        (lambda: il.Box(0, -math.inf), r"Box\(upper=-inf\)"),
        (lambda: il.Simplex(0.0), r"Simplex\(total=0.0\)"),
        (lambda: il.L1Ball(-1), r"L1Ball\(r=-1\): a ball of negative radius is empty"),
        (lambda: il.L2Ball(-1), r"L2Ball\(r=-1\)"),
    ],
)
def test_numbers_that_cannot_be_are_refused_when_made(make, message):
    with pytest.raises(il.MisuseError, match=message):
        make()


BAD, NAN = torch.tensor(-0.5, dtype=F64), torch.tensor(math.nan, dtype=F64)


@pytest.mark.parametrize(
    ("regularizer", "message"),
    [
        (il.Lasso(BAD), "Lasso's lam has an entry that is negative or NaN"),
        (il.Lasso(NAN), "Lasso's lam"),
        (il.Lasso({"w": -0.5, "b": 0.0}), "Lasso's lam"),
        (il.ElasticNet(BAD, 1.0), "ElasticNet's l1"),
        (il.ElasticNet(1.0, BAD), "ElasticNet's l2"),
        (il.GroupLasso({"w": BAD, "b": 1.0}), "GroupLasso's lam"),
        (il.Box(torch.tensor(1.0, dtype=F64), 0.5), "a lower bound is above its upper one"),
        (il.Box({"w": torch.tensor([0.0, 2.0, 0.0], dtype=F64), "b": 0.0}, 1.0), "a lower bound is above"),
        (il.Box(upper=NAN), "or NaN"),
        (il.Simplex(BAD), "Simplex's total has an entry that is not positive"),
        (il.L1Ball(BAD), "L1Ball's r has an entry that is negative"),
        (il.L2Ball({"w": BAD, "b": 1.0}), "L2Ball's r"),
        (il.Simplex(dim=1), r"Simplex\(dim=1\): x0\['b'\] has shape \(\) and no such dimension"),
        (il.GroupLasso(1.0, dim=-3), r"GroupLasso\(dim=-3\): x0\['w'\]"),
        (il.L2Ball({"w": torch.ones(2, 3), "b": 1.0}), r"L2Ball's r at x0\['w'\] has shape \(2, 3\).*\(1, 1\)"),
        (il.Box(torch.zeros(7)), "Box's lower has the structure"),
        (il.NonNegative() + il.Lasso(1.0), r"NonNegative \+ Lasso: both have kinks or constraints"),
    ],
)
def test_tensors_and_shapes_that_cannot_be_are_refused_when_posed(regularizer, message):
    with pytest.raises(il.MisuseError, match=message):
        solve(regularizer)


def test_a_group_needs_elements():
    with pytest.raises(il.MisuseError, match=r"Simplex: x0\['e'\] has shape \(0,\), and a group without elements"):
        solve(il.Simplex(), {"e": torch.zeros(0, dtype=F64), "x": torch.zeros(2, dtype=F64)})


def test_a_derivative_in_a_strength_does_not_hide_that_it_cannot_be():
    with pytest.raises(il.MisuseError, match="Lasso's lam"):
        grad(lambda lam: solve(il.Lasso(lam)).value["w"].sum())(BAD)


@pytest.mark.parametrize(
    "make",
    [
        il.Lasso,
        il.GroupLasso,
        il.Simplex,
        il.L1Ball,
        il.L2Ball,
        lambda s: il.ElasticNet(0.1, s),
        lambda s: il.Box(0.0, s),
    ],
    ids=["lasso", "group-lasso", "simplex", "l1-ball", "l2-ball", "elastic-net", "box"],
)
def test_a_lane_that_cannot_be_ends_alone(make):
    strengths = torch.tensor([0.5, -0.5, 0.7], dtype=F64)
    x0 = torch.zeros(3, dtype=F64)
    ours = vmap(lambda s: solve(make(s), x0, on_failure="ignore"))(strengths)
    assert ours.status.tolist() == [il.Status.CONVERGED, il.Status.NON_FINITE, il.Status.CONVERGED]
    for lane in (0, 2):
        torch.testing.assert_close(ours.value[lane], solve(make(strengths[lane]), x0).value, rtol=0, atol=1e-12)


def test_what_a_smooth_solver_cannot_do_it_says():
    with pytest.raises(il.MisuseError, match="LBFGS is not made for a smooth objective plus a part that has kinks"):
        il.argmin(lambda x: x.square().sum(), torch.ones(2), regularizer=il.Lasso(0.1), solver=il.LBFGS())


def test_symmetric_linear_solvers_are_refused_for_kinks():
    with pytest.raises(il.MisuseError, match="CG solves symmetric systems only"):
        solve(il.Lasso(0.1), adjoint=il.Implicit(il.CG()))
