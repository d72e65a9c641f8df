"""What the tests of conjugate gradients share."""

import torch

import implicitlayers as il
from tests.helpers.problems import product


def solve(A, b, x0=None, **options):
    return il.CG(**options).solve(il.Operator(product(A), symmetric=True), b, x0)


def assert_near(ours, expected, tol=1e-10):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def relative_residual(A, x, b):
    return ((product(A)(x) - b).norm(dim=-1) / b.norm(dim=-1)).max().item()
