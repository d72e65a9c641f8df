"""Generated characters: repeatable, inside the frame, alike within a class and unlike between classes."""

import numpy as np
import pytest
import torch

from applications.datasets import SPLIT_SIZES, glyphs
from applications.datasets.glyphs import _draw, _render, _styles
from applications.datasets.strokes import CONTROLS, Script, character


@pytest.fixture(scope="module")
def sample():
    return glyphs(classes=120)


def test_shape_names_and_values(sample):
    assert sample.images.shape == (120, 20, 1, 28, 28)
    assert sample.source == "glyphs"
    assert sample.names[0] == "script0000/character01"
    assert sample.names[24] == "script0001/character01"
    assert list(sample.names) == sorted(sample.names)
    darkest, lightest = sample.images.flatten(2).amin(2), sample.images.flatten(2).amax(2)
    assert darkest.max() < 60, "every drawing should have dark ink"
    assert (lightest == 255).all(), "every drawing should leave paper white"


def test_default_set_has_the_classes_of_its_split():
    assert glyphs.__defaults__[0] == sum(SPLIT_SIZES["glyphs"].values())


def test_ink_fills_the_frame_without_touching_its_border(sample):
    ink = sample.images.flatten(0, 2) < 128
    share = ink.float().mean((1, 2))
    assert share.min() > 0.02
    assert share.max() < 0.4
    assert 0.06 < share.mean() < 0.14, "Omniglot at this size has 0.10"
    border = torch.cat([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], dim=1)
    assert border.float().mean() < 0.005
    tall = ink.any(2).sum(1)
    wide = ink.any(1).sum(1)
    assert torch.maximum(tall, wide).min() >= 14
    assert torch.minimum(tall, wide).min() >= 3


def test_lines_are_whole_and_soft(sample):
    """Ink is one piece for each stroke, not dots, and its edges are grey."""
    grey = (sample.images > 20) & (sample.images < 235)
    assert grey.float().mean() > 0.04
    ink = sample.images[:, :4, 0].flatten(0, 1).numpy() < 200
    pieces = np.array([count_pieces(drawing) for drawing in ink])
    assert pieces.max() <= 6
    assert (pieces <= 2).mean() > 0.85, "most strokes should meet"


def count_pieces(drawing):
    left, pieces = {tuple(place) for place in np.argwhere(drawing).tolist()}, 0
    while left:
        pieces, edge = pieces + 1, [left.pop()]
        while edge:
            row, column = edge.pop()
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
    return pieces


def test_same_arguments_give_the_same_images(sample):
    state = torch.get_rng_state()
    legacy = np.random.get_state()[1].copy()
    again = glyphs(classes=120)
    assert again.images.equal(sample.images)
    assert again.names == sample.names
    assert torch.get_rng_state().equal(state)
    assert (np.random.get_state()[1] == legacy).all()


def test_another_seed_gives_other_characters(sample):
    other = glyphs(classes=30, seed=1).images
    assert (other != sample.images[:30]).flatten(2).any(2).all()


@pytest.mark.parametrize("classes", [1, 23, 25])
def test_class_is_the_same_however_many_are_asked_for(sample, classes):
    fewer = glyphs(classes=classes)
    assert fewer.images.equal(sample.images[:classes])
    assert fewer.names == sample.names[:classes]


def test_drawing_is_the_same_however_many_drawers_there_are(sample):
    assert glyphs(classes=10, drawers=3).images.equal(sample.images[:10, :3])


def test_no_two_drawings_are_equal(sample):
    assert len(sample.images.flatten(0, 1).flatten(1).unique(dim=0)) == 120 * 20


def test_larger_image_shows_the_same_drawing(sample):
    large = glyphs(classes=20, drawers=4, size=84).images.flatten(0, 1).float()
    small = torch.nn.functional.avg_pool2d(large, 3)
    difference = (small - sample.images[:20, :4].flatten(0, 1).float()).abs().mean()
    assert difference < 6


def test_drawer_has_a_style_of_their_own(sample):
    ink = (255 - sample.images.float()).mean((0, 2, 3, 4))
    assert ink.max() > 1.15 * ink.min(), "pens and sizes should differ between drawers"
    halves = (255 - sample.images.float()).unflatten(0, (2, 60)).mean((1, 3, 4, 5))
    assert torch.corrcoef(halves)[0, 1] > 0.9, "a drawer's style should be that of all their characters"


def test_drawers_differ_in_everything_that_makes_a_style():
    styles = _styles(20, 0)
    assert all(len(np.unique(trait)) == 20 for trait in vars(styles).values())


def test_drawings_in_one_style_differ_by_more_than_their_place():
    """No affine map takes one drawing into another of the same drawer, yet a rough one does."""
    strokes = character(np.random.default_rng(0), Script.invent(np.random.default_rng(0)))
    first, second = (_draw(strokes, _styles(20, 0), np.random.default_rng(seed))[0] for seed in (1, 2))
    for one, other in zip(first, second, strict=True):
        placed = np.concatenate([one, np.ones((len(one), 1))], axis=1)
        residual = other - placed @ np.linalg.lstsq(placed, other, rcond=None)[0]
        assert 0.008 < np.sqrt((residual**2).sum(1).mean()) < 0.1


def test_pen_is_lifted_between_strokes_and_as_broad_as_asked():
    across = np.linspace(0.2, 0.8, 60)
    lines = [np.stack([across, np.full(60, height)], axis=-1)[None] for height in (0.3, 0.7)]
    pen = np.array([0.025])
    apart = [_render(line, np.array([59]), pen, 80)[0] for line in lines]
    together = _render(np.concatenate(lines, axis=1), np.array([59, 119]), pen, 80)[0]
    np.testing.assert_array_equal(together, np.minimum(*apart))
    # Half of the peak of exp(-d^2 / 2 sigma^2) is at d = 1.18 sigma on either side.
    assert (255 - apart[0][:, 40].astype(float)).sum() / 255 == pytest.approx(2 * 1.18 * 0.025 * 80, abs=0.3)


def test_unseen_classes_are_hard_but_not_hopeless_for_pixels(sample):
    """5-way 1-shot nearest neighbour: chance is 0.2, Omniglot 0.44."""
    generator = torch.Generator().manual_seed(0)
    pixels = (255 - sample.images.flatten(2).float()) / 255
    tasks = 1000
    correct = 0
    for _ in range(tasks):
        ways = torch.randperm(120, generator=generator)[:5]
        shots = torch.rand(5, 20, generator=generator).argsort(1)[:, :2]
        support, query = pixels[ways, shots[:, 0]], pixels[ways, shots[:, 1]]
        correct += int((torch.cdist(query, support).argmin(1) == torch.arange(5)).sum())
    assert 0.50 < correct / (5 * tasks) < 0.75


@pytest.mark.parametrize("seed", range(3))
def test_character_is_one_to_four_strokes_in_its_box(seed):
    rng = np.random.default_rng(seed)
    counts = set()
    for _ in range(300):
        strokes = character(rng, Script.invent(rng))
        assert strokes.shape[1:] == (CONTROLS, 2)
        counts.add(len(strokes))
        low, high = strokes.min((0, 1)), strokes.max((0, 1))
        np.testing.assert_allclose(low + high, 0, atol=1e-12)
        np.testing.assert_allclose((high - low).max(), 1)
        assert (high - low).min() >= 0.25
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, r"classes=0 .*at least 1"),
        ({"drawers": 0}, r"drawers=0 .*at least 1"),
        ({"size": 7}, r"size=7 .*at least 8"),
        ({"seed": -1}, r"seed=-1 .*at least 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        glyphs(**arguments)
