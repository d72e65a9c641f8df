"""``python -m benchmarks NAME | all``: print a table, write it as JSON. Nothing else should run meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import accuracy, adjoint, device, lanes, large, memory, meta_step, overhead, scaling
from benchmarks.report import publish

BENCHMARKS = {
    "meta_step": meta_step.run,
    "device": device.run,
    "memory": memory.run,
    "overhead": overhead.run,
    "lanes": lanes.run,
    "large": large.run,
    "adjoint": adjoint.run,
    "accuracy": accuracy.run,
    "scaling": scaling.run,
}
# What the usual sizes leave out, since it takes minutes.
IN_FULL = {"adjoint": adjoint.run_in_full}


def main(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(BENCHMARKS)}, or all")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if torch.cuda.is_available() else "cpu",
    repeats: Annotated[int, typer.Option(help="timed runs of each candidate")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's choice")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks/results"),
    full: Annotated[
        bool, typer.Option("--full", help=f"sizes that take minutes as well ({', '.join(IN_FULL)})")
    ] = False,
) -> None:
    """Measure."""
    if name != "all" and name not in BENCHMARKS:
        raise typer.BadParameter(f"{name!r} is no benchmark; pass one of {', '.join(BENCHMARKS)}, or all.")
    if threads:
        torch.set_num_threads(threads)
    runs = BENCHMARKS | IN_FULL if full else BENCHMARKS
    for each in runs if name == "all" else [name]:
        typer.echo(f"written to {publish(each, runs[each](device, repeats), device, out)}")


if __name__ == "__main__":
    typer.run(main)
