"""Line searches: what they accept, by values and by slopes, on lanes, and that solvers end at rounding, not before."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

import implicitlayers as il
from implicitlayers.functorch import batched
from implicitlayers.problem import Posed
from implicitlayers.solvers.line_search import Point
from implicitlayers.terms import ObjectiveTerm, ResidualTerm
from tests.helpers.landscapes import spectrum
from tests.helpers.problems import F64, newton, normal, quadratic


def assert_near(ours, expected, tol=1e-9):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def wavy(x, a):
    """Many minima along every line, and unbounded slopes nowhere."""
    return (a * x).sin().sum() + x.square().sum() / 20


def searched(search, fn, x, first, params=(), look=True):
    """Search from every row of x along -gradient; returns the start, the end, the direction and who found a step."""
    lanes = (tuple(0 for _ in params),)
    problem = Posed((ObjectiveTerm(fn, tuple(range(len(params)))),)).bind(params, lanes)
    at = Point(x, *problem.value_and_residual(x))
    slope = -(at.F * at.F).sum(-1)
    end, found = search.search(problem, at, -at.F, slope, torch.full_like(slope, first), look)
    return at, end, -at.F, found


@pytest.mark.parametrize("first", [1e-4, 1.0, 30.0], ids=["short", "near", "long"])
@pytest.mark.parametrize("curvature", [0.1, 0.9])
@pytest.mark.parametrize("look", [True, False])
def test_strong_wolfe_finds_points_that_satisfy_both_conditions(first, curvature, look):
    x, a = normal(40, 3, seed=3), 1 + normal(40, 3, seed=4).abs()
    at, end, d, found = searched(il.StrongWolfe(1e-4, curvature), wavy, x, first, (a,), look)
    assert found.all()
    t = ((end.x - at.x) * d).sum(-1) / (d * d).sum(-1)
    slope, here = (at.F * d).sum(-1), (end.F * d).sum(-1)
    assert (t > 0).all()
    assert (end.objective <= at.objective + 1e-4 * t * slope).all()
    assert (here.abs() <= curvature * slope.abs()).all()
    assert_near(end.objective, batched(wavy, ((0,),))(end.x, a), 1e-14)


def test_a_sharp_search_finds_the_minimum_of_a_parabola():
    # Cubic interpolation is exact on it: f = ½ c x² from 1 has its minimum at 0 for every c.
    c = torch.tensor([[0.01], [1.0], [300.0]], dtype=F64)
    search = il.StrongWolfe(1e-4, 1e-3)
    _, end, _, found = searched(search, lambda x, c: (c * x * x).sum() / 2, torch.ones(3, 1, dtype=F64), 0.3, (c,))
    assert found.all()
    assert_near(end.x, torch.zeros(3, 1, dtype=F64), 1e-3)


def test_lanes_of_strong_wolfe_do_not_see_each_other():
    x, a = normal(6, 3, seed=3), 1 + normal(6, 3, seed=4).abs()
    a[2] = torch.nan
    together = searched(il.StrongWolfe(), wavy, x, 1.0, (a,))
    for lane in range(6):
        alone = searched(il.StrongWolfe(), wavy, x[lane : lane + 1], 1.0, (a[lane : lane + 1],))
        assert torch.equal(together[1].x[lane], alone[1].x[0])
        assert bool(together[3][lane]) == (lane != 2)
    assert torch.equal(together[1].x[2], x[2])


def test_strong_wolfe_on_an_equation_uses_the_slope_of_half_the_square():
    # F = (x² - 4) from 5: ½F² has slope 2x(x² - 4); Newton's first trial is 2.9, and 0.1 asks for more.
    problem = Posed((ResidualTerm(lambda x: x * x - 4, ()),)).bind(())
    at = Point(x := torch.tensor([5.0], dtype=F64), *problem.value_and_residual(x))
    direction, one = -at.F / 10, torch.ones((), dtype=F64)
    end, found = il.StrongWolfe(1e-4, 0.1).search(problem, at, direction, -2 * at.objective, one, True)
    assert found
    slope = (end.F * 2 * end.x * direction).sum()
    assert slope.abs() <= 0.1 * 2 * at.objective


def test_fixed_takes_the_step_whatever_comes():
    x = torch.ones(1, dtype=F64)
    for factor, expected in ((1.0, -3.0), (0.25, 0.0)):
        solver = il.GradientDescent(lr=1.0, line_search=il.Fixed(factor), rtol=None, atol=None, max_steps=1)
        assert_near(il.argmin(lambda x: (x**4).sum(), x, solver=solver).value, expected * x, 0)


def test_strong_wolfe_goes_past_the_first_trial():
    # The first trial of 1e-3 is far too short on a flat parabola; Armijo is content with it.
    def step(search):
        solver = il.GradientDescent(lr=1e-3, line_search=search, rtol=None, atol=None, max_steps=1)
        return il.argmin(lambda x: x.square().sum() / 2, torch.ones(1, dtype=F64), solver=solver).value.item()

    assert step(il.Armijo()) == pytest.approx(0.999)
    assert abs(step(il.StrongWolfe(curvature=0.5))) <= 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: il.Fixed(0.0), "positive"),
        (lambda: il.StrongWolfe(0.5, 0.1), "0 < sufficient_decrease < curvature < 1"),
        (lambda: il.StrongWolfe(max_steps=0), "positive"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(il.MisuseError, match=message):
        make()


@pytest.mark.parametrize("search", [il.Armijo(), il.StrongWolfe()], ids=["armijo", "wolfe"])
def test_a_broken_lane_does_not_cost_the_others_trials(search):
    def calls(scales):
        count = []

        def bowl(x, s):
            count.append(1)
            return s * (x * x).sum() / 2

        solver = il.LBFGS(line_search=search)
        vmap(lambda s: il.argmin(bowl, torch.ones(2, dtype=F64), s, solver=solver, on_failure="ignore").value)(scales)
        return len(count)

    assert calls(torch.tensor([0.5, torch.nan], dtype=F64)) == calls(torch.tensor([0.5, 0.5], dtype=F64))


# --- next to the minimum --------------------------------------------------------------------------------------

ENDS = {
    "newton-cg": il.Newton(il.CG(rtol=1e-6, max_steps=200)),
    "newton-dense": il.Newton(il.Dense()),
    "lbfgs-armijo": il.LBFGS(),
    "lbfgs-wolfe": il.LBFGS(line_search=il.StrongWolfe()),
}


@pytest.mark.parametrize("solver", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize(
    ("condition", "dtype", "rtol"),
    # In float32 the residual that rounding of x leaves, eps·‖A‖‖x‖, is above 1e-5·‖b‖ from condition 1e3 on.
    [(1e4, F64, 1e-8), (3e2, torch.float32, 1e-5)],
    ids=["float64", "float32"],
)
def test_the_last_steps_are_not_refused_for_the_rounding_of_the_objective(solver, condition, dtype, rtol):
    # Judged by values alone, Newton stalled in 2 and L-BFGS failed in 9 of 20 such problems.
    A, b = spectrum(condition, 20, dtype=dtype)
    solver = type(solver)(**{**vars(solver), "rtol": rtol})

    def layer(A, b):
        return il.argmin(quadratic, torch.zeros_like(b), A, b, solver=solver, on_failure="ignore").status

    assert vmap(layer)(A, b).tolist() == [il.Status.CONVERGED] * 20


def test_unrolled_strong_wolfe_is_differentiable():
    theta = normal(3, seed=1)

    def bowl(x, t):
        return (x - t).square().sum() / 2 + (x**4).sum() / 4

    solver = il.LBFGS(line_search=il.StrongWolfe(), rtol=1e-12, atol=0.0)

    def layer(t):
        return il.argmin(bowl, torch.zeros(3, dtype=F64), t, solver=solver, adjoint=il.Unrolled()).value

    expected = jacrev(lambda t: newton(bowl, torch.zeros(3, dtype=F64), t))(theta)
    assert_near(grad(bowl)(layer(theta), theta), torch.zeros(3, dtype=F64), 1e-10)
    assert_near(jacrev(layer)(theta), expected, 1e-6)
