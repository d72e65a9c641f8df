"""Classic test functions of nonlinear optimization as residuals, whose half sum of squares is minimized."""

import torch

from tests.helpers.problems import F64


def rosenbrock(x, t):
    """Root (t, t²) in a bent valley."""
    return torch.stack([10 * (x[1] - x[0] ** 2), t - x[0]])


def beale(x, t):
    """Root (3, ½) at t = 1, with plateaus around."""
    return torch.stack([target * t - x[0] * (1 - x[1] ** k) for k, target in ((1, 1.5), (2, 2.25), (3, 2.625))])


def himmelblau(x, t):
    """Four roots, of which (3, 2) at t = 1 is the one from the origin."""
    return torch.stack([x[0] ** 2 + x[1] - 11 * t, x[0] + x[1] ** 2 - 7 * t])


def powell(x, t):
    """Powell's singular function moved to (t, t, t, t): JᵀJ has rank two at the root."""
    a, b, c, d = (x - t).unbind()
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


# residuals, start, solution at t = 1, dx/dt there where JᵀJ is regular
LANDSCAPES = {
    "rosenbrock": (rosenbrock, (-1.2, 1.0), (1.0, 1.0), (1.0, 2.0)),
    # The residuals are zero at t = 1 alone, so that dx/dt = (JᵀJ)⁻¹Jᵀ(1.5, 2.25, 2.625) with J as in the test.
    "beale": (beale, (1.0, 1.0), (3.0, 0.5), None),
    "himmelblau": (himmelblau, (0.0, 0.0), (3.0, 2.0), None),
    "powell": (powell, (4.0, 0.0, 1.0, 2.0), (1.0, 1.0, 1.0, 1.0), None),
}
ONE = torch.ones((), dtype=F64)


def spectrum(condition, count, n=10, dtype=F64):
    """Symmetric positive definite ``[count, n, n]`` with eigenvalues from 1 to 1/condition, and right-hand sides."""
    G = torch.randn(count, n, n, generator=torch.Generator().manual_seed(5), dtype=F64)
    Q = torch.linalg.qr(G).Q
    A = (Q * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=F64)) @ Q.mT
    b = torch.randn(count, n, generator=torch.Generator().manual_seed(6), dtype=F64)
    return ((A + A.mT) / 2).to(dtype), b.to(dtype)
