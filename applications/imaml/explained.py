"""Foreseen errors, told in a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from applications.imaml.checkpoint import CheckpointError
from applications.imaml.config import ConfigError
from applications.imaml.run_folder import RunError


@contextmanager
def explained() -> Iterator[None]:
    """Foreseen errors are told in a line, not in a traceback."""
    try:
        yield
    except (ConfigError, RunError, CheckpointError, OSError, ValueError) as error:
        rank = os.environ.get("RANK")
        typer.echo(f"error: {error}" if rank is None else f"error in process {rank}: {error}", err=True)
        sys.exit(1)
