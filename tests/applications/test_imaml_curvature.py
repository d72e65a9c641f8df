"""The linear systems that are there for comparison: the paper's conjugate gradients, the published code's matrix."""

import pytest
import torch

import implicitlayers as il
from applications.imaml.algorithms import curvature
from applications.imaml.algorithms.curvature import PublishedCG, UnguardedCG, conjugate_gradients, implicit
from applications.imaml.config import Config
from applications.imaml.criterion import criterion_of
from applications.imaml.episodes import Tasks
from applications.imaml.metrics import Meter
from tests.helpers.few_shot import LAM, cross_entropy, descended, each, meta_gradient, tiny_problem

N = 8
CURVATURES = ["hessian", "hessian-unguarded", "published"]
# The Hessian is indefinite where few steps lead, from meta-parameters this large.
AWAY, STEPS = 3.0, 2


@pytest.fixture
def problem(monkeypatch):
    theta, tasks = tiny_problem(monkeypatch)
    return AWAY * theta, tasks


def systems(theta, tasks):
    """Hessian and query gradient of every task where the inner solver ends."""
    for task in each(tasks):
        phi = descended(theta, task, STEPS, 0.4)
        hessian = torch.func.hessian(cross_entropy)(phi, task.support_images, task.support_labels)
        yield hessian, torch.func.grad(cross_entropy)(phi, task.query_images, task.query_labels)


def gradient_with(theta, tasks, name, cg_steps):
    return meta_gradient(theta, tasks, curvature=name, cg_steps=cg_steps, inner_steps=STEPS)


def eye(like):
    return torch.eye(len(like), dtype=like.dtype)


def least_curvature(H, v, steps):
    """The smallest eigenvalue of H on the Krylov space of that many dimensions."""
    if steps == 0:
        return torch.inf
    basis = [v / v.norm()]
    for _ in range(steps - 1):
        y = H @ basis[-1]
        for _ in range(2):
            y = y - torch.stack(basis, 1) @ (torch.stack(basis) @ y)
        basis.append(y / y.norm())
    V = torch.stack(basis, 1)
    return torch.linalg.eigvalsh(V.T @ H @ V)[0].item()


def textbook(A, b, steps):
    """Conjugate gradients on a dense matrix, as in any textbook."""
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(steps):
        alpha = r @ r / (p @ A @ p)
        x, following = x + alpha * p, r - alpha * A @ p
        p, r = following + (following @ following) / (r @ r) * p, following
    return x


@pytest.mark.parametrize("cg_steps", [1, 3, 5])
def test_unguarded_gradient_is_that_of_the_papers_algorithm(problem, cg_steps):
    theta, tasks = problem
    parts = [LAM * textbook(H + LAM * eye(v), v, cg_steps) for H, v in systems(theta, tasks)]
    outcome, gradient, _ = gradient_with(theta, tasks, "hessian-unguarded", cg_steps)
    torch.testing.assert_close(gradient, torch.stack(parts).mean(0), rtol=1e-8, atol=1e-10)
    assert outcome.solution.adjoint.steps.tolist() == [cg_steps] * len(parts)


@pytest.mark.parametrize("cg_steps", [1, 3, 5])
def test_published_gradient_is_that_of_the_papers_code(problem, cg_steps):
    """2 v + H v / (lam + 10), by as many textbook steps."""
    theta, tasks = problem
    parts = [textbook(2 * eye(v) + H / (LAM + 10), v, cg_steps) for H, v in systems(theta, tasks)]
    gradient = gradient_with(theta, tasks, "published", cg_steps).gradient
    torch.testing.assert_close(gradient, torch.stack(parts).mean(0), rtol=1e-8, atol=1e-10)


