"""Training on other data than characters: class folders, splits without validation, and what reports call it."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from applications.imaml import __main__ as command
from applications.imaml import episodes
from applications.imaml.config import Config
from applications.imaml.episodes import TaskSampler, generator_for
from applications.imaml.fewshot import Learner
from applications.imaml.metrics import read_metrics
from tests.helpers.pictures import picture, write_folder

SHORT = (
    *("--ways", "2", "--tasks", "2", "--meta-steps", "2", "--inner-steps", "1", "--cg-steps", "1", "--log-every", "1"),
    *("--validate-every", "2", "--validation-tasks", "2", "--device", "cpu", "--quiet"),
)


@pytest.fixture
def tree(tmp_path):
    files = {}
    for part, names in {"train": "abcd", "val": "efg", "test": "hij"}.items():
        for name in names:
            files |= {f"{part}/{name}/{k}.png": picture("PNG", 10 * (ord(name) - 96) + k, 16) for k in range(3)}
    write_folder(tmp_path / "letters", files)
    return tmp_path / "letters"


def run(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def test_class_folders_are_trained_and_tested_on(tree, tmp_path):
    out = tmp_path / "run"
    trained = run("train", "--out", out, "--data", "folder", "--root", tree, "--image-size", "16", *SHORT)
    assert trained.exit_code == 0, trained.stderr
    evaluated = run("evaluate", out, "--tasks", "3")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert evaluated.stdout.startswith("letters 2-way 1-shot, 1 query image a class | test, 3 classes of split files,")
    row = json.loads((out / "evaluation.json").read_text())["row"]
    expected = {"data": "folder", "source": "letters", "partition": "files", "split": "test, 3 classes"}
    assert row | expected == row
    two = {f"{name}/{k}.png": picture("PNG", 10 * (ord(name) - 96) + k, 30) for name in "hi" for k in range(2)}
    write_folder(tmp_path / "two", two)
    adapted = run("adapt", out, "--support", tmp_path / "two", "--query", tmp_path / "two")
    assert adapted.exit_code == 0, adapted.stderr
    assert adapted.stdout.startswith("4 images, 2 classes")
    learner = Learner.load(out)
    assert (learner.channels, learner.side) == (3, 16)


def test_what_photographs_are_called_is_in_every_report(tmp_path):
    rows, files = {}, {}
    for part, names in {"train": "abc", "val": "de", "test": "fg"}.items():
        rows[part] = ["filename,label"]
        for name in names:
            for k in range(3):
                files[f"images/{name}{k}.jpg"] = picture("JPEG", 10 * ord(name) % 256, 20)
                rows[part].append(f"{name}{k}.jpg,{name}")
    write_folder(tmp_path / "data", files | {f"{part}.csv": "\n".join(lines).encode() for part, lines in rows.items()})
    out = tmp_path / "run"
    trained = run("train", "--out", out, "--data", "mini-imagenet", "--root", tmp_path / "data", *SHORT)
    assert trained.exit_code == 0, trained.stderr
    evaluated = run("evaluate", out, "--tasks", "2")
    called = "mini-imagenet layout, not Mini-ImageNet (3/2/2 classes of 3 images of 20 pixels)"
    assert evaluated.stdout.startswith(f"{called} 2-way")
    assert json.loads((out / "evaluation.json").read_text())["row"]["source"] == called


def test_a_split_without_validation_classes(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(episodes, "partition", lambda *_: {"train": torch.arange(5), "test": torch.arange(5, 10)})
    out = tmp_path / "run"
    trained = run("train", "--out", out, "--data", "folder", "--root", tree, "--image-size", "16", *SHORT)
    assert trained.exit_code == 0, trained.stderr
    assert all(math.isnan(value) for value in read_metrics(out / "metrics.csv")["validation_accuracy"])
    refused = run("evaluate", out, "--split", "validation", "--tasks", "2")
    assert refused.exit_code == 1
    assert "error: --split validation has no classes" in refused.stderr
    assert "pass one of train, test" in refused.stderr


def test_photographs_are_not_turned(tree):
    config = Config(data="folder", root=str(tree), image_size=16, ways=2)
    images = episodes.load_splits(config, torch.device("cpu"))["train"]
    assert images.orientations == 1
    tasks = TaskSampler(images, 2, 1, 1, generator_for(0, "it")).sample(20)
    # Every picture is dark in its upper left quarter.
    pixels = (255 * torch.cat([tasks.support_images, tasks.query_images], dim=1)).round().byte().numpy()
    dark, light = pixels[..., 2, 2], pixels[..., 12, 12]
    np.testing.assert_array_equal(dark, light // 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "omniglot", "--download"), "no --root, but omniglot is read from files"),
        (("--download",), "no --root, so there is nowhere to download to"),
        (("--data", "mini-imagenet", "--download", "--root", "x"), "mini-imagenet cannot be downloaded"),
        (("--data", "folder", "--root", "/nowhere/at/all"), "'/nowhere/at/all' does not exist"),
        (("--split", "lake"), "--split lake is no split of glyphs; pass one of seed"),
    ],
)
def test_errors_are_told_in_a_line_before_anything_is_written(tmp_path, arguments, message):
    result = run("train", "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 1
    assert f"error: {message}" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_or_judged_with_other_classes(tmp_path):
    for k in range(10):
        write_folder(tmp_path / "data", {f"{k}/{n}.png": picture("PNG", 10 * k + n, 16) for n in range(3)})
    out = tmp_path / "run"
    arguments = ("--data", "folder", "--root", tmp_path / "data", "--image-size", "16", *SHORT)
    trained = run("train", "--out", out, *arguments, "--schedule", "constant")
    assert trained.exit_code == 0, trained.stderr
    (tmp_path / "data").rename(tmp_path / "moved")
    assert run("evaluate", out, "--tasks", "2", "--root", tmp_path / "moved").exit_code == 0
    write_folder(tmp_path / "moved", {f"new/{n}.png": picture("PNG", n, 16) for n in range(3)})
    again = ("train", "--out", out, "--resume", "--root", tmp_path / "moved", "--meta-steps", "4", "--quiet")
    for command_line in (("evaluate", out, "--tasks", "2", "--root", tmp_path / "moved"), again):
        refused = run(*command_line)
        assert refused.exit_code == 1
        assert "error: moved is not what the run was trained on: its classes were 6 for train, 2 for" in refused.stderr
    pointer = json.loads((out / "checkpoint.json").read_text())
    # As of a run that was made when none was kept.
    del pointer["numbers"]["data"]
    (out / "checkpoint.json").write_text(json.dumps(pointer))
    for command_line in (("evaluate", out, "--tasks", "2", "--root", tmp_path / "moved"), again):
        assert run(*command_line).exit_code == 0
