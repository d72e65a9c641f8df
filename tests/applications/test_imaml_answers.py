"""Class folders in, a table and a picture of answers out."""

import csv
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from applications.imaml import __main__ as command
from applications.imaml.answer_sheet import draw_answers
from applications.imaml.answers import Answers, answer
from applications.imaml.fewshot import Learner
from tests.helpers.pictures import write_folder

NAMES = ("ar", "be", "ce", "de")


def png(image, side=28):
    file = BytesIO()
    Image.fromarray(image.numpy()[0]).resize((side, side)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folders(tmp_path, characters):
    """Three support images of each character, four queries of each in folders, and two that are in none."""
    images = characters.images[30:34]
    support = {f"{name}/{k}.png": png(images[i, k]) for i, name in enumerate(NAMES) for k in range(3)}
    query = {f"{name}/{k}.png": png(images[i, k]) for i, name in enumerate(NAMES) for k in range(3, 7)}
    query |= {"x.png": png(images[0, 8]), "other/y.png": png(images[1, 8]), "notes.txt": b""}
    write_folder(tmp_path / "support", support)
    write_folder(tmp_path / "query", query)
    return tmp_path / "support", tmp_path / "query"


def invoke(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def test_table_and_sheet(run, folders, tmp_path):
    support, query = folders
    out = tmp_path / "new" / "out"
    result = invoke("adapt", run, "--support", support, "--query", query, "--out", out, "--inner-steps", "20")
    assert result.exit_code == 0, result.stderr
    with (out / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    assert len(rows) == 18
    assert {row["file"]: row["truth"] for row in rows if "/" not in row["file"] or "other" in row["file"]} == {
        **{"x.png": "", "other/y.png": ""},
    }
    right = 0
    for row in rows:
        probabilities = {name: float(row[f"p({name})"]) for name in NAMES}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["answer"] == max(probabilities, key=probabilities.get)
        if row["truth"]:
            assert row["truth"] == row["file"].partition("/")[0]
            right += row["answer"] == row["truth"]
    assert f"18 images, 4 classes, {right} of 16 in class folders right ({100 * right / 16:.1f} %)" in result.stdout
    # Chance is 4 of 16, and the standard deviation of guesses 1.7.
    assert right >= 9
    with Image.open(out / "answers.png") as sheet:
        assert sheet.width > 600
    assert sorted(path.name for path in out.iterdir()) == ["answers.csv", "answers.png"]


def test_answers_are_those_of_the_network(run, folders):
    support, query = folders
    learner = Learner.load(run, device="cpu")
    answers = answer(learner, support, query)
    assert answers.classes == NAMES
    assert answers.support_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    again = learner.learn(answers.support_images, answers.support_labels).probabilities(answers.query_images)
    torch.testing.assert_close(answers.probabilities, again)
    with Image.open(query / answers.query_names[5]) as image:
        np.testing.assert_array_equal((255 * answers.query_images[5, 0]).round().byte().numpy(), np.asarray(image))


def test_images_of_any_size_and_colour_are_fitted_to_the_network(run, folders, characters):
    support, query = folders
    expected = answer(Learner.load(run), support, query)
    (support / "ar" / "0.png").write_bytes(png(characters.images[30, 0], side=56))
    found = answer(Learner.load(run), support, query)
    assert found.support_images.shape == expected.support_images.shape
    assert (found.support_images[0] - expected.support_images[0]).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda support, query: (support / "nowhere", query),
            "does not exist; pass a folder with one folder of images",
        ),
        (lambda support, query: (support, query / "nowhere"), "does not exist; pass a folder with the images to class"),
        (lambda support, query: (support, query / "x.png"), "is a file; pass a folder with the images"),
        (lambda support, query: (query / "other", query), "holds 1 images that are in no class folder"),
        (lambda support, query: (query, query), "holds 1 images that are in no class folder, the first x.png"),
    ],
)
def test_folders_that_will_not_do(run, folders, tmp_path, change, message):
    support, query = change(*folders)
    result = invoke("adapt", run, "--support", support, "--query", query, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_images_and_classes_that_will_not_do(run, folders, tmp_path):
    support, query = folders
    (query / "x.png").write_bytes(b"<html>")
    result = invoke("adapt", run, "--support", support, "--query", query)
    assert f"{query / 'x.png'} is no image that can be read" in result.stderr
    assert "it is an HTML page" in result.stderr
    (tmp_path / "empty").mkdir()
    result = invoke("adapt", run, "--support", support, "--query", tmp_path / "empty")
    assert "holds no images" in result.stderr
    for number in range(2):
        write_folder(support, {f"more{number}/0.png": (support / "ar" / "0.png").read_bytes()})
    result = invoke("adapt", run, "--support", support, "--query", query)
    assert "error: there are 6 classes, but the network was trained to tell 5 apart" in result.stderr
    write_folder(tmp_path / "one", {"a/0.png": (support / "ar" / "0.png").read_bytes()})
    result = invoke("adapt", run, "--support", tmp_path / "one", "--query", query)
    assert "has one class, a, and there is nothing to tell it from" in result.stderr
    assert not list(run.glob("answers*"))


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_says_what_is_left_out_and_that_nothing_was_asked_of_a_class(tmp_path, channels):
    images = torch.rand(30, channels, 16, 16)
    probabilities = torch.tensor([[0.9, 0.1, 0.0]]).repeat(30, 1)
    answers = Answers(
        ("a", "b", "c"), images[:9], torch.tensor([0] * 7 + [1, 2]), images, tuple(map(str, range(30))),
        torch.full((30,), -1), probabilities,
    )  # fmt: skip
    draw_answers(answers, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 10
    assert str(answers) == "30 images, 3 classes"


@pytest.mark.parametrize("among", ["support", "query"])
def test_answers_are_not_put_among_the_images(run, folders, tmp_path, among):
    support, query = folders
    refused = invoke("adapt", run, "--support", support, "--query", query, "--out", tmp_path / among / "new")
    assert refused.exit_code == 1
    assert f"error: --out {tmp_path / among / 'new'} lies in --{among} {tmp_path / among}, and" in refused.stderr
    assert not (tmp_path / among / "new").exists()


def test_ignored_files_and_too_few_query_images_are_told(run, folders, tmp_path):
    support, query = folders
    write_folder(tmp_path / "few", {"a.png": (query / "x.png").read_bytes(), ".hidden.png": b"", "b.gif": b""})
    options = ("--support", support, "--out", tmp_path / "out")
    few = invoke("adapt", run, "--query", tmp_path / "few", *options)
    assert few.exit_code == 0, few.stderr
    assert "2 files ignored, hidden or not .png" in few.stderr
    assert "warning: 1 query image normalised by statistics of their own" in few.stderr
    each = invoke("adapt", run, "--query", tmp_path / "few", *options, "--batch-norm", "support")
    assert "warning" not in each.stderr
    many = invoke("adapt", run, "--query", query, *options)
    assert "1 file ignored" in many.stderr
    assert "warning" not in many.stderr
