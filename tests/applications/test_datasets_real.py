"""The real Omniglot, where it is at hand."""

import os
import warnings
from pathlib import Path

import pytest

from applications.datasets import load

REAL = [
    Path(os.environ["IMPLICITLAYERS_DATA"]) if os.environ.get("IMPLICITLAYERS_DATA") else None,
    Path(__file__).resolve().parents[3] / "shared" / "data",
]


def test_whole_omniglot(tmp_path, monkeypatch):
    monkeypatch.setenv("IMPLICITLAYERS_CACHE", str(tmp_path))
    roots = [path for path in REAL if path is not None and path.is_dir()]
    if not roots:
        pytest.skip("the real Omniglot is neither in $IMPLICITLAYERS_DATA nor in ../shared/data")
    with warnings.catch_warnings(action="error"):
        dataset = load("omniglot", roots[0], seed=0)
    assert dataset.images.shape == (1623, 20, 1, 28, 28)
    assert len({name.partition("/")[0] for name in dataset.names}) == 50
    assert list(dataset.names) == sorted(dataset.names)
    assert dataset.names[0] == "Alphabet_of_the_Magi/character01"
    ink = 1 - dataset.images.float().mean() / 255
    assert 0.07 < ink < 0.10
    again = load("omniglot", roots[0], seed=1)
    assert again.images.equal(dataset.images)
    assert len(list(tmp_path.iterdir())) == 1
