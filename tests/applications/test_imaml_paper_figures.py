"""The figures' numbers against closed forms, dense solves, plain loops and finite differences; their files."""

import csv
import json
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from applications.datasets import ClassImages
from applications.imaml import __main__ as command
from applications.imaml import episodes, train
from applications.imaml.config import Config, ConfigError
from applications.imaml.episodes import Tasks
from applications.imaml.paper import cost, probe, smooth
from applications.imaml.paper.accuracy import AccuracySettings, accuracy_of_gradients, relative_error
from applications.imaml.paper.chart import IMAML, MAML, Chart, Panel, Series
from applications.imaml.paper.cost import CostSettings
from applications.imaml.paper.linear import Exact, RegressionSettings, Way, draw_tasks, meta_gradient
from applications.imaml.paper.probe import Memory, memory_of
from applications.imaml.paper.regression import regression
from applications.imaml.paper.smooth import SmoothProblem
from applications.imaml.run_folder import RunError

SMALL = RegressionSettings(
    features=6, samples=4, tasks=3, condition=10, most_inner_steps=8, train_inner_steps=2, meta_steps=5, repeats=2
)
LAM = SMALL.lam


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    tasks = draw_tasks(SMALL, generator)
    return tasks, Exact(tasks, LAM), torch.randn(SMALL.features, dtype=torch.float64, generator=generator)


def each(tasks):
    return zip(*tasks, strict=True)


def inner_matrix(X):
    return X.T @ X / len(X) + LAM * torch.eye(X.shape[1], dtype=X.dtype)


def dense_meta_loss(theta, tasks):
    """Task by task, from normal equations."""
    losses = []
    for X, y, Xq, yq in each(tasks):
        w = torch.linalg.solve(inner_matrix(X), X.T @ y / len(X) + LAM * theta)
        losses.append((Xq @ w - yq).square().mean() / 2)
    return torch.stack(losses).mean()


def test_closed_form_is_that_of_the_normal_equations(problem):
    tasks, exact, theta = problem
    torch.testing.assert_close(exact.meta_loss(theta), dense_meta_loss(theta, tasks), rtol=1e-12, atol=0)
    expected = torch.func.grad(dense_meta_loss)(theta, tasks)
    torch.testing.assert_close(exact.meta_gradient(theta), expected, rtol=1e-10, atol=1e-12)
    # Of a quadratic a central difference is exact.
    differences = [
        (dense_meta_loss(theta + e, tasks) - dense_meta_loss(theta - e, tasks)) / 2
        for e in torch.eye(len(theta), dtype=theta.dtype)
    ]
    torch.testing.assert_close(exact.meta_gradient(theta), torch.stack(differences), rtol=1e-9, atol=1e-11)
    assert exact.meta_gradient(exact.minimum).norm() < 1e-10
    assert exact.meta_loss(exact.minimum) < exact.meta_loss(theta)


def test_step_sizes_are_those_of_the_largest_curvature(problem):
    tasks, exact, theta = problem
    largest = max(torch.linalg.eigvalsh(inner_matrix(X))[-1].item() for X, *_ in each(tasks))
    assert exact.inner_lr == pytest.approx(1 / largest)
    hessian = torch.func.hessian(dense_meta_loss)(theta, tasks)
    assert exact.meta_lr == pytest.approx(1 / torch.linalg.eigvalsh(hessian)[-1].item())


