"""Few-shot tasks so small that all about them can be computed by other means: in float64, from dense matrices."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from applications.imaml import networks
from applications.imaml.algorithms import initial_strengths, meta_loss
from applications.imaml.config import Config
from applications.imaml.episodes import Tasks

FEATURES, HIDDEN, WAYS, TASKS = 3, 4, 3, 4
SHAPES = {"hidden.weight": (HIDDEN, FEATURES), "linear.weight": (WAYS, HIDDEN), "linear.bias": (WAYS,)}
SIZES = [HIDDEN * FEATURES, WAYS * HIDDEN, WAYS]
LAM = 0.3


def tiny_features(parameters, images, statistics=None, how=None):
    """A layer of units with a smooth, non-convex loss, in the place of the convolutions; the head is the real one."""
    return torch.tanh(images.flatten(1) @ parameters["hidden.weight"].T)


def named(vector):
    parts = vector.split(SIZES)
    return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def flat(parameters):
    return torch.cat([parameters[name].flatten() for name in SHAPES])


def logits(vector, images):
    parameters = named(vector)
    return tiny_features(parameters, images) @ parameters["linear.weight"].T + parameters["linear.bias"]


def cross_entropy(vector, images, labels):
    return F.cross_entropy(logits(vector, images), labels)


def tiny_problem(monkeypatch):
    """Meta-parameters as a vector, and tasks; replaces the network."""
    monkeypatch.setattr(networks, "features", tiny_features)
    # With other draws an inner problem may have several minima, and solvers that are all right find different ones.
    draw = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(2)}
    labels = torch.arange(WAYS).expand(TASKS, WAYS)
    support, query = torch.randn(2, TASKS, WAYS, FEATURES, **draw)
    return 0.7 * torch.randn(sum(SIZES), **draw), Tasks(support, labels, query, labels)


def each(tasks):
    return [Tasks(*parts) for parts in zip(*tasks, strict=True)]


class Found(NamedTuple):
    """An outcome and its meta-gradient: for the network as a vector, and for the strengths by name."""

    outcome: object
    gradient: Tensor
    strengths: dict[str, Tensor]


def evaluate(network, tasks, config, strengths=None):
    """The meta-loss of a network and its gradient; the strengths are the initial ones unless given."""
    strengths = initial_strengths(network, config) if strengths is None else strengths
    leaves = {name: value.clone().requires_grad_() for name, value in (network | strengths).items()}
    outcome = meta_loss(config)(leaves, tasks)
    outcome.loss.backward()
    gradient = torch.cat([leaves[name].grad.flatten() for name in network])
    return Found(outcome, gradient, {name: leaves[name].grad for name in strengths})


def meta_gradient(theta, tasks, **settings):
    """Of the tiny problem."""
    return evaluate(named(theta), tasks, Config(**({"lam": LAM} | settings)))


def solved(theta, task, lam=LAM, loss=cross_entropy):
    """The inner minimiser to machine precision, by Newton's method with the dense Hessian, from theta."""
    lam = torch.as_tensor(lam, dtype=theta.dtype)

    def inner(phi):
        return loss(phi, task.support_images, task.support_labels) + (lam * (phi - theta).square()).sum() / 2

    phi = theta.clone()
    gradient, hessian = torch.func.grad(inner), torch.func.hessian(inner)
    for _ in range(200):
        eigenvalues, vectors = torch.linalg.eigh(hessian(phi))
        # Far away the Hessian may be indefinite: then its absolute value still gives a direction of descent.
        direction = -vectors @ ((vectors.T @ gradient(phi)) / eigenvalues.abs().clamp_min(lam.min() / 10))
        t = 1.0
        # Close to the end a fall is below rounding, and the whole step is right.
        while inner(phi + t * direction) > inner(phi) + 1e-14:
            t /= 2
        phi = phi + t * direction
        if gradient(phi).norm() < 1e-14:
            break
    assert gradient(phi).norm() < 1e-12
    return phi


def outer(theta, tasks, lam=LAM, loss=cross_entropy):
    """The whole outer objective of iMAML, by the dense solves above."""
    losses = [loss(solved(theta, task, lam, loss), task.query_images, task.query_labels) for task in each(tasks)]
    return torch.stack(losses).mean()


def descended(theta, task, steps, lr, lam=LAM, held=0):
    """Gradient steps on the inner objective from theta; the first `held` of them count as an added constant."""
    phi = theta
    for step in range(steps):
        if step == held:
            phi = theta + (phi - theta).detach()
        slope = torch.func.grad(cross_entropy)(phi, task.support_images, task.support_labels)
        phi = phi - lr * (slope + lam * (phi - theta))
    return theta + (phi - theta).detach() if held == steps else phi


def slope_of(function, point, direction, h=1e-3):
    """Derivative along a direction by central differences of order four."""
    near, far = (function(point + k * h * direction) - function(point - k * h * direction) for k in (1, 2))
    return (8 * near - far) / (12 * h)
