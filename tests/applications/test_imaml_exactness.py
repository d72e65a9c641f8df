"""How near a meta-gradient is to a tight one: nearer with what is spent on it; the figures are what they are called."""

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


def test_the_tight_reference_is_what_it_is_made_of(theta, tasks, monkeypatch):
    monkeypatch.setattr(module, "_INNER_STEPS", 40)
    monkeypatch.setattr(module, "_CG_STEPS", 20)
    found = exactness(theta, tasks, BASE)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.error < 1e-6
    assert found.seconds > 0
    assert found.reference_residual == pytest.approx(found.residual)


def test_less_work_is_farther_from_the_reference(theta, tasks, monkeypatch):
    monkeypatch.setattr(module, "_INNER_STEPS", 40)
    good, fair, poor = (
        exactness(theta, tasks, Config(**(vars(BASE) | {"inner_steps": inner, "cg_steps": cg})))
        for inner, cg in ((30, 20), (8, 3), (2, 1))
    )
    assert good.cosine > fair.cosine > poor.cosine
    assert good.error < fair.error < poor.error
    assert good.residual < fair.residual < poor.residual
    assert fair.estimate < poor.estimate
    assert good.reference_residual == fair.reference_residual == poor.reference_residual < fair.residual


def test_what_an_algorithm_does_not_have_is_nan(theta, tasks, monkeypatch):
    monkeypatch.setattr(module, "_INNER_STEPS", 3)
    found = exactness(theta, tasks, Config(ways=2, algorithm="fomaml", lam=2.0, device="cpu"))
    assert math.isnan(found.estimate)
    assert -1 <= found.cosine < 1
    assert torch.isfinite(torch.tensor([found.residual, found.error])).all()


def test_there_is_no_reference_without_a_pull(theta, tasks):
    found = exactness(theta, tasks, Config(ways=2, algorithm="maml", lam=0.0, inner_steps=2, device="cpu"))
    assert all(map(math.isnan, (found.cosine, found.error, found.estimate, found.reference_residual)))
    assert found.residual > 0
