"""Which classes are for training and which for testing, as a pure function of a seed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def split_classes(classes: int, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Draw disjoint sets of classes.

    The parts are dealt from one permutation in the alphabetical order of their names, not in the order of the
    mapping. So "test" comes before "train" and "validation", and holding out validation classes from the
    training ones leaves the test classes what they were.

    Args:
        classes: number of classes to draw from.
        sizes: number of classes for each part; classes beyond their sum are in no part.
        seed: chooses the permutation; the global random state is neither read nor changed.

    Returns:
        For each part, in the order of ``sizes``, its class indices: int64 ``[size]``, ascending.

    Raises:
        ValueError: if a size is negative or not an integer, or if the parts want more classes than there are.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(
                f"sizes[{name!r}]={size!r} cannot count classes; pass an integer of at least 0 for each part."
            )
    wanted = sum(sizes.values())
    if wanted > classes:
        raise ValueError(
            f"sizes={dict(sizes)} wants {wanted} classes, but there are only {classes} and no class may be in two "
            f"parts; pass sizes that sum to at most {classes}."
        )
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed), device="cpu")
    dealt: dict[str, Tensor] = {}
    start = 0
    for name in sorted(sizes):
        dealt[name] = order[start : start + sizes[name]].sort().values
        start += sizes[name]
    parts = {name: dealt[name] for name in sizes}
    check_disjoint(parts)
    return parts


def check_disjoint(parts: Mapping[str, Tensor]) -> None:
    """Refuse a split in which a class appears twice.

    A test class that was trained on makes every accuracy meaningless, so this is checked where a split is made
    and can be checked again where it is used, for instance after reading indices from a file.

    Args:
        parts: class indices of each part, integer tensors ``[size]``.

    Raises:
        ValueError: if any class is in two parts, or twice in one.
    """
    owner: dict[int, str] = {}
    for name, indices in parts.items():
        for index in indices.tolist():
            if index in owner:
                raise ValueError(
                    f"class {index} is in part {owner[index]!r} and again in part {name!r}, so the accuracy on one "
                    f"would be measured on what was learnt from the other; pass parts without a common class."
                )
            owner[index] = name
