"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each.

Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction", Science
350 (2015).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from applications.datasets.archives import Pixels, fingerprint, read_images
from applications.datasets.cache import read_cache, write_cache
from applications.datasets.images import ClassImages

DRAWINGS = 20
PARTS = ("images_background", "images_evaluation")
_FOLDERS = (".", "omniglot-py", "omniglot")
_ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_CACHE_VERSION = 1


def omniglot(root: str | os.PathLike[str], size: int = 28, cache: bool = True) -> ClassImages:
    """Read Omniglot from the archives as published, or from folders extracted from them.

    Under ``root``, ``root/omniglot-py`` or ``root/omniglot`` both ``images_background`` and ``images_evaluation``
    must lie, each a ``.zip`` (taken first) or a folder, with
    ``images_*/<Alphabet>/characterNN/XXXX_YY.png`` in them.

    The classes of both parts are sorted together by alphabet and then character, the drawings by file name, all
    by code point: never by the order in which an archive or a file system lists them.

    Args:
        root: where to look.
        size: height and width of the images, in pixels; resized with a Lanczos filter.
        cache: keep the decoded images in the user's cache folder (or ``$IMPLICITLAYERS_CACHE``) for next time.

    Returns:
        Images ``[classes, 20, 1, size, size]``, not inverted (ink 0, paper 255), named
        ``<Alphabet>/characterNN``.

    Raises:
        FileNotFoundError: if ``root`` or either part isn't there.
        ValueError: if ``size`` is below 1, an archive or image cannot be read, or a character hasn't 20 drawings.
    """
    if size < 1:
        raise ValueError(f"size={size} leaves no pixel; pass the height of the images, such as 28.")
    sources = _find(Path(root))
    if not cache:
        return _read(sources, size)
    file_name = _cache_name(sources, size)
    dataset = read_cache(file_name)
    if dataset is None:
        dataset = _read(sources, size)
        write_cache(file_name, dataset)
    return dataset


def _find(root: Path) -> list[Path]:
    """The two sources, from the first folder that has both."""
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"root={str(root)!r} {state}, so Omniglot cannot be under it; pass the folder that holds "
            f"{' and '.join(part + '.zip' for part in PARTS)}."
        )
    folders = [root / folder for folder in _FOLDERS]
    found = [{part: source for part in PARTS if (source := _source(folder, part))} for folder in folders]
    for sources in found:
        if len(sources) == len(PARTS):
            return list(sources.values())
    for folder, sources in zip(folders, found, strict=True):
        if sources:
            (missing,) = set(PARTS) - set(sources)
            raise FileNotFoundError(
                f"{folder} holds {next(iter(sources.values())).name} but neither {missing}.zip nor a folder {missing}, "
                f"and half of Omniglot is another dataset; put {_ADDRESS}/{missing}.zip beside it."
            )
    looked_for = ", ".join(str(folder / part) + "[.zip]" for folder in folders for part in PARTS)
    raise FileNotFoundError(
        f"root={str(root)!r} holds no Omniglot: looked for {looked_for}; download both archives from {_ADDRESS}/ "
        f"or pass the folder they are in."
    )


def _source(folder: Path, part: str) -> Path | None:
    archive = folder / f"{part}.zip"
    if archive.is_file():
        return archive
    extracted = folder / part
    return extracted if extracted.is_dir() else None


def _cache_name(sources: list[Path], size: int) -> str:
    facts = [_CACHE_VERSION, [fingerprint(source) for source in sources]]
    return f"omniglot-{size}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.safetensors"


def _read(sources: list[Path], size: int) -> ClassImages:
    drawings: dict[tuple[str, str], list[tuple[str, Pixels]]] = defaultdict(list)
    for part, source in zip(PARTS, sources, strict=True):
        pattern = re.compile(rf"{part}/([^/]+)/(character\d+)/([^/.][^/]*\.png)")
        before = len(drawings)
        for (alphabet, character, file_name), pixels in read_images(source, pattern, size):
            drawings[alphabet, character].append((file_name, pixels))
        if len(drawings) == before:
            raise ValueError(
                f"{source} holds no {part}/<Alphabet>/characterNN/*.png, so it is not this part of Omniglot; "
                f"pass the archive as published ({_ADDRESS}/{part}.zip)."
            )
    for (alphabet, character), files in drawings.items():
        if len(files) != DRAWINGS:
            raise ValueError(
                f"{alphabet}/{character} has {len(files)} drawings where every character of Omniglot has {DRAWINGS}; "
                f"files are missing or doubled, so fetch the archives again or extract them into an empty folder."
            )
    order = sorted(drawings)
    images = np.stack([np.stack([pixels for _, pixels in sorted(drawings[key], key=_file_name)]) for key in order])
    names = tuple(f"{alphabet}/{character}" for alphabet, character in order)
    return ClassImages(images=torch.from_numpy(images).unsqueeze(2), names=names, source="omniglot")


def _file_name(drawing: tuple[str, Pixels]) -> str:
    return drawing[0]