@pytest.mark.parametrize("algorithm", ["imaml", "maml", "fomaml"])
@pytest.mark.parametrize("steps", [1, 4])
def test_meta_gradients_are_those_of_the_path(problem, algorithm, steps):
    """w_k = w* + Mᵏ(theta - w*) with M = 1 - t A; its derivative, or that of w*, or none, is applied."""
    tasks, exact, theta = problem
    lr, eye = exact.inner_lr, torch.eye(len(theta), dtype=theta.dtype)
    expected = torch.zeros_like(theta)
    for X, y, Xq, yq in each(tasks):
        A = inner_matrix(X)
        D = LAM * torch.linalg.inv(A)
        solution = torch.linalg.solve(A, X.T @ y / len(X) + LAM * theta)
        M = torch.linalg.matrix_power(eye - lr * A, steps)
        v = Xq.T @ (Xq @ (solution + M @ (theta - solution)) - yq) / len(yq)
        jacobian = {"imaml": D, "maml": D + M @ (eye - D), "fomaml": eye}[algorithm]
        expected += jacobian.T @ v / len(tasks.y)
    found = meta_gradient(theta, tasks, LAM, lr, Way(algorithm, steps, SMALL.features))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_few_conjugate_gradient_steps_are_not_enough(problem):
    tasks, exact, theta = problem
    true = exact.meta_gradient(theta)
    errors = [
        (meta_gradient(theta, tasks, LAM, exact.inner_lr, Way("imaml", 400, cg)) - true).norm() / true.norm()
        for cg in (1, 2, SMALL.features)
    ]
    assert errors[0] > errors[1] > 1e-3
    assert errors[2] < 1e-8


def test_regression_figure_compares_all(tmp_path):
    chart = regression(SMALL)
    inner, conjugate, training = chart.panels
    assert [s.label for s in inner.series][-2:] == ["MAML, through the path", "first-order"]
    assert all(len(s.x) == 4 and s.repeats == 2 for s in inner.series)
    assert conjugate.series[0].x == [1, 2, 4]
    exact = training.series[0].median
    assert all(later < earlier for earlier, later in pairwise(exact))
    # All start from the same place.
    assert len({series.median[0] for series in training.series}) == 1
    assert "2 problems" in chart.spread
    assert len(chart.findings) == 3
    check_files(chart, tmp_path)


def check_files(chart, folder):
    picture, data, table = chart.save(folder)
    assert picture.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(data.read_text())
    assert saved["settings"] == json.loads(json.dumps(dict(chart.settings)))
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves = [series for panel in chart.panels for series in panel.series]
    assert len(rows) == sum(len(series.x) for series in curves)
    assert float(rows[0]["median"]) == pytest.approx(curves[0].median[0], rel=1e-6)
    assert saved["panels"][0]["series"][0]["high"] == list(curves[0].high)


def test_series_has_the_spread_of_its_repeats(tmp_path):
    measured = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 6.0]])
    series = Series.of("a", IMAML, [1, 2], measured)
    assert (series.median, series.low, series.high, series.repeats) == ([2, 0], [1, 0], [3, 6], 3)
    # Zeros have no place on a logarithmic scale, and must not be warned about.
    check_files(Chart("c", "t", "s", {}, [Panel("p", "x", "y", [series])], []), tmp_path)


@pytest.mark.parametrize(
    ("settings", "wrong", "told"),
    [
        (RegressionSettings, {"repeats": 0}, "repeats=0"),
        (RegressionSettings, {"condition": 0.5}, "condition=0.5"),
        (RegressionSettings, {"tasks": 1}, "leave the best"),
        (AccuracySettings, {"lr": 0.0}, r"lr=0\.0"),
        (AccuracySettings, {"most_cg_steps": 0}, "most_cg_steps=0"),
        (CostSettings, {"most_path_steps": 0}, "most_path_steps=0"),
        (CostSettings, {"clock": "cpu", "device": "cuda"}, "clock='cpu'"),
    ],
)
def test_what_cannot_be_is_refused(settings, wrong, told):
    with pytest.raises(ConfigError, match=told):
        settings(**wrong)


# The network with smooth units.


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(smooth, "_HIDDEN", 3)
    draw = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    # Mostly white, as paper is: with more ink the curvature is too large for the step size.
    images, queries = 1 - torch.rand(2, 2, 3, 1, 28, 28, **draw).pow(4)
    labels = torch.arange(3).expand(2, 3)
    tasks = Tasks(images, labels, queries, labels)
    return SmoothProblem(tasks, 0.3, 0.5, torch.Generator().manual_seed(2)), tasks


