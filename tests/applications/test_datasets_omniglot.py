"""Omniglot from archives and folders, from damaged ones, and from the cache."""

import os
import random
import sys
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from applications.datasets import omniglot

# Names whose order by code point is neither that of the parts nor that of the listing.
CHARACTERS = {
    "images_background": ["Zulu/character02", "Zulu/character01", "Greek/character10", "Greek/character09"],
    "images_evaluation": ["Alpha_(new)/character01", "alpha/character01"],
}
ORDER = (
    "Alpha_(new)/character01",
    "Greek/character09",
    "Greek/character10",
    "Zulu/character01",
    "Zulu/character02",
    "alpha/character01",
)


def drawing(class_name, number):
    """One-bit PNG of 105 x 105 with ink 0 on paper 1, different for each class and number."""
    bits = np.ones((105, 105), dtype=bool)
    bits[10 + 4 * number : 13 + 4 * number, 10 : 30 + 10 * ORDER.index(class_name)] = False
    file = BytesIO()
    Image.fromarray(bits).save(file, "PNG")
    return file.getvalue()


def tree(part):
    return {
        f"{part}/{name}/{1 + index:04d}_{number + 1:02d}.png": drawing(name, number)
        for index, name in enumerate(CHARACTERS[part])
        for number in range(20)
    }


def write_zip(path, files, order=list):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in order(files):
            archive.writestr(name, files[name])


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_zips(root, order=list):
    for part in CHARACTERS:
        write_zip(root / f"{part}.zip", tree(part), order)


def shuffled(names):
    names = list(names)
    random.Random(0).shuffle(names)
    return names


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """No test may touch the user's own cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("IMPLICITLAYERS_CACHE", str(folder))
    return folder


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


@pytest.mark.parametrize("way", ["../", "/", "images_background/../../", "C:/", "..\\"])
def test_archive_with_a_way_out_is_refused(root, tmp_path, way):
    part = "images_background"
    name = f"{way}{part}/Zulu/character01/0001_21.png"
    write_zip(root / f"{part}.zip", tree(part) | {name: drawing("Zulu/character01", 0)})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"images_background\.zip has a member .*points outside of the archive"):
        omniglot(root)
    assert sorted(tmp_path.rglob("*")) == before


def test_place_with_both_parts_is_taken_before_one_with_a_single_part(root):
    expected = omniglot(root, cache=False)
    write_zips(root / "omniglot")
    (root / "images_evaluation.zip").unlink()
    assert omniglot(root, cache=False).images.equal(expected.images)


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist.*images_background\.zip"):
        omniglot(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"file' is a file"):
        omniglot(tmp_path / "file")


def test_empty_root_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no Omniglot") as caught:
        omniglot(tmp_path)
    for place in (tmp_path, tmp_path / "omniglot-py", tmp_path / "omniglot"):
        for part in CHARACTERS:
            assert str(place / part) in str(caught.value)


@pytest.mark.parametrize("missing", CHARACTERS)
def test_single_part(root, missing):
    (root / f"{missing}.zip").unlink()
    with pytest.raises(FileNotFoundError, match=rf"neither {missing}\.zip.*https://.*/{missing}\.zip"):
        omniglot(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><title>Moved</title>", r"not a zip: it is an HTML page.*download"),
        (b"\n <HTML>", r"HTML page"),
        (b"", r"not a zip: it is empty"),
        (b"\x1f\x8b\x08\x00", r"not a zip: it starts with b'\\x1f\\x8b"),
    ],
)
def test_not_a_zip(root, content, message):
    (root / "images_evaluation.zip").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        omniglot(root)


def test_truncated_zip(root):
    path = root / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is a truncated or corrupt zip.*download it again"):
        omniglot(root)


def test_corrupt_zip_member(root):
    path = root / "images_evaluation.zip"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.infolist()[7]
    content[member.header_offset + 30 + len(member.filename) + 20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"corrupt zip.*{member.filename[-11:]}"):
        omniglot(root)


def test_zip_of_something_else(root):
    write_zip(root / "images_evaluation.zip", tree("images_background"))
    with pytest.raises(ValueError, match=r"holds no images_evaluation/<Alphabet>"):
        omniglot(root)


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.parametrize("damage", ["text", "half", "flipped bit", "no end"])
def test_corrupt_png(root, form, damage):
    part = "images_evaluation"
    files = tree(part)
    name = sorted(files)[25]
    png = bytearray(files[name])
    png[png.index(b"IDAT") + 8] ^= 1
    files[name] = {
        "text": b"<html>",
        "half": files[name][:60],
        "flipped bit": bytes(png),
        "no end": files[name][:-12],
    }[damage]
    (root / f"{part}.zip").unlink()
    if form == "zip":
        write_zip(root / f"{part}.zip", files)
    else:
        write_folder(root, files)
    with pytest.raises(ValueError, match=rf"{name.rpartition('/')[2]} in .*truncated or corrupt image"):
        omniglot(root)


@pytest.mark.parametrize("count", [19, 21])
def test_character_with_other_than_twenty_drawings(root, count):
    part = "images_evaluation"
    files = tree(part)
    if count < 20:
        del files[f"{part}/alpha/character01/0002_07.png"]
    else:
        files[f"{part}/alpha/character01/0002_21.png"] = drawing("alpha/character01", 0)
    write_zip(root / f"{part}.zip", files)
    with pytest.raises(ValueError, match=rf"alpha/character01 has {count} drawings.*has 20"):
        omniglot(root)


def test_character_in_both_parts(root):
    part = "images_evaluation"
    doubled = {name.replace("alpha", "Zulu"): content for name, content in tree(part).items()}
    write_zip(root / f"{part}.zip", doubled)
    with pytest.raises(ValueError, match=r"Zulu/character01 has 40 drawings"):
        omniglot(root)


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


@pytest.fixture
def no_decoding(monkeypatch):
    """Make it an error to open an image from here on, once called."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("an image was decoded")

    return lambda: monkeypatch.setattr(Image, "open", refuse)


