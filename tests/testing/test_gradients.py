"""assert_gradients_match: verdicts, routes, trees, types, and what the message says."""

import pytest
import torch
from torch import nn

import implicitlayers as il
from implicitlayers.testing import (
    GradientMismatch,
    InconclusiveGradients,
    assert_gradients_match,
    compare_gradients,
)
from implicitlayers.testing.quotients import Quotients
from implicitlayers.testing.report import judge
from tests.testing.planted import cubic, function, linear, same, tangent, transposed

F32, F64 = torch.float32, torch.float64
A = torch.tensor([[2.0, 1.0], [-0.5, 3.0]], dtype=F64)
B = torch.tensor([1.0, -2.0], dtype=F64)
ALL = ("reverse", "forward", "vmap")


def routes(report):
    return {c.what.partition(",")[0] for c in report.comparisons}


def test_a_right_layer_agrees_by_every_route():
    report = assert_gradients_match(torch.linalg.inv, A, order=2)
    assert report.verdict == "agree"
    assert report.agrees
    assert routes(report) == {
        "reverse mode", "forward mode", "reverse over reverse", "forward over reverse", "forward over forward", "vmap",
        "reverse mode through vmap", "reverse over reverse through vmap",
    }  # fmt: skip


@pytest.mark.parametrize("modes", [("reverse",), ("forward",), ("reverse", "forward")])
def test_only_the_modes_asked_for_are_compared(modes):
    report = assert_gradients_match(torch.sin, B, modes=modes, order=2)
    assert not any("vmap" in route for route in routes(report))
    assert any("reverse mode" in r for r in routes(report)) == ("reverse" in modes)
    assert any("forward mode" in r for r in routes(report)) == ("forward" in modes)


def test_a_function_written_by_hand_agrees_in_first_order():
    assert assert_gradients_match(linear(transposed, tangent), A, B).agrees


def test_the_worst_entry_is_that_of_the_largest_error():
    # The first entry is exact but for rounding, which is all of it; the second is 1e-3 off.
    def layer(x):
        return torch.stack([1e-9 * x[0], x[1] + 1e-3 * (x[1] - x[1].detach())])

    (worst,) = compare_gradients(layer, torch.ones(2, dtype=F64), modes=("reverse",)).comparisons
    assert worst.entry == "input[0][1] of Jᵀv"
    assert worst.allowed == pytest.approx(1e-6 * abs(worst.expected), rel=1e-6)


def test_the_message_names_entry_values_floor_and_oracle():
    wrong = function(lambda x: x.sin(), lambda v, y, x: v * x.cos() * torch.tensor([1.0, 1.5], dtype=F64))
    with pytest.raises(GradientMismatch) as caught:
        assert_gradients_match(wrong, B, modes=("reverse",))
    worst = caught.value.report.worst
    assert worst.entry == "input[0][1] of Jᵀv"
    assert worst.found == pytest.approx(1.5 * worst.expected)
    assert 0 < worst.floor < 1e-8
    for part in ("input[0][1]", f"{worst.found:.10g}", f"{worst.expected:.10g}", "floor", "finite differences"):
        assert part in str(caught.value)


def test_the_worst_of_several_is_told_first():
    wrong = function(lambda x, y: x * y, lambda v, out, x, y: (v * y * 1.001, v * x * 2))
    report = compare_gradients(wrong, A, B, modes=("reverse",))
    assert "input[1]" in report.worst.what
    assert str(report).splitlines()[1].startswith("disagree: reverse mode, derivative in input[1]")


@pytest.mark.parametrize("layer", [lambda x: x.detach().sin(), lambda x: x.detach().sin() + 0 * x])
def test_no_gradient_is_a_wrong_gradient(layer):
    report = compare_gradients(layer, B, modes=("reverse",))
    assert report.verdict == "disagree"
    assert report.worst.found == 0


def test_a_zero_derivative_agrees():
    assert compare_gradients(lambda x, y: x.sin() + 0 * y, B, B).agrees
    assert compare_gradients(lambda x: (x * 0 + 3).square(), B, order=2).agrees


def test_nan_is_wrong():
    nan = function(lambda x: x.sin(), lambda v, y, x: v * torch.nan)
    assert compare_gradients(nan, B, modes=("reverse",)).verdict == "disagree"


def test_a_missing_mode_is_told_and_not_skipped():
    no_forward = function(lambda x: x.sin(), lambda v, y, x: v * x.cos())
    with pytest.raises(GradientMismatch, match=r"not supported: forward mode.*\n    raised NotImplementedError"):
        assert_gradients_match(no_forward, B)
    assert assert_gradients_match(no_forward, B, modes=("reverse", "vmap")).agrees


