"""Functions of PyTorch as layers that are right."""

from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis.strategies as st
import torch

from implicitlayers.testing import check_layer, strategies
from tests.testing.library_layers import DTYPES, Rows
from tests.testing.planted import positive, systems


def functions() -> Rows:
    """Linear algebra and pointwise functions."""
    for d, dtype in DTYPES.items():
        square = strategies.matrices(dtype=dtype, max_size=3)
        spd = strategies.spd_matrices(dtype=dtype, max_size=3)
        vectors = strategies.tensors(st.sampled_from([(1,), (3,)]), dtype=dtype)
        pairs = st.tuples(positive(2), strategies.tensors((2,))).map(
            lambda pair, dtype=dtype: tuple(t.to(dtype) for t in pair)
        )
        layers: dict[str, tuple[Any, Any]] = {
            "linalg.solve": (torch.linalg.solve, systems(square)),
            "linalg.inv": (torch.linalg.inv, square),
            "linalg.det": (torch.linalg.det, square),
            "linalg.slogdet": (lambda A: torch.linalg.slogdet(A)[1], square),
            "linalg.matrix_exp": (lambda A: torch.linalg.matrix_exp(A / 4), square),
            "linalg.cholesky": (lambda A: torch.linalg.cholesky((A + A.mT) / 2), spd),
            "linalg.pinv": (torch.linalg.pinv, square),
            "linalg.qr": (torch.linalg.qr, square),
            "logsumexp": (lambda x: x.logsumexp(0), vectors),
            "softmax": (lambda x: x.softmax(0), vectors),
            "sin": (torch.sin, vectors),
            "tanh": (torch.tanh, vectors),
            "matmul": (lambda A, b: A @ b, systems(square)),
            "log_softmax": (lambda x: x.log_softmax(0), vectors),
            "softplus": (torch.nn.functional.softplus, vectors),
            "gelu": (torch.nn.functional.gelu, vectors),
            "erf": (torch.erf, vectors),
            "sigmoid": (torch.sigmoid, vectors),
            "silu": (torch.nn.functional.silu, vectors),
            "cumsum": (lambda x: x.cumsum(0), vectors),
            "logcumsumexp": (lambda x: x.logcumsumexp(0), vectors),
            "einsum": (lambda A, b: torch.einsum("ij,j,i->i", A, b, b), systems(square)),
            "solve_triangular": (
                lambda A, b: torch.linalg.solve_triangular(A.tril() + 0 * A, b[:, None], upper=False),
                systems(spd),
            ),
            "outer": (lambda A, b: torch.outer(b, b) + A, systems(square)),
            "lu_solve": (
                lambda A, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(A), b[:, None]),
                systems(square),
            ),
            "norm": (lambda x: (x.square().sum() + 1).sqrt(), vectors),
            "division": (torch.div, pairs),
        }
        for name, (layer, inputs) in layers.items():
            yield f"torch {name}, {d}", partial(_layer, layer, inputs)


def _layer(layer: Any, inputs: Any, examples: int) -> Any:
    return check_layer(layer, inputs, max_examples=examples)
