"""What a run leaves behind beyond the last network, and what it is told before it starts."""

import csv
import json
import resource
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from applications.imaml import __main__ as command
from applications.imaml import checkpoint, episodes, run_folder, train
from applications.imaml.checkpoint import CheckpointError
from applications.imaml.classifier import FewShotClassifier
from applications.imaml.episodes import Tasks
from applications.imaml.evaluate import Protocol, evaluate, sampler_for
from applications.imaml.fewshot import Learner
from applications.imaml.network import forward
from applications.imaml.run_folder import RunError
from applications.imaml.scores import scores
from applications.imaml.train import Limits
from applications.imaml.trained import load_network
from tests.helpers.runs import SHORT, SIZES, assert_same, few_classes, state

CPU = torch.device("cpu")
QUIET = Limits(quiet=True)
VALIDATED = replace(SHORT, meta_steps=8, validate_every=2)


@pytest.fixture(scope="module", autouse=True)
def _small_dataset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes, "load", few_classes)
        patch.setattr(episodes, "SPLIT_SIZES", SIZES)
        yield


def run_command(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


@contextmanager
def validations():
    """Validation accuracies are these, in turn; what was judged is noted."""
    told, seen = cycle([0.25, 0.75, 0.5, 0.75]), []

    def measured(theta, sampler, config, tasks, *others):
        seen.append(({name: value.detach().clone() for name, value in theta.items()}, sampler._pixels))
        found = scores(theta, sampler, config, tasks, *others)
        return found._replace(after=torch.full_like(found.after, next(told)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "scores", measured)
        yield seen


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A run with four validations, and what was judged in each."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    with validations() as seen:
        train.train(VALIDATED, folder, QUIET)
    return folder, seen


def test_the_best_network_is_that_of_the_first_highest_validation_accuracy(validated):
    folder, seen = validated
    for which, meta_step, (theta, _) in (("best", 4, seen[1]), ("last", 8, seen[3])):
        network = load_network(folder, CPU, which)
        assert network.meta_step == meta_step
        assert network.theta.keys() == theta.keys()
        assert [name for name in theta if not torch.equal(network.theta[name], theta[name])] == []
    assert checkpoint.load(folder).numbers["best"] == {"meta_step": 4, "accuracy": 0.75}


def test_only_validation_classes_choose_the_best_network(validated):
    images = episodes.load_splits(VALIDATED, CPU)["validation"].images
    _, seen = validated
    assert len(seen) == 4
    assert all(torch.equal(pixels, images.flatten(3)) for _, pixels in seen)


def test_an_interrupted_run_has_the_same_best_network(validated, tmp_path):
    folder, _ = validated
    with validations():
        # After the second validation, before the third.
        train.train(replace(VALIDATED, meta_steps=4), tmp_path / "parts", QUIET)
        train.train(VALIDATED, tmp_path / "parts", QUIET, resume=True)
    assert_same(tmp_path / "parts", folder)
    assert checkpoint.load(tmp_path / "parts").numbers["best"] == checkpoint.load(folder).numbers["best"]


@pytest.mark.parametrize("ends", [2, 3, 5, 6])
def test_the_last_meta_step_has_a_row_and_a_validation_and_a_longer_run_is_as_if_it_had_not(tmp_path, ends):
    config = replace(SHORT, meta_steps=8)
    short = replace(config, meta_steps=ends)
    train.train(short, tmp_path / "parts", QUIET)
    train.train(config, tmp_path / "whole", QUIET)
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        add = train.MetaStep.__call__

        def noted(step):
            add(step)
            losses.append(step.meter.sums[0].item())

        patch.setattr(train.MetaStep, "__call__", noted)
        train.train(short, tmp_path / "noted", QUIET)
    taken = (ends - 1) % config.log_every + 1
    _, rows = state(tmp_path / "parts")
    assert int(rows[-1]["meta_step"]) == ends
    assert float(rows[-1]["query_loss"]) == pytest.approx(losses[-1] / taken, rel=1e-6)
    accuracy = float(rows[-1]["validation_accuracy"])
    best = checkpoint.load(tmp_path / "parts").numbers["best"]
    assert best["accuracy"] >= accuracy - 1e-6
    # Going on to the end that is reached already changes nothing.
    before = state(tmp_path / "parts", timed=True)[1]
    train.train(short, tmp_path / "parts", QUIET, resume=True)
    assert state(tmp_path / "parts", timed=True)[1] == before
    train.train(config, tmp_path / "parts", QUIET, resume=True)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert checkpoint.load(tmp_path / "parts").numbers["best"] == checkpoint.load(tmp_path / "whole").numbers["best"]


def test_best_or_last_is_what_evaluation_and_adaptation_use(validated, tmp_path):
    folder, _ = validated
    for which, meta_step in (("best", 4), ("last", 8)):
        report = tmp_path / f"{which}.json"
        options = ("--tasks", "5", "--checkpoint", which, "--device", "cpu", "--report", report)
        result = run_command("evaluate", folder, *options)
        assert result.exit_code == 0, result.stderr
        row = json.loads(report.read_text())["row"]
        assert (row["checkpoint"], row["meta_step"]) == (which, meta_step)
        assert f"{meta_step} meta-steps ({which} checkpoint)" in result.stdout
        expected = load_network(folder, CPU, which).theta["linear.weight"]
        assert torch.equal(Learner.load(folder, device="cpu", checkpoint=which).theta["linear.weight"], expected)
        classifier = FewShotClassifier.load(folder, device="cpu", checkpoint=which)
        learned = classifier.fit(few_classes().images[:2, 0].numpy(), ["a", "b"]).learned_
        assert torch.equal(learned.learner.theta["linear.weight"], expected)


def test_queries_and_inner_steps_of_an_evaluation_are_its_own(validated, tmp_path):
    folder, _ = validated
    given = {"tasks": "4", "queries": "3", "inner-steps": "7", "report": tmp_path / "own.json"}
    result = run_command("evaluate", folder, *(word for name, value in given.items() for word in (f"--{name}", value)))
    assert result.exit_code == 0, result.stderr
    own = json.loads((tmp_path / "own.json").read_text())["row"]
    assert (own["queries"], own["inner_steps"], own["tasks"]) == (3, 7, 4)
    for stated in ("3 query images a class", "7 gradient steps", "4 tasks"):
        assert stated in result.stdout
    config, protocol = replace(VALIDATED, queries=3, inner_steps=7), Protocol(tasks=4)
    sampler = sampler_for(config, episodes.load_splits(config, CPU)["test"], protocol, CPU)
    expected = scores(load_network(folder, CPU).theta, sampler, config, 4).after
    assert own["accuracy"] == pytest.approx(100 * expected.double().mean().item())


def learnt_by_the_plain_loss(theta, task, steps, lr):
    phi = {name: value.requires_grad_() for name, value in theta.items() if not name.startswith("log_lam")}
    for _ in range(steps):
        loss = F.cross_entropy(forward(phi, task.support_images), task.support_labels)
        gradients = torch.autograd.grad(loss, list(phi.values()), allow_unused=True, materialize_grads=True)
        phi = {name: value - lr * part for (name, value), part in zip(phi.items(), gradients, strict=True)}
    return phi


@pytest.mark.parametrize("settings", [{}, {"learn_lam": "layer", "curvature": "hessian", "damping": 1.0}])
def test_without_regularization_tasks_are_learnt_by_the_plain_loss(tmp_path, settings):
    folder = tmp_path / "run"
    config = replace(SHORT, lam=2.0, meta_steps=2, **settings)
    train.train(config, folder, QUIET)
    right = {}
    for option in ("--regularized", "--no-regularized"):
        result = run_command("evaluate", folder, "--tasks", "20", "--inner-steps", "4", option, "--device", "cpu")
        assert result.exit_code == 0, result.stderr
        with (folder / "evaluation.csv").open(newline="") as file:
            right[option] = [float(line["after"]) for line in csv.DictReader(file)]
    row = json.loads((folder / "evaluation.json").read_text())["row"]
    assert (row["regularized"], row["lam"], row["algorithm"]) == (False, 0.0, "imaml")
    assert "4 gradient steps of lr 0.4, not regularized" in result.stdout
    theta, sampler = (
        load_network(folder, CPU).theta,
        sampler_for(config, episodes.load_splits(config, CPU)["test"], Protocol(), CPU),
    )
    expected = []
    for _ in range(20 // config.tasks):
        drawn = sampler.sample(config.tasks)
        for place in range(config.tasks):
            task = Tasks(*(part[place] for part in drawn))
            phi = learnt_by_the_plain_loss(theta, task, 4, config.inner_lr)
            answers = forward(phi, task.query_images).argmax(-1)
            expected.append((answers == task.query_labels).double().mean().item())
    assert right["--no-regularized"] == pytest.approx(expected)
    assert right["--regularized"] != right["--no-regularized"]


def test_there_is_no_best_network_without_a_validation(tmp_path):
    # Stopped after the first meta-step.
    assert train.train(SHORT, tmp_path / "run", Limits(1e-6, quiet=True)) == 1
    with pytest.raises(CheckpointError, match=r"has not been validated.*'last'"):
        evaluate(SHORT, tmp_path / "run", Protocol(tasks=2, checkpoint="best"))


def test_a_folder_that_cannot_be_made_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        train.train(SHORT, tmp_path / "file" / "run", QUIET)


@pytest.fixture
def _small_files():
    """The system refuses to let a file grow beyond 2 MiB, as it would with a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_small_files")
def test_a_disk_that_takes_one_checkpoint_but_not_two_is_told_before_training(tmp_path):
    folder = tmp_path / "run"
    # Its end is no multiple of its validations, so there may be two best networks in a checkpoint.
    (tmp_path / "one").write_bytes(bytes(1_800_000))
    with pytest.raises(RunError, match=r"cannot be written .*a run keeps 5.3 MiB there, which were tried"):
        train.train(SHORT, folder, QUIET)
    # Nothing is in the way of a second try.
    assert list(folder.iterdir()) == []


def test_room_is_tried_for_the_checkpoint_that_is_written(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(run_folder, "_try_out", lambda path, size: tried.append(size))
    train.train(replace(VALIDATED, meta_steps=2), tmp_path / "run", QUIET)
    (written,) = (tmp_path / "run").glob("*.safetensors")
    spare = tried[0] - 2 * written.stat().st_size
    assert 0.9 * 2**20 < spare < 2**20


def test_a_run_is_continued_where_its_tasks_are_drawn(tmp_path):
    folder = tmp_path / "run"
    train.train(replace(SHORT, meta_steps=2), folder, QUIET)
    pointer = json.loads((folder / "checkpoint.json").read_text())
    pointer["numbers"]["device"] = "cuda"
    (folder / "checkpoint.json").write_text(json.dumps(pointer))
    with pytest.raises(CheckpointError, match=r"draws its tasks on cuda, and cpu would draw others; .*--device cuda"):
        train.train(SHORT, folder, QUIET, resume=True)


def test_events_have_the_metrics_once_whatever_happened(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    told = Limits(quiet=True, tensorboard=True)
    train.train(replace(VALIDATED, meta_steps=2), folder, told)
    kept = checkpoint.load(folder)
    train.train(replace(VALIDATED, meta_steps=4), folder, told, resume=True)
    # As if it had been killed at its end, before the checkpoint, and continued.
    checkpoint.save(folder, 2, kept)
    train.train(replace(VALIDATED, meta_steps=6), folder, told, resume=True)
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    _, rows = state(folder, timed=True)
    assert [row["meta_step"] for row in rows] == ["2", "4", "6"]
    for name in ("query_loss", "validation_accuracy", "seconds"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(int(row["meta_step"]), pytest.approx(float(row[name]))) for row in rows]


def test_missing_tensorboard_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(RunError, match=r"cannot be imported .*pip install tensorboard, or leave --tensorboard out"):
        train.train(SHORT, tmp_path / "run", Limits(quiet=True, tensorboard=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metrics.json", "would be written to metrics.csv, which is a file that a run keeps"),
        ("config.json", "would be written to config.json, which"),
        ("own.csv", "is no JSON by its name"),
        ("nowhere/own.json", "cannot be written"),
        ("taken.json", "cannot be written"),
    ],
)
def test_a_report_that_would_do_harm_or_cannot_be_is_refused_before_measuring(
    validated, tmp_path, monkeypatch, name, message
):
    folder, _ = validated
    (tmp_path / "taken.csv").mkdir()
    before = {path.name for path in tmp_path.iterdir()}

    def refuse(*_):
        raise AssertionError("it was measured")

    monkeypatch.setattr(command, "evaluate", refuse)
    refused = run_command("evaluate", folder, "--report", tmp_path / name)
    assert refused.exit_code == 1
    assert f"error: --report {tmp_path / name} {message}" in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == before