@pytest.mark.parametrize("noise", [1e-7, 1e-5])
def test_noise_makes_it_inconclusive_not_right_and_not_wrong(noise):
    def noisy(x):
        return x.sin() + noise * (x.detach() * 1e9).sin()

    with pytest.raises(InconclusiveGradients, match="Solve more tightly"):
        assert_gradients_match(noisy, B, modes=("reverse",))
    assert assert_gradients_match(noisy, B, modes=("reverse",), reference=torch.sin).agrees
    assert assert_gradients_match(noisy, B, modes=("reverse",), tol=1e4 * noise).agrees


def test_noise_does_not_hide_what_is_far_above_it():
    wrong = function(lambda x: x.sin() + 1e-6 * (x * 1e9).sin(), lambda v, y, x: 2 * v * x.cos())
    assert compare_gradients(wrong, B, modes=("reverse",)).verdict == "disagree"


def test_a_discontinuity_is_no_disagreement():
    # LAPACK flips signs of Q as soon as the matrix is not exactly the identity.
    report = compare_gradients(lambda M: torch.linalg.qr(M)[0], torch.eye(3, dtype=F64), modes=("reverse", "forward"))
    assert report.verdict != "disagree"


def test_nothing_on_either_side_is_inconclusive():
    def only_here(x):
        if (x != B).any():
            raise RuntimeError("outside")
        return x * 1

    report = compare_gradients(only_here, B, modes=("reverse",))
    assert report.verdict == "inconclusive"
    assert "No difference quotient" in report.worst.reason


@pytest.mark.parametrize("held", [same, torch.Tensor.detach])
def test_second_derivatives_tell_a_detached_solution(held):
    layer, right = cubic(held), held is same
    assert compare_gradients(layer, B, modes=("reverse",)).agrees
    assert compare_gradients(layer, B, modes=("reverse",), order=2).agrees == right


def test_trees_integers_and_frozen_inputs():
    def layer(tree, k, data):
        return {"y": tree["w"] * k + data.sin(), "count": k}, [tree["b"][0].exp()]

    tree = {"w": B, "b": (torch.tensor(0.5, dtype=F64),)}
    report = assert_gradients_match(layer, tree, 3, B, modes=("reverse", "forward"))
    assert {c.what.rpartition(" ")[2] for c in report.comparisons} == {"input[0]['w']", "input[0]['b'][0]", "input[2]"}
    chosen = {"w": B.clone().requires_grad_(), "b": tree["b"]}
    report = assert_gradients_match(layer, chosen, 3, B, modes=("reverse", "forward"))
    assert {c.what.rpartition(" ")[2] for c in report.comparisons} == {"input[0]['w']"}


def test_a_wrong_small_leaf_does_not_hide_behind_a_large_one():
    wrong = function(lambda x, y: 1e8 * x + 1e-3 * y, lambda v, out, x, y: (1e8 * v, 2e-3 * v))
    assert "input[1]" in compare_gradients(wrong, B, B, modes=("reverse",)).worst.what


def test_parameters_of_a_module_are_inputs():
    report = assert_gradients_match(nn.Linear(2, 3), torch.ones(2), order=2)
    assert any("parameter['weight']" in c.what for c in report.comparisons)
    assert "in float64" in report.comparisons[0].oracle


def test_float32_is_compared_in_float64():
    report = assert_gradients_match(torch.linalg.solve, A.float(), B.float())
    assert all(c.floor < 1e-6 for c in report.comparisons if "finite" in c.oracle)


@pytest.mark.parametrize("error", [TypeError, AssertionError])
def test_a_layer_that_insists_on_float32_is_compared_in_float32(error):
    def refusing(x):
        if x.dtype != F32:
            raise error("single precision only")
        return x.sin()

    report = compare_gradients(refusing, B.float())
    assert report.verdict in ("agree", "inconclusive")
    assert "in float64" not in report.comparisons[0].oracle


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((torch.ones(2, dtype=torch.int64),), {}, "no floating tensor"),
        ((B,), {"modes": "reverse"}, "pass a tuple"),
        ((B,), {"modes": ("backward",)}, "pass a tuple"),
        ((B,), {"order": 3}, "order is 3"),
    ],
)
def test_misuse_is_told(arguments, options, words):
    with pytest.raises(TypeError, match=words):
        compare_gradients(torch.sin, *arguments, **options)


def test_what_cannot_be_called_is_told():
    with pytest.raises(TypeError, match="cannot be called"):
        compare_gradients(B, B)


def _judge(found, expected, floor, scale=1.0, natural=1.0, size=1.0, tol=1e-6, error=None):
    numbers = (found, expected, floor, scale, size, floor if error is None else error)
    found, expected, floor, scale, size, error = (torch.tensor([t], dtype=F64) for t in numbers)
    return judge(found, Quotients(expected, floor, scale, natural, size, error, 10 * error), tol)[0]


