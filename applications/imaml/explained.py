"""Foreseen errors, told in a line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from applications.command_line import as_typed, options_of
from applications.imaml.checkpoint import CheckpointError
from applications.imaml.config import ConfigError
from applications.imaml.processes import FirstFailedError
from applications.imaml.run_folder import RunError

# torchrun ends all processes as soon as one has ended, and the one that tells why should have done so by then.
_COURTESY = 1.0


@contextmanager
def explained(context: typer.Context, **called: str) -> Iterator[None]:
    """Foreseen errors are told in a line, not in a traceback, and settings in it as they are typed.

    What the first of several processes fails at, it tells, and the others end with the same exit status.

    Args:
        context: of the command, for its options.
        **called: by the name that a message has for a setting, that of the command's parameter, where they differ.
    """
    try:
        yield
    except FirstFailedError:
        time.sleep(_COURTESY)
        sys.exit(1)
    except (ConfigError, RunError, CheckpointError, OSError, ValueError) as error:
        rank = os.environ.get("RANK", "0")
        message = as_typed(str(error), options_of(context, **called))
        typer.echo(f"error: {message}" if rank == "0" else f"error in process {rank}: {message}", err=True)
        sys.exit(1)
