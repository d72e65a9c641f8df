"""What may be a layer: how it is called, what it may do to its inputs, and what it may return."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import implicitlayers as il
from implicitlayers.testing import assert_gradients_match, check_layer, compare_gradients, strategies
from implicitlayers.testing.checks import examine

F32, F64 = torch.float32, torch.float64
BACKWARD: dict[str, Any] = {"modes": ("reverse",)}


def vector(*numbers, dtype=F64):
    return torch.tensor(numbers, dtype=dtype)


class Unnamed:
    """A node of trees that gives its children no names."""

    def __init__(self, a):
        self.a = a


pytree.register_pytree_node(Unnamed, lambda node: ([node.a], None), lambda children, _: Unnamed(children[0]))


# --- what comes out -------------------------------------------------------------------------------


def test_a_layer_may_return_the_solution_itself():
    def layer(b):
        objective = lambda x, b: x.pow(4).sum() / 4 + (x - b).square().sum()  # noqa: E731
        return il.argmin(objective, torch.zeros_like(b), b, solver=il.Newton(il.Dense(), rtol=1e-12))

    report = assert_gradients_match(layer, vector(1.0, -2.0))
    assert any("output['value']" in c.entry for c in report.comparisons)


def test_nodes_without_names_are_numbered():
    report = assert_gradients_match(lambda node: Unnamed({"w": node.a.sin()}), Unnamed(vector(1.0, 2.0)))
    assert any(c.what.endswith("input[0][0]") for c in report.comparisons)
    assert any("output[0]['w']" in c.entry for c in report.comparisons)


# --- what happens to what goes in -----------------------------------------------------------------


def test_inputs_are_not_changed_by_a_layer_that_changes_its_inputs():
    x, k = vector(1.0, 2.0), torch.tensor([1, 2])

    def layer(x, k):
        return x.add_(k.add_(1)).sin()

    assert_gradients_match(layer, x, k)
    assert x.tolist() == [1.0, 2.0]
    assert k.tolist() == [1, 2]


def test_buffers_are_not_changed():
    norm = nn.BatchNorm1d(2).double()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    check_layer(norm, strategies.tensors((3, 2)).map(lambda t: t + torch.eye(3, 2)), max_examples=2, **BACKWARD)
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_buffers_follow_the_type_of_the_reference():
    norm = nn.BatchNorm1d(2).eval()
    report = assert_gradients_match(norm, torch.ones(3, 2), **BACKWARD)
    assert "in float64" in report.worst.oracle


@pytest.mark.parametrize(
    "x", [vector(1.0).expand(3), torch.arange(6.0, dtype=F64).reshape(2, 3).mT], ids=["expanded", "transposed"]
)
def test_inputs_need_not_be_contiguous(x):
    assert assert_gradients_match(lambda x: x.view(-1).mul_(2).sin(), x, order=2).agrees


# --- how it is evaluated --------------------------------------------------------------------------


def test_a_layer_may_differentiate_its_input():
    def force(x):
        return torch.autograd.grad(x.pow(4).sum(), x, create_graph=True)[0]

    assert assert_gradients_match(force, vector(1.0, 2.0), order=2, **BACKWARD).agrees
    assert assert_gradients_match(force, vector(1.0, 2.0, dtype=F32), **BACKWARD).agrees


def test_a_layer_may_differentiate_inside_by_torch_func():
    assert assert_gradients_match(torch.func.hessian(lambda x: x.pow(4).sum()), vector(1.0, 2.0), order=2).agrees


def test_inference_mode_is_switched_off():
    with torch.inference_mode():
        x = vector(1.0, 2.0)
        assert compare_gradients(torch.sin, x, order=2).agrees
        assert check_layer(torch.sin, strategies.tensors((2,)), max_examples=2).examples == 2


class SingleOnlyError(Exception):
    """Not an error that Python has."""


def test_any_error_in_float64_means_that_differences_are_taken_in_float32():
    def layer(x):
        if x.dtype != F32:
            raise SingleOnlyError
        return x.sin()

    report = assert_gradients_match(layer, vector(1.0, 2.0, dtype=F32))
    assert report.worst.oracle == "finite differences"


# --- which inputs are tested ----------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=F64))

    def forward(self, x, y):
        return self.w * x * y.detach()


def test_a_module_is_tested_in_the_inputs_that_require_a_gradient_and_its_parameters():
    report = assert_gradients_match(Gated(), vector(1.0, 2.0).requires_grad_(), vector(3.0, 4.0), **BACKWARD)
    assert {c.what.split()[-1] for c in report.comparisons} == {"input[0]", "parameter['w']"}
    assert not compare_gradients(Gated(), vector(1.0, 2.0), vector(3.0, 4.0), **BACKWARD).agrees


def test_complex_constants_are_let_through():
    def layer(x, c):
        return (x * c).real

    c = torch.tensor([1 + 2j, 3j])
    assert assert_gradients_match(layer, vector(1.0, 2.0).requires_grad_(), c).agrees
    with pytest.raises(TypeError, match=r"input.*\[1\] is complex"):
        compare_gradients(layer, vector(1.0, 2.0), c)


# --- layouts ---------------------------------------------------------------------------------------


def test_a_sparse_gradient_is_a_gradient():
    layer = nn.Embedding(4, 2, sparse=True, dtype=F64)
    assert examine(layer, (torch.tensor([0, 2, 2]),), modes=("reverse",)).agrees


def test_a_sparse_input_is_a_constant_or_told():
    A, x = torch.eye(3, dtype=F64).to_sparse(), torch.tensor([[1.0], [2.0], [-1.0]], dtype=F64)
    assert examine(torch.matmul, (A, x.requires_grad_()), modes=("reverse",)).agrees
    with pytest.raises(TypeError, match="is sparse"):
        compare_gradients(torch.matmul, A, x.detach())
    with pytest.raises(TypeError, match="output is sparse"):
        compare_gradients(lambda x: x.to_sparse(), x)
