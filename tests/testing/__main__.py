"""``python -m tests.testing``: the figures that docs/testing.md reports, made there and then."""

from __future__ import annotations

import argparse
import time
import warnings

import hypothesis
import torch

from implicitlayers.testing import GradientMismatch, InconclusiveGradients
from tests.testing.correct import CORRECT
from tests.testing.planted import PLANTED, run
from tests.testing.study import study


def planted(examples: int) -> None:
    """How many of the planted bugs are caught."""
    caught = 0
    for name, (bad, _, inputs, options) in PLANTED.items():
        try:
            run(bad, inputs, options, examples)
        except GradientMismatch:
            caught += 1
        else:
            print(f"missed: {name}", flush=True)
    print(f"{caught} of {len(PLANTED)} planted bugs caught within {examples} examples each")


def correct(examples: int, seconds: float, match: str) -> None:
    """How many right layers pass, with up to so many examples in about so many seconds each."""
    layers = {name: check for name, check in CORRECT.items() if match in name}
    alarms = agreed = silent = full = 0
    fewest = examples
    for name, check in layers.items():
        begin, done, batch = time.monotonic(), 0, 5
        while done < examples and (time.monotonic() - begin < seconds or not done):
            batch = min(2 * batch, examples - done)
            try:
                checked = check(batch)
            except (GradientMismatch, InconclusiveGradients) as error:
                alarms += 1
                print(f"alarm: {name}\n{error}\n{getattr(error, '__notes__', '')}", flush=True)
                break
            done += batch
            agreed, silent = agreed + checked.examples, silent + checked.inconclusive
            if checked.examples + checked.inconclusive < batch:  # Hypothesis has tried all there are.
                done = examples
        full, fewest = full + (done >= examples), min(fewest, done)
    print(
        f"{len(layers) - alarms} of {len(layers)} right layers passed without an alarm: {agreed} examples agree, "
        f"{silent} are inconclusive; {full} layers had all {examples} examples, each at least {fewest}"
    )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.testing", description=__doc__)
    parser.add_argument("what", choices=["study", "planted", "correct"])
    parser.add_argument("--examples", type=int, default=None, help="examples a layer (100 planted, 1000 correct)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="about how long to spend on a right layer")
    parser.add_argument("--match", default="", help="only right layers whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # A bug is caught or not: how small the example is does not matter here.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("count", database=None, phases=phases)
    hypothesis.settings.load_profile("count")
    if options.what == "study":
        print("| method | noise | error ≤ estimate | estimate / error | error | undecided |\n|---|---|---|---|---|---|")
        for row in study():
            print(row, flush=True)
    elif options.what == "planted":
        planted(options.examples or 100)
    else:
        correct(options.examples or 1000, options.seconds, options.match)


if __name__ == "__main__":
    main()
