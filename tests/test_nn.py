"""The modules: in a Sequential, moved, saved, copied, pickled, called functionally, under autocast, in DDP."""

import copy
import datetime
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import implicitlayers as il

F64 = torch.float64


class Distance(nn.Module):
    """½‖x - W b‖² + ¼ Σ x⁴, so that the minimizer is not linear in W."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.3, 0.1]], dtype=F64))

    def forward(self, x, b):
        return (x - self.W @ b).square().sum() / 2 + x.pow(4).sum() / 4


class Ridge(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_lam = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, *params):
        return il.Ridge(self.log_lam.exp())


def layer():
    return il.nn.ArgminLayer(Distance(), torch.zeros(3, dtype=F64), regularizer=Ridge(), solver=il.Newton(rtol=1e-12))


B = torch.tensor([0.7, -0.4], dtype=F64)


def expected(W, log_lam, b):
    """The root of x + x³ + λx = W b, elementwise, by Newton's method."""
    lam, c = log_lam.exp(), W @ b
    x = torch.zeros_like(c)
    for _ in range(30):
        x = x - (x + x**3 + lam * x - c) / (1 + 3 * x**2 + lam)
    return x


def test_every_parameter_is_found_and_gets_its_gradient():
    module = layer()
    assert set(dict(module.named_parameters())) == {"function.W", "regularizer.log_lam"}
    module(B).sin().sum().backward()
    W, log_lam = module.function.W, module.regularizer.log_lam
    oracle = torch.autograd.grad(expected(W, log_lam, B).sin().sum(), (W, log_lam))
    torch.testing.assert_close((W.grad, log_lam.grad), oracle, rtol=1e-9, atol=1e-12)
    assert module.solution.status == il.Status.CONVERGED
    assert module.solution.adjoint.residual < 1e-6
    assert not module.solution.value.requires_grad


def test_composite_of_modules_contributes_its_parameters():
    model = nn.Linear(2, 3).double()
    composite = il.Composite(lambda w, X: X @ w, lambda z, X: z.square().sum())
    assert not list(il.nn.ArgminLayer(composite, torch.zeros(2)).parameters())
    composite = il.Composite(model, lambda z, *_: (z - 1).square().sum())
    module = il.nn.ArgminLayer(composite, torch.zeros(2, dtype=F64), adjoint=il.Implicit(curvature="gauss_newton"))
    assert len(list(module.parameters())) == 2
    module.regularizer = il.Ridge(1.0)
    module().sum().backward()
    assert model.weight.grad.abs().min() > 0


def test_in_a_sequential_over_a_batch():
    torch.manual_seed(0)
    start = nn.Linear(4, 2).double()
    module = layer()
    model = nn.Sequential(start, module)
    one = model(torch.ones(4, dtype=F64))
    torch.testing.assert_close(
        one, expected(module.function.W, module.regularizer.log_lam, start(torch.ones(4, dtype=F64)))
    )
    rows = torch.randn(5, 4, dtype=F64)
    batch = torch.vmap(model)(rows)
    torch.testing.assert_close(batch, torch.stack([model(row) for row in rows]))
    torch.vmap(model)(rows)
    assert module.solution is None  # What lives inside a transform must not be kept.


def test_state_moves_saves_and_loads():
    module, other = layer(), layer()
    with torch.no_grad():
        module.function.W.mul_(2)
    other.load_state_dict(module.state_dict())
    assert set(module.state_dict()) == {"function.W", "regularizer.log_lam"}
    torch.testing.assert_close(other(B), module(B))
    single = layer().to(torch.float32)
    assert single(B.float()).dtype == torch.float32


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_also_after_a_call(again):
    module = layer()
    value = module(B)
    twin = again(module)
    assert twin.solution is None
    torch.testing.assert_close(twin(B), value)
    with torch.no_grad():
        twin.function.W.zero_()
    torch.testing.assert_close(module(B), value)
    assert twin(B).abs().max() == 0


def test_functional_call_differentiates_what_is_passed():
    module = layer()
    values = {name: value.detach().clone() for name, value in module.named_parameters()}

    def total(values):
        return torch.func.functional_call(module, values, (B,)).sin().sum()

    ours = torch.func.grad(total)(values)
    oracle = torch.func.grad(lambda v: expected(v["function.W"], v["regularizer.log_lam"], B).sin().sum())(values)
    torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-12)


