"""Messages for those who typed options: a setting that the program calls ``inner_lr=0.4`` is ``--inner-lr 0.4``."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import typer

__all__ = ["Option", "as_typed", "options_of"]


class Option(NamedTuple):
    """An option of a command.

    Args:
        on: how it is typed, for instance "--inner-lr".
        off: how its opposite is typed, if it is a switch that has one.
    """

    on: str
    off: str | None = None


# What repr makes of strings, tuples, numbers, None and truth values. A full stop may end the sentence.
_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\([^()]*\)|[-+]?\w+(?:[.+-]\w+)*"""
# Other values of the same setting: "inner='gradient', 'adam' or 'lbfgs'".
_OTHERS = r"(?:(?:,? or|,) '[\w.-]+')*"


def options_of(context: typer.Context, **called: str) -> dict[str, Option]:
    """The options of a running command by the names that messages have for them.

    Args:
        context: of the command.
        **called: by the name that a message has for a setting, that of the command's parameter, where they differ.

    Returns:
        The options.
    """
    typed = {
        parameter.name: Option(parameter.opts[-1], next(iter(parameter.secondary_opts), None))
        for parameter in context.command.params
        if parameter.name is not None and parameter.opts[-1].startswith("--")
    }
    # What a message calls by another name's name is not that other setting.
    return typed | {name: typed[parameter] for name, parameter in called.items()}


def as_typed(message: str, options: Mapping[str, Option]) -> str:
    """Write the settings in a message as options.

    Args:
        message: with settings as ``name=value``, values as ``repr`` has them.
        options: by name; other names are left as they are.

    Returns:
        The message, with ``--name value``; "no --name" where the value is None.
    """

    def setting(found: re.Match[str]) -> str:
        return _typed(options[found["name"]], found["value"]) + found["others"].replace("'", "")

    names = "|".join(map(re.escape, options))
    # Not inside a path, nor the end of a longer name.
    message = re.sub(rf"(?<![\w./-])(?P<name>{names})=(?P<value>{_VALUE})(?P<others>{_OTHERS})", setting, message)
    long = "|".join(re.escape(name) for name in options if "_" in name)
    if not long:
        return message
    # A name without underscore may be a word of the sentence.
    return re.sub(rf"(?<![\w./-])({long})(?![\w/=-]|\.\w)", lambda found: options[found[1]].on, message)


def _typed(option: Option, text: str) -> str:
    value = _value(text)
    if value is None or value == ():
        return f"no {option.on}"
    if isinstance(value, bool):
        return option.on if value else option.off or f"no {option.on}"
    if isinstance(value, tuple):
        return " ".join(f"{option.on} {shlex.quote(str(each))}" for each in value)
    return f"{option.on} {shlex.quote(value) if isinstance(value, str) else text}"


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # "nan", and whatever else was written without quotes.
        return text
