"""Settings without effect are refused where they were typed, and only there."""

import pytest
from typer.testing import CliRunner

from applications.imaml import __main__ as command
from applications.imaml.config import Config
from applications.imaml.idle import idle


@pytest.fixture
def asked(monkeypatch):
    """The settings of the runs that were not refused; none is trained."""
    seen = []
    monkeypatch.setattr(command, "train", lambda config, out, limits, **_: seen.append(config) or config.meta_steps)
    monkeypatch.setattr(command, "race", lambda plan, out, tell, **_: seen.append(plan.base) or True)
    monkeypatch.setattr(command, "evaluate", lambda config, run, protocol: seen.append(config))
    return seen


def run(*arguments):
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--algorithm", "fomaml", "--cg-steps", 9), "--cg-steps 9 is of imaml's linear system, and fomaml has none"),
        (("--data", "glyphs", "--root", "x"), "--root x is not for glyphs, which are drawn on the spot; leave it out"),
        (("--inner", "lbfgs", "--inner-lr", 1), "--inner-lr 1.0 is not for --inner lbfgs, whose steps are found by a"),
        (("--inner", "hessian-free", "--inner-lr", 1), "--inner-lr 1.0 is not for --inner hessian-free"),
        # Also where it is what it would have been.
        (("--algorithm", "maml", "--curvature", "gauss-newton"), "--curvature gauss-newton is of imaml's linear"),
    ],
)
def test_what_was_typed_and_changes_nothing_is_refused(asked, tmp_path, arguments, message):
    refused = run("train", "--out", tmp_path / "run", *arguments)
    assert refused.exit_code == 1
    assert f"error: {message}" in refused.stderr
    assert asked == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--algorithm", "fomaml"),
        ("--inner", "lbfgs"),
        ("--algorithm", "fomaml", "--inner", "hessian-free", "--cg-steps", 9),
        ("--inner", "torch.SGD", "--inner-lr", 1),
        ("--data", "omniglot", "--root", "x"),
    ],
)
def test_what_has_an_effect_or_was_not_typed_is_not_refused(asked, tmp_path, arguments):
    result = run("train", "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 0, result.stderr
    assert len(asked) == 1


def test_a_setting_that_some_runner_of_a_race_uses_is_not_idle(asked, tmp_path):
    some = run("race", "--out", tmp_path, "--variant", "first-order", "--variant", "hessian", "--cg-steps", 2)
    assert some.exit_code == 0, some.stderr
    none = run("race", "--out", tmp_path, "--variant", "first-order", "--cg-steps", 2)
    assert none.exit_code == 1
    assert "error: --cg-steps 2 is of imaml's linear system" in none.stderr
    assert len(asked) == 1


def test_another_folder_for_characters_that_are_drawn_is_refused_later_too(asked, tmp_path):
    Config().save(tmp_path / "config.json")
    for arguments in (("evaluate", tmp_path), ("train", "--resume", "--out", tmp_path)):
        refused = run(*arguments, "--root", "x")
        assert refused.exit_code == 1
        assert "error: --root x is not for glyphs" in refused.stderr
    assert asked == []


def test_nothing_of_the_defaults_but_the_folder_is_idle():
    assert idle(Config()).keys() == {"root"}
