"""Decoded datasets kept between runs, in the user's cache folder.

A cache is a convenience: whatever is wrong with it, the dataset is read again from its source and the user is
warned, never stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from applications.datasets.images import ClassImages

_VERSION = 2


def cache_folder() -> Path:
    """Where caches lie: ``$IMPLICITLAYERS_CACHE``, else the platform's folder for them.

    Returns:
        The folder, which need not exist.

    Raises:
        RuntimeError: if the user has no home folder.
    """
    chosen = os.environ.get("IMPLICITLAYERS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "implicitlayers" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "implicitlayers"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "implicitlayers"


def cached(kind: str, facts: Any, read: Callable[[], ClassImages], *, use: bool) -> ClassImages:
    """A dataset from the cache, or read and put there.

    Args:
        kind: start of the file's name.
        facts: all that decides what is read, such as the fingerprint of its source; must fit JSON.
        read: reads it.
        use: whether to look into the cache and write it at all.

    Returns:
        The dataset.
    """
    if not use:
        return read()
    key = hashlib.sha256(json.dumps([_VERSION, facts]).encode()).hexdigest()[:24]
    file_name = f"{kind}-{key}.safetensors"
    dataset = read_cache(file_name)
    if dataset is None:
        dataset = read()
        write_cache(file_name, dataset)
    return dataset


def read_cache(file_name: str) -> ClassImages | None:
    """Read a dataset from the cache.

    Args:
        file_name: name of the file in the cache folder.

    Returns:
        The dataset, or None if it isn't there or cannot be used (then with a warning).
    """
    try:
        path = cache_folder() / file_name
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            # A copy, so that the tensor doesn't hang on a mapped file that another process may replace.
            images = stored.get_tensor("images").clone()
        if metadata.get("crc32") != _checksum(images):
            raise ValueError("the images don't match their checksum")
        return ClassImages(
            images=images,
            names=tuple(json.loads(metadata["names"])),
            source=metadata["source"],
            parts=tuple(json.loads(metadata["parts"])),
            orientations=json.loads(metadata["orientations"]),
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        warnings.warn(
            f"the cache file {file_name} in $IMPLICITLAYERS_CACHE or the user's cache folder cannot be used "
            f"({type(error).__name__}: {error}); reading the dataset from its source and replacing the file.",
            stacklevel=3,
        )
        return None


def write_cache(file_name: str, dataset: ClassImages) -> None:
    """Write a dataset to the cache, whole or not at all; warn if it cannot be written.

    Args:
        file_name: name of the file in the cache folder.
        dataset: what to keep.
    """
    metadata = {
        "names": json.dumps(dataset.names),
        "source": dataset.source,
        "parts": json.dumps(dataset.parts),
        "orientations": json.dumps(dataset.orientations),
        "crc32": _checksum(dataset.images),
    }
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / file_name, dataset.images.contiguous(), metadata)
    except (OSError, RuntimeError, SafetensorError) as error:
        warnings.warn(
            f"the dataset could not be cached ({type(error).__name__}: {error}) and will be decoded again next time; "
            f"set $IMPLICITLAYERS_CACHE to a folder that can be written, or pass cache=False.",
            stacklevel=3,
        )


def _replace(path: Path, images: Tensor, metadata: dict[str, str]) -> None:
    # A reader sees the old file or the new one; two writers don't see each other's half-written one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file({"images": images}, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _checksum(images: Tensor) -> str:
    # The memory itself, not a copy: a set of photographs is over a gigabyte.
    return f"{zlib.crc32(images.contiguous().numpy().data):08x}"
