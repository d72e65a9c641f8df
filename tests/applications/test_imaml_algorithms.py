"""Meta-gradients of a tiny smooth problem in float64, against oracles that know nothing of the library."""

import pytest
import torch
from torch.nn import functional as F

from applications.imaml import networks
from applications.imaml.algorithms import meta_loss
from applications.imaml.config import Config
from applications.imaml.episodes import Tasks

FEATURES, HIDDEN, WAYS, TASKS = 3, 4, 3, 4
LAM = 0.3
SHAPES = {"in": (HIDDEN, FEATURES), "out": (WAYS, HIDDEN)}
SIZES = [HIDDEN * FEATURES, WAYS * HIDDEN]


def tiny(parameters, images, statistics=None):
    """A network with a smooth, non-convex loss, in the place of the convolutional one."""
    return torch.tanh(images.flatten(1) @ parameters["in"].T) @ parameters["out"].T


def named(vector):
    parts = vector.split(SIZES)
    return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def flat(parameters):
    return torch.cat([parameters[name].flatten() for name in SHAPES])


def cross_entropy(vector, images, labels):
    return F.cross_entropy(tiny(named(vector), images), labels)


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(networks, "forward", tiny)
    labels = torch.arange(WAYS).expand(TASKS, WAYS)
    support, query = torch.randn(2, TASKS, WAYS, FEATURES, dtype=torch.float64)
    return 0.7 * torch.randn(sum(SIZES), dtype=torch.float64), Tasks(support, labels, query, labels)


def each(tasks):
    return [Tasks(*parts) for parts in zip(*tasks, strict=True)]


def solved(theta, task):
    """The inner minimiser to machine precision, by Newton's method with the dense Hessian, from theta."""

    def inner(phi):
        return cross_entropy(phi, task.support_images, task.support_labels) + LAM / 2 * (phi - theta).square().sum()

    phi = theta.clone()
    gradient, hessian = torch.func.grad(inner), torch.func.hessian(inner)
    for _ in range(200):
        eigenvalues, vectors = torch.linalg.eigh(hessian(phi))
        # Far away the Hessian may be indefinite: then its absolute value still gives a direction of descent.
        direction = -vectors @ ((vectors.T @ gradient(phi)) / eigenvalues.abs().clamp_min(LAM / 10))
        t = 1.0
        # Close to the end a fall is below rounding, and the whole step is right.
        while inner(phi + t * direction) > inner(phi) + 1e-14:
            t /= 2
        phi = phi + t * direction
        if gradient(phi).norm() < 1e-14:
            break
    assert gradient(phi).norm() < 1e-12
    return phi


def outer(theta, tasks):
    losses = [cross_entropy(solved(theta, task), task.query_images, task.query_labels) for task in each(tasks)]
    return torch.stack(losses).mean()


def meta_gradient(theta, tasks, **settings):
    leaves = {name: value.clone().requires_grad_() for name, value in named(theta).items()}
    outcome = meta_loss(Config(lam=LAM, **settings))(leaves, tasks)
    outcome.loss.backward()
    return outcome, flat({name: value.grad for name, value in leaves.items()})


TIGHT = {"inner": "lbfgs", "inner_steps": 400, "cg_steps": 60}
NEWTON = {"inner": "hessian-free", "inner_steps": 60, "cg_steps": 40}


@pytest.mark.parametrize("settings", [TIGHT, NEWTON], ids=["lbfgs", "hessian-free"])
def test_imaml_gradient_is_that_of_the_whole_outer_objective(problem, settings):
    theta, tasks = problem
    outcome, gradient = meta_gradient(theta, tasks, curvature="hessian", **settings)
    torch.testing.assert_close(outcome.loss.detach(), outer(theta, tasks), rtol=1e-10, atol=0)
    for _ in range(3):
        direction = torch.randn_like(theta)
        # Central differences of order four: truncation and rounding both stay below 1e-9 here.
        h = 1e-3
        near, far = (outer(theta + k * h * direction, tasks) - outer(theta - k * h * direction, tasks) for k in (1, 2))
        torch.testing.assert_close(gradient @ direction, (8 * near - far) / (12 * h), rtol=1e-7, atol=1e-9)


