"""A learnt strength of the pull: its derivative, its place among the meta-parameters, its way through a run."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from applications.imaml import __main__ as command
from applications.imaml import checkpoint, episodes, train
from applications.imaml.algorithms import initial_strengths, learnt_strengths
from applications.imaml.config import Config
from applications.imaml.evaluate import load_network
from applications.imaml.network import initialize
from applications.imaml.train import Limits
from tests.helpers.few_shot import (
    LAM,
    SHAPES,
    SIZES,
    cross_entropy,
    descended,
    each,
    evaluate,
    named,
    outer,
    slope_of,
    tiny_problem,
)
from tests.helpers.runs import SMALL

LAYERS = [name.partition(".")[0] for name in SHAPES]
TIGHT = {"inner": "lbfgs", "inner_steps": 400, "cg_steps": 60, "curvature": "hessian"}


@pytest.fixture
def problem(monkeypatch):
    return tiny_problem(monkeypatch)


def logarithms(hidden, linear):
    """Strengths that differ from layer to layer, as meta-parameters."""
    numbers = {"log_lam.hidden": hidden, "log_lam.linear": linear}
    return {name: torch.tensor(math.log(lam), dtype=torch.float64) for name, lam in numbers.items()}


def weights(hidden, linear):
    """The same for every entry of the parameters as a vector."""
    parts = zip(SIZES, LAYERS, strict=True)
    of = {"hidden": hidden, "linear": linear}
    return torch.cat([torch.full((size,), of[layer], dtype=torch.float64) for size, layer in parts])


@pytest.mark.parametrize("layer", ["hidden", "linear"])
def test_imaml_learns_strengths_by_the_derivative_of_the_whole_outer_objective(problem, layer):
    theta, tasks = problem
    lams = {"hidden": 0.5, "linear": 0.25}
    config = Config(learn_lam="layer", **TIGHT)
    outcome, _, gradients = evaluate(named(theta), tasks, config, logarithms(**lams))
    torch.testing.assert_close(outcome.loss.detach(), outer(theta, tasks, weights(**lams)), rtol=1e-10, atol=0)

    def whole(logarithm):
        return outer(theta, tasks, weights(**(lams | {layer: math.exp(logarithm)})))

    expected = slope_of(whole, math.log(lams[layer]), 1.0)
    torch.testing.assert_close(gradients[f"log_lam.{layer}"], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("held", [0, 3])
def test_maml_learns_strengths_through_the_path(problem, held):
    theta, tasks = problem
    lams = logarithms(hidden=0.5, linear=0.25)
    leaves = {name: value.clone().requires_grad_() for name, value in lams.items()}
    strength = torch.cat(
        [leaves[f"log_lam.{layer}"].exp().expand(size) for layer, size in zip(LAYERS, SIZES, strict=True)]
    )
    phis = [descended(theta, task, 5, 0.5, strength, held) for task in each(tasks)]
    losses = [cross_entropy(phi, t.query_images, t.query_labels) for phi, t in zip(phis, each(tasks), strict=True)]
    torch.stack(losses).mean().backward()
    config = Config(algorithm="maml", learn_lam="layer", inner_lr=0.5, path_steps=5 - held)
    found = evaluate(named(theta), tasks, config, lams).strengths
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("algorithm", ["imaml", "maml"])
def test_one_strength_for_all_gets_the_sum_of_the_layers_gradients(problem, algorithm):
    theta, tasks = problem
    scalar, layers = (
        evaluate(named(theta), tasks, Config(algorithm=algorithm, lam=LAM, learn_lam=how))
        for how in ("scalar", "layer")
    )
    torch.testing.assert_close(scalar.strengths["log_lam.all"], sum(layers.strengths.values()))
    torch.testing.assert_close(scalar.gradient, layers.gradient)
    given = evaluate(named(theta), tasks, Config(algorithm=algorithm, lam=LAM))
    torch.testing.assert_close(scalar.gradient, given.gradient)
    assert given.strengths == {}


def test_strengths_start_as_given_in_the_layers_that_are_adapted():
    network = initialize(5, 1, torch.Generator())
    assert initial_strengths(network, Config()) == {}
    for settings, count in (({"learn_lam": "scalar"}, 1), ({"learn_lam": "layer"}, 9)):
        strengths = learnt_strengths(initial_strengths(network, Config(lam=0.3, **settings)))
        assert list(strengths.values()) == pytest.approx([0.3] * count)
    assert learnt_strengths(initial_strengths(network, Config(algorithm="anil", learn_lam="layer"))).keys() == {
        "linear"
    }


def test_a_run_learns_saves_and_reports_its_strengths(characters, monkeypatch, tmp_path):
    monkeypatch.setattr(episodes, "load", lambda name, root, seed: characters)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", {"glyphs": {"train": 20, "validation": 10, "test": 10}})
    config = replace(SMALL, learn_lam="layer", meta_steps=3, log_every=3, validate_every=3)
    folder = tmp_path / "run"
    train.train(config, folder, Limits(quiet=True))
    strengths = learnt_strengths(load_network(folder, torch.device("cpu")).theta)
    assert len(strengths) == 9
    # Three steps of Adam at up to 5e-3 in the logarithm.
    assert all(0.095 < value < 0.105 and value != pytest.approx(0.1, rel=1e-4) for value in strengths.values())
    tensors = checkpoint.load(folder).tensors
    assert tensors["adam.log_lam.linear.step"].item() == 3
    result = CliRunner().invoke(command.app, ["evaluate", str(folder), "--tasks", "3"])
    assert result.exit_code == 0, result.stderr
    assert f"lam learnt, {min(strengths.values()):g} to {max(strengths.values()):g}" in result.stdout
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["row"]["learnt_lam"] == pytest.approx(strengths)
    assert report["row"]["lam"] is None
    assert report["row"]["learn_lam"] == "layer"


@pytest.mark.parametrize(
    ("options", "lam"), [(("maml",), 0.0), (("imaml",), Config.lam), (("fomaml", "--lam", "0.25"), 0.25)]
)
def test_command_knows_the_strength_that_an_algorithm_is_used_with(monkeypatch, tmp_path, options, lam):
    asked = []
    monkeypatch.setattr(command, "train", lambda config, out, limits, **_: asked.append(config) or config.meta_steps)
    result = CliRunner().invoke(command.app, ["train", "--out", str(tmp_path / "run"), "--algorithm", *options])
    assert result.exit_code == 0, result.stderr
    assert [(config.algorithm, config.lam) for config in asked] == [(options[0], lam)]
