"""A solve with a fixed number of steps, and its derivative, ask a device nothing: it is never waited for."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.devices import HostAskedError, no_host_sync

FIXED = {"rtol": None, "atol": None}
CG = il.CG(**FIXED, max_steps=3)
SOLVERS = {
    "gradient descent": il.GradientDescent(lr=0.1, **FIXED, max_steps=3),
    "Adam": il.Adam(lr=0.1, **FIXED, max_steps=3),
    "Newton": il.Newton(linear_solver=CG, **FIXED, max_steps=2),
    "L-BFGS": il.LBFGS(**FIXED, max_steps=3),
    "SGD of torch.optim": il.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), **FIXED, max_steps=3),
}


@pytest.mark.parametrize(
    "break_it",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t.tolist(),
        lambda t: t[t > 0],
        lambda t: torch.nonzero(t),
        lambda t: torch.tensor(1.0, device=t.device),
        lambda t: t.new_tensor(1.0),
        lambda t: t.to("meta"),
        lambda t: torch.empty_like(t, device="meta").copy_(t),
        lambda t: t.unique(),
    ],
)
def test_the_watch_sees_what_is_waited_for(break_it):
    with pytest.raises(HostAskedError), no_host_sync():
        break_it(torch.ones(3))


def test_the_watch_sees_into_backward_passes_and_maps():
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g.new_tensor(g.sum().item())

    x = torch.ones((), requires_grad=True)
    with pytest.raises(HostAskedError), no_host_sync():
        Asks.apply(x).backward()
    with pytest.raises(HostAskedError), no_host_sync():
        torch.vmap(lambda row: torch.where(row > 0, row, row.new_tensor(0.0)))(torch.ones(2, 3))


def losses(theta, lam, images):
    def inner(x, image):
        return (torch.tanh(image @ x) - 1).square().mean()

    def one(image, solver, adjoint, lam):
        found = il.argmin(
            inner, theta.detach(), image, regularizer=il.Proximal(theta, lam), solver=solver, adjoint=adjoint,
            on_failure="ignore",
        )  # fmt: skip
        return found.value.square().sum()

    return lambda solver, adjoint: torch.vmap(lambda image: one(image, solver, adjoint, lam))(images).mean()


@pytest.mark.parametrize("lam", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_steps_and_their_derivative_never_wait(name, damping, lam):
    theta = torch.randn(4).requires_grad_()
    loss = losses(theta, lam, torch.randn(3, 5, 4))
    adjoint = il.Implicit(linear_solver=CG, damping=damping, on_failure="ignore")
    with no_host_sync():
        loss(SOLVERS[name], adjoint).backward()
    assert theta.grad.isfinite().all()
    assert theta.grad.norm() > 0


def test_unrolled_steps_never_wait():
    theta = torch.randn(4).requires_grad_()
    loss = losses(theta, 0.5, torch.randn(3, 5, 4))
    with no_host_sync():
        loss(SOLVERS["gradient descent"], il.Unrolled()).backward()
    assert theta.grad.norm() > 0


def test_a_tolerance_has_to_be_looked_at():
    theta = torch.randn(4).requires_grad_()
    loss = losses(theta, 0.5, torch.randn(3, 5, 4))
    with pytest.raises(HostAskedError), no_host_sync():
        loss(il.GradientDescent(lr=0.1, max_steps=3), il.Implicit(linear_solver=CG, on_failure="ignore"))
