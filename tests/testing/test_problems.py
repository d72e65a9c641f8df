"""The closed forms against finite differences and against solvers; the strategies against their own words."""

import doctest
import importlib
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from torch.utils import _pytree as pytree

import implicitlayers as il
from implicitlayers.testing import finite_difference, problems, strategies

F32, F64 = torch.float32, torch.float64
QUICK = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], deadline=None)


@pytest.mark.parametrize("name", problems.CLOSED_FORMS)
def test_formulas_match_finite_differences(name):
    problem = problems.CLOSED_FORMS[name]
    at = problem.params[problem.argnum]
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(0), dtype=F64)

    def put(p):
        return [*problem.params[: problem.argnum], p, *problem.params[problem.argnum + 1 :]]

    for f, derivative in ((problem.solution, problem.first), (problem.first, problem.second)):
        formula = torch.tensordot(derivative(*problem.params), direction, dims=at.ndim) if at.ndim else (
            derivative(*problem.params) * direction
        )  # fmt: skip
        found, floor = finite_difference(lambda p, f=f: f(*put(p)), at, direction)
        assert found.shape == f(*problem.params).shape
        # Newton's method inside some of the formulas leaves up to 1e-12 that is smooth, and so is no noise.
        assert ((found - formula).abs() <= 2 * floor + 2e-12).all()


SOLVABLE = [name for name, p in problems.CLOSED_FORMS.items() if p.kind == "argmin" and p.smooth]


@pytest.mark.parametrize("name", SOLVABLE)
def test_the_library_finds_the_closed_forms(name):
    problem = problems.CLOSED_FORMS[name]
    solver = il.Newton(il.Dense(), rtol=1e-13, atol=1e-13)
    x0 = problem.x0 if problem.x0.shape == problem.solution(*problem.params).shape else None
    params = [p.clone().requires_grad_() for p in problem.params]
    x = il.argmin(problem.function, x0, *params, solver=solver, adjoint=il.Implicit(il.Dense())).value
    torch.testing.assert_close(x.detach(), problem.solution(*problem.params), rtol=0, atol=1e-9)
    rows = [torch.autograd.grad(entry, params[problem.argnum], retain_graph=True)[0] for entry in x]
    # Rosenbrock's condition number of 2500 takes three digits.
    torch.testing.assert_close(torch.stack(rows), problem.first(*problem.params), rtol=0, atol=1e-7)


def test_numbers_of_the_table():
    forms = problems.CLOSED_FORMS
    value = {name: forms[name].solution(*forms[name].params) for name in forms}
    assert value["quadratic program"].tolist() == pytest.approx([0.25, 0.75])
    assert value["cubic root"].item() == pytest.approx(1.5213797068, abs=1e-10)
    assert value["cosine"].item() == pytest.approx(0.7390851332, abs=1e-10)
    assert forms["cosine"].first(*forms["cosine"].params).item() == pytest.approx(0.5975100457, abs=1e-10)
    assert value["Beale"].tolist() == pytest.approx([3, 0.5])
    assert forms["ridge"].to(F32).params[0].dtype == F32
    with pytest.raises(ValueError, match="full column rank"):
        forms["lasso"].solution(torch.zeros(2, 1, dtype=F64) * torch.nan, torch.ones(2).double(), torch.tensor(1.0))


def test_systems_are_what_they_are_called():
    systems = problems.SYSTEMS
    assert torch.linalg.cond(systems["condition 4647"]).item() == pytest.approx(4647, rel=1e-3)
    assert torch.linalg.matrix_rank(systems["singular"]) == 1
    assert torch.linalg.eigvalsh(systems["indefinite"]).sign().tolist() == [-1, 1]
    assert systems["Poisson, n = 100"].shape == (100, 100)


@QUICK
@given(st.data(), st.sampled_from([F32, F64]), st.floats(1, 1000))
def test_spd_matrices_are_as_asked(data, dtype, condition):
    A = data.draw(strategies.spd_matrices(condition=condition, dtype=dtype, max_size=4))
    assert A.dtype == dtype
    assert len(A) <= 4
    assert (A.mT == A).all()
    eigenvalues = torch.linalg.eigvalsh(A.double())
    # Rounding to float32 moves an eigenvalue by up to eps times the largest.
    slack = 4 * torch.finfo(dtype).eps * condition
    assert eigenvalues.min() >= 1 - slack
    assert eigenvalues.max() <= condition * (1 + slack) + slack


