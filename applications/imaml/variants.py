"""What a race compares, by name: settings in which the runners differ."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from applications.imaml.config import usual_lam

__all__ = ["NOTES", "VARIANTS", "Subject"]

Subject = Literal["curvature", "inner", "algorithms"]

# Curvature as it is and stopped where negative, damped, as in the paper; what the paper's code solves; none at all.
_CURVATURES = {
    "gauss-newton": {"curvature": "gauss-newton"},
    "hessian": {"curvature": "hessian"},
    "hessian-damped": {"curvature": "hessian", "damping": 5.0},
    "hessian-unguarded": {"curvature": "hessian-unguarded"},
    "published": {"curvature": "published"},
    "first-order": {"algorithm": "fomaml"},
}

# From the fastest to the one that solves its inner problem best. "paper" has the paper's strength, steps and step size,
# but the curvature that all have, which is not the paper's.
_INNER = {
    "descent-5": {},
    "descent-16": {"lam": 0.5, "inner_lr": 0.1, "inner_steps": 16, "cg_steps": 5},
    "paper": {"lam": 2.0, "inner_lr": 0.1, "inner_steps": 16, "cg_steps": 5},
    "lbfgs-10": {"inner": "lbfgs", "inner_steps": 10, "cg_steps": 5},
    "lbfgs-10-strong": {"lam": 0.5, "inner": "lbfgs", "inner_steps": 10, "cg_steps": 5},
    "lbfgs-20": {"lam": 0.5, "inner": "lbfgs", "inner_steps": 20, "cg_steps": 5},
}

# Each with the pull that it is used with: those that were conceived without one have none.
_ALGORITHMS = {
    "imaml": {},
    "imaml-hessian-free": {"inner": "hessian-free", "inner_steps": 3, "cg_steps": 5},
    "maml": {"algorithm": "maml", "lam": usual_lam("maml")},
    "fomaml": {"algorithm": "fomaml", "lam": usual_lam("fomaml")},
    "anil": {"algorithm": "anil", "lam": usual_lam("anil")},
    "reptile": {"algorithm": "reptile", "lam": usual_lam("reptile")},
}

VARIANTS: Mapping[Subject, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "curvature": MappingProxyType(_CURVATURES),
        "inner": MappingProxyType(_INNER),
        "algorithms": MappingProxyType(_ALGORITHMS),
    }
)
"""Settings by subject and name: "curvature", how the meta-gradient's linear system is made and solved; "inner", how
strong the pull is and how well the inner problem is solved; "algorithms", how its answer is differentiated, if it
is."""

NOTES: Mapping[tuple[Subject, str], str] = MappingProxyType(
    {("inner", "paper"): "the paper's strength, steps and step size, with the curvature of the others"}
)
"""What settings alone do not say of a variant, by its subject and name."""
