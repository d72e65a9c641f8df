"""The pytest plugin, in runs of pytest of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAILING = """
import torch
from hypothesis import given, settings
from implicitlayers.testing import assert_gradients_match, strategies

@settings(max_examples=3, database=None)
@given(strategies.tensors((2,)))
def test_wrong(x):
    assert_gradients_match(lambda x: x.sin() + x.detach(), x, modes=("reverse",))

def test_double(float64):
    assert torch.ones(1).dtype == torch.float64

def test_single_again():
    assert torch.ones(1).dtype == torch.float32
"""


def run(folder, text, *options):
    (folder / "test_it.py").write_text(textwrap.dedent(text), encoding="utf-8")
    # -p loads it once, whether or not the installed package has registered it already.
    command = [sys.executable, "-m", "pytest", "-p", "_implicitlayers_pytest", "-q", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CI": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_report_of_a_failure_is_printed_once(tmp_path):
    done = run(tmp_path, FAILING)
    assert "1 failed, 2 passed" in done.stdout
    assert done.stdout.count("gradient report -") == 1
    assert done.stdout.count("No gradient reaches") + done.stdout.count("input[0][") == 1
    assert "See the gradient report." in done.stdout
    assert "compare.py" not in done.stdout


def test_profiles_are_there_to_be_chosen(tmp_path):
    text = """
    from hypothesis import settings

    def test_profile():
        assert settings.default.max_examples == 1000
        assert settings.get_profile("implicitlayers-ci").derandomize
    """
    hook = "import _implicitlayers_pytest, hypothesis\n_implicitlayers_pytest.register_profiles()\n"
    (tmp_path / "conftest.py").write_text(hook, encoding="utf-8")
    done = run(tmp_path, text, "--hypothesis-profile=implicitlayers-deep")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("blocked", ["hypothesis", "torch"])
def test_tests_that_have_nothing_to_do_with_it_run_without(tmp_path, blocked):
    (tmp_path / "conftest.py").write_text("import sys\nassert not {'torch', 'hypothesis'} <= set(sys.modules)\n")
    text = f"""
    import sys

    def test_nothing():
        assert "{blocked}" not in sys.modules
    """
    done = run(tmp_path, text, "-p", "no:hypothesispytest", "-W", "error")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
