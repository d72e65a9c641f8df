"""What mkdocs needs beside its configuration: names in docstrings become links to their place in the reference."""

import re
from pathlib import Path
from typing import Any

import griffe

DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
# `Name` is a name of this library, ``code`` is not: the convention of the docstrings.
NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")


class Crossrefs(griffe.Extension):
    """Link every `Name` in a docstring that has a place in the reference, but for the one it belongs to."""

    def __init__(self) -> None:
        pages = Path(__file__).parent.joinpath("api").glob("*.md")
        documented = [path for page in pages for path in DIRECTIVE.findall(page.read_text(encoding="utf-8"))]
        self._places = {path.rsplit(".", 1)[-1]: path for path in documented}

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return

        def link(found: re.Match[str]) -> str:
            name = found[1]
            return f"[{found[0]}][{self._places[name]}]" if name in self._places and name != obj.name else found[0]

        obj.docstring.value = NAME.sub(link, obj.docstring.value)
