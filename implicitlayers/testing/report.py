"""What a comparison of gradients found: verdicts with their numbers, and the text that a failing test shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from implicitlayers.testing.quotients import CERTAIN, Quotients

__all__ = ["Comparison", "GradientMismatch", "GradientReport", "InconclusiveGradients", "Verdict", "combined", "judge"]

# How not to ask for what a layer does not support.
TAPE, DUAL, MAP = (f'leave "{mode}" out of `modes`' for mode in ("reverse", "forward", "vmap"))

LOOSE = (
    "If the layer solves something to a tolerance, this may be the error of its values, where that is smooth: solve "
    "more tightly, or pass a tighter function as `reference`."
)
"""What a small disagreement may be."""

RANDOM = (
    "There is no derivative to compare where two evaluations at the same inputs differ: if the layer draws random "
    "numbers (dropout, noise), let it seed them itself, or switch them off (eval())."
)
"""What a layer's values are that change from one evaluation to the next."""

Verdict = Literal["agree", "disagree", "inconclusive"]


class GradientMismatch(AssertionError):  # noqa: N818 - a failed assertion, named as what it found
    """The derivatives of a layer disagree with an oracle. `report` is the `GradientReport`."""

    def __init__(self, report: GradientReport) -> None:
        super().__init__(str(report))
        self.report = report


