"""The layouts of Mini-ImageNet: tables with images, folders of parts, pickles. Each is found before it is read."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from applications.datasets.archives import read_files
from applications.datasets.decoding import SUFFIXES, Form, Pixels, decode, extent
from applications.datasets.pickles import read_pickle
from applications.datasets.trees import PART_NAMES, PARTS, class_files, decode_files, parts_of

SIDE = 84

Found = dict[str, dict[str, Pixels]]


class Layout(NamedTuple):
    """A layout that was found: its files, the shorter side of its first image, and how to read it.

    Reading gives the images of each class by file name, and the part of each class.
    """

    files: list[Path]
    side: int
    read: Callable[[Form], tuple[Found, dict[str, str]]]


def _complete(place: Path, pattern: str) -> dict[str, Path]:
    """The file or folder of each part, or nothing if none is there."""
    found: dict[str, Path] = {}
    for name, part in PART_NAMES.items():
        path = place / pattern.format(name)
        if path.exists():
            found.setdefault(part, path)
    missing = [part for part in PARTS if part not in found]
    if found and missing:
        raise FileNotFoundError(
            f"{place} holds {next(iter(found.values())).name} but no {pattern.format(missing[0])}; put it beside it."
        )
    return found


def _pickles(place: Path) -> Layout | None:
    paths = _complete(place, "mini-imagenet-cache-{}.pkl")

    def read(form: Form) -> tuple[Found, dict[str, str]]:
        found: Found = {}
        part_of: dict[str, str] = {}
        for part, path in paths.items():
            images, classes = _cache_content(path)
            for name, places in classes.items():
                _claim(name, part, part_of)
                found[name] = {f"{index:08d}": _formed(images[index], form) for index in places}
        return found, part_of

    return Layout(list(paths.values()), SIDE, read) if paths else None


def _cache_content(path: Path) -> tuple[NDArray[np.uint8], dict[str, list[int]]]:
    content = read_pickle(path)
    images, classes = (content.get("image_data"), content.get("class_dict")) if isinstance(content, dict) else (0, 0)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(
            f"{path} has {kind} for image_data where a cache of Mini-ImageNet has uint8 [images, {SIDE}, {SIDE}, 3]; "
            f"fetch the file again, or pass another layout."
        )
    if not isinstance(classes, dict) or not all(_fits(places, len(images)) for places in classes.values()):
        raise ValueError(
            f"{path} has no class_dict that names the places of each class among its {len(images)} images; fetch the "
            f"file again, or pass another layout."
        )
    return images, {str(name): [int(place) for place in places] for name, places in classes.items()}


def _fits(places: Any, count: int) -> bool:
    entries = places.tolist() if isinstance(places, np.ndarray) else places
    return isinstance(entries, list | tuple) and all(isinstance(entry, int) and 0 <= entry < count for entry in entries)


def _formed(image: NDArray[np.uint8], form: Form) -> Pixels:
    picture = Image.fromarray(image).convert("L" if form.channels == 1 else "RGB")
    if picture.size != (form.size, form.size):
        picture = picture.resize((form.size, form.size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def _folders(place: Path) -> Layout | None:
    tops = _complete(place, "{}")
    if not tops or not all(path.is_dir() for path in tops.values()):
        return None
    files = {f"{path.name}/{name}": paths for path in tops.values() for name, paths in class_files(path).items()}
    part_of_path = parts_of(tuple(files))
    name_of = {path: path.partition("/")[2] for path in files}
    first = next(iter(files.values()))[0]

    def read(form: Form) -> tuple[Found, dict[str, str]]:
        found = {name_of[path]: decode_files(paths, form) for path, paths in files.items()}
        return found, {name_of[path]: part for path, part in part_of_path.items()}

    return Layout(list(tops.values()), min(extent(first.read_bytes(), str(first))), read)


def _tables(place: Path) -> Layout | None:
    tables = _complete(place, "{}.csv")
    if not tables:
        return None
    archive, extracted = place / "images.zip", place / "images"
    images = archive if archive.is_file() else extracted
    if not images.exists():
        raise FileNotFoundError(
            f"{place} holds {tables['train'].name} but neither images.zip nor images/; put the images beside it."
        )
    label_of: dict[str, str] = {}
    part_of: dict[str, str] = {}
    for part, table in tables.items():
        for file_name, label in _rows(table):
            if file_name in label_of:
                raise ValueError(f"{table} names {file_name} again; an image can be in one class only, once.")
            label_of[file_name] = label
            if part_of.get(label) != part:
                _claim(label, part, part_of)

    def read(form: Form) -> tuple[Found, dict[str, str]]:
        found: Found = defaultdict(dict)
        for (file_name,), content, label in read_files(images, _member(rf"[^/.][^/]*{SUFFIXES}")):
            if file_name in label_of:
                if file_name in found[label_of[file_name]]:
                    raise ValueError(
                        f"{label} is the second file named {file_name}, and the tables don't say which one they mean; "
                        f"take one of them away."
                    )
                found[label_of[file_name]][file_name] = decode(content, label, form)
        missing = sorted(name for name, label in label_of.items() if name not in found[label])
        if missing:
            raise ValueError(
                f"{images} lacks {len(missing)} of the {len(label_of)} images that the tables name, the first "
                f"{missing[0]}; fetch the images again, or the tables that belong to them."
            )
        return dict(found), part_of

    return Layout([*tables.values(), images], _first_side(images, next(iter(label_of))), read)


def _member(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.+/)?({name})")


def _first_side(images: Path, name: str) -> int:
    for _, content, label in read_files(images, _member(re.escape(name))):
        return min(extent(content, label))
    raise ValueError(f"{images} lacks {name}, which a table names; fetch the images that belong to the tables.")


def _rows(table: Path) -> list[tuple[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table} is no table ({error}); fetch it again.") from error
    if not rows or rows[0] != ["filename", "label"]:
        raise ValueError(
            f"{table} starts with {','.join(rows[0]) if rows else ''!r:.60} where a table of Mini-ImageNet starts with "
            f"filename,label; fetch it again."
        )
    for number, row in enumerate(rows[1:], 2):
        if row and (len(row) != 2 or not all(row)):
            raise ValueError(f"{table}, line {number}, is {','.join(row)!r:.60}, not filename,label; fetch it again.")
    if len(rows) == 1:
        raise ValueError(f"{table} names no image; fetch it again.")
    return [(row[0], row[1]) for row in rows[1:] if row]


def _claim(name: str, part: str, part_of: dict[str, str]) -> None:
    if name in part_of:
        raise ValueError(
            f"class {name} is in part {part_of[name]!r} and again in part {part!r}, so the accuracy on one would be "
            f"measured on what was learnt from the other; fetch the files again."
        )
    part_of[name] = part


# By what a user must have, in the order in which they are looked for.
LAYOUTS: Mapping[str, Callable[[Path], Layout | None]] = MappingProxyType(
    {
        "train.csv, val.csv and test.csv with images.zip or images/": _tables,
        "train/, val/ and test/ with class folders": _folders,
        "mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl": _pickles,
    }
)
