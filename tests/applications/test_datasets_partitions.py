"""The named splits: sizes, disjointness, what stays the same between them, and datasets that are too small."""

import pytest
import torch

from applications.datasets import SPLIT_SIZES, SPLITS, ClassImages, check_disjoint, partition, split_classes

# Numbers of characters of Omniglot's alphabets that matter here, and one more in each part to make up the rest.
BACKGROUND = {
    "Armenian": 41, "Balinese": 24, "Bengali": 46, "Early_Aramaic": 22, "Greek": 24, "Hebrew": 22,
    "Japanese_(katakana)": 47, "Korean": 40, "Latin": 26, "Mkhedruli_(Georgian)": 41, "Sanskrit": 42, "Tagalog": 17,
    "Zulu": 572,
}  # fmt: skip
EVALUATION = {"Angelic": 195, "Gurmukhi": 45, "Kannada": 41, "Tibetan": 378}


@pytest.fixture(scope="module")
def characters():
    """A dataset with the names of Omniglot's characters, as far as splits look at them, and no pixels to speak of."""
    part_of = {}
    for part, alphabets in (("background", BACKGROUND), ("evaluation", EVALUATION)):
        for alphabet, count in alphabets.items():
            part_of |= {f"{alphabet}/character{number + 1:03d}": part for number in range(count)}
    names = tuple(sorted(part_of))
    images = torch.zeros(len(names), 1, 1, 1, 1, dtype=torch.uint8)
    return ClassImages(images, names, "omniglot", tuple(part_of[name] for name in names))


def named(dataset, chosen):
    return {part: {dataset.names[index] for index in indices.tolist()} for part, indices in chosen.items()}


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ("maml", {"train": 1100, "validation": 100, "test": 423}),
        ("maml-1200", {"train": 1200, "test": 423}),
        ("vinyals", {"train": 1028, "validation": 172, "test": 423}),
        ("lake", {"train": 964, "test": 659}),
        ("small1", {"train": 136, "test": 659}),
        ("small2", {"train": 156, "test": 659}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_sizes_and_disjointness(characters, split, sizes, seed):
    assert split in SPLITS["omniglot"]
    chosen = partition(characters, "omniglot", split, seed)
    assert {part: len(indices) for part, indices in chosen.items()} == sizes
    check_disjoint(chosen)
    for indices in chosen.values():
        assert indices.dtype == torch.int64
        assert indices.equal(indices.sort().values)


def test_only_drawn_splits_depend_on_the_seed(characters):
    for split in SPLITS["omniglot"]:
        first, second = (partition(characters, "omniglot", split, seed) for seed in (0, 1))
        same = all(first[part].equal(second[part]) for part in first)
        assert same == (split not in ("maml", "maml-1200"))


def test_the_two_drawn_splits_have_the_same_test_characters(characters):
    with_validation, without = (partition(characters, "omniglot", split, 3) for split in ("maml", "maml-1200"))
    assert with_validation["test"].equal(without["test"])
    rest = torch.cat([with_validation["train"], with_validation["validation"]]).sort().values
    assert rest.equal(without["train"])
    assert partition(characters, "omniglot", None, 3)["train"].equal(with_validation["train"])
    direct = split_classes(1623, SPLIT_SIZES["omniglot"], 3)
    assert with_validation["train"].equal(direct["train"])


def test_lake_and_the_minimal_sets_share_no_alphabet(characters):
    for split in ("lake", "small1", "small2"):
        parts = named(characters, partition(characters, "omniglot", split))
        alphabets = {part: {name.partition("/")[0] for name in names} for part, names in parts.items()}
        assert alphabets["test"] == set(EVALUATION)
        assert not alphabets["train"] & alphabets["test"]
    assert alphabets["train"] == {"Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog"}


def test_vinyals_boundary_is_within_gurmukhi(characters):
    parts = named(characters, partition(characters, "omniglot", "vinyals"))
    assert {f"Gurmukhi/character{number:03d}" for number in (42, 43, 44, 45)} <= parts["test"]
    assert {f"Gurmukhi/character{number:03d}" for number in range(1, 42)} <= parts["train"]
    alphabets = {name.partition("/")[0] for name in parts["validation"]}
    assert alphabets == {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}


def test_incomplete_omniglot_is_refused(characters):
    some = characters.take(torch.arange(10, 1623))
    with pytest.raises(ValueError, match=r"split='lake' is of 659 characters .*evaluation set, and this one has 649"):
        partition(some, "omniglot", "lake")
    with pytest.raises(ValueError, match="only 1613"):
        partition(some, "omniglot")


def test_unknown_split(characters):
    with pytest.raises(ValueError, match=r"split='files' is no split of omniglot; pass one of maml, maml-1200, vin"):
        partition(characters, "omniglot", "files")


@pytest.mark.parametrize(("classes", "sizes"), [(3, (1, 1, 1)), (5, (3, 1, 1)), (100, (64, 16, 20)), (7, (5, 1, 1))])
def test_shares_of_a_folder(classes, sizes):
    images = torch.zeros(classes, 1, 1, 1, 1, dtype=torch.uint8)
    dataset = ClassImages(images, tuple(map(str, range(classes))), "birds")
    chosen = partition(dataset, "folder")
    assert tuple(len(chosen[part]) for part in ("train", "validation", "test")) == sizes


def test_two_classes_cannot_be_split():
    dataset = ClassImages(torch.zeros(2, 1, 1, 1, 1, dtype=torch.uint8), ("a", "b"), "birds")
    with pytest.raises(ValueError, match="birds has 2 classes, and training, validation and testing need one each"):
        partition(dataset, "folder")
