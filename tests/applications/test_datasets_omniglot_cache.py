"""Omniglot is decoded once, and again when its files have changed."""

import os

import pytest
import torch

from applications.datasets import omniglot
from tests.helpers.omniglot import CHARACTERS, ORDER, drawing, tree, write_folder, write_zips


@pytest.fixture
def root(tmp_path):
    write_zips(tmp_path / "data")
    return tmp_path / "data"


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
