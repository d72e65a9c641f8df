"""The baseline: iMAML as it is usually written, one task after the other in plain PyTorch.

Inner gradient descent by `torch.autograd.grad`, Hessian-vector products by double backward with the gradient computed
anew for each, textbook conjugate gradients. It shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = Mapping[str, Tensor]


def logits(parameters: Parameters, images: Tensor) -> Tensor:
    """The Omniglot network on PyTorch's own convolution and batch normalisation."""
    x = images
    for block in range(4):
        weight = parameters[f"convolution{block}.weight"].permute(3, 2, 0, 1)
        x = F.conv2d(x, weight, parameters[f"convolution{block}.bias"], stride=2, padding=1)
        scale, shift = parameters[f"normalization{block}.scale"], parameters[f"normalization{block}.shift"]
        x = F.relu(F.batch_norm(x, None, None, scale, shift, training=True))
        if block == 1:
            x = F.pad(x, (0, 1, 0, 1))
    return F.linear(x.movedim(1, -1).flatten(1), parameters["linear.weight"], parameters["linear.bias"])


def meta_gradient(
    theta: Parameters, tasks: Sequence[Tensor], lam: float, lr: float, steps: int, cg_steps: int
) -> dict[str, Tensor]:
    """Mean over tasks of λ (H + λI)⁻¹ ∇L_query(φ), with φ after `steps` steps on L_support + λ/2 ‖φ - θ‖².

    Args:
        theta: meta-parameters.
        tasks: support images, support labels, query images and query labels, each ``[tasks, ...]``.
        lam: λ.
        lr: inner step size.
        steps: inner steps.
        cg_steps: conjugate gradient steps.
    """
    names = list(theta)
    total = [torch.zeros_like(theta[name]) for name in names]
    count = len(tasks[0])
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):

        def support(phi: Sequence[Tensor], x: Tensor = support_x, y: Tensor = support_y) -> Tensor:
            return F.cross_entropy(logits(dict(zip(names, phi, strict=True)), x), y)

        phi = [theta[name].detach() for name in names]
        for _ in range(steps):
            leaves = [p.requires_grad_() for p in phi]
            gradient = torch.autograd.grad(support(leaves), leaves)
            pulled = zip(leaves, gradient, theta.values(), strict=True)
            phi = [(p - lr * (g + lam * (p - t))).detach() for p, g, t in pulled]
        leaves = [p.requires_grad_() for p in phi]
        query = F.cross_entropy(logits(dict(zip(names, leaves, strict=True)), query_x), query_y)
        v = list(torch.autograd.grad(query, leaves))
        u = _conjugate_gradients(lambda p, loss=support, at=leaves: _product(loss, at, p, lam), v, cg_steps)
        total = [a + lam * b / count for a, b in zip(total, u, strict=True)]
    return dict(zip(names, total, strict=True))


def _product(loss: Callable[..., Tensor], at: list[Tensor], p: list[Tensor], lam: float) -> list[Tensor]:
    gradient = torch.autograd.grad(loss(at), at, create_graph=True)
    inner = sum(((g * q).sum() for g, q in zip(gradient, p, strict=True)), torch.zeros(()))
    return [h + lam * q for h, q in zip(torch.autograd.grad(inner, at), p, strict=True)]


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return sum(((x * y).sum() for x, y in zip(a, b, strict=True)), torch.zeros((), device=a[0].device))


def _conjugate_gradients(A: Callable[[list[Tensor]], list[Tensor]], b: list[Tensor], steps: int) -> list[Tensor]:
    x, r, p = [torch.zeros_like(v) for v in b], b, b
    rr = _dot(r, r)
    for _ in range(steps):
        Ap = A(p)
        pAp = _dot(p, Ap)
        if pAp <= 0:
            break
        alpha = rr / pAp
        x = [a + alpha * c for a, c in zip(x, p, strict=True)]
        r = [a - alpha * c for a, c in zip(r, Ap, strict=True)]
        rr, before = _dot(r, r), rr
        p = [a + rr / before * c for a, c in zip(r, p, strict=True)]
    return x
