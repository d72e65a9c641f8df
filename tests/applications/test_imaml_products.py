"""Other lowerings and precisions of a network's products: the same function, with the derivatives of all kinds."""

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from applications.imaml import episodes, networks, train
from applications.imaml.algorithms import adapt, meta_loss, query_logits
from applications.imaml.config import Config, ConfigError
from applications.imaml.convolution import convolve
from applications.imaml.criterion import CLASSIFICATION
from applications.imaml.device import in_float32, use
from applications.imaml.episodes import Tasks, TaskSampler, generator_for, load_splits
from applications.imaml.evaluate import Protocol, evaluate
from applications.imaml.fewshot import Learner
from applications.imaml.metrics import read_metrics
from applications.imaml.products import Products
from applications.imaml.train import Limits
from applications.imaml.trained import load_network
from tests.helpers.runs import SHORT, SIZES, few_classes

HALF = Products(half=True)
LOWERINGS = ("windows", "grouped")
# Half the distance of neighbours among the numbers with 8 significant bits, relative to them.
ROUNDING = 2.0**-8


def drawn(side, tasks=2, ways=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(side)
    labels = torch.arange(ways).expand(tasks, -1)
    support, query = torch.rand(2, tasks, ways, 1, side, side, generator=generator, dtype=dtype)
    theta = networks.initialize(ways, 1, side, generator)
    theta = {name: value.to(dtype).requires_grad_() for name, value in theta.items()}
    return theta, Tasks(support, labels, query, labels)


def meta_gradient(config, theta, tasks):
    loss = meta_loss(config)(theta, tasks).loss
    return torch.autograd.grad(loss, list(theta.values()), allow_unused=True, materialize_grads=True)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("side", [28, 16])
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_lowerings_have_the_same_logits_and_meta_gradient(side, curvature):
    theta, tasks = drawn(side)
    config = Config(ways=3, inner_steps=2, cg_steps=2, curvature=curvature, damping=0.5)
    usual = meta_gradient(config, theta, tasks)
    images = tasks.query_images[0]
    for name in LOWERINGS:
        torch.testing.assert_close(
            networks.forward(theta, images, None, Products(name)), networks.forward(theta, images)
        )
        torch.testing.assert_close(meta_gradient(replace(config, convolution=name), theta, tasks), usual)


@pytest.mark.parametrize("side", [28, 16])
def test_the_lowering_is_the_one_that_was_asked_for(side):
    theta, tasks = drawn(side, tasks=1)
    seen = {}
    for name in ("auto", *LOWERINGS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            networks.forward(theta, tasks.query_images[0], None, Products(name))
        seen[name] = "aten::conv2d" in {event.key for event in profile.key_averages()}
    assert seen == {"auto": side == 16, "windows": False, "grouped": True}


@pytest.mark.parametrize("name", LOWERINGS)
def test_half_products_round_operands_and_result_once(name):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 6, 6, 8), (3, 3, 8, 5)))
    found = convolve(x, weight, Products(name, half=True))
    assert found.dtype == torch.float32
    rounded = [t.bfloat16().double() for t in (x, weight)]
    exact = convolve(*rounded)
    # The sum of 72 products in float32 is nearly exact beside the rounding of the result.
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * ROUNDING, atol=1e-5)
    assert not torch.equal(found, convolve(x, weight))


