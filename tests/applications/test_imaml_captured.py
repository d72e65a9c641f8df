"""A meta-step asks the device nothing, and recorded as a graph it is the eager one to the bit."""

import importlib
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from applications.datasets import Sinusoids
from applications.imaml import episodes, train
from applications.imaml.algorithms import initial_strengths
from applications.imaml.captured import CapturedStep, CudaGraph, check_capturable
from applications.imaml.config import Config, ConfigError
from applications.imaml.episodes import generator_for
from applications.imaml.families import new_network, sampler_of
from applications.imaml.meta_step import MetaStep
from applications.imaml.processes import Processes
from applications.imaml.run_folder import RunError
from applications.imaml.train import Limits
from tests.helpers.devices import HostAskedError, no_host_sync
from tests.helpers.recording import OperationTape
from tests.helpers.runs import SHORT, SIZES, assert_same, few_classes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# What is solved in a fixed number of steps.
FIXED = {
    "imaml": {},
    "hessian": {"curvature": "hessian", "damping": 0.1},
    "unguarded": {"curvature": "hessian-unguarded"},
    "published": {"curvature": "published"},
    "learnt strength": {"learn_lam": "layer"},
    "adam": {"inner": "adam"},
    "bf16": {"precision": "bf16"},
    "grouped": {"convolution": "grouped"},
    "torch.SGD": {"inner": "torch.SGD"},
    "support statistics": {"batch_norm": "support", "query_sets": 2},
    "maml": {"algorithm": "maml", "lam": 0.0},
    "truncated": {"algorithm": "maml", "lam": 0.0, "path_steps": 1},
    "anil": {"algorithm": "anil", "lam": 0.0},
    "fomaml": {"algorithm": "fomaml", "lam": 0.0},
    "reptile": {"algorithm": "reptile", "lam": 0.0},
    "waves": {"data": "sinusoid", "ways": 5},
    "waves, maml": {"data": "sinusoid", "ways": 5, "algorithm": "maml", "lam": 0.0},
}


@pytest.fixture
def _adam_of_devices(monkeypatch):
    """Adam as it runs on a GPU, with its count on the device; PyTorch lets no CPU have that."""
    # The attribute of torch.optim is deleted there.
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])


def made(config=SHORT, device=CPU, *, capturable=True):
    family = Sinusoids() if config.is_regression else few_classes().to(device)
    network = new_network(family, config, generator_for(0, "initialisation"))
    theta = network | initial_strengths(network, config)
    theta = {name: value.to(device).requires_grad_() for name, value in theta.items()}
    generator = generator_for(0, "training tasks", device)
    sampler = sampler_of(family, config, generator, config.query_sets)
    return MetaStep(theta, sampler, config, Processes(), capturable=capturable)


def take(step, rates, run=None):
    for rate in rates:
        step.set_rate(rate)
        (run or step)()
    return {name: value.detach().clone() for name, value in step.tensors().items()}


def differing(found, expected):
    assert found.keys() == expected.keys()
    # Sums of what an algorithm doesn't have are NaN.
    return [name for name in found if not torch.equal(found[name].nan_to_num(7), expected[name].nan_to_num(7))]


@pytest.mark.usefixtures("_adam_of_devices")
@pytest.mark.parametrize("settings", FIXED.values(), ids=FIXED)
def test_a_meta_step_never_waits_for_the_device(settings):
    step = made(replace(SHORT, **settings))
    before = take(step, [])
    with no_host_sync():
        step.set_rate(0.01)
        step()
    after = take(step, [])
    assert "theta.linear.weight" in differing({name: after[name] for name in before}, before)


@pytest.mark.usefixtures("_adam_of_devices")
@pytest.mark.parametrize("inner", ["hessian-free", "lbfgs", "torch.LBFGS"])
def test_line_searches_and_optimizers_with_an_end_of_their_own_ask_the_device(inner):
    with pytest.raises(HostAskedError), no_host_sync():
        made(replace(SHORT, inner=inner))()


