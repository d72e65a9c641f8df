"""What every test of an application may rely on."""

import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """No test may touch the user's own cache."""
    folder = tmp_path_factory.mktemp("cache") / "implicitlayers"
    monkeypatch.setenv("IMPLICITLAYERS_CACHE", str(folder))
    return folder
