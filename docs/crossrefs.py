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

        # An argument may be called like something else, and the testing kit's names mean nothing outside of it.
        own = {obj.name, *(parameter.name for parameter in getattr(obj, "parameters", ()))}
        inside = obj.path.startswith("implicitlayers.testing.")

        def link(found: re.Match[str]) -> str:
            place = self._places.get(found[1])
            known = place is not None and found[1] not in own and (inside or ".testing." not in place)
            return f"[{found[0]}][{place}]" if known else found[0]

        obj.docstring.value = NAME.sub(link, obj.docstring.value)
