"""Sets of images in classes, for few-shot learning.

Whatever its source, a dataset is a ``ClassImages``: bytes ``[classes, per_class, channels, height, width]``, which
fit on an accelerator whole. ``SPLIT_SIZES`` says how many classes of each are for what; hand it to
``split_classes`` with a seed. Omniglot's 423 test characters are those left by the customary 1,200 for training,
100 of which are held out here for choosing settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from applications.datasets.glyphs import glyphs
from applications.datasets.images import ClassImages
from applications.datasets.omniglot import omniglot
from applications.datasets.sheet import contact_sheet
from applications.datasets.splits import check_disjoint, split_classes

__all__ = [
    "SPLIT_SIZES",
    "ClassImages",
    "check_disjoint",
    "contact_sheet",
    "glyphs",
    "load",
    "omniglot",
    "split_classes",
]

SPLIT_SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "omniglot": MappingProxyType({"train": 1100, "validation": 100, "test": 423}),
        "glyphs": MappingProxyType({"train": 900, "validation": 100, "test": 200}),
    }
)


def load(name: str, root: Path | None = None, seed: int = 0) -> ClassImages:
    """Load a dataset by name, with its default number and size of images.

    Args:
        name: "glyphs" (drawn on the spot) or "omniglot" (read from files).
        root: folder with the files of a dataset that is read; glyphs need none.
        seed: chooses the characters of glyphs; a dataset that is read doesn't depend on it.

    Returns:
        The dataset, on the CPU.

    Raises:
        FileNotFoundError: if the files aren't under ``root``.
        ValueError: if the name is unknown, the root missing or the files damaged.
    """
    loaders: dict[str, Callable[[], ClassImages]] = {
        "glyphs": lambda: glyphs(seed=seed),
        "omniglot": lambda: omniglot(_required(name, root)),
    }
    if name not in loaders:
        raise ValueError(f"name={name!r} is not a dataset known here; pass one of {', '.join(sorted(loaders))}.")
    return loaders[name]()


def _required(name: str, root: Path | None) -> Path:
    if root is None:
        raise ValueError(f"root is None, but {name} is read from files; pass the folder that holds its archives.")
    return root
