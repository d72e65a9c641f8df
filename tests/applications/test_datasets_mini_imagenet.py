"""The layouts of Mini-ImageNet give the same images; damaged ones are told; what is not Mini-ImageNet is called so."""

import pickle
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from applications.datasets import mini_imagenet, partition
from tests.helpers.pictures import picture, write_folder, write_zip

# Listed neither in the order of the parts nor of the names.
CLASSES = {"train": ["n30", "n05", "n20"], "val": ["n40", "n10"], "test": ["n35"]}
PART = {"n05": "train", "n10": "validation", "n20": "train", "n30": "train", "n35": "test", "n40": "validation"}
EACH = 4


def shade(name, number):
    return 4 * int(name[1:]) + 10 * number


def files(side, kind="PNG"):
    """Image files by part and class, lossless so that layouts can be compared."""
    return {
        part: {
            name: {f"{name}{number:08d}.jpg": picture(kind, shade(name, number), side) for number in range(EACH)}
            for name in names
        }
        for part, names in CLASSES.items()
    }


def write_tables(root, side=84, form="zip", change=None):
    images = {}
    for part, classes in files(side).items():
        rows = [f"{file},{name}" for name, pictures in classes.items() for file in pictures]
        write_folder(root, {f"{part}.csv": "\n".join(["\ufefffilename,label", *rows, "", ""]).encode()})
        images |= {f"images/{file}": content for pictures in classes.values() for file, content in pictures.items()}
    images = change(images) if change else images
    if form == "zip":
        write_zip(root / "images.zip", images)
    else:
        write_folder(root, images)


def write_folders(root, side=84, validation="val"):
    for part, classes in files(side).items():
        top = root / (validation if part == "val" else part)
        write_folder(
            top, {f"{name}/{file}": png for name, pictures in classes.items() for file, png in pictures.items()}
        )


def cache_of(part):
    images, places = [], {}
    for name, pictures in files(84)[part].items():
        places[name] = list(range(len(images), len(images) + EACH))
        for content in pictures.values():
            with Image.open(BytesIO(content)) as image:
                images.append(np.asarray(image.convert("RGB")))
    return {"image_data": np.stack(images), "class_dict": places}


def write_pickles(root, validation="val"):
    root.mkdir(parents=True, exist_ok=True)
    for part in CLASSES:
        name = f"mini-imagenet-cache-{validation if part == 'val' else part}.pkl"
        (root / name).write_bytes(pickle.dumps(cache_of(part)))


