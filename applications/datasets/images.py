"""The one form in which every dataset of classes hands over its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images grouped by class, the same number for each.

    Raw bytes are kept, not floats: a quarter of the memory, so that a whole dataset fits beside the model on
    an accelerator and tasks can be drawn there.

    Args:
        images: uint8 tensor ``[classes, per_class, channels, height, width]``, 0 black to 255 white.
        names: one distinct name for each class, in the order of ``images``.
        source: short name of the dataset, for reports.
        parts: the part into which the dataset's own files put each class, such as "train", in the order of
            ``images``; empty if they put it into none.
        orientations: number of quarter turns by which a class becomes another: 4 for characters, where a turned
            one is a character as good as any, 1 for what has an up and a down, such as photographs.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the shapes, the element type or the names don't fit.
    """

    images: Tensor
    names: tuple[str, ...]
    source: str
    parts: tuple[str, ...] = ()
    orientations: int = 4

    def __post_init__(self) -> None:
        _check_images(self.images)
        _check_names(self.names, self.images.shape[0])
        if not isinstance(self.source, str) or not self.source:
            raise ValueError(
                f"source={self.source!r} cannot name a dataset in a report; pass a non-empty string such as 'omniglot'."
            )
        if self.parts and len(self.parts) != self.classes:
            raise ValueError(
                f"parts has {len(self.parts)} entries for {self.classes} classes, so a class would be in the part of "
                f"another; pass one for each class, or none."
            )
        if self.orientations not in (1, 4):
            raise ValueError(
                f"orientations={self.orientations!r} is no number of quarter turns that closes a circle; pass 4 for "
                f"characters or 1 for images that have an up and a down."
            )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.images.shape[0]

    @property
    def per_class(self) -> int:
        """Number of images of each class."""
        return self.images.shape[1]

    def take(self, indices: Tensor) -> ClassImages:
        """Some of the classes.

        Args:
            indices: which, int64 ``[size]`` on the CPU.

        Returns:
            A new object with a copy of their images.
        """
        chosen = indices.tolist()
        return replace(
            self,
            images=self.images[indices.to(self.images.device)],
            names=tuple(self.names[index] for index in chosen),
            parts=tuple(self.parts[index] for index in chosen) if self.parts else (),
        )

    def to(self, device: torch.device | str) -> ClassImages:
        """The same images on another device.

        Args:
            device: where the images are to lie.

        Returns:
            A new object, or one sharing this one's memory if it lies there already.
        """
        return replace(self, images=self.images.to(device))


def stack(found: Mapping[str, Mapping[str, NDArray[np.uint8]]], source: str) -> ClassImages:
    """Put the images of classes together, both in the order of their names by code point.

    Args:
        found: for each class, its images ``[channels, height, width]`` by file name.
        source: short name of the dataset.

    Returns:
        The dataset.

    Raises:
        ValueError: if there is no class, or the classes have different numbers of images.
    """
    if not found:
        raise ValueError(f"{source} has no class; pass a place that holds at least one.")
    names = sorted(found)
    counts = {name: len(found[name]) for name in names}
    usual = max(counts.values())
    for name, count in counts.items():
        if count != usual:
            raise ValueError(
                f"{name} of {source} has {count} images where other classes have {usual}; files are missing or "
                f"doubled, so fetch the dataset again, or extract it into an empty folder."
            )
    first = next(iter(found[names[0]].values()))
    images = np.empty((len(names), usual, *first.shape), dtype=np.uint8)
    for index, name in enumerate(names):
        for place, file_name in enumerate(sorted(found[name])):
            images[index, place] = found[name][file_name]
    return ClassImages(torch.from_numpy(images), tuple(names), source)


def _check_images(images: Tensor) -> None:
    layout = "[classes, per_class, channels, height, width]"
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images is a {type(images).__name__}, and only a tensor can move to a device; "
            f"pass a uint8 torch.Tensor {layout}."
        )
    if images.dtype != torch.uint8:
        raise ValueError(
            f"images has dtype {images.dtype}, whose range is ambiguous (0..1 or 0..255); "
            f"pass torch.uint8 with 0 black and 255 white."
        )
    if images.dim() != 5 or 0 in images.shape:
        raise ValueError(
            f"images has shape {list(images.shape)}, which is not a non-empty {layout}; "
            f"pass five dimensions of at least 1 each (grey images have one channel)."
        )


def _check_names(names: tuple[str, ...], classes: int) -> None:
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names={names!r:.80} is not a tuple of strings; pass tuple(names) with one string a class.")
    if len(names) != classes:
        raise ValueError(
            f"names has {len(names)} entries for {classes} classes, so some class has no name of its own; "
            f"pass exactly {classes} names, in the order of images."
        )
    if len(set(names)) != len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(
            f"names holds {twice!r} twice, so a report could not tell the two classes apart; pass distinct names."
        )
