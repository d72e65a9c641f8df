"""The paper's tables: cells go on where they were stopped, are not done twice, and stand beside the right numbers."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from applications.datasets import ClassImages
from applications.imaml import __main__ as command
from applications.imaml import checkpoint, episodes
from applications.imaml.config import ConfigError
from applications.imaml.evaluate import Protocol
from applications.imaml.paper import cells, table
from applications.imaml.paper.cells import TABLES, Cell, Number, Overrides, cells_of, config_of, protocol_of
from applications.imaml.paper.quoted import QUOTED
from applications.imaml.paper.results import CellResult, SeedResult, as_markdown
from applications.imaml.paper.table import Request, fill
from applications.imaml.run_folder import CONFIG, RunError
from applications.imaml.train import Limits

TOY = Overrides(data="glyphs", meta_steps=2, tasks=1, query_sets=1, device="cpu")
REQUEST = Request("omniglot", cells=("5way-1shot-first-order",), overrides=TOY, protocol=Protocol(tasks=3), quiet=True)
BOTH = replace(REQUEST, cells=("5way-1shot-imaml-gd", "5way-1shot-first-order"))


@pytest.fixture(autouse=True)
def _small_dataset(monkeypatch):
    images = torch.randint(0, 256, (16, 4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = ClassImages(images, tuple(f"class {index}" for index in range(16)), "glyphs")
    monkeypatch.setattr(episodes, "load", lambda name, root, seed: dataset)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 6, "validation": 5, "test": 5}})
    monkeypatch.setattr(table, "config_of", lambda *given: replace(config_of(*given), validation_tasks=1))


@pytest.fixture
def told():
    return []


def forbid(monkeypatch, *names):
    def refuse(*args, **options):
        raise AssertionError("done again")

    for name in names:
        monkeypatch.setattr(table, name, refuse)


def test_command_fills_cells_and_goes_on(tmp_path, monkeypatch):
    arguments = ["paper", "--table", "omniglot", "--out", str(tmp_path), "--data", "glyphs", "--meta-steps", "2"]
    arguments += ["--tasks", "1", "--query-sets", "1", "--test-tasks", "3", "--quiet", "--device", "cpu"]
    arguments += ["--cell", "5way-1shot-imaml-gd", "--cell", "5way-1shot-first-order"]
    first = CliRunner().invoke(command.app, arguments)
    assert first.exit_code == 0, first.output
    text = (tmp_path / "omniglot.md").read_text()
    assert text in first.output
    assert "| iMAML, gradient descent: the paper | 99.16 ± 0.35 |" in text
    assert "numbers do not compare" in text
    assert text.startswith("# glyphs, in the place of omniglot, tuned settings: ")
    assert "2 meta-steps of 1 task with 1 query set," in text
    cells = json.loads((tmp_path / "omniglot.json").read_text())["cells"]
    assert [cell["row"] for cell in cells] == ["iMAML, gradient descent", "first-order"]
    assert [len(cell["seeds"]) for cell in cells] == [1, 1]
    assert cells[0]["paper"] == {"mean": 99.16, "interval": 0.35}
    assert "CPU" in cells[0]["seeds"][0]["hardware"]
    evaluation = json.loads((tmp_path / "5way-1shot-imaml-gd" / "seed-0" / "evaluation.json").read_text())
    assert cells[0]["ours"]["mean"] == pytest.approx(evaluation["row"]["accuracy"])
    forbid(monkeypatch, "train", "evaluate")
    again = CliRunner().invoke(command.app, arguments)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "omniglot.md").read_text() == text


def test_command_refuses_in_a_line(tmp_path):
    arguments = ["paper", "--table", "omniglot", "--out", str(tmp_path), "--cell", "7way"]
    refused = CliRunner().invoke(command.app, arguments)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: --cell 7way is in no cell of omniglot")
    # Omniglot needs files.
    rootless = CliRunner().invoke(command.app, arguments[:5])
    assert rootless.exit_code == 1
    assert "error: no --root, but" in rootless.stderr


def test_stopped_cell_goes_on_to_the_same_bits(tmp_path, monkeypatch, told):
    whole, _, _ = fill(REQUEST, tmp_path / "whole", told.append)
    train = table.train
    monkeypatch.setattr(table, "train", lambda *args, **options: train(*args[:2], Limits(1e-9, True), **options))
    stopped, text, _ = fill(REQUEST, tmp_path / "parts", told.append)
    monkeypatch.setattr(table, "train", train)
    went_on, _, _ = fill(REQUEST, tmp_path / "parts", told.append)
    assert (whole, stopped, went_on) == (True, False, True)
    assert "| first-order: ours | — |" in text
    ends = [checkpoint.load(tmp_path / name / REQUEST.cells[0] / "seed-0") for name in ("whole", "parts")]
    assert ends[1].numbers["meta_step"] == 2
    # The meter has NaN for what a first-order algorithm lacks.
    learnt = [name for name in ends[0].tensors if not name.endswith("meter")]
    assert [name for name in learnt if not torch.equal(ends[0].tensors[name], ends[1].tensors[name])] == []


def test_no_time_left_leaves_the_rest(tmp_path, told):
    complete, _, _ = fill(replace(BOTH, seconds=1e-9), tmp_path, told.append)
    assert not complete
    assert told == []
    assert not (tmp_path / "5way-1shot-imaml-gd").exists()


def test_other_protocol_evaluates_again_without_training(tmp_path, monkeypatch, told):
    fill(REQUEST, tmp_path, told.append)
    before = checkpoint.load(tmp_path / REQUEST.cells[0] / "seed-0")
    _, text, _ = fill(replace(REQUEST, protocol=Protocol(tasks=4)), tmp_path, told.append)
    assert "4 tasks" in text
    after = checkpoint.load(tmp_path / REQUEST.cells[0] / "seed-0")
    assert all(
        torch.equal(value, after.tensors[name]) for name, value in before.tensors.items() if not name.endswith("meter")
    )


def test_folder_of_another_run_is_refused_before_training(tmp_path, monkeypatch, told):
    fill(REQUEST, tmp_path, told.append)
    forbid(monkeypatch, "train")
    other = replace(REQUEST, overrides=replace(TOY, meta_steps=3))
    with pytest.raises(ConfigError, match=r"meta_steps=2 there, 3 now"):
        fill(other, tmp_path, told.append)
    # Where it computes may change.
    elsewhere = replace(REQUEST, overrides=replace(TOY, threads=1))
    assert fill(elsewhere, tmp_path, told.append)[0]


def test_what_earlier_calls_have_measured_stays_in_the_table(tmp_path, monkeypatch, told):
    other = replace(REQUEST, cells=("5way-1shot-imaml-gd",))
    fill(replace(REQUEST, seeds=2), tmp_path, told.append)
    first = json.loads((tmp_path / "omniglot.json").read_text())["cells"][0]
    fill(other, tmp_path, told.append)
    cells = json.loads((tmp_path / "omniglot.json").read_text())["cells"]
    assert [cell["row"] for cell in cells] == ["iMAML, gradient descent", "first-order"]
    assert cells[1] == first
    # Nor are seeds beyond those that are asked for now dropped.
    with monkeypatch.context() as patch:
        forbid(patch, "train", "evaluate")
        _, text, _ = fill(REQUEST, tmp_path, told.append)
    assert json.loads((tmp_path / "omniglot.json").read_text())["cells"] == cells
    assert "| iMAML, gradient descent: ours | —" not in text
    # Measured in another way, it is not of this table.
    _, text, _ = fill(replace(other, protocol=Protocol(tasks=4)), tmp_path, told.append)
    assert "first-order" not in text


def test_damaged_record_is_refused(tmp_path, told):
    fill(REQUEST, tmp_path, told.append)
    (tmp_path / REQUEST.cells[0] / "seed-0" / table.DONE).write_text("{}")
    with pytest.raises(ConfigError, match="delete it"):
        fill(REQUEST, tmp_path, told.append)


def test_diverged_cell_is_a_result_and_the_others_go_on(tmp_path, monkeypatch, told):
    train = table.train

    def diverge(config, folder, limits, **options):
        if config.algorithm == "imaml":
            train(replace(config, meta_steps=1), folder, limits, **options)
            config.save(folder / CONFIG)
            raise RunError("the query loss is nan")
        return train(config, folder, limits, **options)

    monkeypatch.setattr(table, "train", diverge)
    complete, text, _ = fill(BOTH, tmp_path, told.append)
    assert complete
    assert "| iMAML, gradient descent: ours | diverged |" in text
    assert "- 5way-1shot-imaml-gd: seed 0: the query loss is nan" in text
    assert "| first-order: ours | —" not in text


def test_run_that_cannot_start_ends_it(tmp_path, monkeypatch, told):
    def fail(*args, **options):
        raise RunError("no room")

    monkeypatch.setattr(table, "train", fail)
    with pytest.raises(RunError, match="no room"):
        fill(BOTH, tmp_path, told.append)


def test_seeds_are_runs_of_their_own(tmp_path, told):
    fill(replace(REQUEST, seeds=2), tmp_path, told.append)
    seeds = json.loads((tmp_path / "omniglot.json").read_text())["cells"][0]["seeds"]
    assert [seed["row"]["training_seed"] for seed in seeds] == [0, 1]
    ends = [checkpoint.load(tmp_path / REQUEST.cells[0] / f"seed-{seed}").tensors for seed in (0, 1)]
    assert not torch.equal(ends[0]["theta.linear.weight"], ends[1]["theta.linear.weight"])
    with pytest.raises(ConfigError, match="seeds=0"):
        replace(REQUEST, seeds=0)


def seed_result(accuracies, source="omniglot"):
    row = {"source": source, "training_seed": 0, "accuracy": 1.0, "interval": 0.1, "algorithm": "imaml"}
    row |= {"inner": "gradient", "inner_lr": 0.1, "inner_steps": 1, "lam": 1.0, "split": "test", "tasks": 2}
    row |= {"queries": 1, "batch_norm": "support", "task_seed": 0, "meta_step": 7, "shots": 1}
    return SeedResult(row, accuracies, 1, 16, "hessian", 60.0, "a machine", 1, 1)


def test_interval_is_over_tasks_after_averaging_seeds():
    cell = TABLES["omniglot"][0]
    result = CellResult(cell, [seed_result([0.0, 1.0, 1.0, 1.0]), seed_result([1.0, 1.0, 0.0, 1.0])])
    # Tasks score 50, 100, 50, 100: standard deviation 50/sqrt(3); Student's quantile for 3 degrees of freedom.
    assert result.number.mean == 75
    assert result.number.interval == pytest.approx(3.1824463 * 50 / 3**0.5 / 2)
    text = as_markdown("omniglot", "paper", [result])
    assert f"| {cell.algorithm}: ours | {result.number} |" in text
    assert "do not compare" not in text
    assert "7 meta-steps of 16 tasks with 1 query set, 1.0 minutes | a machine" in text
    assert "λ = 1, 1 gradient step of 0.1, hessian |" in text
    renamed = CellResult(cell, [seed_result([0.0, 1.0], "photographs laid out like mini-imagenet")])
    assert text.startswith("# omniglot, paper settings: ")
    text = as_markdown("omniglot", "paper", [renamed])
    assert "do not compare" in text
    assert text.startswith("# photographs laid out like mini-imagenet, in the place of omniglot, paper settings: ")
    nothing_yet = [CellResult(cell, [])]
    assert as_markdown("omniglot", "paper", nothing_yet, "glyphs").startswith("# glyphs, in the place of omniglot, ")


def test_training_that_is_otherwise_than_the_evaluation_is_told():
    cell = next(cell for cell in TABLES["omniglot"] if cell.row == "reptile")
    seed = replace(seed_result([0.0, 1.0]), inner_steps=3, shots=15)
    seed.row.update(algorithm="reptile", inner="adam", inner_steps=5, lam=0.0)
    text = as_markdown("omniglot", "paper", [CellResult(cell, [seed])])
    assert "| λ = 0, 5 adam steps of 0.1; in training 3 steps, 15 support images a class |" in text
    assert "| Reptile: ours | 50.00 ± " in text
    assert "| Reptile, quoted by the paper | 97.68 ± 0.04 |" in text


def test_cell_is_evaluated_as_its_own_paper_says(tmp_path, monkeypatch, told):
    monkeypatch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 5, "validation": 5, "test": 5}})
    quick = replace(QUOTED["omniglot", "reptile", 5, 1], shots=2, test_steps=4)
    monkeypatch.setattr(cells, "QUOTED", QUOTED | {("omniglot", "reptile", 5, 1): quick})
    request = replace(REQUEST, settings="paper", cells=("5way-1shot-reptile",))
    fill(request, tmp_path, told.append)
    (seed,) = json.loads((tmp_path / "omniglot.json").read_text())["cells"][0]["seeds"]
    assert (seed["row"]["shots"], seed["row"]["inner_steps"]) == (1, 4)
    assert (seed["shots"], seed["inner_steps"]) == (2, 3)
    forbid(monkeypatch, "train", "evaluate")
    assert fill(request, tmp_path, told.append)[0]


def test_published_numbers_are_the_papers():
    numbers = {(c.table, c.column, c.row): str(c.published) for cells in TABLES.values() for c in cells}
    assert len(numbers) == 25
    assert numbers["omniglot", "20-way 1-shot", "maml"] == "95.80 ± 0.30"
    assert numbers["omniglot", "20-way 5-shot", "reptile"] == "97.12 ± 0.32"
    assert numbers["mini-imagenet", "5-way 1-shot", "maml"] == "48.70 ± 1.84"
    assert numbers["mini-imagenet", "5-way 1-shot", "reptile"] == "49.97 ± 0.32"
    assert numbers["omniglot", "20-way 1-shot", "imaml-hf"] == "96.18 ± 0.36"
    assert numbers["omniglot", "5-way 5-shot", "imaml-gd"] == "99.67 ± 0.12"
    assert numbers["omniglot", "20-way 5-shot", "first-order"] == "97.90 ± 0.10"
    assert numbers["mini-imagenet", "5-way 1-shot", "imaml-hf"] == "49.30 ± 1.88"


def test_cells_are_chosen_by_whole_words():
    names = [cell.name for cell in cells_of("omniglot", ["imaml-hf", "20way-5shot"])]
    assert len(names) == 8
    assert "20way-5shot-imaml-gd" in names
    assert "5way-5shot-imaml-gd" not in names
    assert len(cells_of("omniglot", [])) == 20
    assert [cell.name for cell in cells_of("mini-imagenet", ["maml"])] == ["5way-1shot-maml"]
    with pytest.raises(ConfigError, match="cells='way'"):
        cells_of("omniglot", ["way"])


@pytest.mark.parametrize("settings", ["tuned", "paper"])
@pytest.mark.parametrize("cell", [cell for cells in TABLES.values() for cell in cells], ids=lambda cell: cell.name)
def test_every_cell_can_be_trained(cell, settings):
    config = config_of(cell, settings, 3, Overrides(root="somewhere"))
    measured = protocol_of(cell, settings, Protocol()).applied(config)
    assert (config.data, config.ways, measured.shots, config.seed) == (cell.table, cell.ways, cell.shots, 3)
    assert config.meta_steps == 20_000 or (settings == "paper" and cell.row in ("maml", "reptile"))
    # A class has 20 images of characters.
    assert config.shots + config.queries * config.query_sets <= (600 if cell.table == "mini-imagenet" else 20)


def test_quoted_settings_are_those_of_their_own_papers():
    def settings(table, row, ways, shots):
        cell = Cell(table, row, ways, shots, Number(0, 0))
        config = config_of(cell, "paper", 0, Overrides(root="somewhere"))
        found = (config.inner, config.inner_lr, config.inner_steps, config.tasks, config.meta_steps, config.shots)
        return (*found, protocol_of(cell, "paper", Protocol()).inner_steps)

    # On the mean over five or twenty classes; the code of MAML has a sum.
    assert settings("omniglot", "maml", 5, 5) == ("gradient", pytest.approx(5 * 0.4), 1, 32, 60_000, 5, 3)
    assert settings("omniglot", "maml", 20, 1) == ("gradient", pytest.approx(20 * 0.1), 5, 16, 60_000, 1, 5)
    assert settings("mini-imagenet", "maml", 5, 1) == ("gradient", pytest.approx(5 * 0.01), 5, 4, 60_000, 1, 10)
    assert settings("omniglot", "reptile", 5, 1) == ("adam", 1e-3, 3, 10, 100_000, 15, 5)
    assert settings("omniglot", "reptile", 20, 5) == ("adam", 4.6e-4, 12, 3, 200_000, 12, 97)
    tuned = {
        row: config_of(Cell("omniglot", row, 5, 1, Number(0, 0)), "tuned", 0, Overrides(root="somewhere"))
        for row in ("maml", "reptile")
    }
    assert {row: (config.algorithm, config.lam, config.query_sets) for row, config in tuned.items()} == {
        "maml": ("maml", 0.0, 4),
        "reptile": ("reptile", 0.0, 1),
    }
    smaller = config_of(TABLES["omniglot"][-1], "paper", 0, Overrides(root="somewhere", tasks=2, curvature="hessian"))
    assert (smaller.algorithm, smaller.tasks, smaller.curvature) == ("reptile", 2, "gauss-newton")


def test_paper_settings_are_the_papers():
    descent, newton, first = (
        config_of(Cell("omniglot", row, 20, 1, Number(0, 0)), "paper", 0, Overrides(root="somewhere"))
        for row in ("imaml-gd", "imaml-hf", "first-order")
    )
    assert (descent.lam, descent.inner_lr, descent.inner_steps, descent.cg_steps) == (2, 0.1, 25, 5)
    assert (descent.meta_lr, descent.tasks, descent.schedule) == (1e-3, 32, "constant")
    assert descent.curvature == "hessian-unguarded"
    assert newton.inner == "hessian-free"
    assert (first.algorithm, first.lam, first.curvature) == ("fomaml", 0, "gauss-newton")
    photographs = config_of(TABLES["mini-imagenet"][0], "paper", 0, Overrides(root="somewhere"))
    assert (photographs.lam, photographs.inner_steps, photographs.queries) == (0.5, 10, 15)
    chosen = config_of(TABLES["omniglot"][0], "paper", 0, Overrides(root="somewhere", curvature="hessian"))
    assert chosen.curvature == "hessian"
