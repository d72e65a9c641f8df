"""What every test of an application may rely on."""

import pytest
import torch
from PIL import Image

from applications.datasets import glyphs
from applications.imaml import episodes, train
from applications.imaml.train import Limits
from tests.helpers.runs import SMALL


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """No test may touch the user's own cache."""
    folder = tmp_path_factory.mktemp("cache") / "implicitlayers"
    monkeypatch.setenv("IMPLICITLAYERS_CACHE", str(folder))
    return folder


@pytest.fixture
def no_decoding(monkeypatch):
    """Make it an error to open an image from here on, once called."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("an image was decoded")

    return lambda: monkeypatch.setattr(Image, "open", refuse)


@pytest.fixture(scope="session")
def characters():
    return glyphs(classes=40, seed=1)


@pytest.fixture(scope="session")
def run(tmp_path_factory, characters):
    """A run of some seconds on some of the characters; those from 30 on are for anything else."""
    folder = tmp_path_factory.mktemp("small") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes, "load", lambda name, root, seed: characters.take(torch.arange(30)))
        patch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 20, "validation": 5, "test": 5}})
        train.train(SMALL, folder, Limits(quiet=True))
    return folder
