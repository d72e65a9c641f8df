"""How a layer is used: planted bugs that are right when every input requires a gradient and every lane is mapped."""

from typing import Any

import pytest
import torch

from implicitlayers.testing import GradientMismatch, InconclusiveGradients, check_layer, compare_gradients, strategies
from implicitlayers.testing.checks import examine

F64 = torch.float64
PAIRS: Any = strategies.tensors((2,)).flatmap(lambda a: strategies.tensors((2,)).map(lambda b: (a, b)))
TAPE: dict[str, Any] = {"modes": ("reverse",), "max_examples": 20}
MAP: dict[str, Any] = {"modes": ("reverse", "vmap"), "max_examples": 20}


class Product(torch.autograd.Function):
    """a·b, right in every way: the layers below have a bug each."""

    @staticmethod
    def forward(a, b):
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        (a, b), (v,) = ctx.saved_tensors, cotangents
        return v * b, v * a

    @staticmethod
    def vmap(info, in_dims, *inputs):
        a, b = (t if d is None else t.movedim(d, 0) for t, d in zip(inputs, in_dims, strict=True))
        return Product.apply(a, b), 0


class OneGradient(Product):
    """Gives the only gradient that is needed to the first input."""

    @staticmethod
    def backward(ctx, *cotangents):
        (a, b), (v,) = ctx.saved_tensors, cotangents
        return (v * b, v * a) if all(ctx.needs_input_grad) else (v * b if ctx.needs_input_grad[0] else v, v)


class Viewed(Product):
    """Takes for granted that a cotangent is contiguous."""

    @staticmethod
    def backward(ctx, *cotangents):
        (a, b), (v,) = ctx.saved_tensors, cotangents
        return v.view(-1) * b, torch.as_strided(v, v.shape, (1,)) * a


class LastDimension(Product):
    """Does not look where the lanes are."""

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if all(d is not None for d in in_dims):
            return inputs[0] * inputs[1], 0
        return Product.vmap(info, in_dims, *inputs)


class AllMapped(Product):
    """Takes both inputs to be mapped: numbers of the second are taken for lanes where it is not."""

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if in_dims[1] is None:
            return inputs[0].movedim(in_dims[0], 0) * inputs[1].flip(0), 0
        return Product.vmap(info, in_dims, *inputs)


class TwoLanes(Product):
    """Computes the first lane and the last."""

    @staticmethod
    def vmap(info, in_dims, *inputs):
        a, b = (
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(inputs, in_dims, strict=True)
        )
        out = a * b
        return torch.cat([out[:1], out[-1:].expand(len(out) - 1, *out.shape[1:])]), 0


class Both(torch.autograd.Function):
    """Sine and cosine, with a backward that takes no cotangent for another's."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, *cotangents):
        (x,), (v, w) = ctx.saved_tensors, cotangents
        v, w = w if v is None else v, v if w is None else w
        return v * x.cos() - w * x.sin()


def test_a_right_layer_passes_in_every_pattern():
    assert check_layer(Product.apply, PAIRS, **MAP).inconclusive == 0


@pytest.mark.parametrize(
    ("layer", "inputs", "options", "message"),
    [
        (OneGradient.apply, PAIRS, TAPE, r"gradient in input\[1\] alone"),
        (Viewed.apply, PAIRS, TAPE, "expanded cotangent"),
        (Both.apply, strategies.tensors((2,)), TAPE, r"gradient of output\[\d\] alone"),
        (LastDimension.apply, PAIRS, MAP, "lanes in another order"),
        (AllMapped.apply, PAIRS, MAP, r"vmap over input\[0\] alone"),
        (TwoLanes.apply, PAIRS, MAP, "lanes"),
    ],
    ids=lambda value: getattr(getattr(value, "__self__", None), "__name__", None),
)
def test_a_layer_that_is_right_in_the_common_pattern_only_is_caught(layer, inputs, options, message):
    with pytest.raises(GradientMismatch, match=message):
        check_layer(layer, inputs, **options)


def test_a_layer_that_needs_its_input_to_require_a_gradient_is_not_blamed():
    def force(x, k):
        energy = (k * x.square()).sum() / 2
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    assert check_layer(force, PAIRS, modes=("reverse",), max_examples=10).inconclusive == 0


def test_a_bug_in_tiny_numbers_is_seen():
    class Tiny(Product):
        @staticmethod
        def forward(a, b):
            return 1e-9 * a * b

        @staticmethod
        def backward(ctx, *cotangents):
            (a, b), (v,) = ctx.saved_tensors, cotangents
            factor = 1e-9 if all(ctx.needs_input_grad) else 2e-9
            return factor * v * b, factor * v * a

    with pytest.raises(GradientMismatch, match=r"gradient in input\[\d\] alone"):
        check_layer(Tiny.apply, PAIRS, **TAPE)


# --- what is no function --------------------------------------------------------------------------


def noisy(x):
    return x.sin() * (1 + torch.rand(()))


def test_a_random_layer_is_told_to_seed_itself_not_to_solve_more_tightly():
    report = compare_gradients(noisy, torch.tensor([0.5, 1.0], dtype=F64))
    assert report.verdict == "inconclusive"
    assert "random numbers" in str(report)
    assert "tightly" not in str(report)


def test_the_properties_do_not_blame_a_random_layer():
    with pytest.raises(InconclusiveGradients, match="random numbers"):
        check_layer(noisy, strategies.tensors((2,)).filter(lambda x: bool(x.all())), **TAPE)


def test_a_layer_that_draws_the_same_twice_is_not_blamed_either():
    x, layer = torch.tensor([0.5, 1.0], dtype=F64), torch.nn.Dropout(0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reports = [examine(layer, (x,), modes=("reverse", "forward")) for _ in range(20)]
    assert "disagree" not in {report.verdict for report in reports}
    assert any("evaluated again" in str(report) for report in reports)


# --- second derivatives ---------------------------------------------------------------------------


def test_a_wrong_second_derivative_is_located():
    def layer(x):
        return x.sin() + torch.tensor([0.0, 0.1, 0.0]) * (x.detach() * x - x.square() / 2)

    report = compare_gradients(layer, torch.tensor([0.3, 0.5, 0.7], dtype=F64), order=2)
    wrong = [c for c in report.comparisons if "second derivative" in c.what and c.verdict == "disagree"]
    assert [c.what.partition(",")[0] for c in wrong] == [
        "reverse over reverse", "forward over reverse", "forward over forward",
    ]  # fmt: skip
    assert all(c.entry == "input[0][1] of the gradient of ⟨Jᵀv, w⟩" for c in wrong)
