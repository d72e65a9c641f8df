"""The house rules that no linter knows: sizes, imports at the top, nothing left to be done, documented names."""

import ast
import importlib
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("implicitlayers", "applications", "benchmarks")
MAX_FILE_LINES = 350
MAX_BODY_LINES = 60
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def body_lines(function: Function) -> int:
    """Lines of a function without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def undocumented_methods(tree: ast.AST) -> list[str]:
    """Public methods that have no docstring and, in a class without bases, nowhere to inherit one from."""
    return [
        f"{method.lineno}: {cls.name}.{method.name} has no docstring"
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef) and not cls.bases and not cls.name.startswith("_")
        for method in cls.body
        if isinstance(method, Function) and not method.name.startswith("_") and not ast.get_docstring(method)
    ]


def complaints(text: str) -> list[str]:
    """What the house has against a source text, each with its line."""
    lines, tree = text.splitlines(), ast.parse(text)
    found = [f"{n}: unfinished" for n, line in enumerate(lines, 1) if UNFINISHED.search(line)]
    if len(lines) >= MAX_FILE_LINES:
        found.append(f"{len(lines)}: the file should stay under {MAX_FILE_LINES} lines")
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        if body_lines(function) >= MAX_BODY_LINES:
            found.append(f"{function.lineno}: the body of {function.name} has {body_lines(function)} lines")
        late = {node.lineno for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)}
        found += [f"{line}: import inside {function.name}" for line in sorted(late)]
    return found + undocumented_methods(tree)


def lacks_docstring(thing: object) -> bool:
    """Whether a class, function or module has no docstring of its own; what a dataclass makes up does not count."""
    if not isinstance(thing, type | types.FunctionType | types.ModuleType):
        return False
    doc = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    return not doc or doc.startswith(f"{thing.__name__}(")


def undocumented(face: types.ModuleType) -> list[str]:
    """Names of the face without a docstring, and methods of its classes that neither have nor inherit one."""
    missing = []
    for name in face.__all__:
        thing = getattr(face, name)
        if lacks_docstring(thing):
            missing.append(name)
        for method, value in vars(thing).items() if isinstance(thing, type) else ():
            own = isinstance(value, types.FunctionType | classmethod | staticmethod | property)
            docs = (getattr(vars(base).get(method), "__doc__", None) for base in thing.__mro__)
            if own and not method.startswith("_") and not any(docs):
                missing.append(f"{name}.{method}")
    return missing


FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def test_files_keep_the_house_rules():
    found = {str(file.relative_to(ROOT)): complaints(file.read_text(encoding="utf-8")) for file in FILES}
    assert {file: lines for file, lines in found.items() if lines} == {}


def test_everything_public_is_documented():
    assert undocumented(importlib.import_module("implicitlayers")) == []


STATEMENTS = "    x = 1\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\n" * (MAX_FILE_LINES - 1), None),
        ("x = 1\n" * MAX_FILE_LINES, "350: the file"),
        (f"def f():\n    '''Long\n\n    docstring.'''\n{STATEMENTS * (MAX_BODY_LINES - 1)}", None),
        (f"class A(B):\n  async def f(self):\n{STATEMENTS * MAX_BODY_LINES}", "2: the body of f has 60"),
        ("import os\n\ndef f():\n    return os\n", None),
        ("def f():\n    if True:\n        import os\n", "3: import inside f"),
        ("x = 1\n# TODO: more\n", "2: unfinished"),
        ("xxx = 'to do'\n", None),
        ("class A:\n    def f(self): ...\n    def _g(self): ...\n", "2: A.f"),
        ("class A(B):\n    def f(self): ...\n", None),
    ],
)
def test_planted_complaint_is_found(text, complaint):
    found = complaints(text)
    assert [line.startswith(complaint) for line in found] == [True] if complaint else found == []


def test_planted_lack_of_docstrings_is_found():
    face = types.ModuleType("face")
    source = """
from dataclasses import dataclass
def told(): "A docstring."
def silent(): pass
class Contract:
    "A docstring."
    def step(self): "A docstring."
@dataclass
class Method(Contract):
    def step(self): pass
    def other(self): pass
version = "1"
__all__ = ["told", "silent", "Contract", "Method", "version"]
"""
    exec(source, vars(face))
    assert undocumented(face) == ["silent", "Method", "Method.other"]