def test_under_autocast_the_solve_keeps_its_precision():
    module = layer().to(torch.float32)
    X = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (X @ X).dtype == torch.bfloat16
        value = module(B.float())
        value.sum().backward()
    reference = expected(module.function.W.double(), module.regularizer.log_lam.double(), B.float().double())
    # Bfloat16 has three digits; float32 is asked for.
    torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)
    assert value.dtype == module.function.W.grad.dtype == torch.float32


def test_root_fixed_point_and_least_squares_layers():
    theta = torch.tensor(1.0, dtype=F64, requires_grad=True)
    root = il.nn.RootLayer(lambda x, t: t * x**3 - x - 2, torch.tensor(1.5, dtype=F64))
    x = root(theta)
    assert x.item() == pytest.approx(1.5213797068, abs=1e-9)
    assert torch.autograd.grad(x, theta)[0].item() == pytest.approx(-0.5924469933, abs=1e-9)
    shift = torch.tensor(0.0, dtype=F64, requires_grad=True)
    fixed = il.nn.FixedPointLayer(lambda x, t: torch.cos(x) + t, torch.tensor(1.0, dtype=F64))
    x = fixed(shift)
    assert x.item() == pytest.approx(0.7390851332, abs=1e-7)
    assert torch.autograd.grad(x, shift)[0].item() == pytest.approx(0.5975100457, abs=1e-6)
    A, y = torch.eye(3, 2, dtype=F64), torch.arange(3, dtype=F64, requires_grad=True)
    fit = il.nn.LeastSquaresLayer(lambda w, y: A @ w - y, torch.zeros(2, dtype=F64))
    torch.testing.assert_close(fit(y), y[:2])


def test_a_start_made_from_the_input_and_aux():
    mapping = nn.Linear(3, 3).double()
    with torch.no_grad():
        mapping.weight.mul_(0.1)
    module = il.nn.FixedPointLayer(
        lambda z, x: (torch.tanh(mapping(z) + x), z.norm()), x0=torch.zeros_like, has_aux=True
    )
    x = torch.randn(2, 3, dtype=F64)
    value, size = module(x)
    torch.testing.assert_close(value, torch.tanh(mapping(value) + x), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(size, value.norm())


def test_what_cannot_be_is_refused():
    with pytest.raises(il.MisuseError, match=r"Ridge holds an nn.Parameter.*pass a module"):
        il.nn.ArgminLayer(Distance(), torch.zeros(3), regularizer=il.Ridge(nn.Parameter(torch.ones(()))))
    with pytest.raises(il.MisuseError, match="x0 holds a float"):
        il.nn.RootLayer(lambda x: x, {"a": 1.0})


ROWS = torch.tensor([[0.7, -0.4], [0.2, 0.9], [-0.5, 0.3], [1.1, 0.6]], dtype=F64)


class Network(nn.Module):
    """A layer behind a linear map, for a batch of rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Linear(2, 2).double(), layer())

    def forward(self, rows):
        return torch.vmap(self.one)(rows)


def gradients(model, rows):
    model(rows).sin().sum(-1).mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def distributed(rank, store):
    """What one of two processes has after a backward over its half of the rows."""
    # Half an hour is the default, which would be the suite's where the other process does not come up.
    patience = datetime.timedelta(seconds=120)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience
    )
    try:
        return gradients(DistributedDataParallel(Network()), ROWS[rank::2])
    finally:
        torch.distributed.destroy_process_group()


def other_process(_, store, answer):
    torch.set_num_threads(1)
    torch.save(distributed(1, store), answer)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    expected = gradients(Network(), ROWS)
    assert all(g.abs().max() > 1e-3 for g in expected.values())
    store, answer = tmp_path / "store", tmp_path / "answer"
    other = torch.multiprocessing.spawn(other_process, (store, answer), nprocs=1, join=False)
    ours = distributed(0, store)
    while not other.join():
        pass
    # The mean of two means; the lanes stop each by itself, so that every row is solved as in one batch.
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.load(answer), ours, rtol=0, atol=0)


def test_a_layer_prints_what_it_is():
    layer = il.nn.ArgminLayer(nn.Linear(2, 1), {"a": torch.zeros(2)}, solver=il.Newton(il.CG()))
    assert "x0={'a': (2,)}, solver=Newton(linear_solver=CG(" in repr(layer)
    assert "adjoint" not in repr(layer)
    assert "(function): Linear(in_features=2" in repr(layer)
    assert "x0=made" in repr(il.nn.RootLayer(lambda x, b: x - b, torch.zeros_like))
