"""A run in two processes is the run in one, but for rounding; and when one dies, the other ends and the run goes on."""

import json
import signal
import socket
import time
from dataclasses import replace

import pytest
import torch

from applications.imaml import checkpoint, episodes, train
from applications.imaml.config import Config, ConfigError
from applications.imaml.processes import Processes
from applications.imaml.train import Limits
from tests.helpers.runs import SHORT, SIZES, double_precision, few_classes, spawn, state, wait_for_step

# Shares of two tasks and of one: a mean that counts both alike would be another.
CONFIG = replace(SHORT, tasks=3, meta_steps=4, validate_every=2, threads=1)
OPTIONS = (
    *("--ways", 3, "--tasks", 4, "--inner-steps", 2, "--cg-steps", 2, "--log-every", 2, "--validate-every", 2),
    *("--validation-tasks", 3, "--device", "cpu", "--threads", 1, "--schedule", "constant"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(autouse=True)
def _small_dataset(monkeypatch):
    monkeypatch.setattr(episodes, "load", few_classes)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", SIZES)


def both(*arguments, **environment):
    """Two processes that nobody watches over, so that each has to end by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    return [spawn(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]


def assert_close(folder, other):
    """The same but for rounding in double precision; metrics are written with eight digits."""
    (tensors, rows), (other_tensors, other_rows) = state(folder), state(other)
    assert tensors.keys() == other_tensors.keys()
    torch.testing.assert_close(tensors, other_tensors, rtol=1e-10, atol=1e-12, equal_nan=True)
    numbers, expected = (
        [[float(cell or "nan") for cell in row.values()] for row in table] for table in (rows, other_rows)
    )
    assert numbers == [pytest.approx(row, rel=1e-7, nan_ok=True) for row in expected]


def test_two_processes_go_on_from_one_and_one_from_two_as_if_there_were_no_difference(tmp_path):
    quiet, mixed, whole = Limits(quiet=True), tmp_path / "mixed", tmp_path / "whole"
    with double_precision():
        train.train(CONFIG, whole, quiet)
        train.train(replace(CONFIG, meta_steps=1), mixed, quiet)
    # Steps 2 and 3 by torchrun: the middle of a row at both ends.
    process = spawn("train", "--out", mixed, "--resume", "--meta-steps", 3, launcher=TORCHRUN, DOUBLE="1")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    # One process shows and says it.
    assert output.count("trained: 3 of 3 meta-steps") == 1
    assert output.count("glyphs 3-way 1-shot, imaml: 3 meta-steps of 3 tasks; ") == 1
    assert output.count(" parameters on cpu, from meta-step 1\n") == 1
    # Two rows, since there is one at the end.
    assert output.count("\n") == 4
    with double_precision():
        train.train(CONFIG, mixed, quiet, resume=True)
    assert_close(mixed, whole)
    best, expected = (checkpoint.load(folder).numbers["best"] for folder in (mixed, whole))
    assert best == pytest.approx(expected)


@pytest.mark.parametrize(("how", "patience"), [("killed", 300), pytest.param("stopped", 20, marks=pytest.mark.slow)])
def test_when_a_process_is_gone_the_other_ends_and_the_run_goes_on(tmp_path, how, patience):
    folder = tmp_path / "run"
    options = ("--checkpoint-every", 1, "--meta-steps", 100000, "--validate-every", 100000, "--quiet")
    first, second = both("train", "--out", folder, *OPTIONS, *options, PATIENCE=str(patience))
    try:
        wait_for_step(folder, 2, first)
        second.send_signal({"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
        _, errors = first.communicate(timeout=120)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 1
    assert errors.startswith("error: another process of this run has ended or doesn't answer")
    assert "continue with --resume" in errors
    done = checkpoint.load(folder).numbers["meta_step"]
    saved = Config.load(folder / "config.json")
    assert train.train(replace(saved, meta_steps=done + 1), folder, Limits(quiet=True), resume=True) == done + 1


def test_what_the_first_process_fails_at_ends_all(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    SHORT.save(folder / "config.json")
    before = time.monotonic()
    told = f"error: {folder} holds a run already; continue it with --resume, or pass another folder."
    for process, errors_expected in zip(both("train", "--out", folder, "--quiet", *OPTIONS), ([told], []), strict=True):
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output, errors.splitlines()) == (1, "", errors_expected)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text())["tasks"] == SHORT.tasks
    assert time.monotonic() - before < 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--tasks", 1),
            "--tasks 1 cannot be shared by 2 processes, some of which would have no task; pass --tasks 2 or more, or",
        ),
        pytest.param(
            ("--inner-lr", 1e30, "--meta-steps", 4, "--quiet"),
            "the query loss is nan in the 2 meta-steps before 2; start",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_all_fail_at_is_told_once(tmp_path, options, message):
    first, second = both("train", "--out", tmp_path / "run", *OPTIONS, *options)
    output, errors = first.communicate(timeout=120)
    assert (first.returncode, output) == (1, "")
    assert errors.startswith(f"error: {message}")
    assert (second.communicate(timeout=120), second.returncode) == (("", ""), 1)


def test_what_another_process_alone_fails_at_it_tells(monkeypatch):
    # The first one has nothing to tell.
    monkeypatch.setattr(Processes, "from_first", lambda self, make: None)
    with pytest.raises(ConfigError, match="ways=1 cannot be"):
        Processes(1, 2).alike(lambda: Config(ways=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": 2}, "tasks=2 cannot be shared by 3 processes, .* pass tasks=3 or more, or start 2 at most"),
        ({"tasks": 3, "device": "cuda:1"}, "device='cuda:1' is one device for 3 processes; pass auto, cuda or cpu"),
    ],
)
def test_settings_that_several_processes_cannot_have_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train.train(replace(SHORT, **settings), tmp_path / "run", Limits(), processes=Processes(0, 3))
    assert not (tmp_path / "run").exists()
    Processes().check(replace(SHORT, **settings))


def test_a_process_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of this machine has no device of its own, there are 2"):
        Processes(2, 3, 2).check(replace(SHORT, tasks=3, device="cuda"))
    Processes(1, 3, 1).check(replace(SHORT, tasks=3, device="cuda"))
    Processes(2, 3, 2).check(replace(SHORT, tasks=3, device="cpu"))


@pytest.mark.parametrize(("tasks", "count"), [(6, 3), (7, 3), (2, 3), (5, 1)])
def test_shares_are_all_of_the_batch(tasks, count):
    shares = [Processes(rank, count).share(tasks) for rank in range(count)]
    assert [place for share in shares for place in range(tasks)[share]] == list(range(tasks))
    sizes = {share.stop - share.start for share in shares}
    assert sizes == {tasks // count, -(-tasks // count)}
