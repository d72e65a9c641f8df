"""Named files from a zip or from a folder, read alike.

Zips are read in memory and never extracted, so a member's name can point at no file outside; one that tries to is
refused all the same, since nobody packs such an archive with good intent.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from applications.datasets.recognition import START, recognised

_ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_UNREADABLE_MEMBER = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)


class File(NamedTuple):
    """One file that was asked for: the groups of its match, its content, and what to call it in an error."""

    groups: tuple[str, ...]
    content: bytes
    label: str


def read_files(source: Path, pattern: re.Pattern[str]) -> Iterator[File]:
    """Read all files whose path matches a pattern, in the order of the listing: sorting is left to the caller.

    Args:
        source: a zip, or a folder (whose own name is the first part of the paths below it).
        pattern: matched in full against paths with forward slashes; other files are passed over.

    Yields:
        The files.

    Raises:
        OSError: if a folder cannot be listed or a file in it not be read.
        ValueError: if the zip cannot be read, or a member points outside it.
    """
    members = _zip_members if source.is_file() else _folder_members
    for name, content in members(source, pattern):
        match = pattern.fullmatch(name)
        if match:
            yield File(match.groups(), content, f"{name} in {source}")


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, in the order of the listing.

    Args:
        folder: where to look.

    Yields:
        Their paths.

    Raises:
        OSError: if a folder cannot be listed: its files would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise OSError(
            f"{error.filename} cannot be listed ({error.strerror}), and without its files this would be another "
            f"dataset; get read access to it, or pass a folder that can be read."
        ) from error

    for here, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            yield Path(here) / name


def fingerprint(source: Path) -> list[tuple[str, int, int]]:
    """What changes when a source does, found without reading it.

    Args:
        source: a file or a folder.

    Returns:
        Relative name, size in bytes and time of change in nanoseconds of the file, or of each file in the folder,
        in the order of the names.
    """
    files = [source] if source.is_file() else files_below(source)
    entries = []
    for path in files:
        stat = path.stat()
        entries.append((path.relative_to(source.parent).as_posix(), stat.st_size, stat.st_mtime_ns))
    return sorted(entries)


def check_zip(path: Path, origin: str) -> None:
    """Refuse a file that doesn't start as a zip does, and say what it is instead.

    Args:
        path: the file.
        origin: what to call it.

    Raises:
        ValueError: if it is empty, an HTML page or anything else but a zip.
    """
    with path.open("rb") as file:
        start = file.read(START)
    if start.startswith(_ZIP_MAGIC):
        return
    found = recognised(start) or f"starts with {start[:4]!r} where a zip starts with {_ZIP_MAGIC[0]!r}"
    raise ValueError(f"{origin} is not a zip: it {found}; download the archive again and look at the file's size.")


def _folder_members(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for path in files_below(folder):
        name = path.relative_to(folder.parent).as_posix()
        if pattern.fullmatch(name):
            yield name, path.read_bytes()


def _zip_members(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    check_zip(path, str(path))
    with _explained(path, "its table of contents"):
        archive = zipfile.ZipFile(path)
    with archive:
        for name in archive.namelist():
            _check_inside(name, path)
        for name in archive.namelist():
            if pattern.fullmatch(name):
                with _explained(path, name):
                    content = archive.read(name)
                yield name, content


def _check_inside(name: str, path: Path) -> None:
    # A Windows path takes both slashes for separators and knows drives, so it sees every way out.
    seen = PureWindowsPath(name)
    if seen.anchor or ".." in seen.parts:
        raise ValueError(
            f"{path} has a member {name!r}, which points outside of the archive: it is damaged, or made to overwrite "
            f"files where it is extracted; fetch it again from its publisher."
        )


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE_MEMBER as error:
        raise ValueError(
            f"{path} is a truncated or corrupt zip: {what} cannot be read ({error}); download it again, or copy it "
            f"again from where it is intact."
        ) from error
