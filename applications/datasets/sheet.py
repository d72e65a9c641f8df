"""Contact sheets: many small images on one, for looking at a sample."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

_GAP = 2
_TITLE_HEIGHT = 12
_BACKGROUND = (200, 208, 220)


def contact_sheet(
    images: Tensor, path: str | os.PathLike[str], columns: int, titles: Sequence[str] | None = None
) -> None:
    """Write images side by side, row by row, into one PNG.

    Args:
        images: uint8 tensor ``[count, channels, height, width]`` with one (grey) or three (RGB) channels.
        path: file to write; its folder is made if it isn't there.
        columns: number of images in a row.
        titles: a caption below each image, cut at the image's width; none without.

    Raises:
        ValueError: if the shape, the number of columns or the number of titles doesn't fit.
    """
    if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images has shape {list(images.shape)}, which is not [count, channels, height, width] with 1 or 3 "
            f"channels; flatten the classes first, for instance with images.flatten(0, 1)."
        )
    if columns < 1:
        raise ValueError(f"columns={columns} leaves no place for an image; pass at least 1.")
    if titles is not None and len(titles) != images.shape[0]:
        raise ValueError(
            f"titles has {len(titles)} entries for {images.shape[0]} images, so captions would be on the wrong ones; "
            f"pass one title an image, or none."
        )
    count, _, height, width = images.shape
    pixels = images.cpu().expand(count, 3, height, width).permute(0, 2, 3, 1).numpy()
    pitch_x, pitch_y = width + _GAP, height + _GAP + (_TITLE_HEIGHT if titles else 0)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * pitch_x + _GAP, rows * pitch_y + _GAP), _BACKGROUND)
    for index in range(count):
        row, column = divmod(index, columns)
        corner = (_GAP + column * pitch_x, _GAP + row * pitch_y)
        tile = Image.new("RGB", (width, pitch_y - _GAP), _BACKGROUND)
        tile.paste(Image.fromarray(np.ascontiguousarray(pixels[index])))
        if titles:
            ImageDraw.Draw(tile).text((0, height), titles[index], fill=(0, 0, 0))
        sheet.paste(tile, corner)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
