"""Handwritten characters of invented scripts, drawn on the spot.

A stand-in for Omniglot that needs no download: each class is a character made of pen strokes that touch as those
of letters do, each image is one drawer's rendition of it, dark ink (0) on white paper (255).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from applications.datasets.images import ClassImages
from applications.datasets.strokes import CONTROLS, SCRIPT_LENGTH, Script, character

# Distance between samples of a pen's path, for a character 1 long: below the width of the finest pen, or its line
# would come out dotted.
SPACING = 0.015
Floats = NDArray[np.float64]

_SCRIPT_STREAM, _CHARACTER_STREAM, _DRAWING_STREAM, _DRAWER_STREAM = range(4)


def glyphs(classes: int = 1200, drawers: int = 20, size: int = 28, seed: int = 0) -> ClassImages:
    """Draw a set of handwritten characters.

    Class ``k`` and drawer ``j`` each have their own random stream, so an image is the same however many classes
    and drawers are asked for. Drawer ``j`` writes all characters in one style (slant, size, pen, neatness).

    Args:
        classes: number of characters, 24 to a script.
        drawers: number of drawings of each character.
        size: height and width of an image, in pixels.
        seed: chooses scripts, characters and drawers; not negative.

    Returns:
        Images ``[classes, drawers, 1, size, size]``, named ``scriptSSSS/characterCC``.

    Raises:
        ValueError: if a count is below 1, the size below 8 or the seed negative.
    """
    _check_arguments(classes, drawers, size, seed)
    styles = _styles(drawers, seed)
    images = np.empty((classes, drawers, 1, size, size), dtype=np.uint8)
    names = []
    for index in range(classes):
        number, position = divmod(index, SCRIPT_LENGTH)
        script = Script.invent(np.random.default_rng([seed, _SCRIPT_STREAM, number]))
        strokes = character(np.random.default_rng([seed, _CHARACTER_STREAM, index]), script)
        noise = np.random.default_rng([seed, _DRAWING_STREAM, index])
        path, ends = _draw(strokes, styles, noise)
        images[index, :, 0] = _render(path, ends, styles.pen, size)
        names.append(f"script{number:04d}/character{position + 1:02d}")
    return ClassImages(images=torch.from_numpy(images), names=tuple(names), source="glyphs")


def _check_arguments(classes: int, drawers: int, size: int, seed: int) -> None:
    for name, value, least in (("classes", classes, 1), ("drawers", drawers, 1), ("size", size, 8), ("seed", seed, 0)):
        if value < least:
            why = {
                "size": "leaves no room for a stroke a pixel wide",
                "seed": "cannot start a random stream",
            }.get(name, "leaves nothing to draw")
            raise ValueError(f"{name}={value} {why}; pass an integer of at least {least}.")


@dataclass(frozen=True)
class _Styles:
    """One entry for each drawer; lengths are fractions of the frame."""

    slant: Floats
    stretch: Floats
    extent: Floats
    pen: Floats
    mess: Floats
    tremor: Floats
    tilt: Floats


def _styles(drawers: int, seed: int) -> _Styles:
    draws = np.stack([np.random.default_rng([seed, _DRAWER_STREAM, j]).random(7) for j in range(drawers)])
    slant, stretch, extent, pen, mess, tremor, tilt = draws.T
    return _Styles(
        slant=-0.15 + 0.4 * slant,
        stretch=np.exp(-0.2 + 0.4 * stretch),
        extent=0.66 + 0.22 * extent,
        pen=0.017 + 0.008 * pen,
        mess=0.02 + 0.03 * mess,
        tremor=0.003 + 0.007 * tremor,
        tilt=np.radians(-6 + 12 * tilt),
    )


def _draw(strokes: Floats, styles: _Styles, rng: np.random.Generator) -> tuple[Floats, NDArray[np.intp]]:
    """One drawing by each drawer.

    Returns the pen's path ``[drawers, samples, 2]`` in the unit frame, all strokes one after the other, and the
    last sample of each stroke.
    """
    count = strokes.shape[0]
    # One row of numbers a drawer, so that the first drawers' drawings don't depend on how many follow.
    noise = rng.standard_normal((styles.pen.shape[0], count * (2 * CONTROLS + 3) * 2 + 6))
    whole, noise = noise[:, :6], noise[:, 6:].reshape(-1, count, 2 * CONTROLS + 3, 2)
    mess, tremor = styles.mess[:, None, None, None], styles.tremor[:, None, None, None]

    offset, growth, turn = noise[:, :, 0:1], noise[:, :, 1:2], noise[:, :, 2:3, :1]
    arm = strokes - strokes.mean(axis=1, keepdims=True)
    points = strokes + mess * (0.7 * offset + 1.8 * growth * arm + 1.4 * turn * arm[..., ::-1] * (1, -1))
    points = points + mess * (_BEND @ noise[:, :, 3 : 3 + CONTROLS]) + tremor * noise[:, :, 3 + CONTROLS :]

    bases = [_even_spline(stroke) for stroke in strokes]
    path = np.concatenate([basis @ points[:, index] for index, basis in enumerate(bases)], axis=1)
    return _place(path, styles, whole), np.cumsum([len(basis) for basis in bases]) - 1


def _place(path: Floats, styles: _Styles, whole: Floats) -> Floats:
    """Fit a character into the frame as its drawer does: slanted, stretched, tilted, near the middle."""
    angle = styles.tilt + np.radians(5.0) * whole[:, 0]
    shear = styles.slant + 0.07 * whole[:, 1]
    stretch = np.sqrt(styles.stretch * np.exp(0.08 * whole[:, 2]))
    cos, sin = np.cos(angle), np.sin(angle)
    slanted = np.stack([np.stack([stretch, -shear / stretch], -1), np.stack([0 * shear, 1 / stretch], -1)], -2)
    turned = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2) @ slanted
    path = np.einsum("dij,dpj->dpi", turned, path)

    low, high = path.min(axis=1, keepdims=True), path.max(axis=1, keepdims=True)
    extent = np.minimum(styles.extent * np.exp(0.06 * whole[:, 3]), 0.90)[:, None, None]
    path = (path - (low + high) / 2) * (extent / (high - low).max(axis=-1, keepdims=True))
    room = (0.94 - extent) / 2
    shift = np.clip(0.03 * whole[:, None, 4:6], -room, room)
    return 0.5 + path + shift


def _render(path: Floats, ends: NDArray[np.intp], pen: Floats, size: int) -> NDArray[np.uint8]:
    """Ink ``[drawers, size, size]`` left by a round, soft pen.

    A Gaussian of width sigma dragged along a line with weight ds/(sqrt(2 pi) sigma) leaves the profile
    exp(-d^2 / 2 sigma^2) across it. The Gaussian is a product of one in x and one in y, so the sum over the
    samples of a path is a matrix product rather than a distance for each pixel and sample.
    """
    path, sigma = path * size, pen * size
    steps = np.linalg.norm(np.diff(path, axis=1), axis=-1)
    steps[:, ends[:-1]] = 0.0
    length = (np.pad(steps, ((0, 0), (0, 1))) + np.pad(steps, ((0, 0), (1, 0)))) / 2
    weight = (length / (math.sqrt(2 * math.pi) * sigma[:, None])).astype(np.float32)
    scaled = (path / (math.sqrt(2) * sigma)[:, None, None]).astype(np.float32)
    grid = ((np.arange(size) + 0.5) / (math.sqrt(2) * sigma)[:, None]).astype(np.float32)
    across = np.exp(-((scaled[:, :, 0, None] - grid[:, None, :]) ** 2))
    down = np.exp(-((scaled[:, :, 1, None] - grid[:, None, :]) ** 2)) * weight[:, :, None]
    profile = down.transpose(0, 2, 1) @ across
    # At half height the profile falls by 0.59/sigma a pixel; an edge one pixel wide needs a fall of 1.
    gain = np.maximum(1.2, sigma / 0.59)[:, None, None]
    ink = np.clip(0.5 + gain * (profile - 0.5), 0.0, 1.0)
    ink[profile < 0.02] = 0.0
    return np.rint(255 * (1 - ink)).astype(np.uint8)


def _even_spline(stroke: Floats) -> Floats:
    """Matrix ``[samples, CONTROLS]`` that runs through the controls of a stroke at an even pace."""
    times = np.linspace(0, CONTROLS - 1, len(_DENSE))
    steps = np.linalg.norm(np.diff(_DENSE @ stroke, axis=0), axis=-1)
    travelled = np.concatenate([[0.0], np.cumsum(steps)])
    samples = 2 + math.ceil(travelled[-1] / SPACING)
    return _spline(np.interp(np.linspace(0, travelled[-1], samples), travelled, times))


def _spline(times: Floats) -> Floats:
    """Catmull-Rom spline with mirrored ends: ``[times, CONTROLS]``, control ``i`` being passed at time ``i``."""
    left = np.minimum(times.astype(int), CONTROLS - 2)
    u = times - left
    blends = (
        (-u + 2 * u**2 - u**3) / 2,
        (2 - 5 * u**2 + 3 * u**3) / 2,
        (u + 4 * u**2 - 3 * u**3) / 2,
        (-(u**2) + u**3) / 2,
    )
    padded = np.zeros((len(times), CONTROLS + 2))
    for step, blend in enumerate(blends):
        padded[np.arange(len(times)), left + step] = blend
    matrix = padded[:, 1:-1]
    matrix[:, :2] += padded[:, :1] * (2, -1)
    matrix[:, -2:] += padded[:, -1:] * (-1, 2)
    return matrix


def _smoother(points: int, reach: float) -> Floats:
    """Matrix that turns white noise ``[points]`` into unit-variance noise correlated over ``reach`` points."""
    distance = np.subtract.outer(np.arange(points), np.arange(points))
    kernel = np.exp(-0.5 * (distance / reach) ** 2)
    return kernel / np.linalg.norm(kernel, axis=1, keepdims=True)


_DENSE = _spline(np.linspace(0, CONTROLS - 1, 8 * (CONTROLS - 1) + 1))
_BEND = _smoother(CONTROLS, 2.5)
