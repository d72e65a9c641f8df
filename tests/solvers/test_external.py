"""Adam, and what was written elsewhere: torch.optim step for step, SciPy, given solutions; the best iterate."""

import pytest
import scipy.optimize
import torch
from torch.func import jacrev, vmap

import implicitlayers as il
from tests.helpers.landscapes import LANDSCAPES, ONE, beale, rosenbrock
from tests.helpers.problems import F64, coupled, newton, normal, quadratic, spd

ZERO, THETA, BATCH = torch.zeros(3, dtype=F64), normal(3, seed=1), normal(4, 3, seed=2)
BEALE = il.Composite(beale, lambda r, t: r.square().sum() / 2)
BEGIN = torch.tensor(LANDSCAPES["beale"][1], dtype=F64)


def assert_near(ours, expected, tol=1e-9):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def theirs(make, steps, theta=THETA, dtype=F64):
    """The loop as one writes it with torch.optim."""
    x = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = make([x])

    def closure():
        optimizer.zero_grad()
        value = coupled(x, theta.to(dtype))
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)
    return x.detach()


# --- Adam -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.9)])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_adam_is_torchs_adam(steps, betas, dtype):
    ours = il.Adam(lr=0.05, betas=betas, rtol=None, atol=None, max_steps=steps)
    expected = theirs(lambda p: torch.optim.Adam(p, lr=0.05, betas=betas), steps, dtype=dtype)
    value = il.argmin(coupled, torch.zeros(3, dtype=dtype), THETA.to(dtype), solver=ours).value
    # torch computes its bias corrections in float64, we in the dtype of x.
    assert_near(value, expected, 1e-14 if dtype == F64 else 2e-6)


def test_adam_converges_and_a_diverging_lane_is_alone():
    def layer(t):
        return il.argmin(coupled, ZERO, t, solver=il.Adam(lr=0.1, rtol=1e-4), on_failure="ignore")

    assert_near(layer(THETA).value, newton(coupled, ZERO, THETA), 1e-3)
    broken = BATCH.clone()
    broken[1, 0] = torch.nan
    value, status = vmap(lambda t: (layer(t).value, layer(t).status))(broken)
    assert status.tolist() == [0, il.Status.NON_FINITE, 0, 0]
    assert_near(value[0], layer(BATCH[0]).value, 1e-12)


def test_unrolled_adam_is_the_loop_by_hand():
    def loop(theta):
        x, m, v = ZERO, ZERO, ZERO
        for k in range(1, 6):
            F = torch.func.grad(coupled)(x, theta)
            m, v = 0.9 * m + 0.1 * F, 0.99 * v + 0.01 * F**2
            x = x - 0.05 * (m / (1 - 0.9**k)) / ((v / (1 - 0.99**k)).sqrt() + 1e-3)
        return x

    solver = il.Adam(lr=0.05, betas=(0.9, 0.99), eps=1e-3, rtol=None, atol=None, max_steps=5)
    ours = jacrev(lambda t: il.argmin(coupled, ZERO, t, solver=solver, adjoint=il.Unrolled()).value)(THETA)
    assert_near(ours, jacrev(loop)(THETA), 1e-12)


def test_the_derivative_of_adam_where_the_gradient_is_zero():
    # One step from the solution: m̂ = F and v̂ = F², so x - lr·F/(|F| + eps), of derivative lr/eps in the target.
    solver = il.Adam(lr=1e-4, eps=1e-2, rtol=None, atol=None, max_steps=1)

    def layer(t):
        return il.argmin(lambda x, t: (x - t) ** 2 / 2, ONE, t, solver=solver, adjoint=il.Unrolled()).value

    assert_near(jacrev(layer)(ONE), torch.tensor(1e-2, dtype=F64), 1e-12)


# --- torch.optim ----------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "lbfgs-wolfe": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_optimizer_is_itself_and_lanes_are_each_alone(make):
    steps = 6
    solver = il.TorchOptimizer(make, rtol=None, atol=None, max_steps=steps)

    def layer(t):
        solution = il.argmin(coupled, ZERO, t, solver=solver)
        return solution.value, solution.status

    assert_near(layer(THETA)[0], theirs(make, steps), 1e-14)
    value, status = vmap(layer)(BATCH)
    assert status.tolist() == [il.Status.NOT_CHECKED] * 4
    # torch's own line search takes other branches where sums are rounded otherwise, but reaches the same.
    assert_near(value, torch.stack([theirs(make, steps, t) for t in BATCH]), 1e-12)


