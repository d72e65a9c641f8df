"""How exact a meta-gradient is: it rises with what is spent on it, and the figures are what they are called."""

import math

import pytest
import torch

from applications.imaml import exactness as module
from applications.imaml.config import Config
from applications.imaml.episodes import TaskSampler, generator_for
from applications.imaml.exactness import exactness
from applications.imaml.networks import initialize

BASE = Config(ways=2, lam=2.0, inner="lbfgs", inner_steps=40, cg_steps=20, device="cpu")


@pytest.fixture(scope="module")
def tasks(characters):
    return TaskSampler(characters, 2, 1, 1, generator_for(0, "these tasks")).sample(2)


@pytest.fixture(scope="module")
def theta():
    return initialize(2, 1, 28, generator_for(0, "initialisation"))


def test_the_exact_meta_gradient_is_exact(theta, tasks, monkeypatch):
    monkeypatch.setattr(module, "_INNER_STEPS", 40)
    monkeypatch.setattr(module, "_CG_STEPS", 20)
    found = exactness(theta, tasks, BASE)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.error < 1e-6
    assert found.seconds > 0


def test_less_work_is_less_exact(theta, tasks, monkeypatch):
    monkeypatch.setattr(module, "_INNER_STEPS", 40)
    good, fair, poor = (
        exactness(theta, tasks, Config(**(vars(BASE) | {"inner_steps": inner, "cg_steps": cg})))
        for inner, cg in ((30, 20), (8, 3), (2, 1))
    )
    assert good.cosine > fair.cosine > poor.cosine
    assert good.error < fair.error < poor.error
    assert good.residual < fair.residual < poor.residual
    assert fair.estimate < poor.estimate


def test_what_an_algorithm_does_not_have_is_nan(theta, tasks, monkeypatch):
    monkeypatch.setattr(module, "_INNER_STEPS", 3)
    found = exactness(theta, tasks, Config(ways=2, algorithm="fomaml", lam=2.0, device="cpu"))
    assert math.isnan(found.estimate)
    assert -1 <= found.cosine < 1
    assert torch.isfinite(torch.tensor([found.residual, found.error])).all()
