"""Calls that cannot mean what they say: each gets a diagnosis, not a zero, with the words that help."""

import re

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

import implicitlayers as il
from tests.helpers.problems import F64

X0 = torch.zeros(2, dtype=F64)


def square(x):
    return x.square().sum()


def misuse(*words):
    """Expect a MisuseError whose message has all these words, in this order."""
    return pytest.raises(il.MisuseError, match="(?s)" + ".*".join(re.escape(word) for word in words))


def test_misuse_is_a_value_error_and_an_error_of_this_library():
    assert issubclass(il.MisuseError, ValueError)
    for error in (il.MisuseError, il.SolveError, il.AdjointError):
        assert issubclass(error, il.ImplicitLayersError)
    assert not issubclass(il.SolveError, il.AdjointError)


UNKNOWNS = {
    "no leaves": ({}, ["x0 has no leaves", "nothing to solve for"]),
    "None": (None, ["x0", "NoneType", "not a tensor"]),
    "a number": (1.0, ["x0", "float", "not a tensor", "torch.tensor"]),
    "a number in a tree": ({"w": X0, "b": 1.0}, ["x0['b']", "float"]),
    "integers": (torch.zeros(2, dtype=torch.int64), ["x0", "torch.int64", "floating"]),
    "booleans in a tree": ([X0, torch.zeros(2, dtype=torch.bool)], ["x0[1]", "torch.bool", "floating"]),
    "complex": (torch.zeros(2, dtype=torch.complex128), ["x0", "complex128", "real and imaginary parts"]),
    "no elements": (torch.zeros(0, 3, dtype=F64), ["x0 has no elements", "(0, 3)"]),
    "two dtypes": ({"a": X0, "b": X0.float()}, ["x0['b']", "float32", "x0['a']", "float64", "one dtype"]),
    "two devices": ({"a": X0, "b": X0.to("meta")}, ["x0['b']", "meta", "x0['a']", "cpu", "one device"]),
}


@pytest.mark.parametrize(("x0", "words"), UNKNOWNS.values(), ids=UNKNOWNS.keys())
def test_unknown_that_cannot_be_solved_for(x0, words):
    with misuse(*words):
        il.argmin(lambda x: torch.zeros(()), x0)


class Identity(nn.Module):
    def forward(self, x):
        return x


OBJECTIVES = {
    "not callable": (X0, ["objective is a Tensor", "not a function", "(x, *params) -> scalar"]),
    "a vector": (lambda x: x * x, ["shape (2,)", "scalar", ".sum()", "torch.vmap"]),
    "one element": (lambda x: (x * x).sum(0, keepdim=True), ["shape (1,)", "scalar"]),
    "a module's vector": (Identity(), ["shape (2,)", "scalar"]),
    "a number": (lambda x: 1.0, ["float", "not a tensor"]),
    "nothing": (lambda x: None, ["NoneType", "not a tensor"]),
    "aux unasked": (lambda x: (square(x), x), ["tuple", "has_aux=True"]),
    "another dtype": (lambda x: square(x.float()), ["objective is torch.float32", "x0 is torch.float64", "convert"]),
    "another device": (lambda x: square(x).to("meta"), ["objective lies on meta", "x0 on cpu", "move"]),
}


@pytest.mark.parametrize(("objective", "words"), OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_objective_that_cannot_be_minimized(objective, words):
    with misuse(*words):
        il.argmin(objective, X0)


@pytest.mark.parametrize("out", [lambda x: square(x), lambda x: (square(x), x, x)], ids=["no aux", "three"])
def test_aux_that_is_not_there(out):
    with misuse("has_aux=True", "return (value, aux)"):
        il.argmin(out, X0, has_aux=True)


def test_an_aux_objective_whose_value_is_no_scalar():
    with misuse("shape (2,)", "scalar"):
        il.argmin(lambda x: (x * x, x), X0, has_aux=True)


def test_random_objective():
    with misuse("not deterministic", "eval()"):
        il.argmin(lambda x: (x - torch.randn(2, dtype=F64)).square().sum(), X0)


def test_dropout():
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5)).double()
    with misuse("not deterministic"):
        il.argmin(lambda x: (model(x) - 1).square().sum(), X0 + 1)
    model.eval()
    assert il.argmin(lambda x: (model(x) - 1).square().sum() + square(x), X0 + 1).status == il.Status.CONVERGED


def test_batches_that_change_between_calls():
    batches = iter(torch.arange(1000.0, dtype=F64))
    with misuse("not deterministic"):
        il.argmin(lambda x: (x - next(batches)).square().sum(), X0)


@pytest.mark.parametrize("at", [torch.nan, torch.inf])
def test_objective_not_finite_at_the_start(at):
    with pytest.raises(il.SolveError, match=r"NON_FINITE after 0 steps(?s:.*)at the start, x0") as error:
        il.argmin(lambda x: square(x - 1) + at, X0)
    assert il.Status.NON_FINITE.remedy in str(error.value)


def test_gradient_not_finite_at_the_start():
    with pytest.raises(il.SolveError, match="NON_FINITE after 0 steps"):
        il.argmin(lambda x: x.abs().sqrt().sum() + square(x - 1), X0)