# Its own tolerances would end it earlier than ours.
UNSTOPPED = {"tolerance_grad": 1e-14, "tolerance_change": 0.0}


def test_an_optimizer_that_stops_by_itself_is_not_waited_for():
    solver = il.TorchOptimizer(lambda p: torch.optim.LBFGS(p, tolerance_grad=1e-3), rtol=1e-10)
    solution = il.argmin(coupled, ZERO, THETA, solver=solver, on_failure="ignore")
    assert solution.status.item() == il.Status.STALLED
    assert solution.stats.steps.item() <= 10


def test_torch_lbfgs_to_a_tolerance_on_lanes_that_end_at_different_times():
    solver = il.TorchOptimizer(lambda p: torch.optim.LBFGS(p, max_iter=2, **UNSTOPPED), rtol=1e-10)
    targets = torch.stack([BATCH[0] * 1e-3, BATCH[1], torch.full((3,), torch.nan, dtype=F64), 3 * BATCH[3]])

    def layer(t):
        solution = il.argmin(coupled, ZERO, t, solver=solver, on_failure="ignore")
        return solution.value, solution.status, solution.stats.steps

    value, status, steps = vmap(layer)(targets)
    assert status.tolist() == [0, 0, il.Status.NON_FINITE, 0]
    assert len(set(steps.tolist())) > 2
    for lane in (0, 1, 3):
        assert_near(value[lane], newton(coupled, ZERO, targets[lane]), 1e-8)


def test_the_derivative_through_an_optimizer_is_implicit():
    solver = il.TorchOptimizer(
        lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe", **UNSTOPPED), rtol=1e-6, max_steps=20
    )
    ours = jacrev(lambda t: il.argmin(coupled, ZERO, t, solver=solver).value)(THETA)
    # Its line search compares values, and cannot see the last digits of the gradient.
    assert_near(ours, jacrev(lambda t: newton(coupled, ZERO, t))(THETA), 1e-5)


# --- SciPy ----------------------------------------------------------------------------------------------------

MINIMIZE = ["CG", "BFGS", "Newton-CG", "L-BFGS-B", "TNC", "SLSQP", "trust-constr", "dogleg", "trust-ncg", "trust-exact",
            "trust-krylov"]  # fmt: skip
LEAST_SQUARES = ["trf", "dogbox", "lm"]
ROOT = ["hybr", "lm", "broyden1", "broyden2", "anderson", "linearmixing", "diagbroyden", "excitingmixing", "krylov",
        "df-sane"]  # fmt: skip


@pytest.mark.parametrize("method", MINIMIZE + LEAST_SQUARES)
def test_scipys_minimizers(method):
    solver = il.Scipy(method, rtol=1e-6)

    def layer(t):
        solution = il.argmin(BEALE, begin, t, solver=solver, adjoint=il.Implicit(il.Dense()))
        return solution.value, solution.status, solution.stats.steps

    # Dogleg needs a positive definite Hessian on its way.
    begin = torch.tensor([2.8, 0.45], dtype=F64) if method == "dogleg" else BEGIN
    value, status, steps = layer(ONE)
    assert status.item() == il.Status.CONVERGED
    assert 2 <= steps.item() < 200
    assert_near(value, torch.tensor([3.0, 0.5], dtype=F64), 1e-3)
    J = jacrev(beale)(value, ONE)
    expected = torch.linalg.solve(J.T @ J, J.T @ -torch.tensor([1.5, 2.25, 2.625], dtype=F64))
    assert_near(jacrev(lambda t: layer(t)[0])(ONE), expected, 2e-2)


@pytest.mark.parametrize("method", ROOT)
def test_scipys_root_finders(method):
    M, b = torch.linalg.qr(normal(3, 3, seed=3)).Q * 0.3, normal(3, seed=4)
    solver = il.Scipy(method, rtol=1e-9)

    def layer(b):
        return il.fixed_point(lambda x, b: M @ x + b, ZERO, b, solver=solver, adjoint=il.Implicit(il.Dense())).value

    inverse = torch.linalg.inv(torch.eye(3, dtype=F64) - M)
    assert_near(layer(b), inverse @ b, 1e-7)
    assert_near(jacrev(layer)(b), inverse, 1e-10)


