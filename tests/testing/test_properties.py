"""What `check_layer` asks of every layer beside its derivatives: planted violations of each property."""

import pytest
import torch
from hypothesis import Phase, given, settings

from implicitlayers.testing import GradientMismatch, check_layer, strategies
from implicitlayers.testing.checks import examine
from implicitlayers.testing.vectors import generator, normal_like, seed_of

F64 = torch.float64
VECTORS = strategies.tensors((2,))
BACKWARD = {"modes": ("reverse",)}


# --- the cotangent --------------------------------------------------------------------------------


def forgetful(factor):
    """The sine, whose backward is another one when it is asked again on the same graph."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.asked = 0
            return x.sin()

        @staticmethod
        def backward(ctx, v):
            ctx.asked += 1
            return v * ctx.saved_tensors[0].cos() * factor(ctx.asked)

    return Layer.apply


@pytest.mark.parametrize(
    "factor", [lambda n: 1 if n == 1 else 2, lambda n: 1 if n > 1 else 2, lambda n: 2 if n == 2 else 1]
)
def test_a_backward_that_is_right_only_once_is_caught(factor):
    with pytest.raises(GradientMismatch, match="asked again"):
        check_layer(forgetful(factor), VECTORS, max_examples=5, **BACKWARD)


def test_a_backward_that_is_the_same_again_passes():
    assert check_layer(forgetful(lambda n: 1), VECTORS, max_examples=3, **BACKWARD).examples == 3


# --- the directions -------------------------------------------------------------------------------


def test_an_error_that_one_direction_hides_is_seen_in_another():
    # Where the summand of this entry is smallest among those of the directions of seed 0.
    numbers = [torch.zeros(60, dtype=F64)]
    v, d = (normal_like(numbers, generator(k))[0] for k in (1, 3))
    hidden = int((v * d).abs().argmin())

    def layer(x):
        wrong = torch.zeros_like(x)
        wrong[hidden] = 1e-2
        return x.sin() + wrong * (x - x.detach())

    with pytest.raises(GradientMismatch, match="reverse mode"):
        check_layer(layer, strategies.tensors((60,)), max_examples=20, **BACKWARD)


@settings(max_examples=20, database=None, deadline=None, phases=[Phase.generate])
@given(VECTORS, VECTORS)
def test_directions_follow_from_the_numbers(x, y):
    assert seed_of((x,)) == seed_of((x.clone(),))
    assert torch.equal(x, y) or seed_of((x,)) != seed_of((y,))
    assert examine(torch.sin, (x,), **BACKWARD) == examine(torch.sin, (x.clone(),), **BACKWARD)
