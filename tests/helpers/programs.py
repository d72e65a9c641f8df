"""Quadratic programs for tests: random feasible ones, one whose active set is known, and the oracle of that set."""

from __future__ import annotations

import torch

import implicitlayers as il
from tests.helpers.problems import F64, normal

N, P, M = 3, 1, 4
NAMES = ("Q", "q", "A", "b", "G", "h")
ALL = tuple(range(6))
# Rounding times condition numbers up to a thousand, for quantities of order one.
TOL = 1e-10


def random_program(seed, *lanes, n=N, p=P, m=M):
    """A feasible program: a point of it is drawn first."""
    L, point = normal(*lanes, n, n, seed=seed), normal(*lanes, n, seed=seed + 1)
    A, G = normal(*lanes, p, n, seed=seed + 2), normal(*lanes, m, n, seed=seed + 3)
    room = normal(*lanes, m, seed=seed + 4).abs() / 2
    Q = L @ L.mT + 0.5 * torch.eye(n, dtype=F64)
    return Q, 3 * normal(*lanes, n, seed=seed + 5), A, times(A, point), G, times(G, point) + room


def times(A, x):
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def layer(*program, **options):
    return torch.cat(il.quadratic_program(*program, **options).value, dim=-1)


def active_set_solution(active):
    """The solution as a differentiable linear solve: active inequalities are equations, the others are not there."""
    where = torch.nonzero(active)[:, 0]

    def oracle(Q, q, A, b, G, h):
        B = torch.cat([A, G[where]])
        K = torch.cat([torch.cat([(Q + Q.mT) / 2, B.mT], 1), torch.cat([B, torch.zeros(len(B), len(B), dtype=F64)], 1)])
        y = torch.linalg.inv(K) @ torch.cat([-q, b, h[where]])
        head = len(q) + len(b)
        return torch.cat([y[:head], torch.zeros_like(h).index_put((where,), y[head:])])

    return oracle


PROGRAM = random_program(13)
ACTIVE = il.quadratic_program(*PROGRAM).value.inequality > 0
ORACLE = active_set_solution(ACTIVE)


def assert_near(ours, expected, tol=TOL):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tol)


def assert_optimal(program, value, tol=TOL):
    """The conditions of Karush, Kuhn and Tucker, which a convex program needs no more than."""
    Q, q, A, b, G, h = program
    x, nu, lam = value
    assert_near(times(Q, x) + q + times(A.mT, nu) + times(G.mT, lam), torch.zeros_like(x), tol)
    assert_near(times(A, x), b.expand_as(nu), tol)
    slack = h - times(G, x)
    assert slack.min() >= -tol
    assert lam.min() >= 0
    assert_near(lam * slack, torch.zeros_like(lam), tol)
