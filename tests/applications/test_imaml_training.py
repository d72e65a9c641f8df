"""Runs that are interrupted in every way go on to the bit; what cannot be is refused before training starts."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from applications.datasets import ClassImages
from applications.imaml import __main__ as command
from applications.imaml import checkpoint, episodes, train
from applications.imaml.config import Config
from applications.imaml.evaluate import load_network
from applications.imaml.network import batch_statistics, forward
from applications.imaml.train import Limits, RunError

ROOT = Path(__file__).resolve().parents[2]
SHORT = Config(
    *("glyphs", None, 3),
    tasks=2, meta_steps=6, inner_steps=2, cg_steps=2, log_every=2, checkpoint_every=100, validate_every=4,
    validation_tasks=3, device="cpu", schedule="constant",
)  # fmt: skip
SIZES = {"glyphs": {"train": 6, "validation": 3, "test": 5}}
CLOCK = ("seconds", "tasks_per_second")


def few_classes(name="glyphs", root=None, seed=0):
    images = torch.randint(0, 256, (14, 4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ClassImages(images, tuple(f"class {index}" for index in range(14)), name)


@pytest.fixture(autouse=True)
def _small_dataset(monkeypatch):
    monkeypatch.setattr(episodes, "load", few_classes)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", SIZES)


def state(folder):
    """What a run has come to: all tensors of its checkpoint, and its metrics but for the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: cell for name, cell in row.items() if name not in CLOCK} for row in csv.DictReader(file)]
    return checkpoint.load(folder).tensors, rows


def assert_same(folder, other):
    (tensors, rows), (other_tensors, other_rows) = state(folder), state(other)
    assert tensors.keys() == other_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []
    assert rows == other_rows


@pytest.fixture
def whole(tmp_path):
    """A run that was never interrupted."""
    folder = tmp_path / "whole"
    assert train.train(SHORT, folder, Limits(quiet=True)) == SHORT.meta_steps
    return folder


