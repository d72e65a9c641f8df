"""Look at a dataset: ``python -m applications.datasets glyphs --sheet glyphs.png``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from applications.command_line import as_typed, options_of
from applications.datasets import SPLITS, contact_sheet, load, partition
from applications.datasets.download import download as fetch
from applications.datasets.omniglot import MINIMAL


def main(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help=" or ".join(SPLITS))],
    root: Annotated[Path | None, typer.Option(help="folder with the dataset's files")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="fetch archives that are missing there (omniglot)")
    ] = False,
    split: Annotated[str | None, typer.Option(help="name of a split; the dataset's own by default")] = None,
    seed: Annotated[int, typer.Option(help="chooses the characters of glyphs, and the classes of a drawn split")] = 0,
    size: Annotated[int | None, typer.Option(help="height and width of the images, in pixels")] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for colour")] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG to write, one class a row")] = None,
    classes: Annotated[int, typer.Option(min=1, help="classes on the sheet, spread over the dataset")] = 24,
    drawings: Annotated[int, typer.Option(min=1, help="drawings of each class on the sheet")] = 20,
) -> None:
    """Print how many classes and images a dataset has and how it is split, and save a sheet of some.

    Args:
        context: of the command.
        name: the dataset.
        root: folder with its files.
        download: fetch archives that are missing.
        split: how to split the classes.
        seed: chooses the characters of glyphs, and the classes of a drawn split.
        size: height and width of the images.
        channels: grey or colour.
        sheet: PNG to write.
        classes: rows of the sheet.
        drawings: columns of the sheet.
    """
    try:
        if download:
            if root is None:
                raise ValueError("root=None, so there is nowhere to download to; pass the folder for the archives.")
            for archive in fetch(name, root, minimal=split if split in MINIMAL else None):
                typer.echo(f"fetched: {archive}")
        dataset = load(name, root, seed, size=size, channels=channels, split=split)
        parts = partition(dataset, name, split, seed)
    except (OSError, ValueError) as error:
        typer.echo(f"error: {as_typed(str(error), options_of(context))}", err=True)
        sys.exit(1)
    _, _, depth, height, width = dataset.images.shape
    typer.echo(f"{dataset.source}: {dataset.classes} classes x {dataset.per_class} images, {depth}x{height}x{width}")
    typer.echo("split: " + ", ".join(f"{part} {len(chosen)}" for part, chosen in parts.items()))
    if sheet is not None:
        chosen = dataset.images[:: max(1, dataset.classes // classes)][:classes, :drawings]
        contact_sheet(chosen.flatten(0, 1), sheet, columns=chosen.shape[1])
        typer.echo(f"sheet: {sheet}")


if __name__ == "__main__":
    typer.run(main)
