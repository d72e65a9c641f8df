"""A race keeps what is done, goes on where it was stopped, and adds up rightly."""

import math

import pytest
import torch
from typer.testing import CliRunner

from applications.imaml import __main__ as command
from applications.imaml import checkpoint, episodes, exactness
from applications.imaml import race as racing
from applications.imaml.config import Config, ConfigError
from applications.imaml.race import Race, Result, table
from applications.imaml.race_picture import Curve
from applications.imaml.run_folder import RunError
from applications.imaml.train import Limits, train
from applications.imaml.variants import VARIANTS

BASE = Config(
    ways=3, tasks=2, meta_steps=4, inner_steps=1, cg_steps=1, log_every=2, validate_every=2, validation_tasks=3,
    schedule="constant", device="cpu",
)  # fmt: skip
PLAN = Race(BASE, "curvature", ("gauss-newton", "first-order"), seeds=1, test_tasks=4)


@pytest.fixture(autouse=True)
def _few_characters(characters, monkeypatch):
    monkeypatch.setattr(episodes, "load", lambda name, root, seed: characters)
    monkeypatch.setattr(exactness, "_INNER_STEPS", 3)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 20, "validation": 10, "test": 10}})


def run(plan, out):
    told = []
    return racing.race(plan, out, told.append, quiet=True), told


def test_every_cell_is_a_run_and_is_not_run_again(tmp_path, monkeypatch):
    done, told = run(PLAN, tmp_path)
    assert done
    compared = told[::2]
    assert all(line.endswith("8 tasks with a tight reference, for half a minute") for line in compared)
    told = told[1::2]
    assert [line.partition(":")[0] for line in told] == [
        str(tmp_path / f"{name}-seed0") for name in ("gauss-newton", "first-order")
    ]
    assert Config.load(tmp_path / "first-order-seed0" / "config.json").algorithm == "fomaml"
    text = (tmp_path / "race.md").read_text()
    assert text.startswith("glyphs, 3-way 1-shot; lam 0.1, 1 step of gradient (lr 0.4), 1 CG step; 2 tasks a meta-step")
    assert [row.split(" | ")[:2] for row in text.splitlines()[4:6]] == [["| gauss-newton", "4"], ["| first-order", "4"]]
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")

    def must_not(*args, **kwargs):
        raise AssertionError("a complete cell was run again")

    for name in ("train", "evaluate", "exactness"):
        monkeypatch.setattr(racing, name, must_not)
    assert run(PLAN, tmp_path) == (True, told)
    assert (tmp_path / "race.md").read_text() == text


def test_a_stopped_race_goes_on_to_the_bit(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(racing, "train", lambda config, out, limits, **how: train(config, out, Limits(1e-6, True), **how))
        assert run(PLAN, tmp_path / "parts") == (False, [])
    assert checkpoint.load(tmp_path / "parts" / "gauss-newton-seed0").numbers["meta_step"] == 1
    assert run(PLAN, tmp_path / "parts")[0]
    assert run(PLAN, tmp_path / "whole")[0]
    for name in PLAN.variants:
        parts, whole = (checkpoint.load(tmp_path / each / f"{name}-seed0").tensors for each in ("parts", "whole"))
        assert [key for key in whole if not torch.equal(parts[key], whole[key])] == []


def test_a_race_may_go_on_for_longer_but_not_otherwise(tmp_path):
    short = Race(BASE, variants=("first-order",), seeds=1, test_tasks=4)
    run(short, tmp_path)
    longer = Race(Config(**(vars(BASE) | {"meta_steps": 6})), variants=("first-order",), seeds=1, test_tasks=4)
    assert run(longer, tmp_path)[1][-1].endswith("after 6")
    for changed in ({"lam": 0.2}, {"meta_steps": 4}):
        other = Race(Config(**(vars(longer.base) | changed)), variants=("first-order",), seeds=1, test_tasks=4)
        with pytest.raises(ConfigError, match="holds a run with other settings, and a race goes on as it began"):
            run(other, tmp_path)


def test_a_variant_that_breaks_down_is_a_result(tmp_path):
    base = Config(**(vars(BASE) | {"inner_lr": 1e30}))
    done, told = run(Race(base, variants=("first-order",), seeds=1, test_tasks=4), tmp_path)
    assert done
    assert told[0].endswith(": — ± — % after 0")
    assert "| first-order | 0 | — (—) | — (—) | — (—) | — (—) |" in (tmp_path / "race.md").read_text()


def test_a_folder_that_cannot_be_written_is_no_result(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        run(PLAN, tmp_path / "file")


def test_cells_go_through_all_variants_a_seed_at_a_time():
    cells = list(Race(BASE).cells())
    assert [(name, config.seed) for name, config in cells] == [
        (name, seed) for seed in (0, 1) for name in VARIANTS["curvature"]
    ]
    by_name = dict(cells)
    assert by_name["hessian-damped"].damping > 0
    assert {config.curvature for config in by_name.values()} == {
        *("gauss-newton", "hessian", "hessian-unguarded", "published")
    }
    assert by_name["first-order"].algorithm == "fomaml"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": ("newton",)}, r"variants=\('newton',\) cannot be; pass some of gauss-newton, hessian"),
        ({"subject": "inner", "variants": ("hessian",)}, r"variants=\('hessian',\) cannot be; pass some of descent-5"),
        ({"seeds": 0}, "seeds=0 cannot be; pass an integer of at least 1"),
        ({"base": Config(meta_steps=30, validate_every=25)}, "meta_steps=30 is not a multiple of validate_every=25"),
        ({"base": Config(learn_lam="scalar")}, "curvature='published' has a damping of its own"),
    ],
)
def test_races_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Race(**({"base": Config()} | settings))


