"""Statuses carry their remedy; solutions are trees; messages name lanes."""

import pytest
import torch
from torch.utils import _pytree as pytree

import implicitlayers as il
from implicitlayers.status import describe_failures, failed


def test_every_status_says_what_it_means_and_what_to_try():
    for status in il.Status:
        assert len(status.meaning) > 10
        assert status.remedy
    assert il.Status(0) is il.Status.CONVERGED
    assert len({int(status) for status in il.Status}) == len(il.Status) == 10
    assert " ".join(status.name for status in il.Status) == (
        "CONVERGED MAX_STEPS STALLED NON_FINITE LINE_SEARCH_FAILED INDEFINITE SINGULAR NOT_CHECKED INFEASIBLE UNBOUNDED"
    )


def test_what_counts_as_failed():
    codes = torch.tensor([int(status) for status in il.Status])
    good = {il.Status.CONVERGED, il.Status.NOT_CHECKED}
    assert failed(codes).tolist() == [status not in good for status in il.Status]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_messages_name_lanes_of_any_depth(shape):
    status = torch.zeros(shape, dtype=torch.int64)
    status.view(-1)[-1] = il.Status.STALLED
    steps, residual = torch.full(shape, 7), torch.full(shape, 0.125)
    message = describe_failures("The solve", status, steps, residual)
    where = {(): "  STALLED", (3,): "lane 2: STALLED", (2, 3): "lane (1, 2): STALLED"}[shape]
    assert f"{where} after 7 steps, residual 1.250e-01" in message
    assert il.Status.STALLED.meaning in message
    assert il.Status.STALLED.remedy in message
    assert il.Status.MAX_STEPS.meaning not in message


def test_a_solution_is_a_tree_that_keeps_its_report():
    stats = il.Stats(torch.tensor(1), torch.tensor(2.0), torch.tensor(3.0))
    report = il.AdjointReport(damping=0.5)
    solution = il.Solution({"x": torch.ones(2)}, torch.tensor(0), stats, torch.zeros(1), report)
    doubled = pytree.tree_map(lambda t: t * 2, solution)
    assert isinstance(doubled, il.Solution)
    assert torch.equal(doubled.value["x"], torch.full((2,), 2.0))
    assert doubled.stats.residual.item() == 4.0
    assert doubled.adjoint is report
