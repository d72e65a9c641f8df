"""Meta-gradients of a tiny smooth network in float64, against oracles that know nothing of the library."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from applications.imaml.algorithms import adapt
from applications.imaml.config import Config
from applications.imaml.episodes import Tasks
from applications.imaml.network import initialize
from tests.helpers.few_shot import (
    LAM,
    SIZES,
    TASKS,
    WAYS,
    cross_entropy,
    descended,
    each,
    evaluate,
    logits,
    meta_gradient,
    named,
    outer,
    slope_of,
    solved,
    tiny_problem,
)

# The floor of "hessian" would change the derivative where the curvature of a solved task is small, but positive.
TIGHT = {"inner": "lbfgs", "inner_steps": 400, "cg_steps": 60, "curvature": "hessian-unguarded"}
NEWTON = {"inner": "hessian-free", "inner_steps": 60, "cg_steps": 60, "curvature": "hessian-unguarded"}
DESCENT = {"inner_steps": 600, "inner_lr": 0.8, "cg_steps": 60, "curvature": "hessian-unguarded"}
# An odd number of steps, so that a cut divides the path unevenly.
STEPS, LR = 5, 0.5
PATH = {"inner_steps": STEPS, "inner_lr": LR}


@pytest.fixture
def problem(monkeypatch):
    return tiny_problem(monkeypatch)


@pytest.mark.parametrize("settings", [TIGHT, NEWTON, DESCENT], ids=["lbfgs", "hessian-free", "gradient"])
def test_imaml_gradient_is_that_of_the_whole_outer_objective(problem, settings):
    theta, tasks = problem
    outcome, gradient, _ = meta_gradient(theta, tasks, **settings)
    torch.testing.assert_close(outcome.loss.detach(), outer(theta, tasks), rtol=1e-10, atol=0)
    for _ in range(3):
        direction = torch.randn_like(theta)
        # Truncation and rounding both stay below 1e-9 here.
        expected = slope_of(lambda point: outer(point, tasks), theta, direction)
        torch.testing.assert_close(gradient @ direction, expected, rtol=1e-7, atol=1e-9)


def by_autograd(theta, tasks, **how):
    """The mean query loss after plain gradient steps, and its derivative through them as PyTorch records it."""
    leaf = theta.clone().requires_grad_()
    phis = [descended(leaf, task, STEPS, LR, **how) for task in each(tasks)]
    losses = [cross_entropy(phi, t.query_images, t.query_labels) for phi, t in zip(phis, each(tasks), strict=True)]
    loss = torch.stack(losses).mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def plain_forward(parameters, images):
    """The convolutional network of the Omniglot experiments, by PyTorch's own operations alone."""
    x = images
    for block in range(4):
        # Channels last, [height, width, in, out].
        weight = parameters[f"convolution{block}.weight"].permute(3, 2, 0, 1)
        x = F.conv2d(x, weight, parameters[f"convolution{block}.bias"], stride=2, padding=1)
        scale, shift = (parameters[f"normalization{block}.{name}"] for name in ("scale", "shift"))
        x = F.batch_norm(x, None, None, scale, shift, training=True).relu()
        x = F.pad(x, (0, 1, 0, 1)) if block == 1 else x
    return x.movedim(1, -1).flatten(1) @ parameters["linear.weight"].T + parameters["linear.bias"]


