"""Omniglot that is missing, damaged or something else says so."""

import zipfile

import pytest

from applications.datasets import omniglot
from tests.helpers.omniglot import CHARACTERS, drawing, tree, write_folder, write_zip, write_zips


@pytest.fixture
def root(tmp_path):
    write_zips(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("way", ["../", "/", "images_background/../../", "C:/", "..\\"])
def test_archive_with_a_way_out_is_refused(root, tmp_path, way):
    part = "images_background"
    name = f"{way}{part}/Zulu/character01/0001_21.png"
    write_zip(root / f"{part}.zip", tree(part) | {name: drawing("Zulu/character01", 0)})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"images_background\.zip has a member .*points outside of the archive"):
        omniglot(root)
    assert sorted(tmp_path.rglob("*")) == before


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
    told = "no image that can be read, .*: it is an HTML page" if damage == "text" else "a truncated or corrupt image"
    with pytest.raises(ValueError, match=rf"{name.rpartition('/')[2]} in .*{part}.* is {told}"):
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
