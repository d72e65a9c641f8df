"""What a file is that is not what it was taken for, judged by its first bytes."""

from __future__ import annotations

import re

START = 512
"""So many bytes are enough."""

# What people have in the place of an image or an archive.
_KINDS = (
    (rb"\x89PNG", "begins as a PNG, but its header is cut off or damaged"),
    (rb"\xff\xd8\xff", "begins as a JPEG, but its header is cut off or damaged"),
    (rb"RIFF....WEBP", "begins as a WebP, but its header is cut off or damaged"),
    (rb"GIF8", "is a GIF"),
    (rb"II\*\0|MM\0\*", "is a TIFF"),
    (rb"....ftyp", "is a HEIF or AVIF image, or a film"),
    (rb"%PDF", "is a PDF"),
    (rb"PK\x03\x04", "is a zip"),
    (rb"version https://git-lfs", "is a pointer of Git LFS, without the content; `git lfs pull` fetches that"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!(doctype svg|--).*?>\s*)*<svg", "is an SVG drawing"),
    (
        rb"\s*<(!doctype|html|head|\?xml|!--)",
        "is an HTML page, such as a server sends in place of a file it refuses",
    ),
)


def recognised(start: bytes) -> str | None:
    """What a file is.

    Args:
        start: its first ``START`` bytes, or all of them.

    Returns:
        A sentence's end, such as "is a GIF"; None if that isn't known.
    """
    if not start:
        return "is empty, as after an interrupted download"
    return next((told for begin, told in _KINDS if re.match(begin, start, re.IGNORECASE | re.DOTALL)), None)
