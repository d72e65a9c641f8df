"""Which classes are for training, validation and testing: the splits that have a name.

A split is one of three kinds: drawn by a seed, given by the dataset's own files, or a published list. Two of
Omniglot's have no validation classes, and then there is no such part.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from applications.datasets.images import ClassImages
from applications.datasets.omniglot import BACKGROUND, EVALUATION, MINIMAL
from applications.datasets.splits import check_disjoint, split_classes
from applications.datasets.trees import PARTS

# Omniglot's 423 test characters are those left by the customary 1,200 for training, 100 of which are held out here for
# choosing settings.
SPLIT_SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "omniglot": MappingProxyType({"train": 1100, "validation": 100, "test": 423}),
        "glyphs": MappingProxyType({"train": 900, "validation": 100, "test": 200}),
    }
)
# The names of the splits of each dataset, its own first.
SPLITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "glyphs": ("seed",),
        "omniglot": ("maml", "maml-1200", "vinyals", "lake", *MINIMAL),
        "mini-imagenet": ("files",),
        "folder": ("seed", "files"),
    }
)
# Of a dataset of any size: as Mini-ImageNet is split.
_FRACTIONS = {"validation": 0.16, "test": 0.20}
_VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
_VINYALS_TEST = 423
_CHARACTERS = {BACKGROUND: 964, EVALUATION: 659}


def partition(
    dataset: ClassImages,
    data: str,
    split: str | None = None,
    seed: int = 0,
    sizes: Mapping[str, Mapping[str, int]] = SPLIT_SIZES,
) -> dict[str, Tensor]:
    """Say which classes of a dataset are for what.

    - ``seed``: drawn by the seed; of glyphs 900, 100 and 200, of a folder 64, 16 and 20 % of its classes.
    - ``maml``: Omniglot's 1,100/100/423 characters, drawn by the seed, in the sizes of Finn et al., "Model-Agnostic
      Meta-Learning" (2017); ``maml-1200`` gives the 100 back to training and has the same test characters.
    - ``files``: as the dataset's own files have it.
    - ``vinyals``: Omniglot's 1,028/172/423 characters of Vinyals et al., "Matching Networks for One Shot Learning"
      (2016), in the lists of Snell et al., "Prototypical Networks for Few-shot Learning" (2017): the last 423,
      background set before evaluation set, for testing, and five alphabets for validation.
    - ``lake``: Omniglot's background set (964) for training and its evaluation set (659) for testing, which share no
      alphabet: Lake et al., "Human-level concept learning through probabilistic program induction" (2015).
    - ``small1``, ``small2``: the same with the minimal background sets of 136 and 156 characters.

    Args:
        dataset: the classes.
        data: name of the dataset, a key of ``SPLITS``.
        split: name of the split; None for the dataset's own, which for a folder is ``files`` if it has parts.
        seed: chooses the classes of a split that is drawn.
        sizes: number of classes of each part of a dataset that is drawn, by its name.

    Returns:
        For each part, "train", "test" and mostly "validation", its class indices: int64 ``[size]``, ascending. No class
        is in two.

    Raises:
        ValueError: if the dataset has no such split or too few classes for it.
    """
    if split is None:
        split = own_split(data, has_parts=bool(dataset.parts))
    if split not in SPLITS[data]:
        raise ValueError(f"split={split!r} is no split of {data}; pass one of {', '.join(SPLITS[data])}.")
    if split in ("seed", "maml"):
        return split_classes(dataset.classes, sizes[data] if data in sizes else _shares(dataset), seed)
    if split == "maml-1200":
        return split_classes(dataset.classes, {"train": 1200, "test": sizes[data]["test"]}, seed)
    parts = _by_files(dataset) if split == "files" else _by_name(dataset, split)
    chosen = {name: torch.tensor(indices, dtype=torch.int64) for name, indices in parts.items()}
    check_disjoint(chosen)
    return chosen


def own_split(data: str, *, has_parts: bool) -> str:
    """The split that a dataset has where none is asked for.

    Args:
        data: name of the dataset, a key of ``SPLITS``.
        has_parts: whether its files put every class into a part.

    Returns:
        Name of the split.
    """
    return "files" if data == "folder" and has_parts else SPLITS[data][0]


def _shares(dataset: ClassImages) -> dict[str, int]:
    if dataset.classes < len(PARTS):
        raise ValueError(
            f"{dataset.source} has {dataset.classes} classes, and training, validation and testing need one each that "
            f"the others don't have; pass a dataset with more."
        )
    held_out = {part: max(1, round(share * dataset.classes)) for part, share in _FRACTIONS.items()}
    return {"train": dataset.classes - sum(held_out.values()), **held_out}


def _by_files(dataset: ClassImages) -> dict[str, list[int]]:
    missing = [part for part in PARTS if part not in dataset.parts]
    if missing:
        raise ValueError(
            f"{dataset.source} has no classes for {missing[0]} in its files; put class folders into train/, "
            f"validation/ and test/, or pass split='seed'."
        )
    return {part: [index for index, own in enumerate(dataset.parts) if own == part] for part in PARTS}


def _by_name(dataset: ClassImages, split: str) -> dict[str, list[int]]:
    sides = {
        side: [index for index, part in enumerate(dataset.parts) if part == side] for side in (BACKGROUND, EVALUATION)
    }
    alphabets = [name.partition("/")[0] for name in dataset.names]
    wanted = dict(_CHARACTERS)
    if split in MINIMAL:
        sides[BACKGROUND] = [index for index in sides[BACKGROUND] if alphabets[index] in MINIMAL[split]]
        wanted[BACKGROUND] = {"small1": 136, "small2": 156}[split]
    for side, characters in wanted.items():
        if len(sides[side]) != characters:
            raise ValueError(
                f"split={split!r} is of {characters} characters of Omniglot's {side} set, and this one has "
                f"{len(sides[side])}; fetch the archives as published, or pass split='maml'."
            )
    if split != "vinyals":
        return {"train": sides[BACKGROUND], "test": sides[EVALUATION]}
    order = sides[BACKGROUND] + sides[EVALUATION]
    rest, test = order[:-_VINYALS_TEST], order[-_VINYALS_TEST:]
    validation = [index for index in rest if alphabets[index] in _VINYALS_VALIDATION]
    return {"train": sorted(set(rest) - set(validation)), "validation": validation, "test": sorted(test)}