def test_what_is_not_a_product_stays_in_single_precision():
    theta, tasks = drawn(28, dtype=torch.float32)
    images = tasks.query_images[0]
    logits, features = networks.forward(theta, images, None, HALF), networks.features(theta, images, None, HALF)
    statistics = networks.batch_statistics(theta, images, HALF)
    for t in (logits, features, *(t for pair in statistics for t in pair)):
        assert t.dtype == torch.float32
    assert not torch.equal(logits, networks.head(theta, features))
    task = Tasks(*(part[0] for part in tasks))
    seen = networks.batch_statistics(theta, task.support_images, HALF)
    judged = query_logits(theta, task, "support", 1, HALF)
    expected = torch.vmap(lambda batch: networks.forward(theta, batch, seen, HALF))(images[None])[0]
    torch.testing.assert_close(judged, expected, rtol=0, atol=0)
    # More significant bits than bfloat16 has.
    assert all(not torch.equal(t.bfloat16().float(), t) for t in (features, statistics[1].mean))
    # The first layer isn't rounded.
    torch.testing.assert_close(statistics[0].mean, networks.batch_statistics(theta, images)[0].mean, rtol=0, atol=0)
    assert not torch.equal(statistics[1].mean, networks.batch_statistics(theta, images)[1].mean)
    outcome = meta_loss(Config(ways=3, inner_steps=2, cg_steps=2, precision="bf16"))(theta, tasks)
    outcome.loss.backward()
    report = outcome.solution.adjoint
    assert {t.dtype for t in (outcome.loss, outcome.support_loss, outcome.solution.stats.residual)} == {torch.float32}
    assert {t.dtype for t in (report.residual, theta["linear.weight"].grad)} == {torch.float32}


@pytest.mark.parametrize("side", [28, 16])
def test_half_products_can_be_differentiated_forwards_backwards_twice_and_mapped(side):
    theta, tasks = drawn(side, dtype=torch.float32)
    theta = {name: value.detach() for name, value in theta.items()}
    direction = {name: torch.randn_like(value) for name, value in theta.items()}

    def loss(parameters, how, images, labels):
        return F.cross_entropy(networks.forward(parameters, images, None, how), labels)

    def derivatives(how):
        def one(images, labels):
            def f(parameters):
                return loss(parameters, how, images, labels)

            gradient, slope = torch.func.grad(f)(theta), torch.func.jvp(f, (theta,), (direction,))[1]
            product = torch.func.jvp(torch.func.grad(f), (theta,), (direction,))[1]
            return flat(gradient.values()), slope, flat(product.values())

        return torch.vmap(one)(tasks.query_images, tasks.query_labels)

    half, single = derivatives(HALF), derivatives(Products())
    gradient, slope, _ = half
    # Forwards and backwards are the same derivative but for the order of rounding.
    by_backward = gradient @ flat(direction.values())
    torch.testing.assert_close(slope, by_backward, rtol=0.1, atol=0.05 * float(gradient.norm(dim=-1).max()))
    for found, expected, least in zip(half, single, (0.9, 0, 0.7), strict=True):
        assert found.dtype == torch.float32
        assert (F.cosine_similarity(found, expected, dim=-1) > least).all() if least else found.isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"curvature": "hessian", "damping": 0.5},
        {"algorithm": "maml", "lam": 0.0},
        {"algorithm": "anil", "lam": 0.0},
        {"batch_norm": "support"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "imaml",
)
def test_a_meta_gradient_in_half_points_where_the_one_in_single_does(characters, settings):
    network = networks.initialize(5, 1, 28, generator_for(0, "initialisation"))
    theta = {name: value.requires_grad_() for name, value in network.items()}
    tasks = TaskSampler(characters, 5, 1, 1, generator_for(3, "tasks")).sample(4)
    # Steps so short that what is compared is rounding: with those of 0.4 a network that has learnt nothing is led to
    # quite another place by it.
    config = Config(cg_steps=2, inner_lr=0.01, inner_steps=3, **({"lam": 1.0} | settings))
    single, half = (
        flat(meta_gradient(replace(config, precision=precision), theta, tasks)) for precision in ("float32", "bf16")
    )
    assert half.dtype == torch.float32
    assert F.cosine_similarity(single, half, dim=0) > 0.95
    assert not torch.equal(single, half)


@pytest.mark.parametrize("settings", [{}, {"algorithm": "anil", "lam": 0.0}], ids=["imaml", "anil"])
def test_tasks_are_learnt_in_the_precision_that_was_asked_for(settings):
    theta, tasks = drawn(28, tasks=1, dtype=torch.float32)
    task = Tasks(*(part[0] for part in tasks))
    single, half = (
        adapt(theta, task, Config(ways=3, inner_steps=1, precision=precision, **settings)).value["linear.weight"]
        for precision in ("float32", "bf16")
    )
    # The features are rounded to 8 bits on their way through three blocks, and the step is made of them.
    assert 1e-4 < (single - half).norm() / (single - theta["linear.weight"]).norm() < 0.2


