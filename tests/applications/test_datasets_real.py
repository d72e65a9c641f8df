"""The real Omniglot, and real photographs in Mini-ImageNet's layout, where they are at hand."""

import hashlib
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from applications.datasets import check_disjoint, load, partition
from applications.datasets.download import MD5
from applications.datasets.omniglot import MINIMAL

REAL = [
    Path(os.environ["IMPLICITLAYERS_DATA"]) if os.environ.get("IMPLICITLAYERS_DATA") else None,
    Path(__file__).resolve().parents[3] / "shared" / "data",
]


@pytest.fixture
def root():
    roots = [path for path in REAL if path is not None and path.is_dir()]
    if not roots:
        pytest.skip("no real data: neither $IMPLICITLAYERS_DATA nor ../shared/data is a folder")
    return roots[0]


def test_whole_omniglot(root, cache_folder):
    with warnings.catch_warnings(action="error"):
        dataset = load("omniglot", root, seed=0)
    assert dataset.images.shape == (1623, 20, 1, 28, 28)
    assert len({name.partition("/")[0] for name in dataset.names}) == 50
    assert list(dataset.names) == sorted(dataset.names)
    assert dataset.names[0] == "Alphabet_of_the_Magi/character01"
    assert [dataset.parts.count(part) for part in ("background", "evaluation")] == [964, 659]
    ink = 1 - dataset.images.float().mean() / 255
    assert 0.07 < ink < 0.10
    again = load("omniglot", root, seed=1)
    assert again.images.equal(dataset.images)
    assert len(list(cache_folder.iterdir())) == 1
    for split, sizes in {
        "vinyals": {"train": 1028, "validation": 172, "test": 423},
        "lake": {"train": 964, "test": 659},
        "small1": {"train": 136, "test": 659},
    }.items():
        chosen = partition(dataset, "omniglot", split)
        assert {part: len(indices) for part, indices in chosen.items()} == sizes
        check_disjoint(chosen)


def test_published_checksums(root):
    # The other two archives were packed again, so their checksums cannot be looked at here.
    for name in ("images_background_small1", "images_background_small2"):
        content = (root / "omniglot" / f"{name}.zip").read_bytes()
        assert hashlib.md5(content).hexdigest() == MD5[name]


@pytest.mark.parametrize("minimal", MINIMAL)
def test_minimal_sets_are_alphabets_of_the_whole(root, minimal):
    def drawings(name):
        with zipfile.ZipFile(root / "omniglot" / f"{name}.zip") as archive:
            return {info.filename.partition("/")[2]: info.CRC for info in archive.infolist() if not info.is_dir()}

    whole, small = drawings("images_background"), drawings(f"images_background_{minimal}")
    assert small == {name: crc for name, crc in whole.items() if name.partition("/")[0] in MINIMAL[minimal]}
    assert len(small) == {"small1": 136, "small2": 156}[minimal] * 20


def test_photographs_in_the_layout_of_mini_imagenet_are_not_called_so(root):
    with warnings.catch_warnings(action="error"):
        dataset = load("mini-imagenet", root)
    assert dataset.images.shape == (100, 120, 3, 64, 64)
    assert dataset.source == ("mini-imagenet layout, not Mini-ImageNet (64/16/20 classes of 120 images of 64 pixels)")
    chosen = partition(dataset, "mini-imagenet")
    assert {part: len(indices) for part, indices in chosen.items()} == {"train": 64, "validation": 16, "test": 20}
    with zipfile.ZipFile(root / "mini-imagenet-layout" / "images.zip") as archive:
        for name in (dataset.names[0], dataset.names[57]):
            with Image.open(archive.open(f"images/{name}00000003.jpg")) as image:
                expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            np.testing.assert_array_equal(dataset.images[dataset.names.index(name), 3].numpy(), expected)