@pytest.mark.parametrize("method", ["BFGS", "trust-exact", "trf"])
def test_scipys_lanes_and_the_one_that_breaks(method):
    solver = il.Scipy(method)
    ts = torch.tensor([[1.0, torch.nan], [1.1, 0.9]], dtype=F64)

    def layer(t):
        solution = il.argmin(BEALE, BEGIN, t, solver=solver, on_failure="ignore")
        return solution.value, solution.status, solution.stats.steps

    value, status, steps = vmap(vmap(layer))(ts)
    assert status.tolist() == [[0, il.Status.NON_FINITE], [0, 0]]
    assert steps[0, 1] == 0
    for lane in ((0, 0), (1, 0), (1, 1)):
        alone = layer(ts[lane])
        assert_near(value[lane], alone[0], 1e-12)
        assert steps[lane] == alone[2]


def test_scipy_is_scipy_and_takes_options():
    A, b = spd(3), normal(3)
    solver = il.Scipy("BFGS", rtol=1e-10, options={"c2": 0.3})
    found = scipy.optimize.minimize(
        lambda z: (z @ A.numpy() @ z / 2 - b.numpy() @ z, A.numpy() @ z - b.numpy()), [0.0] * 3, jac=True,
        method="BFGS", options={"gtol": 1e-10, "c2": 0.3},
    )  # fmt: skip
    solution = il.argmin(quadratic, ZERO, A, b, solver=solver)
    assert_near(solution.value, torch.tensor(found.x), 1e-8)
    assert solution.stats.steps.item() == pytest.approx(found.nit, abs=1)


def test_scipy_names_its_limit_and_serves_single_precision_and_no_dimensions():
    short = il.argmin(BEALE, BEGIN, ONE, solver=il.Scipy("BFGS", max_steps=2), on_failure="ignore")
    assert short.status.item() == il.Status.MAX_STEPS
    assert short.stats.steps.item() == 2
    solver = il.Scipy("L-BFGS-B", rtol=1e-5)
    value = il.argmin(lambda x: (x - 2) ** 4 + x**2, torch.tensor(0.0), solver=solver).value
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert_near(4 * (value - 2) ** 3 + 2 * value, torch.tensor(0.0), 1e-3)


# --- solved elsewhere, and the best iterate -------------------------------------------------------------------


def test_a_given_solution_is_differentiated_where_it_is():
    x = newton(coupled, ZERO, THETA)
    tree = {"a": x[:1], "b": (x[1:],)}

    def objective(tree, t):
        return coupled(torch.cat([tree["a"], tree["b"][0]]), t)

    def layer(t):
        solution = il.argmin(objective, {"a": ZERO[:1], "b": (ZERO[1:],)}, t, solver=il.Given(tree))
        return torch.cat([solution.value["a"], solution.value["b"][0]]), solution.status, solution.stats.steps

    value, status, steps = layer(THETA)
    assert torch.equal(value, x)
    assert (status.item(), steps.item()) == (il.Status.CONVERGED, 0)
    assert_near(jacrev(lambda t: layer(t)[0])(THETA), jacrev(lambda t: newton(coupled, ZERO, t))(THETA), 1e-8)


def test_given_solutions_of_lanes_and_no_gradient_into_the_value():
    solved = torch.stack([newton(coupled, ZERO, t) for t in BATCH])
    solved[2] += 0.1

    def layer(x, t):
        solution = il.argmin(coupled, ZERO, t, solver=il.Given(x), on_failure="ignore")
        return solution.value, solution.status

    value, status = vmap(layer)(solved, BATCH)
    assert torch.equal(value, solved)
    assert [code == il.Status.CONVERGED for code in status.tolist()] == [True, True, False, True]
    expected = vmap(jacrev(lambda t: newton(coupled, ZERO, t)))(BATCH)
    ours = vmap(jacrev(lambda x, t: layer(x, t)[0], argnums=(0, 1)))(solved, BATCH)
    assert (ours[0] == 0).all()
    assert_near(ours[1][[0, 1, 3]], expected[[0, 1, 3]], 1e-7)


