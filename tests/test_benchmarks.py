"""Every benchmark that can be made small runs at toy size and says what it found; speeds are nobody's test."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from applications.imaml.paper.probe import Memory
from benchmarks import __main__ as command
from benchmarks import accuracy, adjoint, device, lanes, large, memory, meta_step, overhead, scaling


@pytest.fixture
def measure(tmp_path):
    """Run the command as a shell would, and return what it wrote and printed."""
    app = typer.Typer()
    app.command()(command.main)

    def run(name, *options):
        threads = torch.get_num_threads()
        arguments = [name, "--device", "cpu", "--repeats", "1", "--out", str(tmp_path), *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert torch.get_num_threads() == threads
        return json.loads((tmp_path / f"{name}.json").read_text()) | {"printed": result.output}

    return run


def test_overhead(measure, monkeypatch):
    for name, value in {"SIZES": (10, 200), "LARGE": 200, "BATCH": 4, "STEPS": 2, "PRODUCTS": 3, "MANY": 6}.items():
        monkeypatch.setattr(overhead, name, value)
    found = measure("overhead")
    assert [row["n"] for row in found["rows"]] == [8, 200]
    assert all(row["forward ratio"] > 0 and row["backward ratio"] > 0 for row in found["rows"])


def test_the_loop_by_hand_is_what_argmin_does(monkeypatch):
    monkeypatch.setattr(overhead, "BATCH", 4)
    given = overhead._given(50, "cpu")
    ours, by_hand = overhead._forward(given, 5), overhead._loop(given, 5)
    for mine, theirs in zip(ours.values(), by_hand, strict=True):
        # Float32, five steps.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_lanes(measure, monkeypatch):
    monkeypatch.setattr(lanes, "LANES", (1, 3))
    found = measure("lanes")
    assert [row["lanes"] for row in found["rows"]] == [1, 3]
    assert all(row["largest ‖∇f‖"] <= lanes.TOLERANCE for row in found["rows"])
    assert "leaves every bit" in found["verdict"]


def test_lanes_are_the_loop():
    problems = lanes._given(3, "cpu")
    torch.testing.assert_close(lanes.solve(problems), lanes._loop(problems), rtol=0, atol=1e-7)


def test_large(measure, monkeypatch):
    for name, value in {"RIDGE_ROWS": 30, "RIDGE_FEATURES": 12, "ROWS": 8, "FEATURES": 6, "CLASSES": 5}.items():
        monkeypatch.setattr(large, name, value)
    ridge, multinomial = measure("large")["rows"]
    assert (ridge["unknowns"], multinomial["unknowns"]) == (12, 30)
    assert ridge["‖∇f‖"] <= 1e-6
    assert min(ridge["products"], multinomial["products"]) > 10


def test_the_ridge_is_its_closed_form(monkeypatch):
    monkeypatch.setattr(large, "RIDGE_ROWS", 30)
    monkeypatch.setattr(large, "RIDGE_FEATURES", 12)
    generator = torch.Generator().manual_seed(0)
    X, w, ll, noise = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((30, 12), (12,), (12,), (30,))
    )

    def outer(ll):
        return (torch.linalg.solve(X.T @ X / 30 + ll.exp().diag(), X.T @ (X @ w + noise) / 30) - w).square().sum() / 2

    found = large.ridge("cpu")()
    torch.testing.assert_close(found.hypergradient, torch.func.grad(outer)(ll), rtol=1e-5, atol=1e-7)


def test_adjoint(measure, monkeypatch):
    for name, value in {"N": 40, "CONDITIONS": (1e1, 1e2), "ALL_CONDITIONS": (1e1,), "RANK": 8, "MEMORY": 5}.items():
        monkeypatch.setattr(adjoint, name, value)
    found = measure("adjoint")
    rows = found["rows"]
    assert [(row["spectrum"], row["κ"], row["measure"]) for row in rows] == [
        (spectrum, condition, measured)
        for spectrum in ("spread", "outliers", "scaled")
        for condition in ("1e+01", "1e+02")
        for measured in ("steps", "ms")
    ]
    # As wide as a terminal: no cell is cut or broken over lines.
    table = [line for line in found["printed"].splitlines() if line.startswith(("│", "┃"))]
    assert len(table) == 1 + len(rows)
    assert max(map(len, table)) <= 80
    assert "…" not in found["printed"]
    assert {row["κ"] for row in measure("adjoint", "--full")["rows"]} == {"1e+01"}


def test_accuracy(measure, monkeypatch):
    for name, value in {"PROBLEMS": 8, "SWEPT": 2, "LARGEST": 10}.items():
        monkeypatch.setattr(accuracy, name, value)
    assert measure("accuracy")["rows"][4]["problems"] == 8


def test_memory(measure, monkeypatch):
    for name, value in {"STEPS": (1, 2), "LAST_MAML": 1, "WAYS": 2, "SHOTS": 2, "TASKS": 1}.items():
        monkeypatch.setattr(memory, name, value)
    asked = []

    def measured(config, *, gradient=False):
        asked.append((config.algorithm, config.inner_steps, gradient))
        assert (config.ways, config.shots, config.queries, config.tasks) == (2, 2, 2, 1)
        return Memory(10 * 2**20, (12 if gradient else 14) * 2**20)

    # That a process is measured is a test of the probe's.
    monkeypatch.setattr(memory, "memory_of", measured)
    found = measure("memory")
    assert [row["in inner gradients"] for row in found["rows"]] == [2.0] * 5
    assert asked[1:] == [(row["way"], row["inner steps"], False) for row in found["rows"]]
    assert (asked[0][2], [row["way"] for row in found["rows"]].count("maml")) == (True, 1)
    assert "takes 1.000 times the memory of 1" in found["verdict"]


def test_meta_step(measure, monkeypatch):
    for name, value in {"TASKS": 2, "WAYS": 2, "INNER_STEPS": 1, "CG_STEPS": 2}.items():
        monkeypatch.setattr(meta_step, name, value)
    assert {row["way"] for row in measure("meta_step")["rows"]} >= {"task by task", "batched"}


def test_device(measure, monkeypatch):
    monkeypatch.setattr(device, "TASKS", {"cpu": 2})
    monkeypatch.setattr(device, "SAME", replace(device.SAME, ways=2, inner_steps=1, cg_steps=2))
    found = measure("device")
    loop, *ways = found["rows"]
    assert loop["way"] == "task by task"
    same = [(row["convolution"], row["precision"]) for row in ways if row["steps"] == "1 inner + 2 CG, hessian"]
    assert same == [(c, p) for c in ("windows", "grouped") for p in ("float32", "bf16")]
    assert {row["steps"] for row in ways[4:]} == {"5 inner + 3 CG, gauss-newton"}
    for row in found["rows"]:
        assert row["minutes for 20,000 x 32"] == pytest.approx(640_000 / row["tasks/s"] / 60)
        assert row["tasks/s"] / loop["tasks/s"] == pytest.approx(row["ratio"])
        assert row["cosine"] > (0.8 if row["precision"] == "bf16" else 0.9999)


def test_a_gpu_is_asked_for_graphs_and_tf32_as_well():
    ways = list(device._ways(replace(device.SAME, device="cuda", tasks=32), cuda=True))
    assert len(set(ways)) == len(ways) == 2 * 2 * 3 * 2
    chosen = {(way.way, way.config.graph, way.config.precision) for way in ways}
    assert chosen == {
        (way, way == "graph", name) for way in ("batched", "graph") for name in ("float32", "tf32", "bf16")
    }
    assert {way.config.tasks for way in ways} == {32}
    graph = next(way for way in ways if way.config.graph)
    taken = device._step(graph._replace(config=replace(graph.config, device="cpu")))
    assert isinstance(taken, device.CapturedStep)


def test_scaling(measure, monkeypatch):
    # On images that show nothing, which need not be drawn.
    for name, value in {"COMMAND": ("-m", "tests.helpers.runs", "train"), "WAYS": 3, "TASKS": 2, "ROW": 1}.items():
        monkeypatch.setattr(scaling, name, value)
    found = measure("scaling")
    one, two = found["rows"]
    assert (one["processes"], one["ratio"], two["processes"]) == (1, 1.0, 2)
    assert two["ratio"] == pytest.approx(two["tasks/s"] / one["tasks/s"]) == pytest.approx(2 * two["per process"])
    assert "two processes need two free cores" in found["verdict"]


def test_runs_that_are_not_the_same_are_found_out():
    one, other = ({"query_loss": losses} for losses in ([2.0, 1.0], [2.5, 1.0]))
    assert scaling._difference(one, other) == 0.25
    assert scaling._difference(one, one) == 0


def test_an_unknown_name_is_refused():
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, ["speed"])
    assert result.exit_code != 0
    assert "no benchmark" in result.output