def test_first_order_gradient_is_the_query_gradient_at_the_solution(problem):
    theta, tasks = problem
    outcome, gradient = meta_gradient(theta, tasks, algorithm="fomaml", **TIGHT)
    at_solutions = [
        torch.func.grad(cross_entropy)(solved(theta, task), task.query_images, task.query_labels)
        for task in each(tasks)
    ]
    torch.testing.assert_close(gradient, torch.stack(at_solutions).mean(0), rtol=1e-8, atol=1e-10)
    assert outcome.solution.adjoint.residual is None
    _, implicit = meta_gradient(theta, tasks, curvature="hessian", **TIGHT)
    assert (gradient - implicit).norm() > 0.1 * implicit.norm()


def descended(theta, task, steps, lr):
    phi = theta
    for _ in range(steps):
        slope = torch.func.grad(cross_entropy)(phi, task.support_images, task.support_labels)
        phi = phi - lr * (slope + LAM * (phi - theta))
    return phi


def test_few_gradient_steps_with_gauss_newton_curvature_and_damping(problem):
    """Where the inner problem isn't solved, the meta-gradient is lam (G + lam + damping)⁻¹ v at the point reached."""
    theta, tasks = problem
    damping, steps, lr = 0.2, 3, 0.4
    settings = {"inner_steps": steps, "inner_lr": lr, "cg_steps": 40, "damping": damping}
    outcome, gradient = meta_gradient(theta, tasks, curvature="gauss-newton", **settings)
    parts, losses = [], []
    for task in each(tasks):
        phi = descended(theta, task, steps, lr)
        jacobian = torch.func.jacrev(lambda p, images=task.support_images: tiny(named(p), images))(phi)
        softmax = tiny(named(phi), task.support_images).softmax(-1)
        loss_hessian = (torch.diag_embed(softmax) - softmax[:, :, None] * softmax[:, None, :]) / WAYS
        curvature = torch.einsum("nkp,nkl,nlq->pq", jacobian, loss_hessian, jacobian)
        v = torch.func.grad(cross_entropy)(phi, task.query_images, task.query_labels)
        parts.append(LAM * torch.linalg.solve(curvature + (LAM + damping) * torch.eye(len(phi)), v))
        # The record costs no evaluation of its own: it is the inner objective before the last step.
        before = descended(theta, task, steps - 1, lr)
        pull = LAM / 2 * (before - theta).square().sum()
        losses.append(cross_entropy(before, task.support_images, task.support_labels) + pull)
    torch.testing.assert_close(gradient, torch.stack(parts).mean(0), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(outcome.support_loss, torch.stack(losses))
    report = outcome.solution.adjoint
    assert report.residual.shape == (TASKS,)
    assert report.residual.max() < 1e-8
    assert report.curvature[0].min() >= LAM + damping - 1e-9


def test_the_record_tells_tasks_apart(problem):
    theta, tasks = problem
    outcome, _ = meta_gradient(theta, tasks, **TIGHT)
    alone = [meta_gradient(theta, Tasks(*(part[i : i + 1] for part in tasks)), **TIGHT)[0] for i in range(TASKS)]
    for name in ("query_loss", "query_accuracy", "support_loss"):
        together = getattr(outcome, name)
        torch.testing.assert_close(together, torch.cat([getattr(one, name) for one in alone]))
        assert not together.requires_grad
    logits = torch.vmap(tiny)({name: v.expand(TASKS, *v.shape) for name, v in named(theta).items()}, tasks.query_images)
    assert logits.shape == (TASKS, WAYS, WAYS)
    expected = [
        (tiny(named(solved(theta, t)), t.query_images).argmax(-1) == t.query_labels).double().mean().item()
        for t in each(tasks)
    ]
    assert outcome.query_accuracy.tolist() == pytest.approx(expected)