def test_table_compares_after_the_meta_steps_and_after_the_time_that_all_had():
    def result(name, rate, accuracies, accuracy, meta_steps=4):
        steps = [2.0, 4.0][: len(accuracies)]
        curve = Curve(steps, [rate * step for step in steps], accuracies, "unseen validation classes")
        return Result(name, curve, meta_steps, "", accuracy, 1.0)

    results = [
        result("gauss-newton", 10, [30.0, 50.0], 60.0),
        result("first-order", 5, [20.0, 40.0], 70.0),
        result("gauss-newton", 8, [40.0, 60.0], 62.0),
        # It broke down, and says nothing about the time that others had.
        result("first-order", 1, [10.0], math.nan, meta_steps=3),
    ]
    rows = table(PLAN, results).splitlines()[2:]
    assert "| on unseen validation classes after 20.0 s, % | residual |" in rows[0]
    # After 20 s, 2 and 2.5 meta-steps.
    assert (
        rows[2]
        == "| gauss-newton | 4 | 36.0 (40.0, 32.0) | 61.0 (60.0, 62.0) | 37.5 (30.0, 45.0)" + 5 * " | — (—, —)" + " |"
    )
    assert rows[3] == "| first-order | 4, 3 | 11.0 (20.0, 2.0) | — (70.0, —) | — (40.0, —)" + 5 * " | — (—, —)" + " |"
    assert rows[4:8] == [
        "",
        "- gauss-newton: `--algorithm imaml`",
        "- first-order: `--algorithm fomaml`",
        "",
    ]
    assert ("in parentheses each of them" in rows[8], "A dash stands where" in rows[8]) == (True, True)


def test_title_and_table_tell_what_runners_share_and_what_they_do_not():
    def told(**settings):
        plan = Race(**({"base": BASE, "subject": "inner"} | settings))
        nothing = Curve([], [], [], "unseen validation classes")
        lines = table(plan, [Result(plan.names[0], nothing, 0, "", math.nan, math.nan)]).splitlines()
        return lines[0].partition("; 2 tasks")[0], [line for line in lines if line.startswith("- ")]

    title, settings = told()
    assert title == "glyphs, 3-way 1-shot"
    assert "- lbfgs-10-strong: `--inner lbfgs --lam 0.5 --inner-steps 10 --cg-steps 5`" in settings
    assert settings[2] == (
        "- paper: `--inner gradient --lam 2.0 --inner-lr 0.1 --inner-steps 16 --cg-steps 5`; the paper's strength, "
        "steps and step size, with the curvature of the others"
    )
    assert told(variants=("lbfgs-10",)) == ("glyphs, 3-way 1-shot; lam 0.1, 10 steps of lbfgs, 5 CG steps", [])
    assert told(variants=("descent-5",))[0] == "glyphs, 3-way 1-shot; lam 0.1, 1 step of gradient (lr 0.4), 1 CG step"
    pair = told(variants=("lbfgs-10-strong", "lbfgs-20"), base=BASE)
    assert pair == (
        "glyphs, 3-way 1-shot; lam 0.5, 5 CG steps",
        ["- lbfgs-10-strong: `--inner-steps 10`", "- lbfgs-20: `--inner-steps 20`"],
    )


def test_algorithms_race_in_one_run(tmp_path):
    base = Config(**(vars(BASE) | {"meta_steps": 2}))
    done, told = run(Race(base, "algorithms", seeds=1, test_tasks=2, tight=False), tmp_path)
    assert done
    names = ["imaml", "imaml-hessian-free", "maml", "fomaml", "anil", "reptile"]
    assert [line.partition(":")[0] for line in told] == [str(tmp_path / f"{name}-seed0") for name in names]
    saved = {name: Config.load(tmp_path / f"{name}-seed0" / "config.json") for name in names}
    assert [saved[name].algorithm for name in names] == ["imaml", "imaml", "maml", "fomaml", "anil", "reptile"]
    assert [saved[name].lam for name in names] == [0.1, 0.1, 0, 0, 0, 0]
    lines = (tmp_path / "race.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[4:10]] == [f"| {name}" for name in names]
    assert "- fomaml: `--algorithm fomaml --inner gradient --lam 0.0 --inner-steps 1`" in lines


def test_the_title_of_the_picture_is_not_that_of_one_runner(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(racing, "draw_race", lambda curves, title, path: titles.append(title))
    variants = ("descent-5", "lbfgs-10")
    run(Race(BASE, "inner", variants, seeds=1, test_tasks=2), tmp_path)
    assert titles == ["glyphs, 3-way 1-shot; lam 0.1"] * 2


def test_command_tells_where_it_left_what(tmp_path):
    arguments = [
        *("race", "--out", tmp_path, "--variant", "first-order", "--seeds", 1, "--meta-steps", 2, "--tasks", 2),
        *(
            "--validate-every",
            2,
            "--validation-tasks",
            2,
            "--test-tasks",
            2,
            "--inner-steps",
            1,
            "--quiet",
            "--no-tight",
        ),
    ]
    result = CliRunner().invoke(command.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "race.md").read_text()
    assert "2 tasks a meta-step" in text
    assert text.splitlines()[4].endswith(" | — (—)" * 5 + " |")
    assert "tight reference" not in result.stdout
    assert not (tmp_path / "first-order-seed0" / "exactness.json").exists()
    assert f"done: {tmp_path / 'race.md'}, {tmp_path / 'race.png'}" in result.stdout
    refused = CliRunner().invoke(command.app, ["race", "--out", str(tmp_path), "--variant", "newton"])
    assert refused.exit_code == 1
    assert "error: --variant newton cannot be" in refused.stderr
