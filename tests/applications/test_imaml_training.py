"""Runs that are interrupted in every way go on to the bit; what cannot be is refused before training starts."""

import csv
import json
import signal
import statistics
from dataclasses import replace

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from applications.imaml import __main__ as command
from applications.imaml import checkpoint, episodes, train
from applications.imaml.config import Config
from applications.imaml.evaluate import load_network, mean_and_interval
from applications.imaml.network import batch_statistics, forward
from applications.imaml.run_folder import RunError
from applications.imaml.train import Limits
from tests.helpers.runs import SHORT, SIZES, assert_same, few_classes, spawn, state, wait_for_step


@pytest.fixture(autouse=True)
def _small_dataset(monkeypatch):
    monkeypatch.setattr(episodes, "load", few_classes)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", SIZES)


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
    assert [row["validation_accuracy"] != "" for row in rows] == [False, True, True]
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
        {"precision": "bf16", "convolution": "grouped"},
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


def test_killed_then_interrupted_then_finished_is_as_if_nothing_had_happened(tmp_path):
    options = (
        *("--ways", "3", "--tasks", "2", "--inner-steps", "2", "--cg-steps", "2", "--log-every", "2"),
        *("--validate-every", "4", "--validation-tasks", "3", "--device", "cpu", "--threads", "1"),
        *("--schedule", "constant"),
    )
    folder = tmp_path / "run"
    process = spawn("train", "--out", folder, *options, "--checkpoint-every", "1", "--meta-steps", "100000")
    wait_for_step(folder, 5, process)
    process.kill()
    process.communicate()
    killed_at = checkpoint.load(folder).numbers["meta_step"]

    process = spawn("train", "--out", folder, "--resume", "--checkpoint-every", "100000")
    # The first row behind the checkpoint, so that there is something to lose.
    announced, row = process.stdout.readline(), process.stdout.readline()
    assert f", from meta-step {killed_at}" in announced
    assert row.startswith(f"{killed_at + 2 - killed_at % 2}/")
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
    assert "error: --lam 3.0 differs from the run's 0.1" in refused.stderr
    more = run_command("train", "--out", whole, "--resume", "--meta-steps", "8", "--lam", "0.1")
    assert more.exit_code == 0, more.stderr
    assert "trained: 8 of 8 meta-steps" in more.stdout
    assert Config.load(whole / "config.json") == replace(SHORT, meta_steps=8)


def test_errors_are_told_in_a_line(tmp_path):
    for arguments, message in (
        (("train", "--out", tmp_path / "run", "--ways", "99"), "error: glyphs has too few classes for --ways 99"),
        (("train", "--out", tmp_path / "run", "--device", "cuda:77"), "error: --device cuda:77 cannot be used here"),
        (("train", "--out", tmp_path / "run", "--time-limit", "0"), "error: --time-limit 0.0 cannot be"),
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
    with (whole / "evaluation.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["task"] for line in table] == [*"0123456"]
    before, accuracies = ([float(line[name]) for line in table] for name in ("before", "after"))
    row = report["row"]
    assert row["accuracy"] == pytest.approx(100 * statistics.mean(accuracies))
    assert row["interval"] == pytest.approx(244.69119 * statistics.stdev(accuracies) / 7**0.5)
    assert row["before"] == pytest.approx(100 * statistics.mean(before))
    expected = {
        "split": "test, 5 classes", "ways": 3, "shots": 1, "queries": 1, "batch_norm": "support", "inner": "gradient",
        "inner_steps": 2, "lam": 0.1, "tasks": 7, "task_seed": 5, "training_seed": 0, "meta_step": 6,
        "partition": "seed", "query_sets": 1, "curvature": "gauss-newton", "cg_steps": 2, "tasks_per_meta_step": 2,
        "learnt_lam": None,
    }  # fmt: skip
    assert row | expected == row
    assert report["config"] == json.loads((whole / "config.json").read_text())
    protocol = {"tasks": 7, "split": "test", "batch_norm": "support", "seed": 5, "queries": None}
    assert report["protocol"] | protocol == report["protocol"]
    for stated in (
        *(
            "3-way 1-shot",
            "test, 5 classes of split seed, split seed 0",
            "6 meta-steps",
            "2 gradient steps",
            "lam 0.1",
            "batch norm support",
        ),
        *("7 tasks, seed 5", f"after {row['accuracy']:.2f} ± {row['interval']:.2f} %"),
    ):
        assert stated in result.stdout
    theta = load_network(whole, torch.device("cpu")).theta
    splits = episodes.load_splits(SHORT, torch.device("cpu"))
    sampler = episodes.TaskSampler(splits["test"], 3, 1, 1, episodes.generator_for(5, "test tasks"))
    first = episodes.Tasks(*(part[0] for part in sampler.sample(SHORT.tasks)))
    seen = batch_statistics(theta, first.support_images)
    unadapted = forward(theta, first.query_images, seen).argmax(-1) == first.query_labels
    assert before[0] == pytest.approx(unadapted.double().mean().item(), rel=1e-7)
    # Fractions of three query images, as they are read by people.
    assert {line["after"] for line in table} <= {"0", "0.33333333", "0.66666667", "1"}
    assert row["accuracy"] == round(row["accuracy"], 6)
    again = run_command("evaluate", whole, "--tasks", "7", "--batch-norm", "support", "--seed", "5")
    assert json.loads((whole / "evaluation.json").read_text()) == report
    assert again.stdout == result.stdout


@pytest.mark.parametrize(("tasks", "quantile"), [(2, 12.706), (10, 2.262), (100, 1.984), (600, 1.964), (10**6, 1.960)])
def test_the_interval_is_students(tasks, quantile):
    fractions = torch.rand(tasks, generator=torch.Generator().manual_seed(0))
    mean, interval = mean_and_interval(fractions)
    low, high = stats.t.interval(0.95, tasks - 1, fractions.double().mean(), stats.sem(fractions.double()))
    assert (mean - interval, mean + interval) == pytest.approx((100 * low, 100 * high))
    assert interval / (100 * stats.sem(fractions.double())) == pytest.approx(quantile, abs=5e-4)


def test_one_task_has_no_interval(whole):
    result = run_command("evaluate", whole, "--tasks", "1")
    assert "error: --tasks 1 has no spread" in result.stderr