def split(vector):
    return {"hidden": vector[:147].reshape(49, 3), "linear": vector[147:].reshape(3, 3)}


def cross_entropy(vector, images, labels):
    phi = split(vector)
    pixels = 1 - images.unflatten(-1, (7, 4)).unflatten(-3, (7, 4)).mean((-1, -3)).flatten(1)
    return F.cross_entropy(torch.tanh(pixels @ phi["hidden"]) @ phi["linear"], labels)


def descended(theta, task, steps):
    phi = theta
    for _ in range(steps):
        slope = torch.func.grad(cross_entropy)(phi, task.support_images, task.support_labels)
        phi = phi - 0.5 * (slope + 0.3 * (phi - theta))
    return phi


def theta_of(problem):
    return torch.cat([problem._theta[name][0].flatten() for name in ("hidden", "linear")])


def task_of(tasks, index):
    return Tasks(*(part[index] for part in tasks))


def test_exact_meta_gradient_is_the_slope_of_the_whole(tiny):
    problem, tasks = tiny
    theta, task, h = theta_of(problem), task_of(tasks, 1), 1e-3
    direction = torch.randn(len(theta), dtype=theta.dtype, generator=torch.Generator().manual_seed(3))
    direction /= direction.norm()

    def outer(t):
        return cross_entropy(descended(theta + t * direction, task, 800), task.query_images, task.query_labels)

    with torch.no_grad():
        slope = (8 * (outer(h) - outer(-h)) - (outer(2 * h) - outer(-2 * h))) / (12 * h)
    torch.testing.assert_close(problem.exact()[1] @ direction, slope, rtol=1e-7, atol=1e-10)
    assert problem.residual() < 1e-12


def test_what_is_certified_is_the_dense_solve(tiny):
    """lam A⁻¹ v with A at the exact solution, v after three steps."""
    problem, tasks = tiny
    theta, task = theta_of(problem), task_of(tasks, 0)
    solution, phi = (descended(theta, task, steps).detach() for steps in (800, 3))
    H = torch.func.hessian(cross_entropy)(solution, task.support_images, task.support_labels)
    v = torch.func.grad(cross_entropy)(phi, task.query_images, task.query_labels)
    expected = 0.3 * torch.linalg.solve(H + 0.3 * torch.eye(len(H), dtype=H.dtype), v)
    torch.testing.assert_close(problem.exact_adjoint(3)[0], expected, rtol=1e-8, atol=1e-11)


def test_path_gradient_is_that_of_a_plain_loop(tiny):
    problem, tasks = tiny
    theta, task = theta_of(problem).requires_grad_(), task_of(tasks, 0)
    loss = cross_entropy(descended(theta, task, 4), task.query_images, task.query_labels)
    (expected,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(problem.through_path(4)[0], expected, rtol=1e-9, atol=1e-12)


def test_certificate_is_beside_the_truth(tiny):
    problem, _ = tiny
    for steps in (8, 32):
        found = problem.certified(steps, None)
        true = relative_error(found.gradient, problem.exact_adjoint(steps))
        assert ((true / 2 < found.estimate) & (found.estimate < 20 * true)).all()
    exact = problem.exact()
    for cg_steps in (3, 6):
        found = problem.certified(None, cg_steps)
        true = relative_error(found.gradient, exact)
        # After few steps the smallest Ritz value lies above the smallest eigenvalue, and the estimate below the truth.
        assert ((true / 3 < found.estimate) & (found.estimate < 30 * true)).all()


@pytest.mark.parametrize("trained", [False, True])
def test_accuracy_figure_has_truth_and_estimate(monkeypatch, tmp_path, trained):
    images = torch.randint(0, 256, (14, 4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = ClassImages(images, tuple(f"class {index}" for index in range(14)), "glyphs")
    monkeypatch.setattr(episodes, "load", lambda name, root, seed: dataset)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 6, "validation": 3, "test": 5}})
    monkeypatch.setattr(smooth, "_HIDDEN", 3)
    run = tmp_path / "run" if trained else None
    if run is not None:
        train.train(Config(ways=3, meta_steps=1, tasks=2, lam=0.5, device="cpu"), run, train.Limits(quiet=True))
    chart = accuracy_of_gradients(AccuracySettings(tasks=2, most_inner_steps=4, most_cg_steps=4), run)
    assert chart.panels[2].title == f"{'the trained' if trained else 'a new'} network of the experiments, λ = " + (
        "0.5" if trained else "0.1"
    )
    for panel in chart.panels[1:]:
        true, estimate = (torch.tensor(list(series.median)) for series in panel.series)
        assert true[-1] < true[0]
        assert ((true / 10 < estimate) & (estimate < 100 * true)).all()
    check_files(chart, tmp_path)


