"""Look at a dataset: ``python -m applications.datasets glyphs --sheet glyphs.png``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from applications.datasets import SPLIT_SIZES, contact_sheet, load


def main(
    name: Annotated[str, typer.Argument(help="glyphs or omniglot")],
    root: Annotated[Path | None, typer.Option(help="folder with the dataset's files (omniglot)")] = None,
    seed: Annotated[int, typer.Option(help="chooses the characters of glyphs")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="PNG to write, one class a row")] = None,
    classes: Annotated[int, typer.Option(min=1, help="classes on the sheet, spread over the dataset")] = 24,
    drawings: Annotated[int, typer.Option(min=1, help="drawings of each class on the sheet")] = 20,
) -> None:
    """Print how many classes and images a dataset has, and save a sheet of some.

    Args:
        name: the dataset.
        root: folder with its files.
        seed: chooses the characters of glyphs.
        sheet: PNG to write.
        classes: rows of the sheet.
        drawings: columns of the sheet.
    """
    try:
        dataset = load(name, root, seed)
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    _, _, channels, height, width = dataset.images.shape
    typer.echo(f"{dataset.source}: {dataset.classes} classes x {dataset.per_class} images, {channels}x{height}x{width}")
    typer.echo("split: " + ", ".join(f"{part} {size}" for part, size in SPLIT_SIZES[name].items()))
    if sheet is not None:
        chosen = dataset.images[:: max(1, dataset.classes // classes)][:classes, :drawings]
        contact_sheet(chosen.flatten(0, 1), sheet, columns=chosen.shape[1])
        typer.echo(f"sheet: {sheet}")


if __name__ == "__main__":
    typer.run(main)