def cached_file(folder):
    (path,) = folder.iterdir()
    return path


def test_cache_round_trip(root, cache_folder, no_decoding):
    first = omniglot(root)
    assert cached_file(cache_folder).suffix == ".safetensors", "no temporary file should be left"
    no_decoding()
    second = omniglot(root)
    assert second.images.equal(first.images)
    assert second.images.dtype == torch.uint8
    assert (second.names, second.source, second.parts) == (first.names, first.source, first.parts)


def test_no_cache(root, cache_folder):
    omniglot(root, cache=False)
    assert not cache_folder.exists()


def test_cache_is_not_used_for_another_size_or_changed_source(root, cache_folder):
    assert omniglot(root).images.shape[-1] == 28
    assert omniglot(root, size=14).images.shape[-1] == 14
    assert len(list(cache_folder.iterdir())) == 2
    stat = (root / "images_evaluation.zip").stat()
    os.utime(root / "images_evaluation.zip", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    omniglot(root)
    assert len(list(cache_folder.iterdir())) == 3


def test_cache_notices_a_change_in_a_folder(tmp_path):
    for part in CHARACTERS:
        write_folder(tmp_path, tree(part))
    before = omniglot(tmp_path).images
    changed = tmp_path / "images_background" / "Zulu" / "character02" / "0001_01.png"
    changed.write_bytes(drawing("alpha/character01", 19))
    after = omniglot(tmp_path).images
    assert (before != after).flatten(2).any(2).nonzero().tolist() == [[4, 0]]


def test_corrupt_cache_is_replaced(root, cache_folder, no_decoding):
    expected = omniglot(root)
    cached_file(cache_folder).write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert omniglot(root).images.equal(expected.images)
    no_decoding()
    assert omniglot(root).images.equal(expected.images)


def test_unwritable_cache_is_a_warning(root, cache_folder):
    cache_folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be cached"):
        assert omniglot(root).names == ORDER
