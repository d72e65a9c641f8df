"""What the tests of linear solvers share."""

import pytest
import torch

import implicitlayers as il
from tests.helpers.problems import F64, normal, product

ANY = {
    "GMRES": il.GMRES,
    "BiCGStab": il.BiCGStab,
    "NormalCG": il.NormalCG,
    "LSMR": il.LSMR,
}
SYMMETRIC = {"CG": il.CG, "MINRES": il.MINRES, **ANY}
every = pytest.mark.parametrize("method", SYMMETRIC.values(), ids=SYMMETRIC.keys())
general = pytest.mark.parametrize("method", ANY.values(), ids=ANY.keys())

# Condition number 4647.
SKEWED = torch.tensor([[3.9, 1.65], [6.845, 2.9]], dtype=F64)


def solve(A, b, x0=None, **options):
    return il.CG(**options).solve(il.Operator(product(A), symmetric=True), b, x0)


def operator(A, **claims):
    """The operator of a matrix, or of one matrix a lane, with its transpose."""
    symmetric = claims.pop("symmetric", bool(torch.equal(A, A.mT)))
    return il.Operator(product(A), symmetric=symmetric, apply_transpose=product(A.mT), **claims)


def assert_near(ours, expected, tol=1e-10):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def relative_residual(A, x, b):
    return ((product(A)(x) - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


def orthogonal(n, seed=0):
    """An orthogonal matrix that depends on the seed only."""
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def with_condition(kind, n, condition, dtype=F64):
    """A matrix with that condition number, and eigenvalues or singular values spread evenly on a logarithmic scale.

    Args:
        kind: "definite", "indefinite" (signs alternate along the spectrum), or "unsymmetric" (eigenvalues positive, far
            from normal).
        n: size.
        condition: quotient of the largest and the smallest of them.
        dtype: of the result.
    """
    values = torch.logspace(0, -torch.tensor(float(condition), dtype=F64).log10().item(), n, dtype=F64)
    Q = orthogonal(n, seed=1)
    if kind == "unsymmetric":
        above = torch.triu(normal(n, n, seed=5), 1) * values[:, None] / 10
        return (Q @ (values.diag() + above) @ Q.T).to(dtype)
    if kind == "indefinite":
        values = values * (-1.0) ** torch.arange(n)
    A = Q @ values.diag() @ Q.T
    return ((A + A.T) / 2).to(dtype)


def suited(name, matrices):
    """A strategy for the matrices that a linear solver is for, from one for any."""
    if name != "BiCGStab":
        return matrices
    # It breaks down where xᵀA x is zero for all x of a subspace, and says so.
    return matrices.map(lambda A: A / A.norm() / 2 + torch.eye(len(A), dtype=A.dtype))