LAYOUTS = {
    "tables and zip": write_tables,
    "tables and folder": lambda root: write_tables(root, form="folder"),
    "folders": write_folders,
    "folders, validation": lambda root: write_folders(root, validation="validation"),
    "pickles": write_pickles,
    "pickles, validation": lambda root: write_pickles(root, validation="validation"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [".", "mini-imagenet", "mini-imagenet-layout"])
def test_every_layout_gives_the_same(tmp_path, layout, place):
    LAYOUTS[layout](tmp_path / place)
    dataset = mini_imagenet(tmp_path)
    assert dataset.names == tuple(sorted(PART))
    assert dataset.parts == tuple(PART[name] for name in dataset.names)
    assert dataset.images.shape == (6, EACH, 3, 84, 84)
    assert dataset.orientations == 1
    for index, name in enumerate(dataset.names):
        for number in range(EACH):
            assert (dataset.images[index, number, :, :42, :42] == shade(name, number) // 2).all()
            assert (dataset.images[index, number, :, 42:, :] == shade(name, number)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_size_and_greyscale(tmp_path, layout, cache_folder):
    LAYOUTS[layout](tmp_path)
    small = mini_imagenet(tmp_path, size=32, channels=1)
    assert small.images.shape == (6, EACH, 1, 32, 32)
    assert (small.images[2, 1, 0, 20:, 20:] == shade("n20", 1)).all()
    assert mini_imagenet(tmp_path, size=32).images.shape == (6, EACH, 3, 32, 32)
    assert len(list(cache_folder.iterdir())) == 2


def test_it_is_read_once(tmp_path, monkeypatch):
    write_tables(tmp_path)
    first = mini_imagenet(tmp_path)
    monkeypatch.setattr("applications.datasets.layouts.decode", lambda *_: pytest.fail("an image was decoded"))
    again = mini_imagenet(tmp_path)
    assert again.images.equal(first.images)
    assert (again.names, again.parts, again.source, again.orientations) == (
        *(first.names, first.parts, first.source, first.orientations),
    )


def test_smaller_images_keep_their_size_and_say_so(tmp_path):
    write_tables(tmp_path, side=64)
    dataset = mini_imagenet(tmp_path)
    assert dataset.images.shape[-2:] == (64, 64)
    assert dataset.source == "mini-imagenet layout, not Mini-ImageNet (3/2/1 classes of 4 images of 64 pixels)"


@pytest.mark.parametrize(
    ("classes", "per_class", "side", "genuine"),
    [
        ({"train": 64, "validation": 16, "test": 20}, 600, 84, True),
        ({"train": 64, "validation": 16, "test": 20}, 600, 375, True),
        ({"train": 64, "validation": 16, "test": 20}, 600, 64, False),
        ({"train": 64, "validation": 16, "test": 20}, 599, 84, False),
        ({"train": 63, "validation": 17, "test": 20}, 600, 84, False),
    ],
)
def test_only_mini_imagenet_is_called_so(classes, per_class, side, genuine):
    name = sys.modules["applications.datasets.mini_imagenet"].source_name(classes, per_class, side)
    assert (name == "mini-imagenet") == genuine
    assert genuine or "not Mini-ImageNet" in name


def test_its_own_split(tmp_path):
    write_tables(tmp_path)
    dataset = mini_imagenet(tmp_path)
    chosen = partition(dataset, "mini-imagenet")
    names = {part: [dataset.names[index] for index in indices.tolist()] for part, indices in chosen.items()}
    assert names == {"train": ["n05", "n20", "n30"], "validation": ["n10", "n40"], "test": ["n35"]}


def without(name):
    return lambda images: {path: content for path, content in images.items() if name not in path}


def replaced(name, content):
    return lambda images: images | {f"images/{name}": content}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("n1000000002"),
            r"images\.zip lacks 1 of the 24 images that the tables name, the first n1000000002\.jpg",
        ),
        (without("n30"), r"images\.zip lacks n3000000000\.jpg, which a table names"),
        (replaced("n1000000002.jpg", b"<html>"), r"n1000000002\.jpg in .*images\.zip is no image .*: it is an HTML"),
        (replaced("n1000000002.jpg", picture("JPEG", 9)[:400]), r"n1000000002\.jpg in .*truncated or corrupt image"),
        (
            *(lambda images: images | {"old/n1000000002.jpg": picture("JPEG", 9)},),
            r"old/n1000000002\.jpg in .*images\.zip is the second file named n1000000002\.jpg",
        ),
        (replaced("../n1.jpg", b""), "points outside of the archive"),
    ],
)
def test_damaged_images(tmp_path, change, message, cache_folder):
    write_tables(tmp_path, change=change)
    with pytest.raises(ValueError, match=message):
        mini_imagenet(tmp_path)
    assert not cache_folder.exists()


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("train", "label,filename\na.jpg,n05\n", r"train\.csv starts with 'label,filename' where .* filename,label"),
        ("train", "<!DOCTYPE html>", r"train\.csv starts with '<!DOCTYPE html>'"),
        ("train", "", r"train\.csv starts with '' where"),
        ("train", "filename,label\n", r"train\.csv names no image"),
        ("train", "filename,label\na.jpg\n", r"train\.csv, line 2, is 'a\.jpg', not filename,label"),
        ("train", b"filename,label\n\xff,a\n", r"train\.csv is no table"),
        ("val", "filename,label\nx.jpg,n05\n", "class n05 is in part 'train' and again in part 'validation'"),
        ("val", "filename,label\nn0500000001.jpg,n10\n", r"val\.csv names n0500000001\.jpg again"),
        (
            *("test", "filename,label\n" + "".join(f"n35{k:08d}.jpg,n35\n" for k in range(3))),
            "n35 of mini-imagenet layout has 3 images where other classes have 4",
        ),
    ],
)
def test_damaged_tables(tmp_path, table, content, message):
    write_tables(tmp_path)
    (tmp_path / f"{table}.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        mini_imagenet(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Quota exceeded</html>", r"cache-val\.pkl is a truncated .*HTML page"),
        (pickle.dumps(cache_of("val"))[:-500], r"cache-val\.pkl is a truncated or corrupt pickle"),
        (pickle.dumps([1]), "has int for image_data"),
        (
            pickle.dumps({"image_data": np.zeros((8, 32, 32, 3), np.uint8)}),
            r"has uint8 \[8, 32, 32, 3\] for image_data",
        ),
        (pickle.dumps(cache_of("val") | {"image_data": np.zeros((8, 84, 84, 3))}), r"has float64 \[8, 84, 84, 3\]"),
        (pickle.dumps(cache_of("val") | {"class_dict": [1]}), "no class_dict that names the places"),
        (pickle.dumps(cache_of("val") | {"class_dict": {"n10": [0, 8]}}), "no class_dict that names the places"),
        (pickle.dumps(cache_of("val") | {"class_dict": {"n10": [-1]}}), "no class_dict that names the places"),
        (pickle.dumps(cache_of("train")), "class n30 is in part 'train' and again in part 'validation'"),
        (
            pickle.dumps(cache_of("val") | {"class_dict": {"n10": [0]}}),
            "n10 of mini-imagenet layout has 1 images where",
        ),
        (pickle.dumps(cache_of("val") | {"x": print}), r"asks for (__builtin__|builtins)\.print"),
    ],
)
def test_damaged_pickles(tmp_path, content, message):
    write_pickles(tmp_path)
    (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        mini_imagenet(tmp_path)


def test_class_in_two_folders(tmp_path):
    write_folders(tmp_path)
    write_folder(tmp_path, {f"test/n05/{number}.png": picture("PNG", 9) for number in range(EACH)})
    with pytest.raises(ValueError, match="class n05 is in part 'train' and again in part 'test'"):
        mini_imagenet(tmp_path)


@pytest.mark.parametrize(
    ("write", "missing", "message"),
    [
        (write_tables, "val.csv", r"holds train\.csv but no validation\.csv"),
        (write_tables, "images.zip", r"holds train\.csv but neither images\.zip nor images/"),
        (write_pickles, "mini-imagenet-cache-test.pkl", r"holds mini-imagenet-cache-train\.pkl but no .*-test\.pkl"),
    ],
)
def test_incomplete_layout(tmp_path, write, missing, message):
    write(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        mini_imagenet(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no Mini-ImageNet .*train\.csv.*cache-train\.pkl.*may not"):
        mini_imagenet(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        mini_imagenet(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file' is a file"):
        mini_imagenet(tmp_path / "file")
