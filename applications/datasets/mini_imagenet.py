"""Mini-ImageNet: 100 classes of photographs, 600 each, in the three layouts in which it goes about.

Vinyals et al., "Matching Networks for One Shot Learning" (2016), with the classes and the split of Ravi and
Larochelle, "Optimization as a Model for Few-Shot Learning" (2017): 64 classes for training, 16 for validation, 20 for
testing. It may not be passed on, so there is nowhere to download it from; other photographs in the same layout will do,
but then ``source`` says that they are not Mini-ImageNet, and no accuracy on them compares with a published one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from applications.datasets.archives import fingerprint
from applications.datasets.cache import cached
from applications.datasets.decoding import Form
from applications.datasets.images import ClassImages, stack
from applications.datasets.layouts import LAYOUTS, SIDE, Layout
from applications.datasets.trees import PARTS

PER_CLASS = 600
SIZES = {"train": 64, "validation": 16, "test": 20}

_FOLDERS = (".", "mini-imagenet", "miniimagenet", "mini-imagenet-layout")


def mini_imagenet(
    root: str | os.PathLike[str], size: int | None = None, cache: bool = True, *, channels: int = 3
) -> ClassImages:
    """Read Mini-ImageNet, or other photographs that are laid out like it.

    Under ``root``, or ``mini-imagenet`` in it, must lie one of

    - ``train.csv``, ``val.csv`` and ``test.csv`` with the header ``filename,label``, and ``images/`` or
      ``images.zip`` with the files that they name;
    - ``train``, ``val`` and ``test`` with one folder of images for each class;
    - ``mini-imagenet-cache-train.pkl``, ``-val.pkl`` (or ``-validation.pkl``) and ``-test.pkl``, each a dict of
      ``image_data`` (uint8 ``[images, 84, 84, 3]``) and ``class_dict`` (places in it by class). They are read without
      running anything that they may hold.

    Args:
        root: where to look.
        size: height and width that images are resized to; None for 84, or what they have if that is less.
        cache: keep the decoded images in the user's cache folder (or ``$IMPLICITLAYERS_CACHE``) for next time.
        channels: 3 for colour, 1 for grey.

    Returns:
        Images ``[classes, per_class, channels, size, size]``, the classes sorted by name, their parts "train",
        "validation" and "test". ``source`` is "mini-imagenet" only if there are 64, 16 and 20 classes of 600 images
        of at least 84 pixels; otherwise it says what was found instead.

    Raises:
        OSError: if no layout is there whole, or a file cannot be read.
        ValueError: if an argument cannot be, a file is damaged, files that are named are missing, a class is in two
            parts, or classes have different numbers of images.
    """
    source = _find(Path(root))
    form = Form(min(SIDE, source.side) if size is None else size, channels)

    def read() -> ClassImages:
        found, parts = source.read(form)
        dataset = stack(found, "mini-imagenet layout")
        ordered = tuple(parts[name] for name in dataset.names)
        name = source_name(Counter(ordered), dataset.per_class, source.side)
        return replace(dataset, source=name, parts=ordered, orientations=1)

    facts = [[fingerprint(path) for path in source.files], channels]
    return cached(f"mini-imagenet-{form.size}", facts, read, use=cache)


def source_name(classes: Mapping[str, int], per_class: int, side: int) -> str:
    """What to call photographs that are laid out like Mini-ImageNet: only they themselves get its name.

    Args:
        classes: number of classes of each part.
        per_class: images of each.
        side: the shorter side of the images as stored.

    Returns:
        The name, for reports.
    """
    if classes == SIZES and per_class == PER_CLASS and side >= SIDE:
        return "mini-imagenet"
    counts = "/".join(str(classes[part]) for part in PARTS)
    return f"mini-imagenet layout, not Mini-ImageNet ({counts} classes of {per_class} images of {side} pixels)"


def _find(root: Path) -> Layout:
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"root={str(root)!r} {state}; pass the folder that holds one of: {'; '.join(LAYOUTS)}.")
    for place in (root / name for name in _FOLDERS):
        for find in LAYOUTS.values():
            source = find(place)
            if source is not None:
                return source
    raise FileNotFoundError(
        f"root={str(root)!r} holds no Mini-ImageNet in any of its layouts ({'; '.join(LAYOUTS)}); it may not "
        f"be passed on, so make it from ImageNet, or lay out photographs of your own like that."
    )
