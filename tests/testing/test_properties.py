"""What `check_layer` asks of every layer beside its derivatives: planted violations of each property."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings

from implicitlayers import MisuseError
from implicitlayers.testing import GradientMismatch, check_layer, strategies
from implicitlayers.testing.checks import examine
from implicitlayers.testing.vectors import generator, normal_like, seed_of

F64 = torch.float64
VECTORS = strategies.tensors((2,))
BACKWARD: dict[str, Any] = {"modes": ("reverse",)}


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


# --- the start ------------------------------------------------------------------------------------


class Leaking(torch.autograd.Function):
    """The sine, with a gradient in the start that a cotangent of ones does not see."""

    @staticmethod
    def forward(ctx, x, x0):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, v):
        return v * ctx.saved_tensors[0].cos(), v - v.mean()


def refusing(error):
    def layer(x, x0):
        if x0.requires_grad:
            raise error("no gradient flows to x0")
        return x.sin()

    return layer


def from_starts(layer, starts=VECTORS, **options):
    return check_layer(layer, VECTORS, starts=starts, max_examples=3, **BACKWARD, **options)


def test_a_gradient_in_the_start_that_ones_do_not_see_is_caught():
    with pytest.raises(GradientMismatch, match="gradient in the start"):
        from_starts(lambda x, x0: Leaking.apply(x, x0))


def test_only_a_refusal_is_a_refusal():
    assert from_starts(refusing(MisuseError)).examples == 3
    with pytest.raises(GradientMismatch, match=r"gradient in the start(.|\n)*raised NameError"):
        from_starts(refusing(NameError))


def test_starts_may_be_trees():
    trees = VECTORS.map(lambda t: {"x": t, "steps": torch.tensor(3)})
    assert from_starts(lambda x, x0: x.sin() + 0 * x0["x"].detach(), trees).examples == 3
    with pytest.raises(GradientMismatch, match="from another start"):
        from_starts(lambda x, x0: x.sin() + 1e-3 * x0["x"].detach(), trees)


def test_a_search_may_move_on_from_its_start_in_place():
    def layer(x, x0):
        return x0.detach().mul_(0).add_(x.detach().sin()) + x.sin() - x.detach().sin()

    begun = torch.ones(2, dtype=F64)
    assert from_starts(layer, st.just(begun)).examples == 3
    assert begun.tolist() == [1.0, 1.0]


# --- the tolerance --------------------------------------------------------------------------------


def at_tolerances(error, layer=torch.sin, **options):
    return check_layer(
        layer, VECTORS, at_tolerance=lambda t: lambda x: x.sin() + error(t), max_examples=3, **BACKWARD, **options
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda t: 0.1, "against zero"),
        (lambda t: 0.1 * max(t, 1e-3), "against zero"),
        (lambda t: 5e-7, "It does not fall"),
    ],
    ids=["wrong", "right to 1e-4", "the same at all"],
)
def test_a_tolerance_that_does_not_lead_to_the_answer_is_caught(error, words):
    with pytest.raises(GradientMismatch, match=words):
        at_tolerances(error)


def test_errors_are_taken_against_the_reference():
    assert at_tolerances(lambda t: t, reference=torch.sin).examples == 3
    with pytest.raises(GradientMismatch, match="error at tolerance 1e-08, against zero"):
        at_tolerances(lambda t: t, reference=lambda x: x.sin() + 1)


def test_what_a_layer_raises_at_a_tolerance_is_a_finding():
    def fails(t):
        if t > 1e-3:
            raise RuntimeError("not so loosely")
        return t

    with pytest.raises(GradientMismatch, match=r"error at tolerance 1e-02(.|\n)*not so loosely"):
        at_tolerances(fails)


def test_a_layer_at_a_tolerance_starts_where_the_layer_does():
    def layer(x, *, x0):
        return x.sin() + 0 * x0.detach()

    assert from_starts(layer, at_tolerance=lambda t: layer).examples == 3