# --- parameters that cannot reach the result -------------------------------------------------------------------------


def test_parameter_that_enters_through_the_start_alone():
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    with misuse("x0 carries a derivative", "would be zero", "Proximal(anchor=", "x0.detach()", "Unrolled()"):
        il.argmin(lambda x: square(x - 1), theta)
    with misuse("x0 carries a derivative"):
        il.argmin(lambda x: square(x["w"] - 1), {"w": theta * 2}, adjoint=il.OneStep())


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.grad])
def test_start_alone_under_transforms(transform):
    with misuse("x0 carries a derivative"):
        transform(lambda theta: il.argmin(lambda x: square(x - 1), theta).value.sum())(torch.ones(2, dtype=F64))


def test_start_alone_in_forward_mode_without_grad():
    with torch.no_grad(), forward_ad.dual_level(), misuse("x0 carries a derivative"):
        start = forward_ad.make_dual(torch.ones(2, dtype=F64), torch.ones(2, dtype=F64))
        il.argmin(lambda x: square(x - 1), start)


def test_start_alone_is_meant_when_it_is_detached_or_unrolled_or_the_anchor():
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    assert not il.argmin(lambda x: square(x - 1), theta.detach()).value.requires_grad
    solver = il.GradientDescent(lr=0.25, rtol=None, atol=None, max_steps=2)
    x = il.argmin(lambda x: square(x - 2), theta, solver=solver, adjoint=il.Unrolled()).value
    torch.testing.assert_close(torch.autograd.grad(x.sum(), theta)[0], torch.full((2,), 0.25, dtype=F64))
    x = il.argmin(lambda x: square(x - 2), theta, regularizer=il.Proximal(theta, 1.0)).value
    torch.testing.assert_close(torch.autograd.grad(x.sum(), theta)[0], torch.full((2,), 1 / 3, dtype=F64))


def test_start_alone_beside_a_learnable_strength():
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    lam = torch.tensor(0.5, dtype=F64, requires_grad=True)
    with misuse("only through x0"):
        il.argmin(lambda x: square(x - 1), theta, regularizer=il.Ridge(lam))


def test_leaf_that_the_objective_does_not_touch():
    x0 = {"used": X0, "unused": X0}
    with misuse("does not use x0['unused']", "take it out", "regularizer"):
        il.argmin(lambda x: square(x["used"] - 1), x0)
    with misuse("does not use x0, "):
        il.argmin(lambda x: torch.ones((), dtype=F64), X0)
    solution = il.argmin(lambda x: square(x["used"] - 1), x0, regularizer=il.Ridge(1.0))
    torch.testing.assert_close(solution.value["unused"], X0)


@pytest.mark.parametrize(
    "objective",
    [lambda x: square(x.detach() - 1), torch.no_grad()(lambda x: square(x - 1))],
    ids=["detach", "no_grad"],
)
def test_objective_that_cannot_be_differentiated(objective):
    with pytest.raises(il.ImplicitLayersError):
        il.argmin(objective, X0)


# --- arguments -------------------------------------------------------------------------------------------------------


ARGUMENTS = {
    "solver class": ({"solver": il.LBFGS}, ["solver is the class LBFGS", "an instance, LBFGS("]),
    "adjoint class": ({"adjoint": il.Implicit}, ["adjoint is the class Implicit", "instance"]),
    "regularizer class": ({"regularizer": il.Ridge}, ["regularizer is the class Ridge", "instance"]),
    "solver of another kind": ({"solver": il.CG()}, ["solver is CG", "no Solver"]),
    "adjoint of another kind": ({"adjoint": il.CG()}, ["adjoint is CG", "no Adjoint"]),
    "regularizer of another kind": ({"regularizer": 0.1}, ["regularizer is 0.1", "no Regularizer"]),
    "policy": ({"on_failure": "print"}, ["on_failure is 'print'", '"raise", "warn", "ignore", "nan"']),
    "gauss-newton": ({"adjoint": il.Implicit(curvature="gauss_newton")}, ["plain function", "Composite(model, loss)"]),
    "last steps": ({"adjoint": il.Unrolled(last=2)}, ["Unrolled(last=2)", "not known", "rtol=atol=None", "OneStep"]),
    "anchor's tree": ({"regularizer": il.Proximal({"w": X0}, 1.0)}, ["Proximal's anchor", "structure"]),
    "anchor's shape": ({"regularizer": il.Proximal(torch.zeros(3), 1.0)}, ["Proximal's anchor", "(3,)", "(2,)"]),
    "anchor is a number": ({"regularizer": il.Proximal(0.0, 1.0)}, ["Proximal's anchor", "float"]),
    "strength's tree": ({"regularizer": il.Ridge({"w": 1.0})}, ["Ridge's lam", "structure"]),
    "strength's shape": ({"regularizer": il.Ridge(torch.ones(3))}, ["Ridge's lam", "(3,)", "broadcast to (2,)"]),
    "strength's dimensions": ({"regularizer": il.Ridge(torch.ones(1, 2))}, ["Ridge's lam", "(1, 2)", "broadcast"]),
}


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_argument_that_does_not_fit(arguments, words):
    with misuse(*words):
        il.argmin(square, X0, **arguments)