class InconclusiveGradients(AssertionError):  # noqa: N818
    """The derivatives could not be told from wrong ones. `report` is the `GradientReport`."""

    def __init__(self, report: GradientReport) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Comparison:
    """One derivative of the layer against one oracle; the numbers are those of the worst entry.

    Attributes:
        what: which derivative, by which route.
        oracle: what it was compared with.
        verdict: "agree", "disagree", or "inconclusive".
        entry: which number it is.
        found: the layer's.
        expected: the oracle's.
        floor: error estimate of the oracle: a smaller difference says nothing.
        allowed: tol times the size of the derivative.
        reason: why the verdict is not "agree", and what to do.
        missing: where the layer raised, the option whose value asks for that: it may not be meant to have it.
    """

    what: str
    oracle: str
    verdict: Verdict
    entry: str = ""
    found: float = 0.0
    expected: float = 0.0
    floor: float = 0.0
    allowed: float = 0.0
    reason: str = ""
    missing: str = ""

    @classmethod
    def raised(cls, what: str, oracle: str, missing: str, error: Exception) -> Comparison:
        """What a layer raised instead of an answer."""
        message = str(error).strip().partition("\n")[0]
        return cls(what, oracle, "disagree", reason=f"raised {type(error).__name__}: {message}", missing=missing)

    @property
    def is_wrong(self) -> bool:
        """Whether two numbers disagree."""
        return self.verdict == "disagree" and not self.missing

    @property
    def difference(self) -> float:
        """How far the layer is from the oracle."""
        return abs(self.found - self.expected)

    @property
    def rank(self) -> tuple[int, float]:
        """Bad ones last: by verdict, then by the difference relative to what is allowed."""
        excess = self.difference / max(self.allowed + self.floor, 1e-300)
        return ("agree", "inconclusive", "disagree").index(self.verdict), excess if excess == excess else float("inf")

    def __str__(self) -> str:
        """One paragraph."""
        if self.missing:
            remedy = f"If the layer is not meant to have it, {self.missing}."
            return f"not supported: {self.what}\n    {self.reason}\n    {remedy}"
        lines = [f"{self.verdict}: {self.what}, against {self.oracle}"]
        if self.entry:
            lines.append(
                f"    {self.entry}: layer {self.found:.10g}, oracle {self.expected:.10g}, difference "
                f"{self.difference:.2e} (floor {self.floor:.1e}, allowed {self.allowed:.1e})"
            )
        if self.reason:
            lines.append(f"    {self.reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class GradientReport:
    """Everything `assert_gradients_match` compared.

    Attributes:
        comparisons: one for every derivative and oracle.
    """

    comparisons: tuple[Comparison, ...]

    @property
    def worst(self) -> Comparison:
        """The comparison that decides."""
        return max(self.comparisons, key=lambda c: c.rank)

    @property
    def verdict(self) -> Verdict:
        """The worst of all verdicts."""
        return self.worst.verdict

    @property
    def agrees(self) -> bool:
        """Whether every derivative agrees with its oracle."""
        return self.verdict == "agree"

    def __str__(self) -> str:
        """The worst comparison first, then the other troubled ones, then what agrees in one line."""
        ordered = sorted(self.comparisons, key=lambda c: c.rank, reverse=True)
        troubled = [c for c in ordered if c.verdict != "agree" and not c.missing]
        # Asked for anything that it does not have a layer raises much the same.
        unsupported = {c.missing: c for c in self.comparisons[::-1] if c.missing}
        agreeing = [c for c in ordered if c.verdict == "agree"]
        head = {
            "agree": "The gradients agree",
            "disagree": "The gradients disagree",
            "inconclusive": "The gradients could not be checked",
        }[self.verdict]
        if unsupported and not troubled:
            head = "The layer does not support everything"
        lines = [f"{head} ({len(agreeing)} of {len(ordered)} comparisons agree)."]
        lines += [str(c) for c in (*troubled[:8], *list(unsupported.values())[::-1])]
        if len(troubled) > 8:
            lines.append(f"… and {len(troubled) - 8} more.")
        if agreeing:
            lines.append(f"closest call among those that agree: {str(agreeing[0]).removeprefix('agree: ')}")
        return "\n".join(lines)


def judge(found: Tensor, oracle: Quotients, tol: float) -> tuple[Verdict, int]:
    """Verdict on a vector of numbers, and the index of the worst.

    Args:
        found: what the layer says, ``[m]``.
        oracle: what the oracle says, how wrong it may be, and what such numbers amount to.
        tol: tolerance, relative to the latter.
    """
    expected, scale, natural = oracle.expected, oracle.scale, oracle.natural
    difference = torch.where(torch.isfinite(found), (found - expected).abs(), torch.inf)
    floor = torch.where(torch.isfinite(expected), oracle.floor, torch.inf)
    allowed = tol * scale
    # Where a part of the output jumps by its own size, x lies on a discontinuity, and a quotient across it may look
    # smooth in another part (the Q of a QR decomposition at the identity).
    jumps = bool((floor > scale.clamp_min(natural)).any())
    wrong = torch.isfinite(floor) & (difference > allowed + CERTAIN * floor) & (not jumps)
    resolved = floor <= tol * scale.clamp_min(natural)
    agreed = resolved & (difference <= allowed + floor)
    # What is hidden agrees as any other number of its size would, unless it is seen to agree by its own size.
    agreed &= ~oracle.missed(found, tol)
    if bool(wrong.any()):
        excess = torch.where(wrong, difference / (allowed + floor).clamp_min(1e-300), -1.0)
        return "disagree", int(excess.nan_to_num(nan=-1.0, posinf=torch.inf).argmax())
    if bool(agreed.all()):
        return "agree", int((difference / (allowed + floor).clamp_min(1e-300)).argmax())
    return "inconclusive", int(torch.where(agreed, -1.0, floor).argmax())


def combined(reports: Sequence[GradientReport]) -> GradientReport:
    """One report of all."""
    return GradientReport(tuple(c for report in reports for c in report.comparisons))


def left_out(what: str) -> str:
    """How not to ask for a derivative."""
    if "vmap" in what or "forward" in what:
        return MAP if "vmap" in what else DUAL
    return "pass order=1" if " over " in what else TAPE


def named(names: Sequence[str], shapes: Sequence[torch.Size], k: int) -> str:
    """Where the k-th number of some tensors is."""
    for name, shape in zip(names, shapes, strict=True):
        if k < shape.numel():
            return f"entry {index(k, shape)}{name}"
        k -= shape.numel()
    raise IndexError(k)


def index(k: int, shape: torch.Size) -> str:
    """Where the k-th entry of a tensor is."""
    return str([int(i) for i in torch.unravel_index(torch.tensor(k), shape)]) if shape else ""


def remedy(oracle: Quotients, k: int, tol: float) -> str:
    """What to do about an oracle that cannot see its k-th number."""
    floor, scale = float(oracle.floor[k]), float(oracle.scale[k])
    if floor == float("inf"):
        return "No difference quotient could be formed: the layer is not defined, or not finite, on both sides of x."
    if bool(oracle.hidden(tol)[k]):
        return (
            f"A derivative of size {float(oracle.size[k]):.1e} is left of numbers of {oracle.natural:.1e}, judging by "
            "the values, and rounding may have taken it: take the large constant part out of what the layer "
            "returns, or compute in float64."
        )
    return (
        f"Differences of the layer are good to {floor:.1e} only, against a derivative of size {scale:.1e}: its values "
        "scatter, or are not smooth near x. Solve more tightly (rtol, atol, max_steps) or in float64, move away from a "
        f"kink, pass a tighter function as `reference`, or a `tol` above {tol:.0e}."
    )
