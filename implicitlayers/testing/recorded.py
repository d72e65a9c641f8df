"""An evaluation of a layer on the tape, and gradients of what came out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Leaves", "Recorded", "fresh", "pair", "pulled"]

Leaves = Sequence[Tensor]


@dataclass(frozen=True)
class Recorded:
    """One evaluation on the tape, whose gradient is taken as often as one likes.

    Attributes:
        given: what went in.
        out: what came out, with its graph.
    """

    given: list[Tensor]
    out: list[Tensor]

    @classmethod
    def of(
        cls, function: Callable[[Leaves], Sequence[Tensor]], leaves: Leaves, only: Collection[int] | None = None
    ) -> Recorded:
        """Evaluate; only some of the leaves may require a gradient."""
        with torch.enable_grad():
            given = [fresh(leaf).requires_grad_(only is None or i in only) for i, leaf in enumerate(leaves)]
            return cls(given, list(function(given)))

    @property
    def values(self) -> list[Tensor]:
        """What came out, without its graph."""
        return [o.detach() for o in self.out]

    def pull(self, v: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Jᵀ v; None for a leaf that no gradient reaches. An output whose cotangent is None is not asked."""
        return pulled(self.out, self.given, v, record=False, retain=True)


def fresh(leaf: Tensor) -> Tensor:
    """A copy that a tape may start from."""
    return leaf.detach().clone().requires_grad_()


def pair(found: Sequence[Tensor | None], with_: Leaves) -> Tensor:
    """⟨found, with_⟩ as a differentiable scalar; what is None counts as zero."""
    terms = [(f * w).sum() for f, w in zip(found, with_, strict=True) if f is not None]
    return torch.stack(terms).sum() if terms else with_[0].new_zeros(())


def pulled(
    out: Sequence[Tensor], leaves: Leaves, v: Sequence[Tensor | None] | None, *, record: bool = False,
    retain: bool = False,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of ⟨v, out⟩; None for leaves that are not connected, or are constants."""
    weights = [torch.ones_like(o) for o in out] if v is None else v
    reached = [(o, w) for o, w in zip(out, weights, strict=True) if o.requires_grad and w is not None]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if not reached or not asked:
        return [None] * len(leaves)
    ends, cotangents = zip(*reached, strict=True)
    found = iter(
        torch.autograd.grad(
            ends, asked, cotangents, create_graph=record, retain_graph=record or retain, allow_unused=True
        )
    )
    return [dense(next(found)) if leaf.requires_grad else None for leaf in leaves]


def dense(t: Tensor | None) -> Tensor | None:
    """The same in a full tensor: the gradient of an embedding may be sparse."""
    return t if t is None or t.layout == torch.strided else t.to_dense()
