"""From the bytes of an image file to pixels of one size and colour depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from applications.datasets.recognition import START, recognised

SUFFIXES = r"\.(?i:png|jpe?g|bmp|webp)"

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)
_MODES = {1: "L", 3: "RGB"}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Form:
    """What images are decoded to.

    Args:
        size: height and width, in pixels. Oblong images are squeezed, as in the preparation of Mini-ImageNet.
        channels: 1 for grey, 3 for red, green and blue.

    Raises:
        ValueError: if the size is below 1 or the channels are neither 1 nor 3.
    """

    size: int
    channels: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size={self.size!r} leaves no pixel; pass the height of the images, such as 28.")
        if self.channels not in _MODES:
            raise ValueError(
                f"channels={self.channels!r} is neither grey nor red, green and blue; pass 1 for grey or 3 for colour."
            )


def decode(content: bytes, name: str, form: Form) -> Pixels:
    """Decode an image, upright as its camera says, resized with a Lanczos filter, transparent parts white.

    Args:
        content: PNG, JPEG, BMP or WebP file.
        name: what to call it in an error.
        form: size and colour depth wanted.

    Returns:
        uint8 ``[channels, size, size]``, 0 black to 255 white.

    Raises:
        ValueError: if it is no such file, which tells what it is instead, is truncated or corrupt, or has more than 8
            bits a channel.
    """
    with _explained(content, name):
        # Loading alone overlooks checksums, and a flipped bit can pass as another drawing; verifying uses an image up.
        with _open(content) as image:
            image.verify()
        with _open(content) as image:
            mode = image.mode
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            # One-bit images must become grey first: Pillow resizes palettes and bits by nearest neighbour only.
            picture = upright.convert(_MODES[form.channels])
    if mode.startswith(("I", "F")):
        raise ValueError(
            f"{name} has more than 8 bits a channel (mode {mode}), and which of them to keep is not for a loader to "
            f"guess; convert it to 8 bits."
        )
    if picture.size != (form.size, form.size):
        picture = picture.resize((form.size, form.size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def extent(content: bytes, name: str) -> tuple[int, int]:
    """Width and height of an image as it is stored, found without decoding it.

    Args:
        content: PNG, JPEG, BMP or WebP file.
        name: what to call it in an error.

    Returns:
        Both in pixels.

    Raises:
        ValueError: if it is no such file.
    """
    with _explained(content, name), _open(content) as image:
        return image.size


def _open(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content), formats=_FORMATS)


@contextmanager
def _explained(content: bytes, name: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        found = recognised(content[:START]) or f"starts with {content[:4]!r}"
        raise ValueError(
            f"{name} is no image that can be read, which are PNG, JPEG, BMP and WebP: it {found}; fetch it again, "
            f"convert it, or take it away."
        ) from error
    except _UNREADABLE as error:
        raise ValueError(
            f"{name} is a truncated or corrupt image ({error}); its pixels cannot be restored, so fetch it again."
        ) from error
