"""What to begin a run with in place of one that broke down."""

from __future__ import annotations

from applications.imaml.config import Config
from applications.imaml.idle import idle

__all__ = ["remedies"]

# Those through whose inner steps the derivative is taken, so that it may grow by a factor in each.
_PATH = ("maml", "anil")
# Curvatures that a damping is added to and that may be negative.
_DAMPED = ("hessian", "hessian-unguarded")


def remedies(config: Config) -> str:
    """Settings under which a loss or a parameter that is no longer finite is less likely.

    Larger steps than the inner problem bears are what training breaks down by as a rule. A stronger pull is no remedy
    for those, whose product with the curvature it enlarges; it is where a line search finds the step and the loss of
    a few support images has no minimizer without it. Negative curvature in the linear system and a derivative that
    grows along the path are the other ways.

    Args:
        config: of the run that broke down.

    Returns:
        What to change, for a sentence: each is a setting that can be changed so beside the others.
    """
    unused = idle(config)
    found = ["a larger lam" if "inner_lr" in unused else "a smaller inner_lr", "a smaller meta_lr"]
    if config.algorithm in _PATH and config.inner_steps > 1:
        found.append("fewer inner_steps")
        if config.inner == "gradient" and config.path_steps != 1:
            found.append("fewer path_steps")
    if config.algorithm == "imaml" and config.curvature in _DAMPED:
        found.append("a larger damping")
    if config.algorithm == "imaml" and config.curvature != "gauss-newton":
        found.append("curvature='gauss-newton'")
    if config.learn_lam != "none":
        found.append("learn_lam='none'")
    if config.precision != "float32":
        found.append("precision='float32'")
    return f"{', '.join(found[:-1])} or {found[-1]}"
