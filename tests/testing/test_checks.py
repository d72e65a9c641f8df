"""The checks catch every planted bug, pass the same layers without it, and shrink to something small."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings

import implicitlayers as il
from implicitlayers.testing import (
    Checked,
    GradientMismatch,
    InconclusiveGradients,
    check_adjoint,
    check_layer,
    check_linear_solver,
    check_solver,
    strategies,
)
from tests.testing.planted import PLANTED, conjugate_gradients, run

F32, F64 = torch.float32, torch.float64


@pytest.fixture(scope="module", autouse=True)
def _no_shrinking():
    """What is caught is what counts here, and shrinking solves hundreds of problems."""
    before = settings.get_current_profile_name()
    settings.register_profile("caught", settings.default, phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("caught")
    yield
    settings.load_profile(before)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name):
    bad, _, inputs, options = PLANTED[name]
    with pytest.raises(GradientMismatch):
        run(bad, inputs, options, 100)


@pytest.mark.parametrize("name", PLANTED)
def test_the_layer_without_the_bug_passes(name):
    _, right, inputs, options = PLANTED[name]
    checked = run(right, inputs, options, 3)
    assert checked.examples >= 2


def test_a_failure_shrinks_and_is_named():
    settings.register_profile("shrinking", settings.default, phases=list(Phase))
    settings.load_profile("shrinking")
    with pytest.raises(GradientMismatch) as caught:
        check_layer(lambda x: x.sin() + x.detach(), strategies.tensors((2,)), max_examples=10)
    settings.load_profile("caught")
    assert "tensor([0., 0.], dtype=torch.float64)" in str(caught.value.__notes__)


def test_a_layer_that_says_nothing_is_inconclusive():
    def noisy(x):
        return x.sin() + 1e-4 * (x.detach() * 1e9).sin()

    inputs = strategies.tensors((2,), elements=st.integers(1, 9).map(float))
    with pytest.raises(InconclusiveGradients):
        check_layer(noisy, inputs, modes=("reverse",), max_examples=5)


def test_a_tolerance_that_does_nothing_is_caught():
    inputs = strategies.tensors((2,))
    assert check_layer(
        torch.sin, inputs, modes=("reverse",), at_tolerance=lambda t: lambda x: x.sin() + t, max_examples=3
    )
    with pytest.raises(GradientMismatch, match="error at"):
        check_layer(
            torch.sin, inputs, modes=("reverse",), max_examples=3,
            at_tolerance=lambda t: lambda x: x.sin() + (1e-3 if 1e-9 < t < 1e-5 else t),
        )  # fmt: skip


def test_a_value_that_depends_on_the_start_is_caught():
    def layer(x, x0):
        return x.sin() + 1e-3 * x0.detach()

    with pytest.raises(GradientMismatch, match="from another start"):
        check_layer(
            layer, strategies.tensors((2,)), starts=strategies.tensors((2,)), modes=("reverse",), max_examples=5
        )


def test_a_value_in_the_place_of_a_strategy_is_told():
    with pytest.raises(TypeError, match=r"a Tensor, but a Hypothesis strategy is needed"):
        check_layer(torch.sin, torch.ones(2))
    with pytest.raises(TypeError, match="call it"):
        check_layer(torch.sin, strategies.tensors((2,)), starts=strategies.tensors)


# --- linear solvers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("solver", [il.CG(rtol=1e-12), il.CG(), il.Dense()], ids=["tight CG", "CG", "Dense"])
def test_linear_solvers_pass(solver, dtype):
    assert check_linear_solver(solver, dtype=dtype, max_examples=10).examples == 10


@dataclasses.dataclass(frozen=True)
class Faulty(il.LinearSolver):
    """Solves densely, with one thing wrong."""

    fault: str
    max_steps: int = 100

    @property
    def looks(self):
        return True

    def solve(self, operator, b, x0=None):
        right = il.Dense().solve(operator, b)
        A, status = operator.dense(b), torch.full_like(right.status, il.Status.CONVERGED)
        if self.fault == "transposed":
            return right._replace(x=torch.linalg.solve_ex(A.mT, b)[0])
        if self.fault == "lies":
            return right._replace(status=status)
        if self.fault == "hasty" and self.max_steps == 1:
            return right._replace(x=0 * b, status=status)
        if self.fault == "underflow":
            size = (b * b).sum(-1, keepdim=True).float().sqrt().to(b)
            return right._replace(x=torch.where(size > 0, right.x, 0))
        if self.fault == "offset":
            return right._replace(x=right.x + 1e-3)
        if self.fault == "lanes" and b.ndim == 2:
            return right._replace(x=right.x.flip(0))
        if self.fault == "poison" and b.ndim == 2:
            return right._replace(x=right.x + 0 * b.sum())
        if self.fault == "previous" and b.ndim == 1:
            return right._replace(x=conjugate_gradients(A, b, previous=True))
        return right


FAULTS = {
    "transposed": "solution|⟨c",
    "lies": "singular",
    "hasty": "one step",
    "underflow": "solution for b of size",
    "offset": "solution",
    "lanes": "batch|lane",
    "poison": "lane of NaN",
    "previous": "solution",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_linear_solvers_are_caught(fault):
    with pytest.raises(GradientMismatch, match=FAULTS[fault]):
        check_linear_solver(Faulty(fault), max_examples=100)
    assert check_linear_solver(Faulty("none"), max_examples=3).examples == 3


# --- solvers and adjoints -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [il.LBFGS(), il.Newton(), il.Newton(il.Dense(), rtol=1e-12)], ids=lambda s: str(s)[:40]
)
def test_solvers_pass(solver):
    assert check_solver(solver, max_examples=4).examples == 4


def test_a_solver_of_a_fixed_number_of_steps_passes_where_they_are_enough():
    assert check_solver(il.Newton(il.Dense(), rtol=None, atol=None, max_steps=12), max_examples=3).examples == 3


def test_a_solver_with_too_few_steps_is_caught():
    # It says so itself, and where the smallest example lets it off, it is far from the known answer.
    with pytest.raises(GradientMismatch, match=r"MAX_STEPS|against the known answer"):
        check_solver(il.GradientDescent(lr=1e-3, max_steps=20))


@pytest.mark.parametrize("adjoint", [il.Implicit(il.Dense()), il.Implicit(il.CG(rtol=1e-12))], ids=["Dense", "CG"])
def test_adjoints_pass(adjoint):
    assert check_adjoint(adjoint, order=2, max_examples=2).examples == 2


@pytest.mark.parametrize(
    "adjoint",
    [il.Implicit(il.Dense(), damping=0.1), il.Implicit(il.CG(rtol=None, atol=None, max_steps=1), on_failure="ignore")],
    ids=["damped", "one step"],
)
def test_biased_adjoints_are_caught(adjoint):
    with pytest.raises(GradientMismatch, match="the known one of"):
        check_adjoint(adjoint, order=1, modes=("reverse",), max_examples=20)


@pytest.mark.parametrize(
    ("check", "given", "words"),
    [
        (check_solver, il.CG(), "which is no Solver"),
        (check_solver, il.LBFGS, "pass an instance, LBFGS"),
        (check_linear_solver, il.LBFGS(), "which is no LinearSolver"),
        (check_adjoint, il.CG(), "which is no Adjoint"),
    ],
)
def test_the_wrong_kind_is_told(check, given, words):
    with pytest.raises(TypeError, match=words):
        check(given)


def test_the_counts_are_returned():
    assert check_layer(torch.sin, strategies.tensors((1,)), max_examples=4) == Checked(4, 0)


def test_a_matrix_that_is_symmetric_by_chance_need_not_be_positive_definite():
    negative = st.just(-4 * torch.eye(2, dtype=torch.float64))
    assert check_linear_solver(il.Auto(rtol=1e-12), matrices=negative, max_examples=3).examples == 3