# Memory and time.


def test_memory_figure_asks_a_fresh_process(monkeypatch, tmp_path):
    asked = []

    def measured(config, *, gradient=False):
        asked.append((config.algorithm, config.inner_steps, gradient))
        grown = config.inner_steps if config.algorithm == "maml" else 2
        return Memory(100 * 2**20, (100 + (5 if gradient else 10 * grown)) * 2**20)

    monkeypatch.setattr(cost, "memory_of", measured)
    chart = cost.memory(CostSettings(ways=2, shots=1, most_inner_steps=4, most_path_steps=2))
    assert asked[0] == ("imaml", 1, True)
    assert [entry[:2] for entry in asked[1:]] == [
        *(("imaml", k) for k in (1, 2, 4)),
        *(("maml", k) for k in (1, 2)),
        *(("fomaml", k) for k in (1, 2, 4)),
    ]
    implicit, path, _ = chart.panels[0].series
    assert (implicit.median, path.median) == ([20, 20, 20], [10, 20])
    assert "4.00 inner gradients" in chart.findings[1]
    check_files(chart, tmp_path)


def test_probe_measures_a_process():
    settings = CostSettings(ways=5, shots=5, threads=1)
    measured = memory_of(settings.config("imaml", 1))
    # Sixty-four 14x14 maps of each of 25 images, in float32, are the least that a gradient keeps.
    assert measured.peak - measured.before > 25 * 64 * 14 * 14 * 4


def test_probe_tells_what_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(probe.sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"measuring maml with 2 steps failed \(exit status 1\)"):
        memory_of(CostSettings().config("maml", 2))


def test_time_figure_times_every_algorithm(tmp_path):
    chart = cost.seconds(
        CostSettings(ways=2, shots=1, most_inner_steps=2, most_path_steps=1, repeats=2, threads=1, clock="cpu")
    )
    implicit, path, first_order = chart.panels[0].series
    assert (implicit.x, path.x, first_order.x) == ([1, 2], [1], [1, 2])
    assert path.style == MAML
    assert all(0 < low <= high for low, high in zip(implicit.low, implicit.high, strict=True))
    assert chart.findings[-1].startswith("with 1 inner step MAML takes")
    assert (chart.panels[0].ylabel, implicit.repeats) == ("CPU time (s)", 2)
    check_files(chart, tmp_path)


def test_command_draws_and_tells(tmp_path):
    options = ["--features", "4", "--samples", "3", "--tasks", "2", "--most-inner-steps", "2", "--meta-steps", "1"]
    called = CliRunner().invoke(
        command.app, ["figures", "regression", "--out", str(tmp_path / "new"), "--repeats", "1", *options]
    )
    assert called.exit_code == 0, called.output
    assert "meta-loss above its minimum after 1 meta-step, from" in called.output
    settings = json.loads((tmp_path / "new" / "regression.json").read_text())["settings"]
    assert (settings["features"], settings["meta_steps"], settings["seed"]) == (4, 1, 0)
    file = tmp_path / "file"
    file.touch()
    refused = CliRunner().invoke(command.app, ["figures", "regression", "--out", str(file)])
    assert (refused.exit_code, refused.stderr[:6]) == (1, "error:")
