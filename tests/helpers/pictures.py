"""Small picture files for tests of what reads them."""

import zipfile
from io import BytesIO

import numpy as np
from PIL import Image


def picture(kind, shade, side=64, mode="RGB", **options):
    """A file of one colour, but for a darker upper left quarter."""
    pixels = np.full((side, side, 3), shade, np.uint8)
    pixels[: side // 2, : side // 2] = shade // 2
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
