"""`check_adjoint` in float32, and problems whose answers follow the type of what they are given."""

import pytest
import torch
from hypothesis import given, settings

import implicitlayers as il
from implicitlayers.testing import check_adjoint, strategies

F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize("order", [1, 2])
def test_an_adjoint_passes_in_float32(order):
    checked = check_adjoint(il.Implicit(il.Dense()), order=order, dtype=F32, max_examples=3)
    assert checked.examples == 3


@settings(max_examples=30, database=None, deadline=None)
@given(strategies.strongly_convex_problems(dtype=F32) | strategies.contractions(dtype=F32))
def test_a_problem_in_float32_has_its_answer_in_float64(problem):
    params = [p.double() for p in problem.params]
    answer = problem.solution(*params)
    assert answer.dtype == F64
    assert problem.function(answer, *params).dtype == F64
    torch.testing.assert_close(problem.solution(*problem.params), answer, check_dtype=False, rtol=1e-3, atol=1e-4)
