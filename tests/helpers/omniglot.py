"""A few characters in the layouts of Omniglot."""

import random
import zipfile
from io import BytesIO

import numpy as np
from PIL import Image

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