@QUICK
@given(strategies.matrices(2, condition=st.floats(1, 50)))
def test_matrices_are_regular(A):
    assert torch.linalg.cond(A) <= 50 * (1 + 1e-12)


@QUICK
@given(
    strategies.tensors(device="meta") | strategies.spd_matrices(device="meta") | strategies.matrices(device="meta")
    | strategies.trees(device="meta", max_leaves=2)
)  # fmt: skip
def test_the_device_is_the_one_asked_for(tree):
    assert {leaf.device.type for leaf in pytree.tree_leaves(tree)} == {"meta"}


@QUICK
@given(strategies.strongly_convex_problems() | strategies.contractions())
def test_drawn_problems_know_their_answers(problem):
    x = problem.solution(*problem.params)
    if problem.kind == "argmin":
        residual = torch.func.grad(problem.function)(x, *problem.params)
    else:
        residual = problem.function(x, *problem.params) - x
    assert residual.abs().max() < 1e-9
    assert problem.first().shape == x.shape + problem.params[0].shape
    assert problem.second().shape == x.shape + 2 * problem.params[0].shape


@QUICK
@given(strategies.contractions(rate=0.5))
def test_contractions_contract(problem):
    a, b = problem.x0, problem.x0 + 1
    apart = problem.function(a, *problem.params) - problem.function(b, *problem.params)
    assert apart.norm() <= 0.5 * (a - b).norm() + 1e-12


@QUICK
@given(strategies.trees(dtype=F32, max_size=2))
def test_trees_hold_tensors_as_asked(tree):
    leaves = pytree.tree_leaves(tree)
    assert leaves
    assert all(leaf.dtype == F32 and max(leaf.shape, default=0) <= 2 for leaf in leaves)


@QUICK
@given(strategies.layers(dtype=F64, max_size=2))
def test_layers_are_right(example):
    found = example.layer(*example.inputs)
    torch.testing.assert_close(found, example.solution(*example.inputs), rtol=0, atol=1e-8)


def test_examples_shrink_to_something_small():
    options = settings(database=None, deadline=None)
    assert torch.equal(find(strategies.spd_matrices(2), lambda A: True, settings=options), torch.eye(2).double())
    assert find(strategies.trees(), lambda t: True, settings=options).shape == ()
    small = find(strategies.tensors((2,)), lambda t: bool(t[1] > 1), settings=options)
    assert small.tolist() == [0, 1.125]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: strategies.trees(torch.ones(2)), r"leaves is tensor.*pass strategies.tensors\(\)"),
        (lambda: strategies.spd_matrices("3").example(), "n is '3', a str"),
        (lambda: strategies.spd_matrices(2, condition="big").example(), "condition is 'big'"),
        (lambda: strategies.matrices(2, condition="big").example(), "condition is 'big'"),
        (lambda: strategies.tensors((2,), elements=3.0).example(), r"elements is 3.0.*st.just\(3.0\)"),
        (lambda: strategies.tensors([2]).example(), r"shape is \[2\]"),
        (lambda: strategies.layers(solvers=il.LBFGS()).example(), "solvers is LBFGS"),
        (lambda: strategies.trees(strategies.tensors), "makes strategies but is none; call it"),
    ],
)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_a_value_in_the_place_of_a_strategy_is_told(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize(
    "name",
    [
        "checks",
        "finite_difference",
        "gradients",
        "linear_checks",
        "problems",
        "solver_checks",
        "strategies.problems",
        "strategies.tensors",
    ],
)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_examples_of_the_docstrings_run(name):
    module = importlib.import_module(f"implicitlayers.testing.{name}")
    done = doctest.testmod(module, extraglobs={"torch": torch, "math": math, "il": il})
    assert done.attempted > 0
    assert done.failed == 0
