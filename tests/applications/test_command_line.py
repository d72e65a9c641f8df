"""Settings in a message are written as they are typed, and nothing else in it is touched."""

import pytest
import typer
from typer.testing import CliRunner

from applications.command_line import Option, as_typed, options_of

OPTIONS = {
    **{name: Option(f"--{name.replace('_', '-')}") for name in ("ways", "lam", "inner", "inner_lr", "root", "cell")},
    "regularized": Option("--regularized", "--no-regularized"),
    "quiet": Option("--quiet"),
}


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("ways=1 cannot be; pass 2.", "--ways 1 cannot be; pass 2."),
        ("pass for instance ways=60.", "pass for instance --ways 60."),
        ("lam=-1e-05 and lam=nan cannot be", "--lam -1e-05 and --lam nan cannot be"),
        ("inner='sgd' is not known", "--inner sgd is not known"),
        ("inner='two words'", "--inner 'two words'"),
        ("inner='adam', 'lbfgs', or 'gradient', or lam=2", "--inner adam, lbfgs, or gradient, or --lam 2"),
        ("root=None, but it's read", "no --root, but it's read"),
        ("root='/a folder/ways=3' isn't there", "--root '/a folder/ways=3' isn't there"),
        ("runs/ways=3/lam=1 and runs/inner_lr hold a run", "runs/ways=3/lam=1 and runs/inner_lr hold a run"),
        ("cell=('a', 'b') and cell=()", "--cell a --cell b and no --cell"),
        ("regularized=False, regularized=True", "--no-regularized, --regularized"),
        ("quiet=False", "no --quiet"),
        ("a smaller inner_lr.", "a smaller --inner-lr."),
        ("ways of at most 5, a larger lam", "ways of at most 5, a larger lam"),
        ("always=1 shots=3 inner_lrs", "always=1 shots=3 inner_lrs"),
    ],
)
def test_settings_are_written_as_typed(message, typed):
    assert as_typed(message, OPTIONS) == typed


def test_options_are_those_of_the_command():
    app, found = typer.Typer(), {}

    @app.command()
    def command(context: typer.Context, folder: str, test_tasks: int = 1, joined: bool = True) -> None:
        found.update(options_of(context, tasks="test_tasks"))

    assert CliRunner().invoke(app, ["here"]).exit_code == 0
    assert found["tasks"] == found["test_tasks"] == Option("--test-tasks")
    assert found["joined"] == Option("--joined", "--no-joined")
    assert "folder" not in found
