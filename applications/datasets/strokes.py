"""The strokes from which the characters of an invented script are put together.

A stroke is ``[CONTROLS, 2]``: points (x, y) that the pen passes, y downwards, in a frame about one unit wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONTROLS = 13
SCRIPT_LENGTH = 24
# Length of all strokes for a character 1 long: less is a mere line, of which every script would have the same,
# and more clots at 28 pixels.
LEAST_INK, MOST_INK = 1.4, 3.8
# Shorter by longer side of the box: below it, a pen has gone to and fro on one line.
LEAST_BREADTH = 0.25
Floats = NDArray[np.float64]
Kind = Callable[[np.random.Generator, Floats, Floats], Floats]

_T = np.linspace(0.0, 1.0, CONTROLS)


@dataclass(frozen=True)
class Script:
    """What the characters of one script have in common.

    Args:
        habits: probability of each kind of stroke, ``[kinds]``.
        lengths: probability of 1, 2, 3 and 4 strokes, ``[4]``.
        width: width of a character for a height of 1.
    """

    habits: Floats
    lengths: Floats
    width: float

    @classmethod
    def invent(cls, rng: np.random.Generator) -> Script:
        """Draw a script: some prefer lines and corners, some loops and waves.

        Args:
            rng: random stream, advanced.

        Returns:
            The script.
        """
        habits = rng.dirichlet(np.full(len(KINDS), 0.8))
        lengths = rng.dirichlet((1.5, 4.0, 4.0, 2.0))
        return cls(0.7 * habits + 0.3 / len(KINDS), lengths, float(rng.uniform(0.65, 1.1)))


def character(rng: np.random.Generator, script: Script) -> Floats:
    """Put a character together: a main stroke, and others that start, end, cross or lie near an earlier one.

    Args:
        rng: random stream, advanced.
        script: habits that the character follows.

    Returns:
        Strokes ``[strokes, CONTROLS, 2]``, centred on 0, the longer side of their box 1 long.
    """
    # Outside the loop, or the refusals would be of many strokes more often than of few.
    count = 1 + int(rng.choice(4, p=script.lengths))
    while True:
        strokes = [_cursive(rng) if count == 1 else _main(rng, script)]
        while len(strokes) < count:
            stroke = _attached(rng, script, strokes)
            if not _runs_along(stroke, strokes):
                strokes.append(stroke)
        points = np.stack(strokes) * (script.width, 1.0)
        low, high = points.min(axis=(0, 1)), points.max(axis=(0, 1))
        longer, shorter = (high - low).max(), (high - low).min()
        points = (points - (low + high) / 2) / longer
        ink = np.linalg.norm(np.diff(points, axis=1), axis=-1).sum()
        if LEAST_INK <= ink <= MOST_INK and shorter >= LEAST_BREADTH * longer:
            return points


def _runs_along(stroke: Floats, earlier: list[Floats]) -> bool:
    """Whether a stroke runs along another rather than meeting it: nobody would write it, or tell it apart."""
    points = np.stack(earlier)
    finer = np.concatenate([points, (points[:, 1:] + points[:, :-1]) / 2], axis=1).reshape(-1, 2)
    gaps = np.linalg.norm(stroke[:, None] - finer, axis=-1).min(axis=1)
    return bool((gaps < 0.1).sum() > 4)


def _anchor(rng: np.random.Generator) -> Floats:
    """A place where pens like to turn: a grid of 3 by 4, so that letters share heights and margins."""
    return np.array((rng.integers(3) / 2, rng.integers(4) / 3)) + rng.normal(0, 0.03, 2)


def _far_anchor(rng: np.random.Generator, start: Floats, distance: float) -> Floats:
    """An anchor some way off, level with the start or plumb to it more often than chance would have it."""
    while True:
        end = _anchor(rng)
        oblique = np.abs(end - start).min() > 0.15
        if np.linalg.norm(end - start) >= distance and not (oblique and rng.random() < 0.6):
            return end


def _kind(rng: np.random.Generator, script: Script) -> Kind:
    return KINDS[int(rng.choice(len(KINDS), p=script.habits))]


def _main(rng: np.random.Generator, script: Script) -> Floats:
    start = _anchor(rng)
    return _kind(rng, script)(rng, start, _far_anchor(rng, start, 0.6))


def _attached(rng: np.random.Generator, script: Script, strokes: list[Floats]) -> Floats:
    host = strokes[int(rng.integers(len(strokes)))]
    point = host[int(rng.choice((0, 3, 4, 6, 8, 9, 12)))]
    choice = rng.random()
    if choice < 0.45:
        return _kind(rng, script)(rng, point, _far_anchor(rng, point, 0.4))
    if choice < 0.60:
        other = strokes[int(rng.integers(len(strokes)))][int(rng.integers(CONTROLS))]
        far = np.linalg.norm(other - point) >= 0.3
        return _kind(rng, script)(rng, point, other if far else _far_anchor(rng, point, 0.4))
    if choice < 0.78:
        return _cross(rng, host, point)
    if choice < 0.95:
        return _loop(rng, point)
    return _mark(rng, strokes)


def _cross(rng: np.random.Generator, host: Floats, point: Floats) -> Floats:
    along = (host[-1] - host[0]) / max(float(np.linalg.norm(host[-1] - host[0])), 1e-6)
    angle = math.atan2(along[1], along[0]) + math.pi / 2 + rng.normal(0, 0.3)
    half = rng.uniform(0.18, 0.4) * np.array((math.cos(angle), math.sin(angle)))
    return _line(rng, point - half, point + half)


def _loop(rng: np.random.Generator, point: Floats) -> Floats:
    # The middle of the frame is where loops have room; away from it they'd stretch the character's box.
    away = np.array((0.5, 0.5)) - point + rng.normal(0, 0.2, 2)
    heading = math.atan2(away[1], away[0])
    radius = rng.uniform(0.12, 0.28)
    squash = rng.uniform(0.6, 1.0)
    sweep = rng.choice((-1.0, 1.0)) * 2 * math.pi * rng.uniform(0.75, 1.05) * _T
    round_trip = np.stack([1 - np.cos(sweep), squash * np.sin(sweep)], axis=-1) * radius
    cos, sin = math.cos(heading), math.sin(heading)
    return point + round_trip @ np.array(((cos, sin), (-sin, cos)))


def _mark(rng: np.random.Generator, strokes: list[Floats]) -> Floats:
    """A dot or dash above, below or beside what is there."""
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    side = int(rng.integers(4))
    middle = low + (high - low) * rng.uniform(0.2, 0.8, 2)
    middle[side % 2] = (low if side < 2 else high)[side % 2] + (-0.16 if side < 2 else 0.16)
    half = rng.uniform(0.02, 0.14) * _unit(rng)
    return _line(rng, middle - half, middle + half)


def _unit(rng: np.random.Generator) -> Floats:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array((math.cos(angle), math.sin(angle)))


def _normal(start: Floats, end: Floats) -> Floats:
    return np.array((start[1] - end[1], end[0] - start[0]))


def _line(_rng: np.random.Generator, start: Floats, end: Floats) -> Floats:
    return start + (end - start) * _T[:, None]


def _bow(rng: np.random.Generator, start: Floats, end: Floats) -> Floats:
    depth = rng.choice((-1.0, 1.0)) * rng.uniform(0.2, 0.6)
    return _line(rng, start, end) + depth * np.sin(math.pi * _T)[:, None] * _normal(start, end)


def _wave(rng: np.random.Generator, start: Floats, end: Floats) -> Floats:
    depth = rng.choice((-1.0, 1.0)) * rng.uniform(0.15, 0.35)
    turns = rng.choice((2.0, 2.0, 3.0))
    return _line(rng, start, end) + depth * np.sin(turns * math.pi * _T)[:, None] * _normal(start, end)


def _curl(rng: np.random.Generator, start: Floats, end: Floats) -> Floats:
    """A line on whose way the pen goes once round, as in a written l or e."""
    radius, phase = rng.uniform(0.15, 0.3), rng.uniform(0, 2 * math.pi)
    turn = phase + rng.choice((-1.0, 1.0)) * 2 * math.pi * _T
    circle = np.stack([np.cos(turn) - math.cos(phase), np.sin(turn) - math.sin(phase)], axis=-1)
    return _line(rng, start, end) + radius * circle


def _hook(rng: np.random.Generator, start: Floats, end: Floats) -> Floats:
    """A line that turns back at its end, as in a written j."""
    straight = 8
    side = rng.choice((-1.0, 1.0))
    radius = rng.uniform(0.15, 0.28)
    turn = rng.uniform(0.8, 1.3) * math.pi * np.linspace(0, 1, CONTROLS - straight + 1)[1:, None]
    arc = end + radius * ((end - start) * np.sin(turn) + side * _normal(start, end) * (1 - np.cos(turn)))
    return np.concatenate([start + (end - start) * np.linspace(0, 1, straight)[:, None], arc])


def _through(vertices: Floats, at: Floats) -> Floats:
    """Straight from vertex to vertex, each reached at its time."""
    return np.stack([np.interp(_T, at, vertices[:, axis]) for axis in range(2)], axis=-1)


def _angle(rng: np.random.Generator, start: Floats, end: Floats) -> Floats:
    tip = (start + end) / 2 + rng.choice((-1.0, 1.0)) * rng.uniform(0.35, 0.8) * _normal(start, end)
    return _through(np.stack([start, tip, end]), np.linspace(0, 1, 3))


def _zigzag(rng: np.random.Generator, start: Floats, end: Floats) -> Floats:
    side = rng.choice((-1.0, 1.0)) * rng.uniform(0.2, 0.45) * _normal(start, end)
    vertices = np.stack([start, (2 * start + end) / 3 + side, (start + 2 * end) / 3 - side, end])
    return _through(vertices, np.linspace(0, 1, 4))


def _cursive(rng: np.random.Generator) -> Floats:
    """A whole letter without lifting the pen: a smooth path through four to six anchors."""
    path = [_anchor(rng)]
    for _ in range(int(rng.integers(3, 6))):
        path.append(_far_anchor(rng, path[-1], 0.45))
    vertices = np.stack(path)
    # An even pace, or the samples of a long leg would lie apart as dots.
    travelled = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(vertices, axis=0), axis=1))])
    rough = _through(vertices, travelled / travelled[-1])
    rounded = np.copy(rough)
    rounded[1:-1] = (rough[:-2] + 2 * rough[1:-1] + rough[2:]) / 4
    return rounded


KINDS: tuple[Kind, ...] = (_line, _bow, _wave, _curl, _hook, _angle, _zigzag)