def test_a_given_value_is_checked():
    with pytest.raises(il.SolveError, match="after 0 steps"):
        il.argmin(coupled, ZERO, THETA, solver=il.Given(ZERO))
    unchecked = il.argmin(coupled, ZERO, THETA, solver=il.Given(ZERO, rtol=None, atol=None))
    assert unchecked.status.item() == il.Status.NOT_CHECKED
    with pytest.raises(il.MisuseError, match="shape"):
        il.argmin(coupled, ZERO, THETA, solver=il.Given(ZERO[:2]))
    root = il.fixed_point(lambda x: x / 2 + 1, ZERO, solver=il.Given(ZERO + 2))
    assert root.status.item() == il.Status.CONVERGED


def test_best_so_far_returns_the_lowest_iterate_seen():
    wild = {"lr": 0.6, "momentum": 0.9}
    seen = [coupled(theirs(lambda p: torch.optim.SGD(p, **wild), k), THETA) for k in range(13)]
    assert seen[-1] > min(seen), "the path descends monotonically and would pass any wrapper"
    for options in ({"rtol": None, "atol": None}, {"rtol": 1e-14}):
        inner = il.GradientDescent(**wild, **options, max_steps=12)
        solution = il.argmin(coupled, ZERO, THETA, solver=il.BestSoFar(inner), on_failure="ignore")
        assert_near(solution.stats.objective, min(seen), 1e-12)
        assert_near(coupled(solution.value, THETA), min(seen), 1e-12)
        assert solution.stats.steps.item() == 12


def test_best_so_far_keeps_the_best_of_a_lane_that_diverges():
    def layer(c):
        solver = il.BestSoFar(il.GradientDescent(lr=0.3))
        solution = il.argmin(lambda x, c: c * x**4 + x**2, ONE, c, solver=solver, on_failure="ignore")
        return solution.value, solution.status

    value, status = vmap(layer)(torch.tensor([0.01, 100.0], dtype=F64))
    assert status.tolist() == [il.Status.CONVERGED, il.Status.NON_FINITE]
    assert_near(value, torch.tensor([0.0, 1.0], dtype=F64), 1e-7)


# --- misuse ---------------------------------------------------------------------------------------------------

FOREIGN = [
    il.Scipy(),
    il.Given(ZERO),
    il.BestSoFar(il.LBFGS()),
    il.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1)),
]


@pytest.mark.parametrize("adjoint", [il.Unrolled(), il.OneStep()], ids=["unrolled", "one-step"])
@pytest.mark.parametrize("solver", FOREIGN, ids=[type(solver).__name__ for solver in FOREIGN])
def test_steps_without_a_graph_cannot_be_recorded(solver, adjoint):
    with pytest.raises(il.MisuseError, match=f"{type(solver).__name__} leave no graph behind"):
        il.argmin(coupled, ZERO, THETA, solver=solver, adjoint=adjoint)


def minimize(solver, **options):
    return lambda: il.argmin(coupled, ZERO, THETA, solver=solver, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: il.Adam(lr=0.0), "positive step size"),
        (lambda: il.Adam(betas=(0.9, 1.0)), r"\[0, 1\)"),
        (lambda: il.Adam(eps=0.0), "zero is divided"),
        (lambda: il.Scipy(rtol=None, atol=None), "look at values"),
        (lambda: il.Scipy("Nelder-Mead"), "no gradients"),
        (lambda: il.Scipy("Newton"), "no such method"),
        (lambda: il.BestSoFar(3), "no solver"),
        (lambda: il.TorchOptimizer(torch.optim.SGD([ZERO.clone()], lr=1.0)), "exists only inside the solve"),
        (minimize(il.TorchOptimizer(lambda p: None)), "return a torch.optim.Optimizer"),
        (minimize(il.TorchOptimizer(lambda p: torch.optim.SGD([ZERO.clone()], lr=1.0))), "does not hold the params"),
        (minimize(il.Scipy("hybr")), "not made for a smooth objective"),
        (minimize(il.Scipy("trf")), "given as a Composite"),
        (lambda: il.root(rosenbrock, ZERO[:2], 1.0, solver=il.Scipy("BFGS")), "not made for an equation"),
        (
            lambda: il.argmin(il.Composite(beale, lambda r, t: r.exp().sum()), BEGIN, ONE, solver=il.Scipy("lm")),
            "minimize ½",
        ),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(il.MisuseError, match=message):
        make()
