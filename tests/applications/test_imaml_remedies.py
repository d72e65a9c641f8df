"""What is advised after a breakdown can be followed: each setting exists, is used, and may be so beside the others."""

from dataclasses import replace

import pytest

from applications.imaml.config import Config
from applications.imaml.idle import idle
from applications.imaml.remedies import remedies

RUNS = {
    "default": ({}, "a smaller inner_lr or a smaller meta_lr"),
    "hessian": (
        {"curvature": "hessian"},
        "a smaller inner_lr, a smaller meta_lr, a larger damping or curvature='gauss-newton'",
    ),
    "published": (
        {"curvature": "published"},
        "a smaller inner_lr, a smaller meta_lr or curvature='gauss-newton'",
    ),
    "unguarded, hessian-free": (
        {"curvature": "hessian-unguarded", "inner": "hessian-free"},
        "a larger lam, a smaller meta_lr, a larger damping or curvature='gauss-newton'",
    ),
    "lbfgs, learnt": (
        {"inner": "lbfgs", "learn_lam": "layer"},
        "a larger lam, a smaller meta_lr or learn_lam='none'",
    ),
    "fomaml": ({"algorithm": "fomaml", "lam": 0.0}, "a smaller inner_lr or a smaller meta_lr"),
    "fomaml, lbfgs": ({"algorithm": "fomaml", "lam": 0.0, "inner": "lbfgs"}, "a larger lam or a smaller meta_lr"),
    "reptile, torch": (
        {"algorithm": "reptile", "lam": 0.0, "inner": "torch.LBFGS", "precision": "bf16"},
        "a smaller inner_lr, a smaller meta_lr or precision='float32'",
    ),
    "maml": (
        {"algorithm": "maml", "lam": 0.0},
        "a smaller inner_lr, a smaller meta_lr, fewer inner_steps or fewer path_steps",
    ),
    "maml, one step": (
        {"algorithm": "maml", "lam": 0.0, "inner_steps": 1},
        "a smaller inner_lr or a smaller meta_lr",
    ),
    "maml, last step": (
        {"algorithm": "maml", "lam": 0.0, "path_steps": 1},
        "a smaller inner_lr, a smaller meta_lr or fewer inner_steps",
    ),
    "anil, adam": (
        {"algorithm": "anil", "lam": 0.0, "inner": "adam"},
        "a smaller inner_lr, a smaller meta_lr or fewer inner_steps",
    ),
}


def followed(config, advice):
    """The settings with one of the pieces of advice taken, and which one that is about."""
    if "=" in advice:
        name, value = advice.split("=")
        return name, replace(config, **{name: value.strip("'")})
    how, name = advice.removeprefix("a ").split()
    value = getattr(config, name)
    if name == "path_steps" and value is None:
        value = config.inner_steps
    changed = {"smaller": lambda v: v / 2, "larger": lambda v: 2 * v or 1.0, "fewer": lambda v: v - 1}[how](value)
    return name, replace(config, **{name: changed})


@pytest.mark.parametrize(("settings", "told"), RUNS.values(), ids=RUNS)
def test_advice_can_be_followed(settings, told):
    config = Config(**settings)
    assert remedies(config) == told
    for advice in told.replace(" or ", ", ").split(", "):
        name, changed = followed(config, advice)
        assert changed != config
        assert name not in idle(changed)
