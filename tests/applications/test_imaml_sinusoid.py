"""Regression of sine waves: that all of a run is as with classes of images."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from applications.datasets import Sinusoids
from applications.imaml import __main__ as command
from applications.imaml import checkpoint, train, waves
from applications.imaml.classifier import FewShotClassifier
from applications.imaml.config import Config, ConfigError
from applications.imaml.episodes import generator_for
from applications.imaml.evaluate import Protocol, evaluate
from applications.imaml.families import SinusoidSampler
from applications.imaml.race import Race
from applications.imaml.scores import Scores
from applications.imaml.train import Limits
from applications.imaml.trained import load_network
from applications.imaml.usual import usual
from tests.helpers.few_shot import each
from tests.helpers.runs import assert_same, double_precision, spawn, state
from tests.helpers.waves import WAVES, mean_squared_error, plain

CPU, QUIET = torch.device("cpu"), Limits(quiet=True)


def run_command(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("waves") / "whole"
    train.train(WAVES, folder, QUIET)
    return folder


def test_a_run_has_the_columns_of_regression_and_a_best_network_of_the_lowest_error(tmp_path, monkeypatch):
    told = iter([0.5, 0.25, 0.25])
    monkeypatch.setattr(train, "scores", lambda *_: Scores(torch.zeros(2), torch.full((2,), next(told))))
    train.train(replace(WAVES, validate_every=2), tmp_path / "run", QUIET)
    _, rows = state(tmp_path / "run")
    assert list(rows[0]) == [
        *("meta_step", "query_mse", "support_loss", "inner_residual", "adjoint_residual", "negative_curvature"),
        "validation_mse",
    ]
    assert [float(row["validation_mse"]) for row in rows] == [0.5, 0.25, 0.25]
    assert checkpoint.load(tmp_path / "run").numbers["best"] == {"meta_step": 4, "mse": 0.25}
    assert load_network(tmp_path / "run", CPU, "best").meta_step == 4
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_resumed_is_the_whole_one_to_the_bit(whole, tmp_path):
    for meta_steps in (3, 5, 6):
        train.train(replace(WAVES, meta_steps=meta_steps), tmp_path / "parts", QUIET, resume=meta_steps > 3)
    assert_same(tmp_path / "parts", whole)
    assert checkpoint.load(tmp_path / "parts").numbers["best"] == checkpoint.load(whole).numbers["best"]


def test_training_validation_and_test_draw_tasks_of_their_own(tmp_path, monkeypatch):
    drawn, sample = [], SinusoidSampler.sample
    monkeypatch.setattr(SinusoidSampler, "sample", lambda own, tasks: drawn.append(sample(own, tasks)) or drawn[-1])
    train.train(WAVES, tmp_path / "run", QUIET)
    assert run_command("evaluate", tmp_path / "run", "--tasks", 4, "--device", "cpu").exit_code == 0
    # Two meta-steps a row; a validation at 4 and at 6 of 4 and 2 tasks; the test and its picture.
    places = {"training": [0, 1, 2, 3, 6, 7], "validation": [4, 5], "again": [8, 9], "test": [10]}
    first = {
        part: torch.cat([drawn[place].query_labels[:, 0, 0] for place in found]).tolist()
        for part, found in places.items()
    }
    assert first["validation"] == first.pop("again")
    each_once = [value for values in first.values() for value in values]
    assert len(each_once) == len(set(each_once)) == 24 + 6 + 4


def test_an_evaluation_is_what_plain_descent_comes_to(whole, tmp_path):
    report = tmp_path / "report.json"
    result = run_command("evaluate", whole, "--tasks", 6, "--seed", 3, "--device", "cpu", "--report", report)
    assert result.exit_code == 0, result.stderr
    theta = load_network(whole, CPU).theta
    tasks = SinusoidSampler(Sinusoids(), 5, 6, generator_for(3, "test tasks"))
    expected = []
    for task in (*each(tasks.sample(4)), *each(tasks.sample(2))):
        phi = theta
        for _ in range(3):
            slope = torch.func.grad(mean_squared_error)(phi, *task[:2])
            phi = {name: p - 0.02 * (slope[name] + 0.1 * (p - theta[name])) for name, p in phi.items()}
        expected.append([mean_squared_error(values, *task[2:]).item() for values in (theta, phi)])
    with report.with_suffix(".csv").open(newline="") as file:
        found = [[float(row["before"]), float(row["after"])] for row in csv.DictReader(file)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    row, values = json.loads(report.read_text())["row"], torch.tensor(found, dtype=torch.float64)
    assert "accuracy" not in row
    assert [row[name] for name in ("partition", "ways", "batch_norm", "query_sets", "split_seed")] == [None] * 5
    assert (row["split"], row["shots"], row["queries"], row["regularized"]) == ("test", 5, 6, True)
    # Student's t of 5 degrees of freedom.
    mean, interval = values[:, 1].mean().item(), 2.5705818 * values[:, 1].std().item() / 6**0.5
    assert [row["before"], row["mse"]] == pytest.approx([values[:, 0].mean().item(), mean], abs=1e-6)
    assert row["interval"] == pytest.approx(interval, abs=1e-6)
    assert "sinusoid 5-shot, 6 query points | test tasks | imaml, 6 meta-steps" in result.stdout
    assert f"| MSE before {row['before']:.3f} | after {mean:.3f} ± {interval:.3f}" in result.stdout


def test_an_evaluation_draws_waves_beside_its_report(whole, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(waves.Figure, "savefig", lambda figure, path, **_: shown.append((figure, path)))
    result = run_command("evaluate", whole, "--tasks", 2, "--device", "cpu", "--report", tmp_path / "own.json")
    assert result.exit_code == 0, result.stderr
    assert f"own.json, {tmp_path / 'own.csv'}, {tmp_path / 'own.png'}" in result.stdout
    ((figure, path),) = shown
    assert path == tmp_path / "own.png"
    theta = load_network(whole, CPU).theta
    for axes in figure.axes:
        lines = {line.get_label(): torch.tensor(line.get_xydata()) for line in axes.get_lines()}
        assert lines.keys() == {"wave", "network before", "network after adaptation", "support points"}
        assert [len(line) for line in lines.values()] == [400, 400, 400, 5]
        # The support points lie on the wave, and learning them brings the network nearer.
        x, y = lines["support points"].T
        wave = lines["wave"]
        on_wave = wave[(wave[:, :1] - x).abs().argmin(0), 1]
        assert (on_wave - y).abs().max() < 0.3
        assert x.abs().max() <= 5
        before = lines["network before"].float()
        torch.testing.assert_close(plain(theta, before[:, :1])[:, 0], before[:, 1])


def test_a_picture_may_not_take_the_place_of_the_learning_curve(whole):
    before = (whole / "curve.png").read_bytes()
    refused = run_command("evaluate", whole, "--tasks", 2, "--device", "cpu", "--report", whole / "curve.json")
    assert refused.exit_code == 1
    assert "would be written to curve.png" in refused.stderr
    assert (whole / "curve.png").read_bytes() == before
    Image.open(whole / "curve.png").verify()


@pytest.mark.parametrize(
    "options",
    [
        ("--learn-lam", "layer"),
        ("--inner", "hessian-free", "--inner-steps", 2),
        ("--inner", "lbfgs", "--curvature", "hessian"),
        ("--inner", "torch.Adam", "--inner-lr", 0.01),
        ("--algorithm", "maml", "--path-steps", 2),
        ("--algorithm", "anil", "--learn-lam", "scalar", "--lam", 0.1),
        ("--inner", "adam"),
        ("--algorithm", "fomaml", "--precision", "bf16"),
        ("--algorithm", "reptile"),
    ],
)
def test_every_algorithm_trains_and_is_evaluated(tmp_path, options):
    budget = ("--meta-steps", 3, "--tasks", 2, "--log-every", 1, "--validate-every", 1, "--validation-tasks", 2)
    trained = run_command(
        "train", "--data", "sinusoid", "--out", tmp_path / "run", "--device", "cpu", *budget, *options
    )
    assert trained.exit_code == 0, trained.stderr
    assert trained.stdout.startswith("sinusoid 10-shot, ")
    assert "3/3  query mse " in trained.stdout
    assert "trained: 3 of 3 meta-steps" in trained.stdout
    _, rows = state(tmp_path / "run")
    assert all(float(row[name]) > 0 for row in rows for name in ("query_mse", "validation_mse"))
    first, last = (checkpoint.load(tmp_path / "run").tensors[f"{name}linear.weight"] for name in ("best.", "theta."))
    assert first.isfinite().all()
    assert last.isfinite().all()
    evaluated = run_command("evaluate", tmp_path / "run", "--tasks", 2, "--device", "cpu", "--no-regularized")
    assert evaluated.exit_code == 0, evaluated.stderr


def test_two_processes_share_the_waves_of_a_meta_step(tmp_path):
    with double_precision():
        train.train(replace(WAVES, threads=1), tmp_path / "one", QUIET)
        train.train(replace(WAVES, threads=1, meta_steps=1), tmp_path / "two", QUIET)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    resumed = ("train", "--out", tmp_path / "two", "--resume", "--meta-steps", 6)
    process = spawn(*resumed, launcher=torchrun, DOUBLE="1")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert output.count("trained: 6 of 6 meta-steps") == 1
    (tensors, rows), (expected, expected_rows) = state(tmp_path / "two"), state(tmp_path / "one")
    torch.testing.assert_close(tensors, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert [float(row["query_mse"]) for row in rows] == pytest.approx(
        [float(row["query_mse"]) for row in expected_rows], rel=1e-7
    )


# --- defaults and refusals ------------------------------------------------------------------------------------


def test_defaults_are_those_of_waves_and_what_is_typed_goes_first(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(command, "train", lambda config, *_, **__: seen.append(config) or config.meta_steps)
    for typed in ((), ("--shots", 5, "--inner-lr", 0.4), ("--algorithm", "maml"), ("--lam", 0.3)):
        assert run_command("train", "--data", "sinusoid", "--out", tmp_path, *typed).exit_code == 0
    plain_run, own, maml, strong = seen
    assert plain_run == Config(data="sinusoid", **usual("sinusoid", "imaml"), queries=10)
    assert own == replace(plain_run, shots=5, queries=5, inner_lr=0.4)
    assert maml == replace(plain_run, algorithm="maml", lam=0.0)
    assert strong == replace(plain_run, lam=0.3)
    assert usual("glyphs", "imaml") == {"lam": Config.lam}


@pytest.mark.parametrize(
    "typed",
    [
        ("--ways", "20"),
        ("--ways", "5"),
        ("--batch-norm", "support"),
        ("--query-sets", "2"),
        ("--image-size", "28"),
        ("--channels", "1"),
        ("--split", "seed"),
        ("--split-seed", "1"),
        ("--root", "x"),
        ("--convolution", "grouped"),
    ],
)
def test_what_is_of_images_is_refused(tmp_path, typed):
    refused = run_command("train", "--data", "sinusoid", "--out", tmp_path / "run", *typed)
    assert refused.exit_code == 1
    told = f"error: {' '.join(typed)} is of images in classes, and the tasks of --data sinusoid are of numbers"
    assert told in refused.stderr
    assert not (tmp_path / "run").exists()


def test_an_evaluation_has_no_batch_normalisation(whole):
    for norm in ("support", "transductive"):
        refused = run_command("evaluate", whole, "--batch-norm", norm, "--device", "cpu")
        assert refused.exit_code == 1
        assert f"error: --batch-norm {norm} is of images in classes" in refused.stderr


def test_what_needs_classes_refuses_regression(whole, tmp_path):
    told = "data='sinusoid' cannot be here: its tasks ask for numbers, and this is of images in classes"
    with pytest.raises(ConfigError, match=told):
        FewShotClassifier.load(whole)
    with pytest.raises(ConfigError, match=told):
        Race(WAVES)
    for arguments in (
        ("adapt", whole, "--support", tmp_path / "support", "--query", tmp_path / "query", "--out", tmp_path / "out"),
        ("race", "--out", tmp_path / "race", "--data", "sinusoid"),
        ("paper", "--table", "omniglot", "--out", tmp_path / "paper", "--data", "sinusoid"),
        ("figures", "accuracy", "--out", tmp_path / "figures", "--run", whole),
    ):
        refused = run_command(*arguments)
        assert refused.exit_code == 1, arguments
        assert "sinusoid cannot be here: its tasks ask for numbers" in refused.stderr.replace("'", "")
    assert not (tmp_path / "race").exists()


# --- what it is for -------------------------------------------------------------------------------------------


def test_training_teaches_to_learn_a_wave_from_ten_points(tmp_path):
    budget = {
        "meta_steps": 250,
        "tasks": 8,
        "log_every": 250,
        "checkpoint_every": 250,
        "validate_every": 250,
    }
    config = Config(data="sinusoid", queries=10, device="cpu", **usual("sinusoid", "imaml") | budget)
    train.train(config, tmp_path / "run", QUIET)
    before, after = (score.mean().item() for score in evaluate(config, tmp_path / "run", Protocol(tasks=200)).measured)
    # An answer of 0 everywhere has half the mean square of the amplitudes, 4.25.
    assert before > 3
    assert after < 1.5
