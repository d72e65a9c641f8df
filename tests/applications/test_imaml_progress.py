"""How far a run is: the rate of this session, and an end that it can keep."""

import io
import math
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from applications.imaml import episodes, progress, train
from applications.imaml.metrics import read_metrics
from applications.imaml.progress import Display, announced
from applications.imaml.scores import Scores
from applications.imaml.train import Limits
from applications.imaml.words import counted, describe_seconds
from tests.helpers.runs import SHORT, SIZES, few_classes

ROW = {"meta_step": 40, "query_loss": 0.5, "query_accuracy": 0.75, "validation_accuracy": math.nan}
ROW["tasks_per_second"] = 7.0


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("limit", "left"), [(None, "30 s"), (25.0, "15 s"), (5.0, "0 s"), (500.0, "30 s")])
def test_rate_and_end_are_told_in_a_line(clock, capsys, limit, left):
    # Resumed at 20 of 100 meta-steps of 4 tasks: 20 more in 10 s leave 60 for 30 s.
    with Display(100, 20, 4, limit, quiet=False) as display:
        clock[0] += 10
        display.step(40)
        display.row(ROW, 0.0)
        display.row(ROW | {"validation_accuracy": 0.5}, 0.0)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"40/100  query loss 0.500  accuracy 75.0 %  7.0 tasks/s, {left} left"
    assert second == f"40/100  query loss 0.500  accuracy 75.0 %  validation 50.0 %  7.0 tasks/s, {left} left"


def test_a_terminal_has_a_bar_whose_rate_is_of_training_and_whose_end_is_of_all(clock, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda: Console(force_terminal=True, file=shown, width=120, color_system=None)
    )
    with Display(100, 20, 4, None, quiet=False) as display:
        clock[0] += 7
        display.row(ROW | {"meta_step": 39}, 2.0)
        clock[0] += 3
        display.step(40)
        display.row(ROW, 0.0)
    assert "40/100 " in shown.getvalue()
    # 20 meta-steps of 4 tasks in 8 s, and 2 s for a validation.
    assert "10.0 tasks/s, 30 s left" in shown.getvalue()
    assert "40/100  query loss 0.500  accuracy 75.0 %" in shown.getvalue()


def test_the_rate_that_is_shown_is_that_of_the_metrics_without_validations(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(episodes, "load", few_classes)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", SIZES)

    def slow(theta, sampler, config, tasks, *others):
        time.sleep(0.5)
        return Scores(torch.zeros(tasks), torch.zeros(tasks))

    monkeypatch.setattr(train, "scores", slow)
    train.train(replace(SHORT, validate_every=2), tmp_path / "run", Limits())
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    shown = [line for line in capsys.readouterr().out.splitlines() if "tasks/s" in line]
    assert [f"  {rate:.1f} tasks/s" in line for rate, line in zip(metrics["tasks_per_second"], shown, strict=True)] == [
        True
    ] * 3
    # The seconds of the last row count the two validations before it.
    training = sum(SHORT.log_every * SHORT.tasks / rate for rate in metrics["tasks_per_second"])
    assert metrics["seconds"][-1] - training >= 1.0


def test_quiet_shows_nothing(clock, capsys):
    with Display(100, 20, 4, None, quiet=True) as display:
        display.step(40)
        display.row(ROW, 0.0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (3599, "60 min"), (5970, "1 h 40 min"), (11100, "3 h 05 min")],
)
def test_durations_are_for_people(seconds, told):
    assert describe_seconds(seconds) == told


def test_one_is_not_many():
    assert [counted(number, "task") for number in (0, 1, 2, 20000)] == ["0 tasks", "1 task", "2 tasks", "20000 tasks"]


def test_what_begins_is_shown_at_once_and_completed(capsys):
    with announced("training", quiet=False) as show:
        assert capsys.readouterr().out == "training"
        show(", 5 parameters")
    assert capsys.readouterr().out == ", 5 parameters\n"
    with pytest.raises(ValueError, match="damaged"), announced("training", quiet=False):
        raise ValueError("damaged")
    assert capsys.readouterr().out == "training\n"
    with announced("training", quiet=True) as show:
        show(", 5 parameters")
    assert capsys.readouterr().out == ""
