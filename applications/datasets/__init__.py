"""Sets of images in classes, for few-shot learning.

Whatever its source, a dataset is a ``ClassImages``: bytes ``[classes, per_class, channels, height, width]``, which
fit on an accelerator whole. ``partition`` says which of its classes are for training, validation and testing.
``Sinusoids`` are tasks of regression, drawn from a formula.
"""

from __future__ import annotations

from applications.datasets.catalogue import load
from applications.datasets.folder import folder
from applications.datasets.glyphs import glyphs
from applications.datasets.images import ClassImages
from applications.datasets.mini_imagenet import mini_imagenet
from applications.datasets.omniglot import omniglot
from applications.datasets.partitions import SPLIT_SIZES, SPLITS, own_split, partition
from applications.datasets.sheet import contact_sheet
from applications.datasets.sinusoid import Sinusoids, SinusoidTasks
from applications.datasets.splits import check_disjoint, split_classes

__all__ = [
    "SPLITS",
    "SPLIT_SIZES",
    "ClassImages",
    "SinusoidTasks",
    "Sinusoids",
    "check_disjoint",
    "contact_sheet",
    "folder",
    "glyphs",
    "load",
    "mini_imagenet",
    "omniglot",
    "own_split",
    "partition",
    "split_classes",
]
