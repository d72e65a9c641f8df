"""Class folders of one's own: which files are images of which class, and what is wrong with a tree that is refused."""

import pytest

from applications.datasets import folder, partition
from tests.helpers.pictures import picture, write_folder


def images(name, count, start=10):
    kinds = {"PNG": "png", "JPEG": "JPG", "BMP": "bmp", "WEBP": "webp"}
    kind, suffix = list(kinds.items())[len(name) % 4]
    return {f"{name}/{number}.{suffix}": picture(kind, start + 10 * number) for number in range(count)}


@pytest.fixture
def root(tmp_path):
    write_folder(tmp_path / "birds", images("wren", 3) | images("tits/blue", 3, 60) | images("owl", 3, 120))
    return tmp_path / "birds"


def shades(dataset):
    """The shade of each image, to the ten that JPEG keeps."""
    return (dataset.images[:, :, 0, -4, -4].float() / 10).round().mul(10).int().tolist()


def test_each_folder_with_images_is_a_class(root):
    write_folder(root, {"wren/notes.txt": b"", "wren/.hidden.png": b"", ".git/x.png": b"", "owl/Thumbs.db": b""})
    dataset = folder(root, size=32)
    assert dataset.names == ("owl", "tits/blue", "wren")
    assert shades(dataset) == [[120, 130, 140], [60, 70, 80], [10, 20, 30]]
    assert dataset.images.shape == (3, 3, 3, 32, 32)
    assert (dataset.source, dataset.parts, dataset.orientations) == ("birds", (), 1)
    assert folder(root, size=32, channels=1).images.shape == (3, 3, 1, 32, 32)


def test_larger_classes_give_images_spread_over_them_with_a_warning(root):
    write_folder(root, images("owl", 9, 20))
    with pytest.warns(UserWarning, match=r"smallest class of .*birds, tits/blue, has 3 images, .* 6 are left out"):
        dataset = folder(root)
    assert shades(dataset)[0] == [20, 50, 80]
    assert shades(folder(root, per_class=2)) == [[20, 60], [60, 70], [10, 20]]


def test_it_is_read_once_and_again_when_it_changes(root, monkeypatch):
    before = folder(root, size=8)
    monkeypatch.setattr("applications.datasets.trees.decode", lambda *_: pytest.fail("an image was decoded"))
    assert folder(root, size=8).images.equal(before.images)
    monkeypatch.undo()
    (root / "wren" / "0.png").write_bytes(picture("PNG", 200))
    assert shades(folder(root, size=8, cache=False))[2] == [200, 20, 30]


def test_parts_of_the_tree_are_the_split(tmp_path):
    tree = {}
    for part, names in {"train": ["a", "b"], "val": ["c"], "test": ["d"]}.items():
        for name in names:
            tree |= images(f"{part}/{name}", 2)
    write_folder(tmp_path, tree)
    dataset = folder(tmp_path)
    assert dataset.parts == ("test", "train", "train", "validation")
    expected = {"train": [1, 2], "validation": [3], "test": [0]}
    assert {part: chosen.tolist() for part, chosen in partition(dataset, "folder").items()} == expected
    by_seed = partition(dataset, "folder", "seed", seed=1)
    assert {part: len(chosen) for part, chosen in by_seed.items()} == {"train": 2, "validation": 1, "test": 1}
    write_folder(tmp_path, images("test/a", 2))
    with pytest.raises(ValueError, match=r"class a is in part '(train|test)' and again in part '(train|test)'"):
        folder(tmp_path)


def test_a_tree_without_parts_is_split_by_seed(root):
    dataset = folder(root)
    assert {part: len(chosen) for part, chosen in partition(dataset, "folder").items()} == {
        **{"train": 1, "validation": 1, "test": 1},
    }
    with pytest.raises(ValueError, match=r"birds has no classes for train in its files.*or pass split='seed'"):
        partition(dataset, "folder", "files")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "holds no images"),
        ({"a/notes.txt": b""}, {}, "holds no images"),
        ({"stray.png": picture("PNG", 9)}, {}, r"holds 1 images that are in no class folder, the first stray\.png"),
        ({"a/x.png": picture("PNG", 9), "b.png": b""}, {}, r"holds 1 images .* the first b\.png"),
        ({"a/x.png": b"<html>"}, {}, r"a/x\.png is no image that can be read, .*: it is an HTML page"),
        ({"a/x.png": picture("PNG", 9)}, {"per_class": 2}, "per_class=2 asks for more images than the 1 that class a"),
        ({"a/x.png": picture("PNG", 9)}, {"per_class": 0}, "per_class=0 leaves no image"),
        ({"a/x.png": picture("PNG", 9)}, {"size": 0}, "size=0"),
        ({"a/x.png": picture("PNG", 9)}, {"channels": 4}, "channels=4"),
    ],
)
def test_refused_trees(tmp_path, files, options, message, cache_folder):
    (tmp_path / "tree").mkdir()
    write_folder(tmp_path / "tree", files)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path / "tree", **options)
    assert not cache_folder.exists()


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist; pass a folder with one folder of images"):
        folder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file' is a file"):
        folder(tmp_path / "file")
