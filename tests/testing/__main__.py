"""``python -m tests.testing``: the figures that docs/testing.md reports, made there and then."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import torch

from implicitlayers.testing import GradientMismatch
from tests.testing import campaign
from tests.testing.correct import CORRECT
from tests.testing.planted import PLANTED, run
from tests.testing.study import study

KEPT = Path(__file__).with_name("correct.jsonl")
"""What has been counted so far."""


def planted(examples: int) -> int:
    """Print at which example each of the planted bugs is caught; return how many are not."""
    print("| planted bug | caught at example |\n|---|---|")
    missed = 0
    for name, (bad, _, inputs, options) in PLANTED.items():
        seen: list[Any] = []
        try:
            run(bad, inputs.map(lambda drawn, seen=seen: seen.append(drawn) or drawn), options, examples)
        except GradientMismatch:
            # The example that failed is run once more to see whether it fails again.
            print(f"| {name} | {max(len(seen) - 1, 1)} |", flush=True)
        else:
            missed += 1
            print(f"| {name} | missed |", flush=True)
    print(f"\n{len(PLANTED) - missed} of {len(PLANTED)} planted bugs are caught within {examples} examples.")
    return missed


def correct(results: Path, examples: int, seconds: float, match: str, part: tuple[int, int]) -> int:
    """Go on looking for false alarms, print the table, and return how many there are."""
    chosen = {
        group: {name: check for name, check in layers.items() if match in name} for group, layers in CORRECT.items()
    }
    layers = {name: check for group in chosen.values() for name, check in group.items()}
    which, of = part
    mine = {name: check for i, (name, check) in enumerate(layers.items()) if i % of == which - 1}
    for count in campaign.go_on(mine, results, examples, seconds):
        if count.alarm:
            print(f"false alarm: {count.layer}\n{count.alarm}\n", file=sys.stderr, flush=True)
    if part == (1, 1):
        campaign.compact(results)
    for row in campaign.table(chosen, results, examples):
        print(row)
    return sum(bool(count.alarm) for name, count in campaign.counts(results).items() if name in layers)


def fraction(text: str) -> tuple[int, int]:
    """ "2/3" as (2, 3)."""
    which, of = (int(number) for number in text.split("/"))
    if not 1 <= which <= of:
        raise ValueError(text)
    return which, of


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.testing", description=__doc__)
    parser.add_argument("what", choices=["study", "planted", "correct"])
    parser.add_argument("--examples", type=int, default=None, help="examples a layer (100 planted, 1000 correct)")
    parser.add_argument("--results", type=Path, default=KEPT, help="what is done; goes on from there")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; 0 prints the table")
    parser.add_argument("--match", default="", help="only right layers whose name contains this")
    parser.add_argument("--part", type=fraction, default=(1, 1), help="K/N: every N-th layer, for N processes at once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Layers say at extreme cotangents that a tolerance was not reached; the kit judges what they returned.
    warnings.filterwarnings("ignore")
    # A bug is caught or not: how small the example is does not matter here.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("count", database=None, phases=phases)
    hypothesis.settings.load_profile("count")
    if options.what == "study":
        print("| method | noise | error ≤ estimate | estimate / error | error | undecided |\n|---|---|---|---|---|---|")
        for row in study():
            print(row, flush=True)
    elif options.what == "planted":
        sys.exit(planted(options.examples or 100))
    else:
        sys.exit(correct(options.results, options.examples or 1000, options.seconds, options.match, options.part))


if __name__ == "__main__":
    main()
