"""Images of one's own, in one folder for each class."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

from applications.datasets.archives import fingerprint
from applications.datasets.cache import cached
from applications.datasets.decoding import Form
from applications.datasets.images import ClassImages, stack
from applications.datasets.trees import class_files, decode_files, parts_of


def folder(
    root: str | os.PathLike[str],
    size: int = 84,
    cache: bool = True,
    *,
    channels: int = 3,
    per_class: int | None = None,
) -> ClassImages:
    """Read a tree of folders: each folder that holds images is a class, named by its path below ``root``.

    If all classes lie in ``train``, ``validation`` (or ``val``) and ``test``, these are their parts. A dataset has the
    same number of images for each class; of a class that has more, images evenly spaced in the order of their names
    are taken, and a warning says how many are left out.

    Args:
        root: the tree; PNG, JPEG, BMP and WebP files, others are passed over.
        size: height and width that images are resized to.
        cache: keep the decoded images in the user's cache folder (or ``$IMPLICITLAYERS_CACHE``) for next time.
        channels: 3 for colour, 1 for grey.
        per_class: images to take of each class; None for as many as the smallest class has.

    Returns:
        Images ``[classes, per_class, channels, size, size]``, the classes sorted by name.

    Raises:
        OSError: if ``root`` is no folder, or something in it cannot be read.
        ValueError: if an argument cannot be, an image is damaged or in no class folder, or a class has fewer than
            ``per_class`` images.
    """
    form, path = Form(size, channels), Path(root)
    files = class_files(path)
    smallest = min(files, key=lambda name: len(files[name]))
    count = len(files[smallest]) if per_class is None else per_class
    if count < 1:
        raise ValueError(f"per_class={per_class} leaves no image; pass at least 1, or None for all there are.")
    if len(files[smallest]) < count:
        raise ValueError(
            f"per_class={per_class} asks for more images than the {len(files[smallest])} that class {smallest} of "
            f"{path} has; pass at most so many, or take that class away."
        )
    left_out = sum(map(len, files.values())) - count * len(files)
    if per_class is None and left_out:
        warnings.warn(
            f"the smallest class of {path}, {smallest}, has {count} images, so {count} of each class are used and "
            f"{left_out} are left out; take small classes away if that is too many.",
            stacklevel=2,
        )
    chosen = {name: [paths[place * len(paths) // count] for place in range(count)] for name, paths in files.items()}
    parts = parts_of(tuple(files))

    def read() -> ClassImages:
        dataset = stack({name: decode_files(paths, form) for name, paths in chosen.items()}, path.resolve().name)
        return replace(dataset, parts=tuple(parts[name] for name in dataset.names) if parts else (), orientations=1)

    facts = [str(path.resolve()), fingerprint(path), channels, count]
    return cached(f"folder-{size}", facts, read, use=cache)
