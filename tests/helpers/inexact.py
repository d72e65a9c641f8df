"""Inexact solutions of a problem about which everything is known."""

import torch

from tests.helpers.linear import orthogonal
from tests.helpers.problems import F64, normal

N = 8
Q, THETA = orthogonal(N, seed=4), torch.logspace(0, -2, N, dtype=F64)
B = Q.T @ THETA
EXACT = Q.T @ THETA.log()
V = normal(N, seed=7)
GRADIENT = Q.T @ ((Q @ V) / THETA)


def exponential(x, b):
    """Solved by x = Qᵀ log(Qb), with the curvature Qᵀ diag(Qb) Q there."""
    return (Q @ x).exp().sum() - b @ x


def conditioned(n, decades, seed=0):
    """Eigenvalues from 1 to 10^-decades, evenly spread on a logarithmic scale."""
    Q = orthogonal(n, seed)
    A = (Q * torch.logspace(0, -decades, n, dtype=F64)) @ Q.T
    return (A + A.T) / 2


def relative(ours, exact):
    return ((ours - exact).norm() / ours.norm()).item()
