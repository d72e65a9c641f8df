"""Named images from a zip or from a folder, read alike.

Zips are read in memory and never extracted, so a member's name can point at no file outside.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)
_UNREADABLE_MEMBER = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)

Pixels = NDArray[np.uint8]


def read_images(source: Path, pattern: re.Pattern[str], size: int) -> Iterator[tuple[tuple[str, ...], Pixels]]:
    """Decode all images whose path matches a pattern, in the order of the listing: sorting is left to the caller.

    Args:
        source: a zip, or a folder (whose own name is the first part of the paths below it).
        pattern: matched in full against paths with forward slashes; other files are passed over.
        size: height and width of the returned images, in pixels.

    Yields:
        The groups of the match, and the image: grey, uint8 ``[size, size]``.

    Raises:
        ValueError: if the zip or an image cannot be read.
    """
    members = _zip_members if source.is_file() else _folder_members
    for name, content in members(source, pattern):
        match = pattern.fullmatch(name)
        if match:
            yield match.groups(), _decode(content, f"{name} in {source}", size)


def fingerprint(source: Path) -> list[tuple[str, int, int]]:
    """What changes when a source does, found without reading it.

    Args:
        source: a zip or a folder.

    Returns:
        Relative name, size in bytes and time of change in nanoseconds of the zip, or of each file in the folder,
        in the order of the names.
    """
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    entries = []
    for path in files:
        stat = path.stat()
        entries.append((path.relative_to(source.parent).as_posix(), stat.st_size, stat.st_mtime_ns))
    return sorted(entries)


def _folder_members(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder.parent).as_posix()
        if pattern.fullmatch(name) and path.is_file():
            yield name, path.read_bytes()


def _zip_members(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    _check_magic(path)
    with _explained(path, "its table of contents"):
        archive = zipfile.ZipFile(path)
    with archive:
        for name in archive.namelist():
            if pattern.fullmatch(name):
                with _explained(path, name):
                    content = archive.read(name)
                yield name, content


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE_MEMBER as error:
        raise ValueError(
            f"{path} is a truncated or corrupt zip: {what} cannot be read ({error}); download it again, or copy it "
            f"again from where it is intact."
        ) from error


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(_ZIP_MAGIC):
        return
    if not start:
        found = "is empty, as after an interrupted download"
    elif re.match(rb"\s*<(!doctype|html|\?xml|!--)", start, re.IGNORECASE):
        found = "is an HTML page, such as a server sends in place of a file it refuses"
    else:
        found = f"starts with {start[:4]!r} where a zip starts with {_ZIP_MAGIC[0]!r}"
    raise ValueError(f"{path} is not a zip: it {found}; download the archive again and look at the file's size.")


def _decode(content: bytes, name: str, size: int) -> Pixels:
    try:
        # Loading alone overlooks checksums, and a flipped bit can pass as another drawing; verifying uses an image up.
        with Image.open(BytesIO(content), formats=("PNG",)) as image:
            image.verify()
        with Image.open(BytesIO(content), formats=("PNG",)) as image:
            # One-bit images must become grey first: Pillow resizes palettes and bits by nearest neighbour only.
            grey = image.convert("L")
    except _UNREADABLE as error:
        raise ValueError(
            f"{name} is a truncated or corrupt PNG ({error}); its drawing cannot be restored, so fetch the dataset "
            f"again."
        ) from error
    return np.asarray(grey.resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)
