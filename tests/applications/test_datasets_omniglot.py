"""Omniglot from archives and folders, whole and in part."""

import os
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from applications.datasets import omniglot
from tests.helpers.omniglot import CHARACTERS, ORDER, drawing, shuffled, tree, write_folder, write_zip, write_zips


@pytest.fixture
def root(tmp_path):
    write_zips(tmp_path / "data")
    return tmp_path / "data"


def test_order_shape_and_values(root):
    dataset = omniglot(root, cache=False)
    assert dataset.images.shape == (6, 20, 1, 28, 28)
    assert dataset.names == ORDER
    assert dataset.source == "omniglot"
    assert dataset.images[0, 0, 0, 0, 0] == 255, "paper should be white"
    for index, name in enumerate(ORDER):
        for number in (0, 1, 19):
            with Image.open(BytesIO(drawing(name, number))) as image:
                expected = np.asarray(image.convert("L").resize((28, 28), Image.Resampling.LANCZOS))
            np.testing.assert_array_equal(dataset.images[index, number, 0].numpy(), expected)


def test_resizing_is_smooth(root):
    assert len(omniglot(root, cache=False).images.unique()) > 10, "nearest neighbour would leave two values"


def test_full_size_is_the_original(root):
    images = omniglot(root, size=105, cache=False).images
    assert images.unique().tolist() == [0, 255]
    assert (images[1, 0, 0, 10:13, 10:40] == 0).all()


@pytest.mark.parametrize("place", [".", "omniglot-py", "omniglot"])
@pytest.mark.parametrize("form", ["zips", "shuffled zips", "folders", "zip and folder"])
def test_every_layout_gives_the_same(root, tmp_path, place, form):
    folder = tmp_path / "other" / place
    if form.endswith("zips"):
        write_zips(folder, shuffled if form.startswith("shuffled") else list)
    else:
        background, evaluation = CHARACTERS
        write_folder(folder, tree(evaluation))
        if form == "folders":
            write_folder(folder, tree(background))
        else:
            write_zip(folder / f"{background}.zip", tree(background))
    expected, found = omniglot(root, cache=False), omniglot(tmp_path / "other", cache=False)
    assert found.images.equal(expected.images)
    assert found.names == expected.names


def test_folder_listing_order_does_not_matter(tmp_path, monkeypatch, no_decoding):
    for part in CHARACTERS:
        write_folder(tmp_path / "data", tree(part))
    expected = omniglot(tmp_path / "data")
    listed = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **options: iter(shuffled(listed(*args, **options))))
    assert omniglot(tmp_path / "data", cache=False).images.equal(expected.images)
    no_decoding()
    assert omniglot(tmp_path / "data").images.equal(expected.images), "the cache should be found again"


def test_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    for part in CHARACTERS:
        write_folder(tmp_path, tree(part))
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("Greek"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match=r"Greek cannot be listed \(Permission denied\).*another dataset.*read access"):
        omniglot(tmp_path)


def test_other_files_are_passed_over(root, tmp_path):
    part = "images_background"
    junk = {
        f"{part}/Zulu/character01/._0001_01.png": b"finder",
        f"__MACOSX/{part}/Zulu/character01/0001_01.png": b"finder",
        f"{part}/Zulu/character01/Thumbs.db": b"explorer",
        f"{part}/readme.png": b"not an image",
    }
    expected = omniglot(root, cache=False)
    write_zip(root / f"{part}.zip", tree(part) | junk)
    before = sorted(tmp_path.rglob("*"))
    assert omniglot(root, cache=False).images.equal(expected.images)
    assert sorted(tmp_path.rglob("*")) == before, "nothing should be extracted"


def test_place_with_both_parts_is_taken_before_one_with_a_single_part(root):
    expected = omniglot(root, cache=False)
    write_zips(root / "omniglot")
    (root / "images_evaluation.zip").unlink()
    assert omniglot(root, cache=False).images.equal(expected.images)


@pytest.mark.parametrize("form", ["own archive", "own folder", "whole archive"])
def test_minimal_set_is_a_part_of_the_whole(root, tmp_path, monkeypatch, form):
    # The package has a function of the name of this module.
    module = sys.modules["applications.datasets.omniglot"]
    monkeypatch.setattr(module, "MINIMAL", {"small1": ("Greek",), "small2": ("Zulu",)})
    whole = omniglot(root)
    small = "images_background_small1"
    files = {name.replace("images_background", small): png for name, png in tree("images_background").items()}
    files = {name: png for name, png in files.items() if "Greek" in name}
    if form == "own archive":
        write_zip(root / f"{small}.zip", files)
    elif form == "own folder":
        write_folder(root, files)
    if form != "whole archive":
        (root / "images_background.zip").write_bytes(b"not looked at")
    found = omniglot(root, minimal="small1")
    assert found.names == ("Alpha_(new)/character01", "Greek/character09", "Greek/character10", "alpha/character01")
    assert found.parts == ("evaluation", "background", "background", "evaluation")
    assert found.images.equal(whole.images[[0, 1, 2, 5]])


def test_unknown_minimal_set(root):
    with pytest.raises(ValueError, match=r"minimal='small3' .*pass small1 or small2"):
        omniglot(root, minimal="small3")


def test_parts_and_colours(root):
    dataset = omniglot(root, channels=3)
    assert dataset.parts == ("evaluation", *["background"] * 4, "evaluation")
    assert dataset.images.shape == (6, 20, 3, 28, 28)
    grey = omniglot(root).images
    assert grey.shape == (6, 20, 1, 28, 28)
    assert dataset.images.equal(grey.expand(-1, -1, 3, -1, -1))
    with pytest.raises(ValueError, match="channels=2 is neither"):
        omniglot(root, channels=2)


def test_impossible_size(root):
    with pytest.raises(ValueError, match=r"size=0 .*such as 28"):
        omniglot(root, size=0)
