"""Every Python block of the documents runs, every link leads somewhere, and every public name has its place."""

import doctest
import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest
import torch

import implicitlayers as il
import implicitlayers.testing

ROOT = Path(__file__).resolve().parents[1]
# A session of commands and Python, which tests/applications/test_imaml_tutorial.py runs as a whole.
SESSIONS = {ROOT / "docs" / "few-shot.md"}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^([ ]*)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
ANY_FENCE = re.compile(r"^[ ]*```.*?^[ ]*```$", re.DOTALL | re.MULTILINE)
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(document):
    return document.read_text(encoding="utf-8")


def name_of(document):
    return str(document.relative_to(ROOT))


# --- code -----------------------------------------------------------------------------------------------------


def blocks(document):
    """The Python of a document, indented as far as its fence is."""
    return [
        "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for indent, body in FENCE.findall(read(document))
    ]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d not in SESSIONS and blocks(d)], ids=name_of)
def test_python_blocks_run(document, capsys):
    # The blocks of a document are one program, as a reader would take them.
    names = {"__name__": "document"}
    for block in blocks(document):
        exec(compile(block, str(document), "exec"), names)
    for name, value in names.items():
        if isinstance(value, torch.Tensor):
            assert torch.isfinite(value).all(), name


def modules_with_examples():
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(il.__path__, "implicitlayers.")]
    # Those of the testing kit are run beside its tests.
    return [m for m in modules if ">>>" in read(Path(m.__file__)) and ".testing" not in m.__name__]


@pytest.mark.parametrize("module", modules_with_examples(), ids=lambda m: m.__name__)
def test_examples_of_the_docstrings_run(module):
    done = doctest.testmod(module, extraglobs={"torch": torch, **{name: getattr(il, name) for name in il.__all__}})
    assert done.attempted > 0
    assert done.failed == 0


def test_examples_have_the_heading_that_the_reference_shows_as_code():
    lines = [line.strip() for file in (ROOT / "implicitlayers").rglob("*.py") for line in read(file).splitlines()]
    assert "Examples:" in lines
    assert "Example:" not in lines


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


# --- links ----------------------------------------------------------------------------------------------------


def anchors(document):
    """What the headings of a document are linked by."""
    headings = re.findall(r"^#+ (.+)$", ANY_FENCE.sub("", read(document)), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def broken_links(document):
    broken = []
    for target in LINK.findall(ANY_FENCE.sub("", read(document))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_somewhere(document):
    assert broken_links(document) == []


def test_planted_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](page.md#a-b) [y](other.md) [z](#c)\n```text\n[t](nowhere)\n```\n", encoding="utf-8")
    assert broken_links(page) == ["other.md", "#c"]


def test_every_page_is_in_the_navigation():
    text = read(ROOT / "mkdocs.yml")
    listed = re.findall(r"^ +- (\S+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(str(d.relative_to(ROOT / "docs")) for d in DOCUMENTS[1:])


# --- names ----------------------------------------------------------------------------------------------------


def public_names(module):
    """Dotted names of everything that a module exports, those of the modules among it in the place of these."""
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, types.ModuleType):
            yield from public_names(thing)
        else:
            yield f"{module.__name__}.{name}"


def test_every_public_name_has_one_place_in_the_reference():
    documented = [path for page in (ROOT / "docs" / "api").glob("*.md") for path in DIRECTIVE.findall(read(page))]
    assert sorted(documented) == sorted([*public_names(il), *public_names(implicitlayers.testing)])


def test_how_to_choose_mentions_every_public_name():
    text = FENCE.sub("", read(ROOT / "docs" / "how-to-choose.md"))
    assert set(il.__all__) - set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", text)))) == set()


def test_how_to_choose_has_every_status():
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \| .*\|$", read(ROOT / "docs" / "how-to-choose.md"), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(status.name for status in il.Status)


def test_design_lists_the_modules():
    text = read(ROOT / "docs" / "design.md")
    package = ROOT / "implicitlayers"
    parts = {
        p.stem if p.suffix else p.name for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert {part for part in parts - {"__init__"} if not re.search(rf"`{part}(\.py|/)`", text)} == set()