@pytest.mark.parametrize(
    ("found", "floor", "verdict"),
    [
        (1.0, 1e-9, "agree"),
        (1.0 + 5e-7, 1e-9, "agree"),
        (1.0 + 2e-6, 1e-9, "disagree"),
        (1.0 + 2e-6, 5e-7, "inconclusive"),
        (1.0, 1e-3, "inconclusive"),
        (1.5, 1e-3, "disagree"),
        (float("nan"), 1e-9, "disagree"),
        (1.0, float("inf"), "inconclusive"),
        (float("nan"), float("inf"), "inconclusive"),
    ],
)
def test_verdicts(found, floor, verdict):
    assert _judge(found, 1.0, floor) == verdict


def test_no_floor_above_the_tolerance_passes():
    assert _judge(1.0, 1.0, 1.1e-6) == "inconclusive"
    assert _judge(0.0, 0.0, 1e-9, scale=0.0, size=0.0) == "agree"
    assert _judge(0.0, 0.0, 1e-5, scale=0.0, size=0.0) == "inconclusive"


def test_what_any_number_would_pass_for_is_inconclusive():
    # A derivative of 1 where 1e10 is natural, and 1e7·tol is negligible.
    assert _judge(1.0, 1.0, 1e-7, scale=1e7, natural=1e10) == "agree"
    assert _judge(2.0, 1.0, 1e-7, scale=1e7, natural=1e10) == "inconclusive"
    assert _judge(1.0, 1.0, 1e-5, scale=1e7, natural=1e10) == "inconclusive"
    # Nothing is seen of it.
    assert _judge(2.0, 1.0, 0.5, scale=1e7, natural=1e10) == "agree"
    # The layer is coarse, but not the quotients.
    assert _judge(2.0, 1.0, 0.5, scale=1e7, natural=1e10, error=1e-7) == "inconclusive"
    assert _judge(1.0, 1.0, 0.5, scale=1e7, natural=1e10, error=1e-7) == "agree"


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float32, (1e5, 1e6)), (F64, (1e10, 1e12))])
def test_a_lost_derivative_behind_any_large_part_is_not_right(dtype, parts):
    x = torch.tensor([0.7, -1.3], dtype=dtype)
    for part in parts:
        lost = compare_gradients(lambda x, c=part: c + x.detach() + 0 * x, x, modes=("reverse",))
        assert lost.verdict == "inconclusive", part
        assert "large constant part" in str(lost)


FLAT_AT_ZERO = [
    torch.square, torch.var, torch.prod, lambda x: x**3, lambda x: 1 - x.cos(), lambda x: torch.outer(x, x)
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("layer", FLAT_AT_ZERO)
def test_a_gradient_of_zero_where_the_value_is_zero_is_right(layer, dtype):
    assert compare_gradients(layer, torch.zeros(3, dtype=dtype)).agrees


def test_a_gradient_that_is_not_zero_where_the_value_is_disagrees():
    def wrong(x):
        return x.detach() ** 2 + 1e-3 * (x - x.detach())

    report = compare_gradients(wrong, torch.zeros(3, dtype=F64), modes=("reverse",))
    assert report.verdict == "disagree"


def test_an_output_is_seen_beside_a_much_larger_one():
    x = torch.tensor([1.5e-3, -3e-4])
    assert compare_gradients(lambda x: {"small": x.sum(), "large": 1e6 * x}, x).agrees


@pytest.mark.parametrize("factor", [1, 2])
def test_a_large_constant_part_is_told(factor):
    def layer(x):
        return 1e10 + x.square() + (factor - 1) * (x.square() - x.square().detach())

    report = compare_gradients(layer, torch.tensor([1.0, 2.0], dtype=F64), modes=("reverse",))
    assert report.verdict == "inconclusive"
    assert "constant part" in str(report)


@pytest.mark.parametrize(("error", "right"), [(2e-5, True), (1e-3, False)])
def test_what_is_left_of_larger_numbers_in_float32_is_held_to_their_rounding(error, right):
    class Parabola(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * x - 2 * x + 5)
        backward = staticmethod(lambda ctx, v: v * (2e-4 + error))

    assert compare_gradients(Parabola.apply, torch.tensor(1.0001), modes=("reverse",)).agrees == right


def test_rounding_in_place_of_a_gradient_of_zero_is_not_held_against_vmap():
    # On its bounds the solution does not depend on q, and what the adjoint returns for it is 1e-17.
    def bounded(q):
        Q, eye = torch.tensor([[1.4981, 0.3736], [0.3736, 1.2802]]).double(), torch.eye(2).double()
        return il.quadratic_program(Q, q, G=-eye, h=eye[0] / 16).value.x

    assert compare_gradients(bounded, torch.tensor([3.0, 0.5]).double()).agrees
