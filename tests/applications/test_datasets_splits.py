"""Class images check themselves, and splits of classes are disjoint and repeatable."""

import dataclasses

import numpy as np
import pytest
import torch

from applications.datasets import SPLIT_SIZES, ClassImages, check_disjoint, split_classes
from applications.datasets.images import stack

SIZES = {"train": 12, "validation": 3, "test": 5}


def class_images(**changes):
    arguments = {"images": torch.zeros(2, 3, 1, 4, 5, dtype=torch.uint8), "names": ("a", "b"), "source": "made up"}
    return ClassImages(**(arguments | changes))


def test_counts_and_device():
    dataset = class_images()
    assert (dataset.classes, dataset.per_class) == (2, 3)
    moved = dataset.to("meta")
    assert moved.images.device.type == "meta"
    assert (moved.names, moved.source) == (dataset.names, dataset.source)
    assert dataset.images.device.type == "cpu"


def test_some_classes_are_taken_with_all_that_is_theirs():
    dataset = class_images(images=torch.arange(6, dtype=torch.uint8).reshape(2, 3, 1, 1, 1), parts=("x", "y"))
    taken = dataset.take(torch.tensor([1]))
    assert (taken.names, taken.parts, taken.source) == (("b",), ("y",), "made up")
    assert taken.images.flatten().tolist() == [3, 4, 5]


def test_stacking_sorts_and_refuses_unequal_classes():
    pixels = [np.full((1, 2, 2), value, np.uint8) for value in range(4)]
    stacked = stack({"b": {"2": pixels[0], "1": pixels[1]}, "a": {"x": pixels[2], "y": pixels[3]}}, "made up")
    assert stacked.names == ("a", "b")
    assert stacked.images[..., 0, 0, 0].tolist() == [[2, 3], [1, 0]]
    with pytest.raises(ValueError, match=r"a of made up has 1 images where other classes have 2"):
        stack({"b": {"2": pixels[0], "1": pixels[1]}, "a": {"x": pixels[2]}}, "made up")
    with pytest.raises(ValueError, match="made up has no class"):
        stack({}, "made up")


def test_class_images_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        class_images().source = "other"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": np.zeros((2, 3, 1, 4, 5), np.uint8)}, TypeError, r"ndarray.*pass a uint8 torch\.Tensor"),
        ({"images": torch.zeros(2, 3, 1, 4, 5)}, ValueError, r"torch\.float32.*pass torch\.uint8"),
        ({"images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)}, ValueError, r"shape \[2, 3, 4, 5\].*five dimensions"),
        ({"images": torch.zeros(2, 0, 1, 4, 5, dtype=torch.uint8)}, ValueError, r"shape \[2, 0, .*non-empty"),
        ({"names": ["a", "b"]}, TypeError, r"\['a', 'b'\] is not a tuple.*tuple\(names\)"),
        ({"names": ("a", 1)}, TypeError, r"not a tuple of strings"),
        ({"names": ("a",)}, ValueError, r"1 entries for 2 classes.*exactly 2"),
        ({"names": ("a", "a")}, ValueError, r"'a' twice.*distinct"),
        ({"source": ""}, ValueError, r"source=''.*non-empty"),
        ({"parts": ("train",)}, ValueError, r"parts has 1 entries for 2 classes.*one for each"),
        ({"orientations": 2}, ValueError, r"orientations=2.*pass 4 .*or 1"),
        ({"source": None}, ValueError, r"source=None.*non-empty"),
    ],
)
def test_unfit_class_images_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        class_images(**changes)


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_disjoint_sorted_and_as_large_as_asked(seed):
    parts = split_classes(20, SIZES, seed)
    assert list(parts) == list(SIZES)
    assert {name: len(indices) for name, indices in parts.items()} == SIZES
    assert all(indices.dtype == torch.int64 and indices.equal(indices.sort().values) for indices in parts.values())
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(20))


def test_classes_beyond_the_sizes_are_left_out():
    parts = split_classes(100, SIZES, 0)
    chosen = torch.cat(list(parts.values()))
    assert len(chosen.unique()) == 20
    assert chosen.max() >= 20, "the parts should be drawn from all classes"


def test_split_is_a_function_of_its_arguments_alone():
    torch.manual_seed(1)
    first = split_classes(200, SIZES, 7)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = split_classes(200, SIZES, 7)
    assert all(first[name].equal(second[name]) for name in SIZES)
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state), "the global random state should be left alone"
    other = split_classes(200, SIZES, 8)
    assert not all(first[name].equal(other[name]) for name in SIZES)


def test_split_is_pinned():
    """Numbers are compared across runs and releases, which need the same test classes."""
    assert split_classes(20, {"train": 16, "test": 4}, 0)["test"].tolist() == [4, 5, 13, 19]


def test_test_classes_stay_when_training_classes_are_held_out():
    whole = split_classes(1623, {"train": 1200, "test": 423}, 3)
    held_out = split_classes(1623, {"validation": 100, "test": 423, "train": 1100}, 3)
    assert held_out["test"].equal(whole["test"])
    assert held_out["train"].tolist() + held_out["validation"].tolist() != whole["train"].tolist()
    assert sorted(held_out["train"].tolist() + held_out["validation"].tolist()) == whole["train"].tolist()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 15, "test": 6}, r"wants 21 classes, but there are only 20.*at most 20"),
        ({"train": -1}, r"sizes\['train'\]=-1.*at least 0"),
        ({"train": 2.0}, r"sizes\['train'\]=2\.0.*integer"),
        ({"train": True}, r"sizes\['train'\]=True.*integer"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        split_classes(20, sizes, 0)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [([0, 1, 2], [5, 2], r"class 2 is in part 'train' and again in part 'test'"), ([4, 4], [5], r"class 4 .*'train'")],
)
def test_common_class_is_found(train, test, message):
    check_disjoint({"train": torch.tensor([0, 1]), "test": torch.tensor([2])})
    with pytest.raises(ValueError, match=message):
        check_disjoint({"train": torch.tensor(train), "test": torch.tensor(test)})


def test_documented_split_sizes():
    assert {name: sum(sizes.values()) for name, sizes in SPLIT_SIZES.items()} == {"omniglot": 1623, "glyphs": 1200}
    assert SPLIT_SIZES["omniglot"]["test"] == 423
