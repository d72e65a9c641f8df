"""Datasets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from applications.datasets.folder import folder
from applications.datasets.glyphs import glyphs
from applications.datasets.images import ClassImages
from applications.datasets.mini_imagenet import mini_imagenet
from applications.datasets.omniglot import MINIMAL, omniglot
from applications.datasets.partitions import SPLITS

_CONTENTS = {"omniglot": "its archives", "mini-imagenet": "it", "folder": "one folder of images for each class"}


def load(
    name: str,
    root: Path | None = None,
    seed: int = 0,
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str | None = None,
) -> ClassImages:
    """Load a dataset by name.

    Args:
        name: "glyphs" (drawn on the spot), "omniglot", "mini-imagenet" or "folder" (read from files).
        root: folder with the files of a dataset that is read; glyphs need none.
        seed: chooses the characters of glyphs; a dataset that is read doesn't depend on it.
        size: height and width of the images in pixels; None for the dataset's own default.
        channels: 1 for grey or 3 for colour; None for the dataset's own default.
        split: how its classes will be split; Omniglot's "small1" and "small2" are archives of their own.

    Returns:
        The dataset, on the CPU.

    Raises:
        OSError: if the files aren't under ``root`` or cannot be read.
        ValueError: if the name is unknown, the root missing, an option cannot be or the files are damaged.
    """
    if name not in SPLITS:
        raise ValueError(f"name={name!r} is not a dataset known here; pass one of {', '.join(sorted(SPLITS))}.")
    options: dict[str, Any] = {}
    if size is not None:
        options["size"] = size
    if name == "glyphs":
        if channels not in (None, 1):
            raise ValueError(f"channels={channels!r}, but glyphs are drawn in ink only; pass 1.")
        return glyphs(seed=seed, **options)
    if root is None:
        raise ValueError(f"root=None, but {name} is read from files; pass the folder that holds {_CONTENTS[name]}.")
    if channels is not None:
        options["channels"] = channels
    if name == "omniglot":
        return omniglot(root, minimal=split if split in MINIMAL else None, **options)
    return mini_imagenet(root, **options) if name == "mini-imagenet" else folder(root, **options)