def test_adam_that_is_not_fused_asks_for_its_count():
    step = made(capturable=False)
    step._optimizer = torch.optim.Adam(step.theta.values(), foreach=False)
    with pytest.raises(HostAskedError), no_host_sync():
        step()


RATES = [0.02, 0.001, 0.03]


@pytest.mark.usefixtures("_adam_of_devices")
@pytest.mark.parametrize("name", ["imaml", "learnt strength", "support statistics", "maml", "waves"])
def test_a_recorded_step_is_the_eager_one_to_the_bit(name):
    config = replace(SHORT, **FIXED[name])
    step, tape = made(config), OperationTape()
    assert differing(take(step, RATES, CapturedStep(step, tape)), take(made(config), RATES)) == []
    assert (tape.recorded, tape.warmed_up) == (1, 3)


@pytest.mark.usefixtures("_adam_of_devices")
def test_a_step_that_is_under_way_is_recorded_as_well():
    step = made()
    take(step, RATES[:1])
    found = take(step, RATES[1:], CapturedStep(step, OperationTape()))
    assert differing(found, take(made(), RATES)) == []


@pytest.mark.usefixtures("_adam_of_devices")
def test_what_a_step_changes_stays_where_it_is():
    step = made()
    run = CapturedStep(step, OperationTape())
    take(step, RATES[:1], run)

    def addresses():
        rates = [group["lr"] for group in step._optimizer.param_groups]
        kept = {name: value for name, value in step.tensors().items() if name != "training_tasks"}
        return {name: value.data_ptr() for name, value in kept.items()}, [rate.data_ptr() for rate in rates]

    before = addresses()
    state = take(step, RATES[1:], run)
    assert addresses() == before
    step.restore(state)
    assert addresses() == before
    # Itself, two moments and their count; and the metrics.
    assert len(before[0]) == 4 * len(step.theta) + 1


@pytest.mark.usefixtures("_adam_of_devices")
def test_a_state_that_is_restored_goes_on_to_the_bit():
    whole = take(made(), RATES)
    state = take(made(), RATES[:1])
    resumed = made()
    resumed.restore(state)
    assert differing(take(resumed, RATES[1:], CapturedStep(resumed, OperationTape())), whole) == []
    # Back to a state without moments, as after a warm-up.
    step = made()
    fresh = take(step, [])
    take(step, RATES[:1])
    step.restore(fresh)
    assert differing(take(step, RATES), whole) == []


@pytest.fixture
def _graph_on_cpu(monkeypatch, _adam_of_devices):
    monkeypatch.setattr(episodes, "load", few_classes)
    monkeypatch.setattr(episodes, "SPLIT_SIZES", SIZES)
    monkeypatch.setattr(train, "check_capturable", lambda *_: None)
    monkeypatch.setattr(train, "draw_curve", lambda *_: None)
    monkeypatch.setattr(train, "CudaGraph", lambda device: OperationTape())


@pytest.mark.usefixtures("_graph_on_cpu")
def test_a_run_with_a_graph_goes_on_to_the_bit_with_or_without_one(tmp_path, monkeypatch):
    config = replace(SHORT, graph=True, schedule="cosine", meta_steps=4)
    assert train.train(config, tmp_path / "whole", Limits(quiet=True)) == 4
    # On a GPU Adam is capturable in either case.
    monkeypatch.setattr(train, "MetaStep", lambda *args, capturable: MetaStep(*args, capturable=True))
    for number, (first, then) in enumerate([(True, True), (True, False), (False, True)]):
        parts = tmp_path / f"parts {number}"
        assert train.train(replace(config, graph=first), parts, Limits(seconds=1e-6, quiet=True)) == 1
        assert train.train(replace(config, graph=then), parts, Limits(quiet=True), resume=True) == 4
        assert_same(parts, tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "device", "count", "message"),
    [
        ({}, CPU, 1, "graph=True cannot be on cpu: .* pass graph=False"),
        ({"inner": "lbfgs"}, CUDA, 1, "graph=True cannot be with inner='lbfgs', .* or inner='gradient' or 'adam'"),
        ({"inner": "hessian-free"}, CUDA, 1, "cannot be with inner='hessian-free'"),
        ({"inner": "torch.LBFGS"}, CUDA, 1, "cannot be with inner='torch.LBFGS'"),
        ({}, CUDA, 2, "graph=True cannot be with 2 processes, .* start one process"),
    ],
)
def test_a_graph_that_cannot_be_is_refused(settings, device, count, message):
    config = Config(graph=True, **settings)
    with pytest.raises(ConfigError, match=message):
        check_capturable(config, device, Processes(0, count))
    check_capturable(replace(config, graph=False), device, Processes(0, count))