def test_the_guard_makes_a_difference_where_the_hessian_is_indefinite(problem):
    theta, tasks = problem
    smallest = torch.stack([torch.linalg.eigvalsh(H).min() for H, _ in systems(theta, tasks)])
    assert (smallest < -LAM).any()
    guarded, unguarded = (gradient_with(theta, tasks, name, 12) for name in CURVATURES[:2])
    stopped = guarded.outcome.solution.adjoint.status == il.Status.INDEFINITE
    met = unguarded.outcome.solution.adjoint.curvature[0] <= 0
    assert met.any()
    assert not (met & ~stopped).any()
    assert not (stopped & (smallest > -LAM / 2)).any()
    assert unguarded.gradient.norm() > 1.5 * guarded.gradient.norm()
    # The metrics count what was stopped, by a curvature that was seen to be negative or not, and what went on.
    assert (stopped & (guarded.outcome.solution.adjoint.curvature[0] > 0)).any()
    for found, counted in ((guarded, stopped), (unguarded, met)):
        meter = Meter(torch.device("cpu"), criterion_of(Config()))
        meter.add(found.outcome)
        assert meter.take(1)["negative_curvature"] == pytest.approx(counted.double().mean().item())


@pytest.mark.parametrize("cg_steps", [3, 5, 12])
def test_no_task_counts_for_more_than_two(problem, monkeypatch, cg_steps):
    """lam (H + lam)⁻¹ v is no longer than 2 v, and what is stopped has as many steps as keep H above -lam/2."""
    theta, tasks = problem
    free = []
    for task, (H, v) in zip(each(tasks), systems(theta, tasks), strict=True):
        one = Tasks(*(part.unsqueeze(0) for part in task))
        found = gradient_with(theta, one, "hessian", cg_steps)
        assert found.gradient.norm() <= 2 * v.norm() * (1 + 1e-9)
        allowed = [k for k in range(cg_steps + 1) if least_curvature(H, v, k) > -LAM / 2]
        taken = next((k for k in range(cg_steps) if k + 1 not in allowed), cg_steps)
        torch.testing.assert_close(found.gradient, LAM * textbook(H + LAM * eye(v), v, taken), rtol=1e-6, atol=1e-9)
        assert (found.outcome.solution.adjoint.status.item() == il.Status.INDEFINITE) == (taken < cg_steps)
        with monkeypatch.context() as patch:
            patch.setattr(curvature, "_LEAST_CURVATURE", 0.0)
            free.append((gradient_with(theta, one, "hessian", cg_steps).gradient.norm() / v.norm()).item())
    # It takes a floor: without one, some task's is longer in the end.
    assert cg_steps < 12 or max(free) > 2


def test_the_guard_is_in_proportion_to_the_pull_and_of_the_hessian_alone():
    floors = {
        name: getattr(implicit(Config(curvature=name, lam=0.6)).linear_solver, "curvature_floor", None)
        for name in ("gauss-newton", *CURVATURES)
    }
    assert floors == {"gauss-newton": 0.0, "hessian": 0.3, "hessian-unguarded": None, "published": None}
    assert conjugate_gradients(Config(curvature="hessian")).curvature_floor == 0.0


@pytest.mark.parametrize("start", [False, True])
def test_where_the_matrix_is_definite_both_are_conjugate_gradients(start):
    factor = torch.randn(2, N, N, dtype=torch.float64)
    A = factor @ factor.mT + torch.eye(N)
    b = torch.randn(2, N, dtype=torch.float64)
    # A start with a residual larger than b would be dropped by `CG`.
    x0 = 0.9 * torch.linalg.solve(A, b)
    operator = il.Operator(lambda y: (A @ y.unsqueeze(-1)).squeeze(-1), symmetric=True)
    x0 = x0 if start else None
    ours = UnguardedCG(5).solve(operator, b, x0)
    expected = il.CG(rtol=None, atol=None, max_steps=5).solve(operator, b, x0)
    for name in ("x", "residual", "curvature_min", "curvature_max", "steps"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    published = PublishedCG(2.0, 60).solve(operator, b, x0).x
    # A is H + 2 here, and the published matrix 2 + H/12.
    matrix = 2 * torch.eye(N, dtype=torch.float64) + (A - 2 * torch.eye(N)) / 12
    torch.testing.assert_close(2 * published, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-12)


def test_a_task_without_a_query_gradient_stays_at_zero():
    operator = il.Operator(lambda y: 3 * y, symmetric=True)
    b = torch.stack([torch.zeros(N), torch.ones(N)])
    solution = UnguardedCG(3).solve(operator, b)
    torch.testing.assert_close(solution.x, b / 3)
