"""Folders of classes: which files there are, and their images."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from applications.datasets.archives import files_below
from applications.datasets.decoding import SUFFIXES, Form, Pixels, decode

PARTS = ("train", "validation", "test")
# The names under which the parts of a split go about.
PART_NAMES: Mapping[str, str] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}

_IMAGE = re.compile(rf"[^.].*{SUFFIXES}")


def image_files(root: Path, wanted: str) -> list[Path]:
    """The images below a folder.

    Args:
        root: where to look; files that are no images, or hidden, are passed over.
        wanted: what to pass instead of a folder that won't do, for the error.

    Returns:
        Their paths, in the order of the names by code point.

    Raises:
        FileNotFoundError: if ``root`` is no folder.
        OSError: if a folder in it cannot be listed.
        ValueError: if there is no image.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"{str(root)!r} {state}; pass {wanted}.")
    found = sorted(
        path
        for path in files_below(root)
        if _IMAGE.fullmatch(path.name) and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    if not found:
        raise ValueError(f"{root} holds no images (.png, .jpg, .bmp or .webp); pass {wanted}.")
    return found


def class_files(root: Path) -> dict[str, list[Path]]:
    """The images below a folder by class: a class is a folder that holds images.

    Args:
        root: where to look; files that are no images, or hidden, are passed over.

    Returns:
        For each class, named by its path below ``root``, its files; both in the order of the names by code point.

    Raises:
        FileNotFoundError: if ``root`` is no folder.
        OSError: if a folder in it cannot be listed.
        ValueError: if there is no image, or one that is in no class folder.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in image_files(root, "a folder with one folder of images for each class"):
        found[path.relative_to(root).parent.as_posix()].append(path)
    if "." in found:
        raise ValueError(
            f"{root} holds {len(found['.'])} images that are in no class folder, the first {min(found['.']).name}; "
            f"move each into a folder named after its class."
        )
    return {name: found[name] for name in sorted(found)}


def parts_of(classes: Sequence[str]) -> dict[str, str]:
    """The part of a split that each class is in, where all lie in folders named train, val or validation, and test.

    Args:
        classes: their paths, as from ``class_files``.

    Returns:
        The part of each class by its path; empty if any lies elsewhere.

    Raises:
        ValueError: if two parts have a class of the same name: an accuracy on one would be of what the other taught.
    """
    split = {path: path.partition("/") for path in classes}
    if not all(top in PART_NAMES and name for top, _, name in split.values()):
        return {}
    seen: dict[str, str] = {}
    for top, _, name in split.values():
        part = PART_NAMES[top]
        if name in seen and seen[name] != part:
            raise ValueError(
                f"class {name} is in part {seen[name]!r} and again in part {part!r}, so the accuracy on one would be "
                f"measured on what was learnt from the other; keep each class in one of them (its images are split "
                f"into support and query images by the sampling of tasks)."
            )
        seen[name] = part
    return {path: PART_NAMES[top] for path, (top, _, _) in split.items()}


def decode_files(files: Sequence[Path], form: Form) -> dict[str, Pixels]:
    """Decode some images.

    Args:
        files: their paths, with distinct names.
        form: what to decode them to.

    Returns:
        The images by file name.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if one is no image.
    """
    return {path.name: decode(path.read_bytes(), str(path), form) for path in files}
