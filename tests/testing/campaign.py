"""Many examples on many right layers, in pieces: what is done stands in a file, and a later run goes on from there."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from implicitlayers.testing import InconclusiveGradients
from tests.testing.library_layers import Check

FIRST, MOST = 8, 250
"""Examples of a layer's first batch, and of its largest: each repeats the simplest ones, so they grow."""

EACH = 16
"""Examples that every layer gets before any gets more."""


@dataclass(frozen=True)
class Count:
    """Some examples of one layer: a line of the file.

    Attributes:
        layer: its name.
        examples: how many there were.
        inconclusive: how many of them said nothing.
        seconds: of processor time that they took.
        exhausted: whether there are no others.
        alarm: what was wrongly found, empty if nothing.
    """

    layer: str
    examples: int = 0
    inconclusive: int = 0
    seconds: float = 0.0
    exhausted: bool = False
    alarm: str = ""

    def __add__(self, other: Count) -> Count:
        """Both together."""
        return Count(
            self.layer, self.examples + other.examples, self.inconclusive + other.inconclusive,
            self.seconds + other.seconds, self.exhausted or other.exhausted, self.alarm or other.alarm,
        )  # fmt: skip


def counts(results: Path) -> dict[str, Count]:
    """What the file has, by layer. A line that an interruption left incomplete is ignored."""
    found: dict[str, Count] = {}
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else []:
        try:
            count = Count(**json.loads(line))
        except ValueError:
            continue
        found[count.layer] = found.get(count.layer, Count(count.layer)) + count
    return found


def compact(results: Path) -> None:
    """Leave one line of each layer in the file, in alphabetical order. No other process may be writing to it."""
    lines = [json.dumps(asdict(count)) for _, count in sorted(counts(results).items())]
    results.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def look(layer: str, check: Check, examples: int) -> Count:
    """One batch."""
    begin = time.process_time()
    try:
        agreed, silent = check(examples)
    except InconclusiveGradients:
        # More than half of them, and most of a small batch may be at the kinks of the simplest examples.
        return Count(layer, examples, examples, time.process_time() - begin)
    except Exception as error:  # Also an error that is none of the kit's is an alarm: these layers are right.
        notes = "\n".join(getattr(error, "__notes__", []))
        alarm = f"{type(error).__name__}: {error}\n{notes}"
        return Count(layer, seconds=time.process_time() - begin, alarm=alarm)
    # Hypothesis draws fewer than it is asked for where it has tried all there are.
    seen = agreed + silent
    return Count(layer, seen, silent, time.process_time() - begin, exhausted=seen < examples)


def go_on(layers: Mapping[str, Check], results: Path, examples: int, seconds: float) -> Iterator[Count]:
    """Give every layer some examples, then all to the layer that will be done first, until the time is over."""
    end, order = time.monotonic() + seconds, random.Random(0)

    def urgency(name: str) -> tuple[bool, float, float]:
        count = done[name]
        if count.examples < EACH:
            # Of equals any one, so that an early end has looked into every corner.
            return False, count.examples, order.random()
        return True, count.seconds / count.examples * (examples - count.examples), 0.0

    done = {name: Count(name) for name in layers} | counts(results)
    while time.monotonic() < end:
        waiting = [
            name for name in layers if done[name].examples < examples and not (done[name].exhausted or done[name].alarm)
        ]
        name = min(waiting, key=urgency, default=None)
        if name is None:
            return
        batch = min(max(FIRST, done[name].examples), MOST, examples - done[name].examples)
        count = look(name, layers[name], batch)
        # In one piece, so that several processes may write to one file.
        with results.open("ab", buffering=0) as file:
            file.write(json.dumps(asdict(count)).encode() + b"\n")
        done[name] += count
        yield count


def table(groups: Mapping[str, Mapping[str, Check]], results: Path, examples: int) -> Iterator[str]:
    """Rows of Markdown, one for each group of layers, and their sum."""
    found = counts(results)
    yield f"| layers | how many | with {examples:,} examples | examples of each | examples | inconclusive | alarms |"
    yield "|---|---|---|---|---|---|---|"
    everything = {"all": [name for names in groups.values() for name in names]}
    for group, names in [*groups.items(), *everything.items()]:
        rows = [found.get(name, Count(name)) for name in names]
        each = [row.examples for row in rows if not row.exhausted] or [0]
        span = f"{min(each):,}" if min(each) == max(each) else f"{min(each):,} to {max(each):,}"
        total, silent = sum(row.examples for row in rows), sum(row.inconclusive for row in rows)
        alarms = sum(bool(row.alarm) for row in rows)
        full = sum(row.examples >= examples or row.exhausted for row in rows)
        yield f"| {group} | {len(rows)} | {full} | {span} | {total:,} | {silent:,} | {alarms} |"
