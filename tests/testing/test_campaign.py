"""The count of examples goes on from its file, and says what it found."""

from pathlib import Path

from implicitlayers.testing import Checked, GradientMismatch, GradientReport, InconclusiveGradients
from implicitlayers.testing.report import Comparison
from tests.testing.__main__ import KEPT
from tests.testing.campaign import Count, compact, counts, go_on, table
from tests.testing.correct import CORRECT


def _raises(kind):
    def check(examples):
        raise kind(GradientReport((Comparison("a derivative", "an oracle", "disagree"),)))

    return check


LAYERS = {
    "right": lambda examples: Checked(examples, 0),
    "small": lambda examples: Checked(min(examples, 3), 0),
    "noisy": lambda examples: Checked(examples - 1, 1),
    "silent": _raises(InconclusiveGradients),
    "wrong": _raises(GradientMismatch),
}


def test_every_layer_gets_its_examples_or_a_reason(tmp_path):
    results = tmp_path / "counts.jsonl"
    found = list(go_on(LAYERS, results, examples=10, seconds=60))
    assert [count.examples for count in found if count.layer == "right"] == [8, 2]
    done = counts(results)
    assert {name: (count.examples, count.exhausted) for name, count in done.items()} == {
        "right": (10, False), "small": (3, True), "noisy": (10, False), "silent": (10, False), "wrong": (0, False),
    }  # fmt: skip
    assert (done["noisy"].inconclusive, done["silent"].inconclusive) == (2, 10)
    assert done["wrong"].alarm.startswith("GradientMismatch: The gradients disagree")
    assert list(go_on(LAYERS, results, examples=10, seconds=60)) == []
    assert list(table({"all of them": LAYERS}, results, 10))[2] == "| all of them | 5 | 4 | 0 to 10 | 33 | 12 | 1 |"


def test_it_goes_on_after_an_interruption(tmp_path):
    results = tmp_path / "counts.jsonl"
    list(go_on({"right": LAYERS["right"]}, results, examples=4, seconds=60))
    results.write_text(results.read_text() + '{"layer": "right", "exam\n')
    assert counts(results)["right"].examples == 4
    (count,) = go_on({"right": LAYERS["right"]}, results, examples=6, seconds=60)
    assert count == Count("right", 2, 0, count.seconds)
    assert list(go_on({"right": LAYERS["right"]}, results, examples=9, seconds=0)) == []
    done = counts(results)
    compact(results)
    assert counts(results) == done
    assert len(results.read_text().splitlines()) == 1


def test_the_documents_have_the_count_that_is_kept():
    names = {name for layers in CORRECT.values() for name in layers}
    assert counts(KEPT).keys() <= names
    document = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    assert [row for row in table(CORRECT, KEPT, 1000) if row not in document] == []
