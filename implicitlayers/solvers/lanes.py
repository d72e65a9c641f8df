"""One lane of a problem by itself, for methods that know nothing of lanes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from implicitlayers.problem import Bound

__all__ = ["each_lane", "lane_of"]


def each_lane(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The indices of all lanes, the outermost first; one empty index where there are no lanes."""
    return itertools.product(*(range(size) for size in sizes))


def lane_of(problem: Bound, index: tuple[int, ...]) -> Bound:
    """The problem of the lane with this index (outermost first), whose unknown is ``[n]``."""
    tensors = []
    for slot, tensor in enumerate(problem.tensors):
        # Lane levels are listed innermost first, dimensions and indices outermost first.
        own = [i for level, i in zip(reversed(problem.lanes), index, strict=True) if level[slot] is not None]
        tensors.append(tensor[tuple(own)])
    return replace(problem, tensors=tuple(tensors), lanes=())