def test_path_through_the_convolutions_is_what_pytorch_records():
    network = {name: value.double() for name, value in initialize(5, 1, torch.Generator().manual_seed(0)).items()}
    labels = torch.arange(5).expand(2, 5)
    tasks = Tasks(
        torch.rand(2, 5, 1, 28, 28, dtype=torch.float64),
        labels,
        torch.rand(2, 5, 1, 28, 28, dtype=torch.float64),
        labels,
    )
    leaves = {name: value.clone().requires_grad_() for name, value in network.items()}
    losses = []
    for task in each(tasks):
        phi = leaves
        for _ in range(2):
            loss = F.cross_entropy(plain_forward(phi, task.support_images), task.support_labels)
            slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {name: value - 0.1 * slope for (name, value), slope in zip(phi.items(), slopes, strict=True)}
        losses.append(F.cross_entropy(plain_forward(phi, task.query_images), task.query_labels))
    torch.stack(losses).mean().backward()
    expected = torch.cat([leaf.grad.flatten() for leaf in leaves.values()])
    found = evaluate(network, tasks, Config(algorithm="maml", lam=0.0, inner_lr=0.1, inner_steps=2))
    torch.testing.assert_close(found.outcome.query_loss, torch.stack(losses).detach())
    assert (found.gradient - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("lam", [0.0, LAM])
@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"algorithm": "maml"}, 0),
        ({"algorithm": "maml", "path_steps": 2}, STEPS - 2),
        ({"algorithm": "maml", "path_steps": STEPS}, 0),
        ({"algorithm": "fomaml"}, STEPS),
    ],
    ids=["maml", "truncated", "truncated at all", "first-order"],
)
def test_path_is_differentiated_as_far_as_asked(problem, settings, held, lam):
    theta, tasks = problem
    outcome, gradient, _ = meta_gradient(theta, tasks, lam=lam, **PATH, **settings)
    loss, expected = by_autograd(theta, tasks, lam=lam, held=held)
    torch.testing.assert_close(outcome.loss.detach(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert outcome.solution.adjoint.residual is None


def test_truncations_differ_from_each_other(problem):
    theta, tasks = problem
    cut = [by_autograd(theta, tasks, lam=0.0, held=held)[1] for held in (0, STEPS - 2, STEPS)]
    assert min((cut[i] - cut[j]).norm() / cut[0].norm() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.05


def test_reptile_gradient_is_the_way_back_from_the_adapted_parameters(problem):
    theta, tasks = problem
    outcome, gradient, _ = meta_gradient(theta, tasks, algorithm="reptile", lam=0.0, **PATH)
    phis = [descended(theta, task, STEPS, LR, lam=0.0) for task in each(tasks)]
    torch.testing.assert_close(gradient, torch.stack([theta - phi for phi in phis]).mean(0), rtol=1e-12, atol=1e-14)
    queried = [cross_entropy(phi, t.query_images, t.query_labels) for phi, t in zip(phis, each(tasks), strict=True)]
    torch.testing.assert_close(outcome.query_loss, torch.stack(queried))
    assert not outcome.query_loss.requires_grad


def test_anil_adapts_the_head_alone_and_differentiates_through_the_features(problem):
    theta, tasks = problem
    leaf = theta.clone().requires_grad_()
    body, losses = SIZES[0], []
    for task in each(tasks):
        phi = leaf
        for _ in range(STEPS):
            slope = torch.func.grad(cross_entropy)(phi, task.support_images, task.support_labels)
            slope = torch.cat([torch.zeros_like(slope[:body]), slope[body:]])
            phi = phi - LR * (slope + LAM * (phi - leaf))
        losses.append(cross_entropy(phi, task.query_images, task.query_labels))
    expected = torch.autograd.grad(torch.stack(losses).mean(), leaf)[0]
    outcome, gradient, _ = meta_gradient(theta, tasks, algorithm="anil", **PATH)
    torch.testing.assert_close(outcome.query_loss, torch.stack(losses).detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    found = adapt(named(theta), each(tasks)[0], Config(algorithm="anil", **PATH)).value
    assert torch.equal(found["hidden.weight"], named(theta)["hidden.weight"])
    assert list(found) == list(named(theta))


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "maml", "inner": "adam", "inner_lr": 0.1, "inner_steps": 4},
        {"algorithm": "maml", "inner": "lbfgs", "inner_steps": 4},
        {"algorithm": "anil", "inner": "adam", "inner_lr": 0.1, "inner_steps": 4},
        {"algorithm": "anil", "inner": "lbfgs", "inner_steps": 4},
        {"algorithm": "anil", "path_steps": 4, "inner_steps": 4},
    ],
    ids=lambda settings: f"{settings['algorithm']}-{settings.get('inner', 'gradient')}",
)
def test_path_gradient_is_that_of_the_whole_outer_objective(problem, settings):
    theta, tasks = problem
    _, gradient, _ = meta_gradient(theta, tasks, **settings)

    def whole(point):
        return meta_gradient(point, tasks, **settings).outcome.loss.detach()

    for _ in range(2):
        direction = torch.randn_like(theta)
        # Line searches choose their steps anew for every point: close enough to theta they choose the same.
        expected = slope_of(whole, theta, direction, h=1e-4)
        torch.testing.assert_close(gradient @ direction, expected, rtol=1e-6, atol=1e-8)


def test_maml_becomes_imaml_as_steps_grow(problem):
    theta, tasks = problem
    gaps, exact = [], meta_gradient(theta, tasks, **TIGHT).gradient
    for steps in (5, 20, 80, 320):
        maml = meta_gradient(theta, tasks, algorithm="maml", inner_steps=steps, inner_lr=0.8).gradient
        gaps.append(((maml - exact).norm() / exact.norm()).item())
    # Measured: 0.41, 0.075, 5e-5 and 1e-15 of the norm: the steps contract, and the path with them.
    assert all(later < earlier / 4 for earlier, later in pairwise(gaps)), gaps
    assert gaps[-1] < 1e-9


@pytest.mark.parametrize(
    ("inner", "lr", "steps", "near"),
    [
        ("torch.SGD", 0.8, 600, 1e-10),
        ("torch.Adam", 2e-3, 3000, 1e-6),
        ("adam", 2e-3, 3000, 1e-6),
        # Stops where its own tolerance_grad or tolerance_change is met, here after an error of 3e-5.
        ("torch.LBFGS", 1.0, 20, 1e-4),
    ],
)
def test_imaml_gradient_knows_nothing_of_the_solver(problem, inner, lr, steps, near):
    theta, tasks = problem
    gradient = meta_gradient(theta, tasks, **(TIGHT | {"inner": inner, "inner_lr": lr, "inner_steps": steps})).gradient
    expected = meta_gradient(theta, tasks, **TIGHT).gradient
    assert (gradient - expected).norm() < near * expected.norm()


@pytest.mark.parametrize("cg_steps", [4, 8, 12])
def test_certificate_bounds_the_error_of_imaml_in_every_task(problem, cg_steps):
    theta, tasks = problem
    # A pull so strong that no task is stopped.
    how = TIGHT | {"curvature": "hessian", "lam": 2.0}
    for index in range(TASKS):
        alone = Tasks(*(part[index : index + 1] for part in tasks))
        exact = meta_gradient(theta, alone, **how).gradient
        outcome, gradient, _ = meta_gradient(theta, alone, **(how | {"cg_steps": cg_steps}))
        error = ((gradient - exact).norm() / gradient.norm()).item()
        # Measured: 1.7 to 3.5 times the error, from 2e-3 after 4 steps down to 1e-10 after 12.
        assert 0 < error <= outcome.solution.adjoint.error_estimate.item() < 8 * error


@pytest.mark.parametrize(("torchs", "ours", "lr"), [("torch.SGD", "gradient", 0.4), ("torch.Adam", "adam", 0.05)])
def test_solvers_of_torch_take_the_same_steps(problem, torchs, ours, lr):
    theta, tasks = problem
    found = [meta_gradient(theta, tasks, inner=inner, inner_lr=lr, inner_steps=4) for inner in (torchs, ours)]
    torch.testing.assert_close(found[0].gradient, found[1].gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[0].outcome.support_loss, found[1].outcome.support_loss)


@pytest.mark.parametrize(
    "name",
    [
        *("ASGD", "Adadelta", "Adafactor", "Adagrad", "AdamW", "Adamax"),
        *("LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop"),
    ],
)
def test_every_optimizer_of_torch_lowers_the_inner_objective(problem, name):
    theta, tasks = problem
    few, many = (
        meta_gradient(theta, tasks, inner=f"torch.{name}", inner_lr=0.02, inner_steps=steps).outcome.support_loss
        for steps in (1, 4)
    )
    assert (many < few).all()


def test_first_order_gradient_is_the_query_gradient_at_the_solution(problem):
    theta, tasks = problem
    tight = {name: value for name, value in TIGHT.items() if name != "curvature"}
    outcome, gradient, _ = meta_gradient(theta, tasks, algorithm="fomaml", **tight)
    at_solutions = [
        torch.func.grad(cross_entropy)(solved(theta, task), task.query_images, task.query_labels)
        for task in each(tasks)
    ]
    torch.testing.assert_close(gradient, torch.stack(at_solutions).mean(0), rtol=1e-8, atol=1e-10)
    assert outcome.solution.adjoint.residual is None
    implicit = meta_gradient(theta, tasks, **TIGHT).gradient
    assert (gradient - implicit).norm() > 0.1 * implicit.norm()


def test_few_gradient_steps_with_gauss_newton_curvature_and_damping(problem):
    """Where the inner problem isn't solved, the meta-gradient is lam (G + lam + damping)⁻¹ v at the point reached."""
    theta, tasks = problem
    damping, steps, lr = 0.2, 3, 0.4
    settings = {"inner_steps": steps, "inner_lr": lr, "cg_steps": 40, "damping": damping}
    outcome, gradient, _ = meta_gradient(theta, tasks, curvature="gauss-newton", **settings)
    parts, losses = [], []
    for task in each(tasks):
        phi = descended(theta, task, steps, lr)
        jacobian = torch.func.jacrev(lambda p, images=task.support_images: logits(p, images))(phi)
        softmax = logits(phi, task.support_images).softmax(-1)
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


@pytest.mark.parametrize("algorithm", ["imaml", "maml", "anil", "fomaml", "reptile"])
def test_the_record_tells_tasks_apart(problem, algorithm):
    theta, tasks = problem
    settings = {"algorithm": algorithm, **PATH}
    outcome = meta_gradient(theta, tasks, **settings).outcome
    one_by_one = [Tasks(*(part[i : i + 1] for part in tasks)) for i in range(TASKS)]
    alone = [meta_gradient(theta, task, **settings) for task in one_by_one]
    for name in ("query_loss", "query_score", "support_loss"):
        together = getattr(outcome, name)
        torch.testing.assert_close(together, torch.cat([getattr(one.outcome, name) for one in alone]))
        assert not together.requires_grad
    # The batch is worth the mean of its tasks.
    gradient = meta_gradient(theta, tasks, **settings).gradient
    torch.testing.assert_close(gradient, torch.stack([one.gradient for one in alone]).mean(0))


def test_accuracy_is_that_of_the_adapted_network(problem):
    theta, tasks = problem
    expected = [
        (logits(solved(theta, t), t.query_images).argmax(-1) == t.query_labels).double().mean().item()
        for t in each(tasks)
    ]
    assert meta_gradient(theta, tasks, **TIGHT).outcome.query_score.tolist() == pytest.approx(expected)
