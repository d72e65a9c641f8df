"""The cache gives back what it was given, or warns and gives nothing."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from applications.datasets import ClassImages
from applications.datasets.cache import cache_folder, cached, read_cache, write_cache

DATASET = ClassImages(
    images=torch.arange(240, dtype=torch.uint8).reshape(2, 5, 1, 4, 6), names=("Ä/1", "b"), source="made up",
    parts=("train", "test"), orientations=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """No test may touch the user's own cache."""
    monkeypatch.setenv("IMPLICITLAYERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_found(file_name="file"):
    found = read_cache(file_name)
    assert found.images.equal(DATASET.images)
    assert found.images.dtype == torch.uint8
    facts = ("names", "source", "parts", "orientations")
    assert [getattr(found, fact) for fact in facts] == [getattr(DATASET, fact) for fact in facts]


def test_round_trip(folder):
    write_cache("file", DATASET)
    assert_found()
    assert [path.name for path in folder.iterdir()] == ["file"], "no temporary file should be left"
    assert read_cache("another") is None


def test_strided_images_are_kept():
    strided = DATASET.images.transpose(3, 4).contiguous().transpose(3, 4)
    write_cache("file", replace(DATASET, images=strided))
    assert_found()


def test_what_was_read_does_not_hang_on_the_file(folder):
    write_cache("file", DATASET)
    found = read_cache("file")
    size = (folder / "file").stat().st_size
    with (folder / "file").open("r+b") as file:
        file.write(bytes(size))
    assert found.images.equal(DATASET.images)


def rewrite(path, change=lambda images: images, **metadata):
    with safe_open(path, framework="pt") as stored:
        kept = stored.metadata()
    written = {name: value for name, value in (kept | metadata).items() if value is not None}
    save_file({"images": change(load_file(path)["images"])}, path, written)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "a page": lambda path: path.write_bytes(b"<html>not here</html>"),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "wrong pixels": lambda path: path.write_bytes(path.read_bytes()[:-10] + bytes(10)),
    "no entry for names": lambda path: rewrite(path, names=None),
    "no parts": lambda path: rewrite(path, parts='["train"]'),
    "a third of a turn": lambda path: rewrite(path, orientations="3"),
    "no names": lambda path: rewrite(path, names="[]"),
    "a number for names": lambda path: rewrite(path, names="5"),
    "names not JSON": lambda path: rewrite(path, names="["),
    "fewer classes": lambda path: rewrite(path, lambda images: images[:1]),
    "another dtype": lambda path: rewrite(path, lambda images: images.float()),
    "no metadata": lambda path: save_file({"images": load_file(path)["images"]}, path),
    "no images": lambda path: save_file({"other": torch.zeros(1)}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_file_is_ignored_with_a_warning(folder, damage):
    write_cache("file", DATASET)
    DAMAGE[damage](folder / "file")
    with pytest.warns(UserWarning, match=r"cache file file .*cannot be used.*reading the dataset from its source"):
        assert read_cache("file") is None


def test_corrupt_file_is_replaced(folder):
    folder.mkdir()
    (folder / "file").write_bytes(b"rubbish")
    write_cache("file", DATASET)
    assert_found()


def test_unwritable_folder_is_a_warning(folder):
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"could not be cached.*set \$IMPLICITLAYERS_CACHE"):
        write_cache("file", DATASET)


def test_failed_write_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    write_cache("file", DATASET)

    def fail(_source, _target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match=r"could not be cached.*disk full"):
        write_cache("file", ClassImages(DATASET.images + 1, DATASET.names, DATASET.source))
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert_found()


def test_full_disk_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    write_cache("file", DATASET)

    def fill(_tensors, path, _metadata):
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("applications.datasets.cache.save_file", fill)
    with pytest.warns(UserWarning, match=r"could not be cached.*No space left on device"):
        write_cache("file", ClassImages(DATASET.images + 1, DATASET.names, DATASET.source))
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert_found()


def test_key_is_made_of_kind_and_facts(folder):
    reads = []

    def read():
        reads.append(1)
        return DATASET

    for kind, facts in (("a", [1]), ("a", [1]), ("a", [2]), ("b", [1]), ("a", [1])):
        assert cached(kind, facts, read, use=True).images.equal(DATASET.images)
    assert len(reads) == len(list(folder.iterdir())) == 3
    cached("a", [1], read, use=False)
    assert len(reads) == 4


def test_no_home_folder_is_a_warning(monkeypatch):
    def homeless():
        raise RuntimeError("no home")

    monkeypatch.delenv("IMPLICITLAYERS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match=r"cannot be used.*no home"):
        assert read_cache("file") is None
    with pytest.warns(UserWarning, match=r"could not be cached.*no home"):
        write_cache("file", DATASET)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "/home/me/.cache/implicitlayers"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/implicitlayers"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/implicitlayers"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/implicitlayers/cache"),
        ("win32", {"LOCALAPPDATA": "/local", "IMPLICITLAYERS_CACHE": "/chosen"}, "/chosen"),
    ],
)
def test_platform_folder(monkeypatch, platform, variables, expected):
    for name in ("IMPLICITLAYERS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert cache_folder() == Path(expected)
