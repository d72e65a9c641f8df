"""Images of every kind come out upright, of one size, and in the colours asked for; others are refused by name."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from applications.datasets.decoding import Form, decode, extent
from tests.helpers.pictures import picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_gives_the_same_pixels(kind, channels):
    pixels = decode(picture(kind, 200), "it", Form(16, channels))
    assert pixels.shape == (channels, 16, 16)
    assert pixels.dtype == np.uint8
    # A lossy file is off by a few shades in places.
    assert abs(int(pixels[0, 2, 2]) - 100) <= 3
    assert abs(int(pixels[-1, 12, 12]) - 200) <= 3
    assert extent(picture(kind, 200, side=20), "it") == (20, 20)


def test_colours_are_channels_in_their_order():
    file = BytesIO()
    Image.new("RGB", (4, 4), (10, 20, 30)).save(file, "PNG")
    assert decode(file.getvalue(), "it", Form(4, 3))[:, 1, 1].tolist() == [10, 20, 30]
    assert decode(file.getvalue(), "it", Form(4, 1))[:, 1, 1].tolist() == [18], "the weights of the eye, not a mean"


def test_resizing_is_lanczos_and_squeezes():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    expected = np.asarray(Image.fromarray(pixels).resize((12, 12), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(decode(file.getvalue(), "it", Form(12))[0], expected)


def test_a_camera_that_was_turned_is_turned_back():
    upright = np.zeros((8, 8), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera's top is on the right: turn by a quarter, clockwise.
    file = BytesIO()
    Image.fromarray(np.rot90(upright)).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(file.getvalue(), "it", Form(8))[0], upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    picture = Image.new("RGBA", (6, 6), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 3, 6))
    file = BytesIO()
    picture.convert(mode).save(file, "PNG")
    pixels = decode(file.getvalue(), "it", Form(6))
    assert (pixels[0, :, :3] == 0).all()
    assert (pixels[0, :, 3:] == 255).all()


@pytest.mark.parametrize("pixels", [np.full((4, 4), 40000, np.uint16)])
def test_more_than_eight_bits_are_not_cut(pixels):
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    with pytest.raises(ValueError, match=r"scan\.png has more than 8 bits a channel.*convert it to 8 bits"):
        decode(file.getvalue(), "scan.png", Form(4))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
@pytest.mark.parametrize("damage", ["short", "empty", "a page"])
def test_damaged_file_is_named(kind, damage):
    content = picture(kind, 90)
    content, found = {
        "short": (content[: len(content) * 2 // 3], r"a truncated or corrupt image \(.*\);"),
        "empty": (b"", "no image that can be read, .*: it is empty"),
        "a page": (b"<html>no</html>", "no image .*: it is an HTML page, such as a server sends"),
    }[damage]
    with pytest.raises(ValueError, match=rf"cat\.img is {found}.*fetch it again") as raised:
        decode(content, "cat.img", Form(8, 3))
    assert "BytesIO" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (picture("PNG", 90)[:12], "begins as a PNG, but its header is cut off or damaged"),
        (picture("WEBP", 90)[:12], "begins as a WebP, but its header is cut off or damaged"),
        (picture("JPEG", 90)[:3] + bytes(9), "begins as a JPEG, but its header is cut off or damaged"),
        (picture("BMP", 90)[:12], "starts with b'BM"),
        (picture("GIF", 90), "is a GIF"),
        (picture("TIFF", 90), "is a TIFF"),
        (b"\0\0\0\x18ftypheic", "is a HEIF or AVIF image"),
        (b"%PDF-1.7", "is a PDF"),
        (b"PK\x03\x04", "is a zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="9"/>', "is an SVG drawing"),
        (b"<svg/>", "is an SVG drawing"),
        (b"\n<!DOCTYPE html><svg/>", "is an HTML page"),
        (b"ink", "starts with b'ink'"),
    ],
)
@pytest.mark.parametrize(
    "read", [extent, lambda content, name: decode(content, name, Form(8))], ids=["extent", "decode"]
)
def test_other_formats_are_not_opened(read, content, found):
    with pytest.raises(ValueError, match=f"^it is no image that can be read, .* WebP: it {found}"):
        read(content, "it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "size=0 leaves no pixel"),
        ((2.0,), r"size=2\.0"),
        ((True,), "size=True"),
        ((8, 2), "channels=2 is neither"),
    ],
)
def test_impossible_forms_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Form(*arguments)
