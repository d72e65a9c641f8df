"""docs/few-shot.md from top to bottom, its commands and its Python as one session, on few characters for few steps."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from applications.imaml import __main__ as command
from applications.imaml import episodes

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "few-shot.md"
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What takes minutes, and what stands for it here.
CUT = {
    "--meta-steps 240 --tasks 8": "--meta-steps 2 --tasks 2 --validation-tasks 2",
    "--log-every 20 --validate-every 80": "--log-every 1 --validate-every 1",
    "--tasks 600": "--tasks 3",
    "--queries 15": "--queries 7",
    "--data sinusoid": "--data sinusoid --meta-steps 2 --tasks 2 --validation-tasks 2",
}
IMAML = "python -m applications.imaml "


@pytest.fixture
def session(tmp_path, monkeypatch, characters):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(episodes, "load", load_few(characters, episodes.load))
    monkeypatch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 20, "validation": 10, "test": 10}})


def load_few(characters, load):
    return lambda name, *given, **named: characters if name == "glyphs" else load(name, *given, **named)


def run_line(line):
    """Run a command of the tutorial, and say what it printed."""
    for long, short in CUT.items():
        line = line.replace(long, short)
    result = CliRunner().invoke(command.app, shlex.split(line.removeprefix(IMAML)))
    if "--root photographs" in line:
        # The one command for images that the reader has to bring.
        assert result.exit_code == 1
        assert "photographs" in result.stderr
    else:
        assert result.exit_code == 0, f"{line}: {result.stderr}"
    return result.stdout


@pytest.mark.usefixtures("session")
def test_the_tutorial_runs_from_top_to_bottom():
    names, said = {"__name__": "tutorial"}, []
    for language, block in FENCE.findall(TUTORIAL.read_text(encoding="utf-8")):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block, str(TUTORIAL), "exec"), names)
            said.append(output.getvalue())
            continue
        for line in block.splitlines():
            assert line.startswith((IMAML, "pip install ")), line
            if line.startswith(IMAML):
                said.append(run_line(line))
    text = "\n".join(said)
    assert "trained: 2 of 2 meta-steps" in text
    assert "12 images, 3 classes, " in text
    assert [Path(name).stat().st_size > 100 for name in ("mine/answers.csv", "mine/answers.png")] == [True, True]
    assert "sinusoid 10-shot, 10 query points | test tasks" in text
    assert Path("runs/sine/evaluation.png").read_bytes().startswith(b"\x89PNG")
    # Every report is where the tutorial says, of what it says.
    assert {path.name for path in Path("runs/glyphs").glob("*.json")} == {
        *("config.json", "checkpoint.json", "evaluation.json", "support.json", "queries-15.json", "best.json")
    }
    assert len(names["classifier"].predict(names["queries"])) == 12
    assert set(names["classifier"].classes_) == {"corner", "cross", "ring"}
    assert all(torch.isfinite(value).all() for value in names["classifier"].learned_.phi.values())
