"""Loading by name, contact sheets, and the command that writes one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from applications.datasets import contact_sheet, glyphs, load

PROJECT = Path(__file__).resolve().parents[2]


def test_load_glyphs_by_name():
    dataset = load("glyphs", None, seed=3)
    assert dataset.images.shape == (1200, 20, 1, 28, 28)
    assert dataset.images[:2].equal(glyphs(classes=2, seed=3).images)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name='mnist' is not a dataset.*folder, glyphs, mini-imagenet, omniglot"):
        load("mnist", None, seed=0)


def test_missing_root(tmp_path):
    with pytest.raises(ValueError, match=r"root=None, but omniglot is read from files.*pass the folder"):
        load("omniglot", None, seed=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load("omniglot", tmp_path / "nowhere", seed=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_shows_each_image_in_its_place(tmp_path, channels):
    images = torch.arange(5, dtype=torch.uint8).mul(40).reshape(5, 1, 1, 1).repeat(1, channels, 6, 8)
    images[:, 0, 0, 0] = 255
    path = tmp_path / "new" / "sheet.png"
    contact_sheet(images, path, columns=3)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * 8 + 2, 3 * 10 + 2, 3)
    for index in range(5):
        top, left = 2 + 8 * (index // 3), 2 + 10 * (index % 3)
        found = pixels[top : top + 6, left : left + 8]
        np.testing.assert_array_equal(found, images[index].expand(3, 6, 8).permute(1, 2, 0).numpy())


def test_titles_are_below_their_images(tmp_path):
    images = torch.full((2, 1, 10, 30), 255, dtype=torch.uint8)
    contact_sheet(images, tmp_path / "sheet.png", columns=2, titles=["", "W"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert pixels.shape == (10 + 12 + 2 * 2, 2 * 32 + 2)
    below = pixels[12:24] < 100
    assert not below[:, :34].any()
    assert below[:, 34:64].any()


@pytest.mark.parametrize(
    ("shape", "columns", "titles", "message"),
    [
        ((2, 3, 1, 4, 4), 1, None, r"shape \[2, 3, 1, 4, 4\].*flatten"),
        ((2, 2, 4, 4), 1, None, r"1 or 3\s*channels"),
        ((0, 1, 4, 4), 1, None, r"shape \[0, "),
        ((2, 1, 4, 4), 0, None, r"columns=0.*at least 1"),
        ((2, 1, 4, 4), 1, ["a"], r"1 entries for 2 images.*one title an image"),
    ],
)
def test_impossible_sheets_are_refused(tmp_path, shape, columns, titles, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(torch.zeros(shape, dtype=torch.uint8), tmp_path / "sheet.png", columns, titles)
    assert not list(tmp_path.iterdir())


def run(*arguments):
    command = [sys.executable, "-m", "applications.datasets", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)


def test_command_prints_counts_and_writes_a_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    done = run("glyphs", "--sheet", str(path), "--classes", "7", "--drawings", "5")
    assert done.returncode == 0, done.stderr
    assert "glyphs: 1200 classes x 20 images, 1x28x28" in done.stdout
    assert "train 900, validation 100, test 200" in done.stdout
    with Image.open(path) as sheet:
        assert sheet.size == (5 * 30 + 2, 7 * 30 + 2)


def test_command_explains_what_is_missing():
    done = run("omniglot")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no --root, but omniglot is read from files; pass the folder")
    assert done.stdout == ""