CONSTRUCTORS = {
    "one tolerance": (lambda kind: kind(rtol=None), ["rtol=None", "one is None and the other is not", "None for both"]),
    "the other tolerance": (lambda kind: kind(atol=None), ["atol=None", "one is None and the other is not"]),
    "negative rtol": (lambda kind: kind(rtol=-1e-3), ["rtol=-0.001", "negative"]),
    "atol that is NaN": (lambda kind: kind(atol=float("nan")), ["atol=nan", "NaN"]),
    "no steps": (lambda kind: kind(max_steps=0), ["max_steps=0", "positive integer"]),
    "half a step": (lambda kind: kind(max_steps=0.5), ["max_steps=0.5", "positive integer"]),
}


@pytest.mark.parametrize("kind", [il.GradientDescent, il.LBFGS, il.Newton, il.CG])
@pytest.mark.parametrize(("make", "words"), CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_tolerances_and_limits(kind, make, words):
    with misuse(kind.__name__, *words):
        make(kind)


PARTS = {
    "step size": (lambda: il.GradientDescent(lr=0.0), ["lr=0.0", "positive"]),
    "momentum": (lambda: il.GradientDescent(momentum=1.0), ["momentum=1.0", "[0, 1)"]),
    "nesterov": (lambda: il.GradientDescent(nesterov=True), ["nesterov=True", "needs momentum"]),
    "search with momentum": (
        lambda: il.GradientDescent(momentum=0.9, line_search=il.Armijo()),
        ["line search", "drop"],
    ),
    "memory": (lambda: il.LBFGS(memory=0), ["memory=0", "positive"]),
    "newton's damping": (lambda: il.Newton(damping=-1.0), ["Newton(damping=-1.0)", ">= 0"]),
    "decrease": (lambda: il.Armijo(sufficient_decrease=0.0), ["sufficient_decrease=0.0", "between 0 and 1"]),
    "shrink": (lambda: il.Armijo(shrink=1.0), ["shrink=1.0", "between 0 and 1"]),
    "trials": (lambda: il.Armijo(max_steps=0), ["Armijo(max_steps=0)", "positive"]),
    "adjoint's damping": (lambda: il.Implicit(damping=-0.1), ["Implicit(damping=-0.1)", ">= 0"]),
    "adjoint's policy": (lambda: il.Implicit(on_failure="no"), ["Implicit's on_failure is 'no'", '"raise"']),
    "curvature": (lambda: il.Implicit(curvature="fisher"), ["curvature='fisher'", '"gauss_newton"']),
    "unrolled steps": (lambda: il.Unrolled(last=0), ["Unrolled(last=0)", "nothing would be differentiated"]),
    "one step": (lambda: il.OneStep(steps=0), ["OneStep(steps=0)", "nothing would be differentiated"]),
    "negative strength": (lambda: il.Ridge(-1.0), ["Ridge(lam=-1.0)", "negative"]),
    "negative proximal": (lambda: il.Proximal(X0, -1), ["Proximal(lam=-1)", "negative"]),
    "a strength of NaN": (lambda: il.Ridge(float("nan")), ["Ridge(lam=nan)"]),
    "a sum with a number": (lambda: il.Ridge(1.0) + 2, ["2 is no regularizer"]),
}


@pytest.mark.parametrize(("make", "words"), PARTS.values(), ids=PARTS.keys())
def test_parts_that_cannot_be_made(make, words):
    with misuse(*words):
        make()


ZERO = torch.zeros(3, dtype=F64)


def test_sparse_and_meta_tensors_are_refused():
    S = torch.eye(3, dtype=F64).to_sparse()
    with pytest.raises(il.MisuseError, match=r"a param is a sparse tensor .*capture it"):
        il.argmin(lambda x, S: (torch.sparse.mm(S, x[:, None]) - 1).square().sum(), ZERO, S)
    x = il.argmin(lambda x: (torch.sparse.mm(S, x[:, None]) - 1).square().sum(), ZERO).value
    torch.testing.assert_close(x, torch.ones(3, dtype=F64))
    with pytest.raises(il.MisuseError, match="Q is a sparse tensor"):
        il.quadratic_program(S, ZERO)
    with pytest.raises(il.MisuseError, match="x0 lies on the meta device"):
        il.argmin(lambda x: x.square().sum(), torch.zeros(3, device="meta"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: il.LBFGS(rtol="a"),  # type: ignore[arg-type]
        lambda: il.LBFGS(max_steps=True),
        lambda: il.GradientDescent(torch.tensor(0.1, requires_grad=True)),  # type: ignore[arg-type]
        lambda: il.CG(rtol=torch.tensor(0.1)),  # type: ignore[arg-type]
    ],
)
def test_settings_are_plain_numbers(make):
    with pytest.raises(il.MisuseError, match="plain Python numbers"):
        make()
    with pytest.raises(il.MisuseError, match="pass a number >= 0"):
        il.Implicit(damping=torch.tensor(1.0))  # type: ignore[arg-type]