def test_a_run_leaves_settings_metrics_curve_and_one_checkpoint(whole):
    assert sorted(path.name for path in whole.iterdir()) == [
        *("checkpoint-00000006.safetensors", "checkpoint.json", "config.json", "curve.png", "metrics.csv")
    ]
    _, rows = state(whole)
    assert [row["meta_step"] for row in rows] == ["2", "4", "6"]
    assert [row["validation_accuracy"] != "" for row in rows] == [False, True, False]
    assert [float(row["adjoint_residual"]) > 0 for row in rows] == [True] * 3
    assert [row["negative_curvature"] for row in rows] == ["0"] * 3
    assert Config.load(whole / "config.json") == SHORT
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"algorithm": "fomaml"},
        {"inner": "lbfgs", "batch_norm": "support"},
        {"algorithm": "maml", "lam": 0.0, "path_steps": 1},
        {"algorithm": "reptile", "lam": 0.0, "inner": "torch.RMSprop"},
        {"learn_lam": "layer", "inner": "adam"},
        {"algorithm": "anil", "learn_lam": "scalar"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_three_steps_and_three_more_are_six(tmp_path, settings):
    config = replace(SHORT, **settings)
    # Three steps end in the middle of a row of metrics, whose sums must be carried over.
    assert train.train(replace(config, meta_steps=3), tmp_path / "parts", Limits(quiet=True)) == 3
    assert train.train(config, tmp_path / "parts", Limits(quiet=True), resume=True) == 6
    assert train.train(config, tmp_path / "whole", Limits(quiet=True)) == 6
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_time_limit_stops_cleanly_and_rows_behind_the_checkpoint_are_cut_off(whole, tmp_path):
    folder = tmp_path / "limited"
    assert train.train(SHORT, folder, Limits(seconds=1e-6, quiet=True)) == 1
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,0.5,0.5,0.5,0.5,0.5,0,,1,1\n3,0.")
    assert train.train(SHORT, folder, Limits(quiet=True), resume=True) == 6
    assert_same(folder, whole)


def test_a_complete_run_that_is_resumed_stays_as_it_is(whole):
    before = (whole / "metrics.csv").read_bytes()
    assert train.train(SHORT, whole, Limits(quiet=True), resume=True) == 6
    assert (whole / "metrics.csv").read_bytes() == before


PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import test_imaml_training as small
from applications.imaml import __main__ as command, episodes
episodes.load, episodes.SPLIT_SIZES = small.few_classes, small.SIZES
command.app()
"""


def spawn(folder, *options):
    arguments = [sys.executable, "-c", PROGRAM, "train", "--out", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder.parent
    )


def wait_for_step(folder, step, process):
    pointer, end = folder / "checkpoint.json", time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if pointer.exists() and json.loads(pointer.read_text())["numbers"]["meta_step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step}: {process.communicate()}")


def test_killed_then_interrupted_then_finished_is_as_if_nothing_had_happened(tmp_path):
    options = (
        *("--ways", "3", "--tasks", "2", "--inner-steps", "2", "--cg-steps", "2", "--log-every", "2"),
        *("--validate-every", "4", "--validation-tasks", "3", "--device", "cpu", "--threads", "1"),
        *("--schedule", "constant"),
    )
    folder = tmp_path / "run"
    process = spawn(folder, *options, "--checkpoint-every", "1", "--meta-steps", "100000")
    wait_for_step(folder, 5, process)
    process.kill()
    process.communicate()
    killed_at = checkpoint.load(folder).numbers["meta_step"]

    process = spawn(folder, "--resume", "--checkpoint-every", "100000")
    # The first row behind the checkpoint, so that there is something to lose.
    assert process.stdout.readline().startswith(f"{killed_at + 2 - killed_at % 2}/")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped (continue with --resume)" in output
    stopped_at = checkpoint.load(folder).numbers["meta_step"]
    assert stopped_at > killed_at

    config = replace(Config.load(folder / "config.json"), meta_steps=stopped_at + 3)
    train.train(config, folder, Limits(quiet=True), resume=True)
    train.train(config, tmp_path / "whole", Limits(quiet=True))
    assert_same(folder, tmp_path / "whole")


def test_a_run_is_not_overwritten(whole):
    with pytest.raises(RunError, match=r"holds a run already; continue it with --resume"):
        train.train(SHORT, whole, Limits(quiet=True))


def test_a_folder_that_cannot_be_made_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        train.train(SHORT, tmp_path / "file" / "run", Limits(quiet=True))


def test_a_full_folder_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(RunError, match="has 1 MiB left, and a run needs 32"):
        train.train(SHORT, tmp_path / "run", Limits(quiet=True))


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_checkpoint(tmp_path):
    config = replace(SHORT, inner_lr=1e30)
    with pytest.raises(RunError, match=r"the query loss is nan .*smaller inner_lr"):
        train.train(config, tmp_path / "run", Limits(quiet=True))
    assert checkpoint.load(tmp_path / "run").numbers["meta_step"] == 0


def run_command(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


def test_a_resumed_run_goes_on_as_it_began(whole):
    refused = run_command("train", "--out", whole, "--resume", "--lam", "3")
    assert refused.exit_code == 1
    assert "error: lam=3.0 differs from the run's 0.1" in refused.stderr
    more = run_command("train", "--out", whole, "--resume", "--meta-steps", "8", "--lam", "0.1")
    assert more.exit_code == 0, more.stderr
    assert "trained: 8 of 8 meta-steps" in more.stdout
    assert Config.load(whole / "config.json") == replace(SHORT, meta_steps=8)


def test_errors_are_told_in_a_line(tmp_path):
    for arguments, message in (
        (("train", "--out", tmp_path / "run", "--ways", "99"), "error: ways=99 asks for more classes"),
        (("train", "--out", tmp_path / "run", "--device", "cuda:77"), "error: device='cuda:77' cannot be used here"),
        (("train", "--out", tmp_path / "run", "--time-limit", "0"), "error: time_limit=0.0 cannot be"),
        (("train", "--out", tmp_path / "run", "--resume"), "does not exist, so there is no run"),
        (("evaluate", tmp_path / "run"), "does not exist, so there is no run"),
    ):
        result = run_command(*arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert not (tmp_path / "run").exists()


def test_evaluation_states_accuracy_and_all_it_depends_on(whole):
    result = run_command("evaluate", whole, "--tasks", "7", "--batch-norm", "support", "--seed", "5")
    assert result.exit_code == 0, result.stderr
    report = json.loads((whole / "evaluation.json").read_text())
    accuracies = torch.tensor(report["accuracies_after"], dtype=torch.float64)
    assert len(accuracies) == len(report["accuracies_before"]) == 7
    row = report["row"]
    assert row["accuracy"] == pytest.approx(100 * accuracies.mean().item())
    assert row["interval"] == pytest.approx(196 * accuracies.std().item() / 7**0.5)
    assert row["before"] == pytest.approx(100 * sum(report["accuracies_before"]) / 7)
    expected = {
        "split": "test, 5 classes", "ways": 3, "shots": 1, "queries": 1, "batch_norm": "support", "inner": "gradient",
        "inner_steps": 2, "lam": 0.1, "tasks": 7, "task_seed": 5, "training_seed": 0, "meta_step": 6,
    }  # fmt: skip
    assert row | expected == row
    for stated in (
        *("3-way 1-shot", "test, 5 classes", "6 meta-steps", "2 gradient steps", "lam 0.1", "batch norm support"),
        *("7 tasks, seed 5", f"after {row['accuracy']:.2f} ± {row['interval']:.2f} %"),
    ):
        assert stated in result.stdout
    theta = load_network(whole, torch.device("cpu")).theta
    splits = episodes.load_splits(SHORT, torch.device("cpu"))
    sampler = episodes.TaskSampler(splits["test"], 3, 1, 1, episodes.generator_for(5, "test tasks"))
    first = episodes.Tasks(*(part[0] for part in sampler.sample(SHORT.tasks)))
    statistics = batch_statistics(theta, first.support_images)
    unadapted = forward(theta, first.query_images, statistics).argmax(-1) == first.query_labels
    assert report["accuracies_before"][0] == unadapted.float().mean().item()
    again = run_command("evaluate", whole, "--tasks", "7", "--batch-norm", "support", "--seed", "5")
    assert json.loads((whole / "evaluation.json").read_text()) == report
    assert again.stdout == result.stdout


def test_one_task_has_no_interval(whole):
    result = run_command("evaluate", whole, "--tasks", "1")
    assert "error: tasks=1 has no spread" in result.stderr
