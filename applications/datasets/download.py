"""Fetching the archives of a dataset that may be passed on, when asked to and never by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pooch import HTTPDownloader, retrieve
from requests import RequestException

from applications.datasets.archives import check_zip
from applications.datasets.omniglot import ADDRESS, archives_of

# Of the archives as published.
MD5: Mapping[str, str] = MappingProxyType(
    {
        "images_background": "68d2efa1b9178cc56df9314c21c6e718",
        "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
        "images_background_small1": "e704a628b5459e08445c13499850abc4",
        "images_background_small2": "b75a71a51d3b13f821f212756fe481fd",
    }
)
_SECONDS = 30
_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "glyphs": "glyphs are drawn on the spot",
        "mini-imagenet": "ImageNet's licence doesn't let anybody pass it on, so it has to be made from ImageNet",
        "folder": "these images are your own",
    }
)


def download(
    name: str,
    root: Path,
    *,
    minimal: str | None = None,
    address: str = ADDRESS,
    checksums: Mapping[str, str] = MD5,
) -> list[Path]:
    """Fetch what is missing of a dataset's archives, each whole and with the published checksum or not at all.

    A file or folder that is there already is left alone, whatever it holds: what is wrong with it is told when it
    is read.

    Args:
        name: "omniglot".
        root: folder to put the archives into; made if it isn't there.
        minimal: "small1" or "small2" for a minimal background set.
        address: folder on the web that holds them.
        checksums: MD5 of each archive by its name.

    Returns:
        The archives that were fetched.

    Raises:
        OSError: if the address cannot be reached or the folder not be written.
        ValueError: if the dataset cannot be downloaded, or what was sent is another file.
    """
    if name in _ELSEWHERE:
        raise ValueError(f"{name} cannot be downloaded: {_ELSEWHERE[name]}; leave --download out.")
    fetched = []
    for names in archives_of(minimal).values():
        archive = root / f"{names[0]}.zip"
        if not any((root / part).exists() or (root / f"{part}.zip").exists() for part in names):
            _fetch(f"{address}/{archive.name}", archive, checksums[names[0]])
            fetched.append(archive)
    return fetched


def _fetch(url: str, archive: Path, md5: str) -> None:
    try:
        # A file beside it first, moved when its checksum is right; it is deleted when anything goes wrong.
        retrieve(url, f"md5:{md5}", fname=archive.name, path=archive.parent, downloader=_checked)
    except RequestException as error:
        raise OSError(
            f"{url} cannot be fetched ({error}); look at the connection, or fetch it elsewhere and put it at {archive}."
        ) from error
    except OSError as error:
        raise OSError(
            f"{archive} cannot be written ({error}); make room, or pass a folder that can be written."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{url} is not what was published ({error}); nothing was kept. Try again later, or fetch it elsewhere and "
            f"put it at {archive}."
        ) from error


def _checked(fname: str, action: Any, pooch: Any, *, check_only: bool | None = None) -> None:
    # pooch calls the address fname and the file action. Before the checksum, which would tell nobody that a server
    # sent a page of apologies.
    HTTPDownloader(timeout=_SECONDS)(fname, action, pooch, bool(check_only))
    check_zip(Path(action), "what the server sent")
