"""Imports go strictly down: the table of floors, and the proof that a breach of it would be seen."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "implicitlayers"

# From the ground up. A module imports from lower floors only; "" is the face, `implicitlayers/__init__.py`.
FLOORS = (
    {"status", "functorch"},
    {"flat", "tape"},
    {"closure"},
    {"problem"},
    {"loop", "certificate", "policy", "terms"},
    {"kkt", "pose"},
    {"regularizers"},
    {"linear", "solver"},
    {"checkpoint", "implicit", "inexact"},
    {"linearized"},
    {"solvers"},
    {"optimality"},
    {"adjoints"},
    {"linear_equation", "solve"},
    {"api", "quadratic"},
    {"nn"},
    {""},
    {"testing"},
)
FLOOR_OF = {module: height for height, floor in enumerate(FLOORS) for module in floor}

# Inside these packages a family knows what is shared, and no other family; but for the one that chooses among them.
SHARED = {
    "linear": {"krylov", "operator", "preconditioner", "solve"},
    "regularizers": {"base", "groups"},
    "solvers": {"direction", "lanes", "line_search", "mapping"},
}
CHOOSES = {"linear.auto"}

# Seen from applications/ and benchmarks/, everything else is internal.
PUBLIC = {"", "nn", "testing"}

CORE = {"torch", "numpy", "scipy"}


class Import(NamedTuple):
    """One imported module, and where."""

    file: Path
    line: int
    importer: str
    target: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.importer} imports {self.target}"


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(dotted: str, root: Path) -> bool:
    path = root.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, at any depth, relative ones resolved and `from a import module` followed."""
    importer = module_name(file, root)
    package = importer.split(".") if file.name == "__init__.py" else importer.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, importer, alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield Import(file, node.lineno, importer, full if is_module(full, root) else source)


def all_imports(folder: str, root: Path) -> list[Import]:
    files = sorted((root / folder).rglob("*.py"))
    return list(dict.fromkeys(found for file in files for found in imports_of(file, root)))


def detours(file: Path, root: Path) -> Iterator[Import]:
    """Attributes that reach through the face to a module behind it, as `il.loop` does after `import … as il`."""
    tree, names = ast.parse(file.read_text(encoding="utf-8")), {PACKAGE}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.name == PACKAGE and alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            target = f"{PACKAGE}.{node.attr}"
            if is_module(target, root):
                yield Import(file, node.lineno, module_name(file, root), target)


def part(dotted: str, depth: int) -> str:
    """The depth-th component of a dotted name, or "" above it."""
    return (dotted.split(".") + [""] * depth)[depth]


def breach_inside(found: Import) -> str | None:
    """Why an import between two modules of the package is not allowed, or None."""
    here, there = part(found.importer, 1), part(found.target, 1)
    for module in (here, there):
        if module not in FLOOR_OF:
            return f"'{module}' has no floor yet: give it one in the table of {Path(__file__).name}"
    if there == "testing" and here != "testing":
        return "nothing imports the testing kit"
    if here != there:
        return None if FLOOR_OF[there] < FLOOR_OF[here] else "an import must go to a lower floor"
    sibling = part(found.target, 2)
    if part(found.importer, 2) == "":  # The package's own __init__ gathers what is below it.
        return None if sibling else "a module imports itself"
    if not sibling:
        return "a module imports the package that gathers it"
    chooses = f"{here}.{part(found.importer, 2)}" in CHOOSES
    if here in SHARED and sibling not in SHARED[here] and not chooses:
        return f"siblings in {here}/ know only {sorted(SHARED[here])} of each other"
    return None


def breach_of_dependencies(found: Import) -> str | None:
    top = part(found.target, 0)
    if top in CORE or top in sys.stdlib_module_names:
        return None
    if top == "hypothesis":
        return None if part(found.importer, 1) == "testing" else "hypothesis belongs to the testing kit"
    return f"the package depends on {sorted(CORE)} only"


