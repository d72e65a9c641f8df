"""`check_linear_solver` on solvers that are wrong somewhere out of the way."""

import dataclasses

import pytest
import torch

import implicitlayers as il
from implicitlayers.testing import GradientMismatch, check_linear_solver, strategies


@dataclasses.dataclass(frozen=True)
class Faulty(il.LinearSolver):
    """Solves densely, with one thing wrong."""

    fault: str

    @property
    def looks(self):
        return True

    def solve(self, operator, b, x0=None):
        if self.fault == "0-d" and b.ndim == 0:
            return il.Dense().solve(operator, b.reshape(1))._replace(x=0 * b)
        right = il.Dense().solve(operator, b)
        if self.fault == "start" and x0 is not None:
            return right._replace(x=x0)
        if self.fault == "status" and not torch.isfinite(b).all():
            return right._replace(status=torch.full_like(right.status, il.Status.CONVERGED))
        if self.fault == "size" and b.norm() > 100:
            return right._replace(x=0 * right.x)
        if self.fault == "unknowns" and b.shape[-1] > 5:
            return right._replace(x=0 * right.x)
        if self.fault == "graph":
            return right._replace(x=right.x.detach())
        return right


FAULTS = {
    "0-d": "b without dimensions",
    "start": "from a start far away",
    "status": "status of each lane",
    "size": r"solution for b of size 1e\+24",
    "unknowns": r"\d\d unknowns",
    "graph": "graph of the solution",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_out_of_the_way_is_caught(fault):
    with pytest.raises(GradientMismatch, match=FAULTS[fault]):
        check_linear_solver(Faulty(fault), matrices=strategies.matrices(3), max_examples=5)


def test_the_solver_without_a_fault_passes():
    assert check_linear_solver(Faulty("none"), max_examples=5).examples == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "make", [il.CG, il.MINRES, il.GMRES, il.LSMR, il.NormalCG, il.Auto], ids=lambda make: make.__name__
)
def test_solvers_of_the_library_pass(make, dtype):
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    assert check_linear_solver(make(rtol=rtol), dtype=dtype, max_examples=3).examples == 3
