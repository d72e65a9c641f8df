"""torch.compile of the function around a layer: the gradient is eager's."""

import shutil

import pytest
import torch
from torch import nn

import implicitlayers as il
from tests.helpers.cases import ADJOINT, TIGHT, Coupled
from tests.helpers.problems import F64, coupled, normal

NEWTON = il.Newton(il.CG(rtol=1e-11), **TIGHT)
THETA = normal(3, seed=1)
BACKENDS = ["eager", "aot_eager"]

# The compiler itself uses functions that PyTorch deprecates, and asks tensors after a graph break for their gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def explicit(theta):
    x = il.argmin(coupled, torch.zeros(3, dtype=F64), theta * 2, solver=NEWTON, adjoint=ADJOINT).value
    return (x.sin() * theta).sum()


def captured(theta):
    shifted = theta + 1
    start = torch.zeros(3, dtype=F64)
    x = il.argmin(lambda x: coupled(x, shifted), start, solver=NEWTON, adjoint=ADJOINT).value
    return (x.sin() * theta).sum()


def regularized(theta):
    start, proximal = {"x": torch.zeros(3, dtype=F64)}, il.Proximal({"x": theta}, theta[0].exp())
    objective = lambda x: x["x"].cosh().sum()  # noqa: E731
    return il.argmin(objective, start, regularizer=proximal, solver=NEWTON, adjoint=ADJOINT).value["x"].sum()


def twice(theta):
    first = il.argmin(coupled, torch.zeros(3, dtype=F64), theta, solver=NEWTON, adjoint=ADJOINT).value
    return il.argmin(coupled, torch.zeros(3, dtype=F64), first + theta, solver=NEWTON, adjoint=ADJOINT).value.sum()


def value_and_gradient(f):
    leaf = THETA.clone().requires_grad_()
    value = f(leaf)
    value.backward()
    return value.detach(), leaf.grad


def assert_same(compiled, eager):
    for ours, expected in zip(value_and_gradient(compiled), value_and_gradient(eager), strict=True):
        # Same operations; fusion may change the rounding.
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f", [explicit, captured, regularized, twice])
def test_compiled_gradient_is_eagers(f, backend):
    compiled = torch.compile(f, backend=backend)
    assert_same(compiled, f)
    assert_same(compiled, f)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_module(backend):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Coupled(THETA)

        def forward(self, theta):
            start = theta.detach() * 0
            return il.argmin(self.inner, start, solver=NEWTON, adjoint=ADJOINT).value.sin().sum() * theta.sum()

    eager, compiled = Layer(), Layer()
    assert_same(torch.compile(compiled, backend=backend), eager)
    assert eager.inner.theta.grad.abs().max() > 1e-3
    torch.testing.assert_close(compiled.inner.theta.grad, eager.inner.theta.grad, rtol=1e-12, atol=1e-12)


def test_compiled_double_backward():
    # AOT compilation has no double backward of its own; through the graph break, eager's must remain.
    compiled = torch.compile(explicit, backend="eager")

    def curvature(f):
        leaf = THETA.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]

    torch.testing.assert_close(curvature(compiled), curvature(explicit), rtol=1e-12, atol=1e-12)


def test_a_full_graph_is_refused_and_not_wrong():
    with pytest.raises(Exception, match=r"(?i)compiler.disable|disabled|graph break"):
        torch.compile(explicit, backend="eager", fullgraph=True)(THETA)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    assert_same(torch.compile(explicit, backend="inductor"), explicit)