def package_breaches(root: Path) -> list[str]:
    """What is wrong with the imports of the package below root."""
    breaches, graph = [], {}
    for found in all_imports(PACKAGE, root):
        inside = part(found.target, 0) == PACKAGE
        why = breach_inside(found) if inside else breach_of_dependencies(found)
        if why:
            breaches.append(f"{found}: {why}")
        if inside:
            graph.setdefault(found.importer, set()).add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        breaches.append("circle: " + " → ".join(error.args[1]))
    return breaches


def user_breaches(folder: str, root: Path) -> list[str]:
    """Where code that stands for a user's looks behind the face."""
    strangers = {"applications": {"benchmarks", "tests"}, "benchmarks": {"tests"}}[folder]
    through = [found for file in sorted((root / folder).rglob("*.py")) for found in detours(file, root)]
    breaches = []
    for found in all_imports(folder, root) + through:
        top = part(found.target, 0)
        if top in strangers:
            breaches.append(f"{found}: {folder}/ does not know {top}/")
        elif top == PACKAGE and part(found.target, 1) not in PUBLIC:
            breaches.append(f"{found}: import it from the face, `{PACKAGE}`")
    return breaches


def installed_beyond_core() -> set[str]:
    """Top-level modules of this environment that the core dependencies do not bring along."""
    # torch asks the list of installed packages for optree and imports it if it stands there.
    closure, waiting = {"optree"}, list(CORE)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in closure:
            continue
        closure.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [re.match(r"[\w.-]+", text)[0] for text in requirements if "extra ==" not in text]
    by_module = importlib.metadata.packages_distributions()
    kept = {
        module for module, owners in by_module.items() if {re.sub(r"[-_.]+", "-", o).lower() for o in owners} & closure
    }
    return by_module.keys() - kept - {PACKAGE} | {"applications", "benchmarks", "tests"}


