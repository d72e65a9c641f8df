"""The demonstration, in small: what it compares, and that its files are where it says."""

import re

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from applications.datasets import ClassImages
from applications.imaml import __main__ as command
from applications.imaml import demo as demonstration
from applications.imaml import episodes
from applications.imaml.config import Config
from applications.imaml.episodes import Tasks
from applications.imaml.evaluate import Protocol


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    images = torch.randint(0, 256, (16, 3, 1, 28, 28), dtype=torch.uint8)
    # Two of the three images of a class are alike to the pixel, and the third is as far from them as can be.
    images[:, 1] = images[:, 0]
    images[:, 2] = 255 - images[:, 0]
    dataset = ClassImages(images, tuple(f"class {index}" for index in range(16)), "glyphs")
    monkeypatch.setattr(episodes, "load", lambda name, root, seed: dataset)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 6, "validation": 5, "test": 5}})
    monkeypatch.setattr(demonstration, "CONFIG", Config(meta_steps=2, tasks=2, inner_steps=2, cg_steps=1, device="cpu"))
    monkeypatch.setattr(demonstration, "PROTOCOL", Protocol(tasks=150))


def test_it_compares_with_the_nearest_neighbour_and_draws(tmp_path):
    found = demonstration.demo(tmp_path / "demo", quiet=True)
    mean, interval = found.neighbour
    # A third of the pairs of support and query images are alike.
    assert mean == pytest.approx(100 / 3, abs=2 * interval)
    assert 0 < interval < 6
    text = str(found)
    assert f"nearest neighbour in pixels   {mean:.1f} ± {interval:.1f} %" in text
    assert "150 tasks, after 2 meta-steps" in text
    assert [file.name for file in found.files] == ["curve.png", "evaluation.json", "tasks.png"]
    for file in found.files:
        assert str(file) in text
        assert file.stat().st_size > 1000


def test_a_folder_with_a_run_is_left_alone_and_what_there_is_to_do_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(command.app, ["demo", "--out", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(
        f"error: --out {tmp_path} holds a run already, and the demo begins one of its own; "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    # The only option that it names without saying of which command is one that the demo has.
    named = set(re.findall(r"(?<!train )--[a-z-]+", result.stderr))
    assert named <= {
        option for parameter in get_command(command.app).commands["demo"].params for option in parameter.opts
    }


def test_the_nearest_neighbour_has_the_label_of_the_support_image():
    support = torch.eye(3).reshape(3, 1, 1, 3)
    task = Tasks(support, torch.tensor([0, 1, 1]), support.flip(0) + 0.1, torch.tensor([1, 1, 1]))
    assert demonstration._nearest_neighbour(task) == pytest.approx(2 / 3)