def test_accuracies_are_measured_in_single_precision(run, characters, monkeypatch):
    config = Config.load(run / "config.json")
    for precision in ("tf32", "bf16"):
        assert Protocol().applied(replace(config, precision=precision)).precision == "float32"
    learner_of = json.loads((run / "config.json").read_text()) | {"precision": "tf32", "device": "cuda"}
    (run.parent / "other").mkdir(exist_ok=True)
    for file in run.iterdir():
        if file.is_file():
            (run.parent / "other" / file.name).write_bytes(file.read_bytes())
    (run.parent / "other" / "config.json").write_text(json.dumps(learner_of))
    assert Learner.load(run.parent / "other", device="cpu").config.precision == "float32"
    monkeypatch.setattr("applications.imaml.families.load_splits", lambda *_: {"test": characters})
    monkeypatch.setattr("applications.imaml.evaluate.check_same_data", lambda *_: None)
    rows = [evaluate(replace(config, precision=p), run, Protocol(tasks=4)).row() for p in ("float32", "tf32", "bf16")]
    assert rows[0] == rows[1] == rows[2]


def test_validation_is_in_single_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(episodes, "load", few_classes)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", SIZES)
    config = replace(SHORT, precision="bf16", tasks=64, validation_tasks=64, meta_steps=2, validate_every=2)
    train.train(config, tmp_path / "run", Limits(quiet=True))
    network, splits = load_network(tmp_path / "run", torch.device("cpu")), load_splits(config, torch.device("cpu"))
    tasks = TaskSampler(splits["validation"], 3, 1, 1, generator_for(config.seed, "validation tasks")).sample(64)

    def judge(task, precision):
        how = replace(config, precision=precision)
        phi = adapt(network.theta, task, how).value
        logits = query_logits(phi, task, how.batch_norm, how=Products.of(how))
        return CLASSIFICATION.scores(logits, task.query_labels).mean()

    single, half = (torch.vmap(partial(judge, precision=p))(tasks).mean().item() for p in ("float32", "bf16"))
    (found,) = read_metrics(tmp_path / "run" / "metrics.csv")["validation_accuracy"]
    assert found == pytest.approx(single)
    assert abs(half - single) > 1e-3


@pytest.fixture
def tf32():
    """Switches of PyTorch, which are put back."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in switches]
    yield switches
    for each, value in zip(switches, before, strict=True):
        each.allow_tf32 = value


@pytest.mark.parametrize("precision", ["tf32", "float32"])
def test_training_goes_on_in_its_precision_after_a_judgement(tf32, precision):
    for each in tf32:
        each.allow_tf32 = precision == "tf32"
    with suppress(KeyboardInterrupt), in_float32(Config(precision=precision)) as judged:
        assert (judged.precision, *(each.allow_tf32 for each in tf32)) == ("float32", False, False)
        raise KeyboardInterrupt
    assert [each.allow_tf32 for each in tf32] == [precision == "tf32"] * 2


def test_a_precision_that_the_device_lacks_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"precision='tf32' cannot be on cpu: .* pass precision='float32' or 'bf16'"):
        train.train(replace(SHORT, precision="tf32"), tmp_path / "run", Limits(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32")
def test_tf32_is_on_when_asked_for_and_off_when_not():
    a = torch.randn(256, 256, device="cuda", dtype=torch.float64)
    errors = {}
    for precision in ("tf32", "float32"):
        use(Config(device="cuda", precision=precision))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        errors[precision] = ((a.float() @ a.float()).double() - a @ a).norm() / (a @ a).norm()
    assert errors["float32"] < 1e-6 < 1e-5 < errors["tf32"]