def import_with_core_only(root: Path) -> subprocess.CompletedProcess:
    """Import the package in a fresh interpreter in which nothing but the core dependencies can be found."""
    program = f"""
    import sys

    # None is how the import system marks a name that cannot be imported; torch asks whether some of these exist.
    sys.modules.update(dict.fromkeys({sorted(installed_beyond_core())!r}))
    sys.path.insert(0, {str(root)!r})
    import {PACKAGE}
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_imports_go_strictly_down():
    assert package_breaches(ROOT) == []


@pytest.mark.parametrize("folder", ["applications", "benchmarks"])
def test_users_import_the_face(folder):
    assert user_breaches(folder, ROOT) == []


def test_face_needs_core_dependencies_only():
    done = import_with_core_only(ROOT)
    assert done.returncode == 0, done.stderr


# The proof: a small sound tree, and one planted breach after the other.

SOUND = {
    f"{PACKAGE}/__init__.py": "from implicitlayers.api import argmin\nfrom implicitlayers import nn\n",
    f"{PACKAGE}/status.py": "import enum\nimport torch\n",
    f"{PACKAGE}/flat.py": "from __future__ import annotations\nfrom torch.utils import _pytree\n",
    f"{PACKAGE}/closure.py": "from .flat import x\n",
    f"{PACKAGE}/regularizers.py": "from .flat import x\n",
    f"{PACKAGE}/loop.py": "from .status import Status\n",
    f"{PACKAGE}/linear/__init__.py": "from . import cg\nfrom .operator import Operator\n",
    f"{PACKAGE}/linear/operator.py": "import torch\n",
    f"{PACKAGE}/linear/cg.py": "from ..loop import iterate\nfrom .operator import Operator\n",
    f"{PACKAGE}/linear/auto.py": "from .cg import CG\n",
    f"{PACKAGE}/solvers/__init__.py": "",
    f"{PACKAGE}/solvers/line_search.py": "",
    f"{PACKAGE}/solvers/lbfgs.py": "from implicitlayers.solvers import line_search\n",
    f"{PACKAGE}/solvers/newton.py": "from implicitlayers.linear.cg import CG\nfrom .line_search import Armijo\n",
    f"{PACKAGE}/implicit.py": "from .loop import iterate\n",
    f"{PACKAGE}/api.py": "from implicitlayers.solvers.newton import Newton\nimport implicitlayers.linear\n",
    f"{PACKAGE}/nn.py": "from implicitlayers.api import argmin\n",
    f"{PACKAGE}/testing/__init__.py": "from . import strategies\n",
    f"{PACKAGE}/testing/strategies.py": "import hypothesis\nfrom implicitlayers import status\n",
    "applications/toy.py": "import implicitlayers as il\nfrom implicitlayers import nn, testing\nil.nn.A(il.CG())\n",
    "benchmarks/speed.py": "from implicitlayers.testing import strategies\nimport applications.toy\n",
}

PLANTED = {
    "upwards": ("status.py", "from implicitlayers.api import argmin", "lower floor"),
    "upwards, relative": ("loop.py", "from .linear.cg import CG", "lower floor"),
    "upwards, from a subpackage": ("linear/cg.py", "from ..solvers import line_search", "lower floor"),
    "same floor": ("implicit.py", "from .solvers import newton", "lower floor"),
    "hidden in a function": ("status.py", "def late():\n    from . import loop", "lower floor"),
    "hidden from the interpreter": (
        "flat.py",
        "if TYPE_CHECKING:\n    from implicitlayers.loop import x",
        "lower floor",
    ),
    "the face": ("api.py", "import implicitlayers", "lower floor"),
    "solver siblings": ("solvers/newton.py", "from .lbfgs import LBFGS", "siblings"),
    "linear siblings": ("linear/operator.py", "from .cg import CG", "siblings"),
    "knowing the one that chooses": ("linear/cg.py", "from .auto import Auto", "siblings"),
    "own package": ("linear/cg.py", "from implicitlayers.linear import Operator", "gathers"),
    "circle": ("linear/operator.py", "from .preconditioner import Jacobi", "circle"),
    "testing imported": ("__init__.py", "from implicitlayers import testing", "testing kit"),
    "hypothesis imported": ("nn.py", "from hypothesis import given", "testing kit"),
    "a stranger": ("nn.py", "import pandas.core", "depends on"),
    "upside down": ("nn.py", "from applications import imaml", "depends on"),
    "no floor": ("nn.py", "from implicitlayers.cellar import wine", "no floor"),
}


@pytest.fixture
def tree(tmp_path):
    for name, text in SOUND.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def plant(file: Path, text: str) -> None:
    file.write_text(file.read_text(encoding="utf-8") + text + "\n", encoding="utf-8")


def test_sound_tree_passes(tree):
    assert package_breaches(tree) == []
    assert user_breaches("applications", tree) == []
    assert user_breaches("benchmarks", tree) == []


@pytest.mark.parametrize(("file", "text", "message"), PLANTED.values(), ids=PLANTED.keys())
def test_planted_breach_is_found(tree, file, text, message):
    (tree / PACKAGE / "linear/preconditioner.py").write_text("from .operator import Operator\n", encoding="utf-8")
    plant(tree / PACKAGE / file, text)
    assert any(message in breach for breach in package_breaches(tree))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("applications/toy.py", "from implicitlayers.loop import iterate"),
        ("applications/toy.py", "from implicitlayers import loop"),
        ("applications/toy.py", "import implicitlayers.linear.cg"),
        ("applications/toy.py", "il.loop.iterate"),
        ("applications/toy.py", "from benchmarks import speed"),
        ("benchmarks/speed.py", "from tests import conftest"),
    ],
)
def test_planted_look_behind_the_face_is_found(tree, file, text):
    plant(tree / file, text)
    assert len(user_breaches(file.partition("/")[0], tree)) == 1


@pytest.mark.parametrize(("text", "works"), [("import numpy, torch", True), ("import hypothesis", False)])
def test_planted_dependency_is_found(tmp_path, text, works):
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "__init__.py").write_text(text, encoding="utf-8")
    assert (import_with_core_only(tmp_path).returncode == 0) == works
