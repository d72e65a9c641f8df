"""Right layers at hard points are not called wrong, and wrong ones that hide are."""

import hypothesis.strategies as st
import pytest
import torch
from torch.nn import functional as F

from implicitlayers.testing import check_layer, compare_gradients, strategies
from tests.testing.planted import F64, function

REVERSE = ("reverse",)
FIRST_CLASS = torch.tensor([0])


def two_lengths(x):
    return (-(x**2)).exp()


SHORT = {
    "a kernel of points far from the origin": (
        lambda x: (-torch.cdist(x, x).square()).exp().sum(1),
        1000 + torch.tensor([[0.0, 0.3], [0.7, -0.4], [-0.2, 0.1]]).double(),
    ),
    "a bell seen from far away": (two_lengths, torch.tensor([30.0, 1.0]).double()),
    "saturated beside not": (torch.tanh, torch.tensor([300.0, 0.5]).double()),
    "low temperature": (lambda x: (x / 1e-4).softmax(0), torch.tensor([1.0, 1.0001, 0.9999]).double()),
    "many periods": (torch.sin, torch.tensor([1e4, 2e4]).double()),
}


@pytest.mark.parametrize("name", SHORT)
def test_layers_that_change_within_much_less_than_the_size_of_their_inputs(name):
    layer, x = SHORT[name]
    assert compare_gradients(layer, x, modes=REVERSE).agrees


CANCELLING = {
    "cross entropy, sure": (lambda x: F.cross_entropy(x, FIRST_CLASS), torch.tensor([[12.0, 0.0]])),
    "cross entropy, certain": (lambda x: F.cross_entropy(x, FIRST_CLASS), torch.tensor([[38.0, 0.0]]).double()),
    "what is left of a sum": (lambda x: x.logsumexp(0) - x[0], torch.tensor([45.0, 0.0]).double()),
    "underflow": (two_lengths, torch.tensor([15.0])),
    "underflow of a tail": (torch.sigmoid, torch.tensor([-95.0])),
}


@pytest.mark.parametrize("name", CANCELLING)
def test_layers_whose_own_rounding_is_as_large_as_their_derivative(name):
    layer, x = CANCELLING[name]
    assert compare_gradients(layer, x, modes=REVERSE).verdict != "disagree"


def test_inputs_of_any_size():
    large = strategies.tensors((3,), elements=st.floats(-1e6, 1e6))
    assert check_layer(torch.tanh, large, modes=REVERSE, max_examples=30).examples > 0


def split(scale, slope):
    """A small output beside a large one, whose derivative is `slope` times what it must be."""
    small = function(lambda x: x.sin(), lambda v, out, x: slope * v * x.cos())
    return lambda x: (scale * x.sum(), small(x))


@pytest.mark.parametrize(("scale", "slope", "right"), [(1e8, -1.0, False), (1e4, 1.01, False), (1e4, 1.0, True)])
def test_an_output_does_not_hide_behind_a_larger_one(scale, slope, right):
    report = compare_gradients(split(scale, slope), torch.tensor([1.0, 2.0]).double(), modes=REVERSE)
    assert report.agrees == right
    assert right or "output[1]" in str(report)


def test_an_entry_that_is_right_is_not_named_as_the_worst():
    def doubled(v, out, x):
        slope = v * x.cos()
        return slope * (1 + (torch.arange(len(slope)) == 37))

    layer = function(lambda x: x.sin(), doubled)
    worst = compare_gradients(layer, torch.linspace(0.1, 2, 100, dtype=F64), modes=REVERSE).worst
    assert (worst.verdict, worst.entry) == ("disagree", "along a random direction")


def test_a_loose_but_smooth_solve_is_told_what_it_may_be():
    # Ten steps of Newton's method damped by half, with the derivative of the root.
    def forward(x):
        root = torch.ones_like(x)
        for _ in range(10):
            root = root - (root**2 - x) / (4 * root)
        return root

    layer = function(forward, lambda v, out, x: v / (2 * x.sqrt()))
    report = compare_gradients(layer, torch.tensor([2.0, 3.0]).double(), modes=REVERSE)
    assert report.verdict == "disagree"
    assert "pass a tighter function as `reference`" in str(report)
    assert compare_gradients(layer, torch.tensor([2.0, 3.0]).double(), modes=REVERSE, reference=torch.sqrt).agrees