def test_a_run_that_cannot_have_a_graph_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="graph=True cannot be on cpu"):
        train.train(replace(SHORT, graph=True), tmp_path / "run", Limits(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_gpu_may_have_a_graph():
    assert check_capturable(Config(graph=True), CUDA, Processes()) is None


def test_a_cuda_graph_is_recorded_in_the_order_that_pytorch_asks_for(monkeypatch):
    told = []

    class Stream:
        def __init__(self, name="beside"):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def register_generator_state(self, generator):
            told.append(f"registered {generator}")

        def replay(self):
            told.append("replayed")

    @contextmanager
    def inside(what):
        told.append(f"into {what}")
        yield
        told.append(f"out of {what}")

    patches = {
        "Stream": Stream,
        "current_stream": lambda: Stream("current"),
        "CUDAGraph": Graph,
        "device": lambda device: inside(device),
        "stream": lambda stream: inside(stream.name),
        "graph": lambda graph: inside("graph"),
    }
    for name, stand_in in patches.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recorder = CudaGraph(torch.device("cuda:1"))
    recorder.warm_up(lambda: told.append("run"))
    assert told == [
        *("into cuda:1", "beside waits for current", "into beside", "run", "run", "run", "out of beside"),
        *("current waits for beside", "out of cuda:1"),
    ]
    told.clear()
    replay = recorder.record(lambda: told.append("run"), "generator")
    assert told == ["into cuda:1", "registered generator", "into graph", "run", "out of graph", "out of cuda:1"]
    replay()
    assert told[-1] == "replayed"


@pytest.mark.gpu
@pytest.mark.parametrize("settings", FIXED.values(), ids=FIXED)
def test_a_meta_step_never_synchronizes_a_gpu(settings):
    step = made(replace(SHORT, **settings), CUDA)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.set_rate(0.01)
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert take(step, [])["theta.linear.weight"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["imaml", "hessian", "learnt strength", "adam", "support statistics", "maml", "anil", "waves"]
)
def test_a_cuda_graph_is_the_eager_step_to_the_bit(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config = replace(SHORT, **FIXED[name])
    step = made(config, CUDA)
    found = take(step, RATES, CapturedStep(step, CudaGraph(CUDA)))
    assert differing(found, take(made(config, CUDA), RATES)) == []
    resumed = made(config, CUDA)
    resumed.restore(take(made(config, CUDA), RATES[:1]))
    assert differing(take(resumed, RATES[1:], CapturedStep(resumed, CudaGraph(CUDA))), found) == []


@pytest.mark.usefixtures("_adam_of_devices")
def test_adam_takes_the_path_on_a_cpu_that_it_takes_on_a_gpu(monkeypatch):
    adam, taken = importlib.import_module("torch.optim.adam"), []
    for name in ("_single_tensor_adam", "_multi_tensor_adam", "_fused_adam"):
        path = getattr(adam, name)
        monkeypatch.setattr(
            adam, name, lambda *args, name=name, path=path, **how: taken.append(name) or path(*args, **how)
        )
    for capturable in (True, False):
        made(capturable=capturable)()
    assert taken == ["_fused_adam"] * 2


def test_a_recording_that_fails_says_how_to_do_without():
    class Failing(OperationTape):
        def record(self, function, generator):
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RunError, match=r"could not be recorded .*\(operation not permitted .*\); pass graph=False"):
        CapturedStep(made(capturable=False), Failing())()
