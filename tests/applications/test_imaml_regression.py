"""Every algorithm on linear regression, where the path, the solution and all derivatives have closed forms.

A task has G = XᵀX/n and b = Xᵀy/n. With A = G + λI the solution is φ* = A⁻¹(b + λθ), and after k gradient steps of size
t the path is at φ* + Mᵏ(θ - φ*) with M = I - tA.
"""

import pytest
import torch
from torch.nn import functional as F

from applications.imaml import networks
from applications.imaml.config import Config
from applications.imaml.episodes import Tasks
from tests.helpers.few_shot import each, evaluate

N, IMAGES, QUERIES, TASKS = 5, 8, 6, 3
LAM, LR, STEPS = 0.4, 0.3, 6


@pytest.fixture
def problem(monkeypatch):
    """A linear model of the images, half the mean squared error, targets in the place of labels."""
    monkeypatch.setattr(networks, "forward", lambda parameters, images, *_: images @ parameters["weight"])
    monkeypatch.setattr(F, "cross_entropy", lambda outputs, targets: (outputs - targets).square().mean() / 2)
    support, query = (torch.randn(TASKS, count, N, dtype=torch.float64) for count in (IMAGES, QUERIES))
    targets, query_targets = (torch.randn(TASKS, count, dtype=torch.float64) for count in (IMAGES, QUERIES))
    return torch.randn(N, dtype=torch.float64), Tasks(support, targets, query, query_targets)


def found(theta, tasks, **settings):
    return evaluate({"weight": theta}, tasks, Config(**({"lam": LAM, "inner_lr": LR, "inner_steps": STEPS} | settings)))


class Exact:
    """A task by hand."""

    def __init__(self, theta, task, lam=LAM):
        X, y, self.Xq, self.yq = task
        self.theta, eye = theta, torch.eye(N, dtype=torch.float64)
        self.A = X.T @ X / IMAGES + lam * eye
        self.inverse = torch.linalg.inv(self.A)
        self.M = eye - LR * self.A
        self.solution = self.inverse @ (X.T @ y / IMAGES + lam * theta)
        # dφ*/dθ.
        self.D = lam * self.inverse

    def power(self, k):
        return torch.linalg.matrix_power(self.M, k)

    def path(self, k):
        return self.solution + self.power(k) @ (self.theta - self.solution)

    def query_gradient(self, phi):
        return self.Xq.T @ (self.Xq @ phi - self.yq) / QUERIES

    def query_loss(self, phi):
        return (self.Xq @ phi - self.yq).square().mean() / 2


def mean_over(theta, tasks, part, lam=LAM):
    return torch.stack([part(Exact(theta, task, lam)) for task in each(tasks)]).mean(0)


def through(k):
    """dφ/dθ after k differentiated steps from a point that counts as θ plus a constant, transposed."""

    def part(task):
        jacobian = task.power(k) + (torch.eye(N) - task.power(k)) @ task.D
        return jacobian.T @ task.query_gradient(task.path(STEPS))

    return part


ORACLES = {
    "imaml": ({"cg_steps": N}, lambda t: t.D @ t.query_gradient(t.path(STEPS))),
    "imaml, Gauss-Newton is the Hessian here": (
        {"cg_steps": N, "curvature": "hessian"},
        lambda t: t.D @ t.query_gradient(t.path(STEPS)),
    ),
    "maml": ({"algorithm": "maml"}, through(STEPS)),
    "truncated maml": ({"algorithm": "maml", "path_steps": 2}, through(2)),
    "fomaml": ({"algorithm": "fomaml"}, through(0)),
    "reptile": ({"algorithm": "reptile"}, lambda t: t.theta - t.path(STEPS)),
}


@pytest.mark.parametrize(("settings", "part"), ORACLES.values(), ids=ORACLES.keys())
def test_gradient_is_the_closed_form(problem, settings, part):
    theta, tasks = problem
    outcome, gradient, _ = found(theta, tasks, **settings)
    torch.testing.assert_close(gradient, mean_over(theta, tasks, part), rtol=1e-10, atol=1e-12)
    queried = mean_over(theta, tasks, lambda t: t.query_loss(t.path(STEPS)))
    torch.testing.assert_close(outcome.query_loss.mean(), queried, rtol=1e-12, atol=0)


@pytest.mark.parametrize("inner", ["lbfgs", "hessian-free", "torch.SGD"])
def test_every_solver_leads_to_the_gradient_of_the_exact_solution(problem, inner):
    theta, tasks = problem
    gradient = found(theta, tasks, inner=inner, inner_steps=300, cg_steps=N).gradient
    expected = mean_over(theta, tasks, lambda t: t.D @ t.query_gradient(t.solution))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_a_plain_path_has_no_pull(problem):
    theta, tasks = problem
    gradient = found(theta, tasks, algorithm="maml", lam=0.0).gradient
    expected = mean_over(theta, tasks, lambda t: t.power(STEPS) @ t.query_gradient(t.path(STEPS)), lam=0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("learn_lam", ["scalar", "layer"])
def test_strength_is_learnt_by_the_derivative_of_the_solution(problem, learn_lam):
    """dφ*/dλ = A⁻¹(θ - φ*), and the logarithm is what is learnt."""
    theta, tasks = problem
    _, gradient, strengths = found(theta, tasks, inner="lbfgs", inner_steps=100, cg_steps=N, learn_lam=learn_lam)
    expected = mean_over(
        theta, tasks, lambda t: LAM * (t.inverse @ (theta - t.solution)) @ t.query_gradient(t.solution)
    )
    assert list(strengths) == [{"scalar": "log_lam.all", "layer": "log_lam.weight"}[learn_lam]]
    torch.testing.assert_close(next(iter(strengths.values())), expected, rtol=1e-10, atol=1e-12)
    same = found(theta, tasks, inner="lbfgs", inner_steps=100, cg_steps=N).gradient
    torch.testing.assert_close(gradient, same, rtol=1e-12, atol=0)


def test_implicit_gradient_is_as_wrong_as_the_solution_is(problem):
    """The error after k steps is DᵀXqᵀXq Mᵏ(θ - φ*)/m: the inner error, pulled through the exact derivative."""
    theta, tasks = problem
    exact = mean_over(theta, tasks, lambda t: t.D @ t.query_gradient(t.solution))
    for steps in (1, 3, 9, 27):
        error = found(theta, tasks, inner_steps=steps, cg_steps=N).gradient - exact
        expected = mean_over(
            theta,
            tasks,
            lambda t, k=steps: t.D @ (t.Xq.T @ (t.Xq @ (t.power(k) @ (theta - t.solution)))) / QUERIES,
        )
        torch.testing.assert_close(error, expected, rtol=1e-8, atol=1e-12)


# After few steps the smallest Ritz value lies well above the smallest eigenvalue, and the estimate is no bound.
@pytest.mark.parametrize(("cg_steps", "slack"), [(2, 2), (3, 1), (4, 1)])
def test_certificate_bounds_the_error_of_few_conjugate_gradient_steps(problem, cg_steps, slack):
    """In every task; the estimate is of the linear system, and the inner problem is solved here."""
    theta, tasks = problem
    for task in each(tasks):
        outcome, gradient, _ = found(
            theta, Tasks(*(part[None] for part in task)), inner="lbfgs", inner_steps=100, cg_steps=cg_steps
        )
        t = Exact(theta, task)
        error = (gradient - t.D @ t.query_gradient(t.solution)).norm() / gradient.norm()
        estimate = outcome.solution.adjoint.error_estimate
        assert 1e-8 < error <= slack * estimate.item() < 30 * error
