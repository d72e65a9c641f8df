"""Every Python block of the documents runs; the README stays short."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# A session of commands and Python, which tests/applications/test_imaml_tutorial.py runs as a whole.
SESSIONS = {ROOT / "docs" / "few-shot.md"}
DOCUMENTS = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - SESSIONS)]
FENCE = re.compile(r"^([ ]*)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def blocks(document):
    """The Python of a document, indented as far as its fence is."""
    return [
        "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for indent, body in FENCE.findall(document.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda d: d.name)
def test_python_blocks_run(document, capsys):
    # The blocks of a document are one program, as a reader would take them.
    names = {"__name__": "document"}
    for block in blocks(document):
        exec(compile(block, str(document), "exec"), names)
    for name, value in names.items():
        if isinstance(value, torch.Tensor):
            assert torch.isfinite(value).all(), name


def test_the_readme_example_learns_which_features_matter():
    names = {}
    exec(blocks(ROOT / "README.md")[0], names)
    gradient = names["log_lam"].grad
    # Less penalty on the two features that matter, and a converged solve with a converged adjoint.
    assert (gradient[:2] > 0).all()
    assert gradient[:2].min() > gradient[2:].abs().max()
    assert names["solution"].status == names["il"].Status.CONVERGED
    assert names["solution"].adjoint.residual < 1e-6


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120
