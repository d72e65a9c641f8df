"""What every test may rely on: few threads, a seed, untouched global settings, patient hypothesis."""

import importlib
import os
import warnings

import hypothesis
import pytest
import torch

# One process per core and one thread per process: several threads in each would wait for each other.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# The first forward derivative of a process imports this module, which uses a function that PyTorch itself deprecates.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("torch._decomp.decompositions_for_jvp")

# Solves differ in length by orders of magnitude, so that a time limit per example would say nothing.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.register_profile("suite-ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite-ci" if os.environ.get("CI") else "suite")


@pytest.fixture(autouse=True)
def _isolated_torch():
    """Seed before each test; float64 or a device made default by one test must not reach the next."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(None)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
