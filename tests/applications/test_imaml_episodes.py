"""Tasks: what is drawn, that support and query don't overlap, that a seed fixes it, that splits don't share classes."""

import pytest
import torch

from applications.datasets import ClassImages
from applications.imaml import episodes
from applications.imaml.config import Config
from applications.imaml.episodes import TaskSampler, check_ways, generator_for, load_splits

CLASSES, PER_CLASS, SIDE = 12, 6, 4


@pytest.fixture
def dataset():
    """Images that carry their class and number: a corner pixel is 255, its neighbour the class, the next the number."""
    images = torch.zeros(CLASSES, PER_CLASS, 1, SIDE, SIDE, dtype=torch.uint8)
    images[..., 0, 0] = 255
    images[..., 0, 1] = torch.arange(CLASSES)[:, None, None]
    images[..., 0, 2] = 100 + torch.arange(PER_CLASS)[:, None]
    return ClassImages(images, tuple(f"class {index}" for index in range(CLASSES)), "numbered")


def sampler(dataset, seed=0, ways=3, shots=2, queries=3, query_sets=1):
    return TaskSampler(dataset, ways, shots, queries, generator_for(seed, "test"), query_sets)


def decode(images):
    """Class, number and quarter turns of each image ``[..., 1, side, side]``."""
    values = (images[..., 0, :, :] * 255).round().long()
    corners = torch.stack([values[..., 0, 0], values[..., -1, 0], values[..., -1, -1], values[..., 0, -1]], dim=-1)
    turns = (corners == 255).long().argmax(-1)
    upright = torch.stack([values.rot90(-k, (-2, -1)) for k in range(4)])
    upright = upright.gather(0, turns[None, ..., None, None].expand(1, *values.shape))[0]
    return upright[..., 0, 1], upright[..., 0, 2] - 100, turns


def test_shapes_labels_and_range(dataset):
    tasks = sampler(dataset).sample(7)
    assert tasks.support_images.shape == (7, 6, 1, SIDE, SIDE)
    assert tasks.query_images.shape == (7, 9, 1, SIDE, SIDE)
    assert tasks.support_labels.tolist() == [[0, 0, 1, 1, 2, 2]] * 7
    assert tasks.query_labels.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 7
    assert tasks.support_images.dtype == torch.float32
    assert tasks.support_images.max() == 1


def test_support_and_query_share_the_class_and_its_turn_but_no_image(dataset):
    tasks = sampler(dataset).sample(200)
    classes, numbers, turns = (
        torch.cat([s.unflatten(1, (3, 2)), q.unflatten(1, (3, 3))], dim=2)
        for s, q in zip(decode(tasks.support_images), decode(tasks.query_images), strict=True)
    )
    assert (classes == classes[:, :, :1]).all()
    assert (turns == turns[:, :, :1]).all()
    assert all(len(set(image)) == 5 for task in numbers.tolist() for image in task)
    assert all(len(set(task)) == 3 for task in classes[:, :, 0].tolist())


def test_query_sets_are_of_the_same_classes_and_share_no_image(dataset):
    tasks = sampler(dataset, queries=1, query_sets=4).sample(50)
    classes, numbers, turns = decode(tasks.query_images)
    assert tasks.query_labels.tolist() == [[0, 1, 2] * 4] * 50
    supported, seen, turned = (part[:, ::2] for part in decode(tasks.support_images))
    assert torch.equal(classes, supported.repeat(1, 4))
    assert torch.equal(turns, turned.repeat(1, 4))
    together = torch.cat(
        [numbers.unflatten(1, (4, 3)), seen[:, None], decode(tasks.support_images)[1][:, None, 1::2]], 1
    )
    assert (together.sort(dim=1).values == torch.arange(6)[:, None]).all()


def test_classes_images_and_turns_are_uniform(dataset):
    tasks = sampler(dataset).sample(2000)
    classes, numbers, turns = decode(tasks.query_images)
    for drawn, kinds, count in ((classes, CLASSES, 6000), (numbers, PER_CLASS, 18000), (turns, 4, 6000)):
        frequency = drawn.flatten().bincount(minlength=kinds) / drawn.numel()
        # Five standard deviations of a count of independent draws; images of one class are drawn together.
        assert (frequency - 1 / kinds).abs().max() < 5 * (1 / kinds / count) ** 0.5


def test_a_class_is_not_bound_to_a_label(dataset):
    classes, _, _ = decode(sampler(dataset).sample(300).support_images)
    assert all(len(set(classes[:, place].tolist())) == CLASSES for place in range(6))


def test_the_state_of_the_generator_is_all_the_state(dataset):
    first, second = sampler(dataset), sampler(dataset, seed=1)
    first.sample(3)
    second.generator.set_state(first.generator.get_state())
    assert all(torch.equal(a, b) for a, b in zip(first.sample(4), second.sample(4), strict=True))


def test_each_seed_and_purpose_has_its_own_stream():
    draws = [
        torch.rand(4, generator=generator_for(seed, purpose)).tolist()
        for seed in (0, 1)
        for purpose in ("training tasks", "validation tasks")
    ]
    assert len({tuple(draw) for draw in draws}) == 4
    assert torch.rand(4, generator=generator_for(1, "training tasks")).tolist() == draws[2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ways": 13}, "ways=13 .* the 12 that"),
        ({"shots": 4}, "shots=4 and queries=3 ask for 7 .* has 6 of each"),
        ({"query_sets": 2}, "queries=3 in each of query_sets=2 ask for 8 "),
    ],
)
def test_too_small_a_dataset_is_refused(dataset, sizes, message):
    with pytest.raises(ValueError, match=message):
        sampler(dataset, **sizes)


def test_oblong_images_are_refused():
    oblong = ClassImages(torch.zeros(5, 5, 1, 4, 6, dtype=torch.uint8), tuple("abcde"), "oblong")
    with pytest.raises(ValueError, match=r"4x6.*square"):
        sampler(oblong)


@pytest.fixture
def small(dataset, monkeypatch):
    monkeypatch.setattr(episodes, "load", lambda name, root, seed: dataset)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 6, "validation": 2, "test": 4}})


@pytest.mark.usefixtures("small")
def test_no_class_is_in_two_splits():
    splits = load_splits(Config(), torch.device("cpu"))
    names = [name for part in splits.values() for name in part.names]
    assert [part.classes for part in splits.values()] == [6, 2, 4]
    assert len(set(names)) == len(names) == CLASSES
    for part in splits.values():
        assert [f"class {index}" for index in part.images[:, 0, 0, 0, 1].tolist()] == list(part.names)


@pytest.mark.usefixtures("small")
def test_a_split_with_a_common_class_is_refused(monkeypatch):
    shared = {"train": torch.tensor([0, 1]), "validation": torch.tensor([2]), "test": torch.tensor([1, 3])}
    monkeypatch.setattr(episodes, "partition", lambda *_: shared)
    with pytest.raises(ValueError, match="class 1 is in part 'train' and again in part 'test'"):
        load_splits(Config(), torch.device("cpu"))


def test_a_part_with_too_few_classes_is_refused_before_training(dataset):
    splits = {"train": dataset, "validation": dataset.take(torch.arange(2)), "test": dataset.take(torch.arange(3))}
    with pytest.raises(ValueError, match=r"ways=3: 12 for train, 2 for validation, 3 for test, .* ways of at most 2\."):
        check_ways(splits, 3)
    check_ways(splits, 2)
