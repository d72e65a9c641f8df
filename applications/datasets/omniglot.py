"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each.

Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction", Science
350 (2015).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from applications.datasets.archives import fingerprint, read_files
from applications.datasets.cache import cached
from applications.datasets.decoding import Form, Pixels, decode
from applications.datasets.images import ClassImages, stack

DRAWINGS = 20
BACKGROUND, EVALUATION = "background", "evaluation"
# The alphabets of the two minimal background sets; their images are those of the whole background set.
MINIMAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "small1": ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"),
        "small2": ("Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog"),
    }
)
ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_FOLDERS = (".", "omniglot-py", "omniglot")


def archives_of(minimal: str | None = None) -> dict[str, tuple[str, ...]]:
    """Names of the archives that make up Omniglot, for each part those that will do, the smallest first.

    Args:
        minimal: "small1" or "small2" for the background set of that name, None for the whole one.

    Returns:
        Names without ".zip".

    Raises:
        ValueError: if there is no such minimal set.
    """
    if minimal is not None and minimal not in MINIMAL:
        raise ValueError(f"minimal={minimal!r} is no minimal set of Omniglot; pass {' or '.join(MINIMAL)}, or None.")
    whole = f"images_{BACKGROUND}"
    return {
        BACKGROUND: (whole,) if minimal is None else (f"{whole}_{minimal}", whole),
        EVALUATION: (f"images_{EVALUATION}",),
    }


def omniglot(
    root: str | os.PathLike[str],
    size: int = 28,
    cache: bool = True,
    *,
    channels: int = 1,
    minimal: str | None = None,
) -> ClassImages:
    """Read Omniglot from the archives as published, or from folders extracted from them.

    Under ``root``, ``root/omniglot-py`` (where torchvision puts them) or ``root/omniglot`` both ``images_background``
    and ``images_evaluation`` must lie, each a ``.zip`` (taken first) or a folder, with
    ``images_*/<Alphabet>/characterNN/XXXX_YY.png`` in them. For a minimal set either ``images_background_small1`` (or
    2) or ``images_background``, from which its alphabets are taken, will do.

    The classes of both parts are sorted together by alphabet and then character, the drawings by file name, all
    by code point: never by the order in which an archive or a file system lists them.

    Args:
        root: where to look.
        size: height and width of the images, in pixels; resized with a Lanczos filter.
        cache: keep the decoded images in the user's cache folder (or ``$IMPLICITLAYERS_CACHE``) for next time.
        channels: 1, or 3 for a network that wants colours.
        minimal: "small1" or "small2" for the minimal background sets, five alphabets each; None for all thirty.

    Returns:
        Images ``[classes, 20, channels, size, size]``, not inverted (ink 0, paper 255), named
        ``<Alphabet>/characterNN``, their parts "background" and "evaluation".

    Raises:
        FileNotFoundError: if ``root`` or either part isn't there.
        ValueError: if an argument cannot be, an archive or image cannot be read, or a character hasn't 20 drawings.
    """
    form = Form(size, channels)
    sources = _find(Path(root), archives_of(minimal))
    facts = [[fingerprint(source) for source in sources.values()], channels, minimal]
    return cached(f"omniglot-{size}", facts, lambda: _read(sources, form, minimal), use=cache)


def _find(root: Path, wanted: dict[str, tuple[str, ...]]) -> dict[str, Path]:
    """The source of each part, from the first folder that has both."""
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"root={str(root)!r} {state}, so Omniglot cannot be under it; pass the folder that holds "
            f"{' and '.join(names[0] + '.zip' for names in wanted.values())}."
        )
    folders = [root / folder for folder in _FOLDERS]
    found = [
        {part: source for part, names in wanted.items() if (source := _source(folder, names))} for folder in folders
    ]
    for sources in found:
        if len(sources) == len(wanted):
            return sources
    for folder, sources in zip(folders, found, strict=True):
        if sources:
            missing = next(names[0] for part, names in wanted.items() if part not in sources)
            raise FileNotFoundError(
                f"{folder} holds {next(iter(sources.values())).name} but neither {missing}.zip nor a folder {missing}, "
                f"and half of Omniglot is another dataset; put {ADDRESS}/{missing}.zip beside it, or let "
                f"--download do so."
            )
    looked_for = ", ".join(str(folder / names[0]) + "[.zip]" for folder in folders for names in wanted.values())
    raise FileNotFoundError(
        f"root={str(root)!r} holds no Omniglot: looked for {looked_for}; download both archives from {ADDRESS}/, "
        f"let --download do so, or pass the folder they are in."
    )


def _source(folder: Path, names: tuple[str, ...]) -> Path | None:
    for name in names:
        archive, extracted = folder / f"{name}.zip", folder / name
        if archive.is_file():
            return archive
        if extracted.is_dir():
            return extracted
    return None


def _read(sources: dict[str, Path], form: Form, minimal: str | None) -> ClassImages:
    drawings: dict[str, list[tuple[str, Pixels]]] = defaultdict(list)
    part_of: dict[str, str] = {}
    for part, source in sources.items():
        folder = source.name.removesuffix(".zip")
        pattern = re.compile(rf"{folder}/([^/]+)/(character\d+)/([^/.][^/]*\.png)")
        before = len(drawings)
        for (alphabet, character, file_name), content, label in read_files(source, pattern):
            if part == BACKGROUND and minimal is not None and alphabet not in MINIMAL[minimal]:
                continue
            name = f"{alphabet}/{character}"
            drawings[name].append((file_name, decode(content, label, form)))
            part_of[name] = part
        if len(drawings) == before:
            raise ValueError(
                f"{source} holds no {folder}/<Alphabet>/characterNN/*.png, so it is not this part of Omniglot; "
                f"pass the archive as published ({ADDRESS}/{folder}.zip)."
            )
    for name, files in drawings.items():
        if len(files) != DRAWINGS:
            raise ValueError(
                f"{name} has {len(files)} drawings where every character of Omniglot has {DRAWINGS}; "
                f"files are missing or doubled, so fetch the archives again or extract them into an empty folder."
            )
    dataset = stack({name: dict(files) for name, files in drawings.items()}, "omniglot")
    return replace(dataset, parts=tuple(part_of[name] for name in dataset.names))
