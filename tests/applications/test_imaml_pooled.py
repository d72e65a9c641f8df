"""The pooled network: its size, its mathematics against torch.nn, its derivatives, and when it is chosen."""

import pytest
import torch
from torch import nn

from applications.imaml import network, networks, pooled
from applications.imaml.network import EPSILON
from implicitlayers.testing import assert_gradients_match


def parameters(side, ways=5, channels=3):
    drawn = pooled.initialize(ways, channels, side, torch.Generator().manual_seed(1))
    for name, value in drawn.items():
        if name.startswith("normalization"):
            value += 0.1 * torch.randn(value.shape)
    return {name: value.double() for name, value in drawn.items()}


def images(count, side, channels=3):
    return torch.rand(count, channels, side, side, dtype=torch.float64)


@pytest.mark.parametrize(("side", "ways", "numbers"), [(84, 5, 32_901), (64, 5, 31_461), (84, 20, 32_901 + 15 * 801)])
def test_number_of_parameters(side, ways, numbers):
    assert sum(value.numel() for value in pooled.initialize(ways, 3, side, torch.Generator()).values()) == numbers


def test_initialisation_is_a_function_of_the_seed_and_keeps_its_bounds():
    first, again, other = (pooled.initialize(5, 3, 84, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])
    bound = 1.73 * (6 / (9 * (32 + 32))) ** 0.5
    weight, bias = first["convolution2.weight"], first["convolution2.bias"]
    assert 0.99 * bound < weight.abs().max() <= bound
    assert 0 <= bias.min() < bias.max() <= 0.05


@pytest.mark.parametrize("side", [84, 64, 20])
def test_same_logits_as_torch_modules(side):
    drawn, batch = parameters(side), images(4, side)
    layers = []
    for block in range(4):
        convolution, normalization = nn.Conv2d(3 if block == 0 else 32, 32, 3, padding=1), nn.BatchNorm2d(32, EPSILON)
        convolution.weight.data, convolution.bias.data = (drawn[f"convolution{block}.{n}"] for n in ("weight", "bias"))
        normalization.weight.data = drawn[f"normalization{block}.scale"]
        normalization.bias.data = drawn[f"normalization{block}.shift"]
        layers += [convolution, normalization, nn.ReLU(), nn.MaxPool2d(2)]
    linear = nn.Linear(drawn["linear.weight"].shape[1], 5)
    linear.weight.data, linear.bias.data = drawn["linear.weight"], drawn["linear.bias"]
    reference = nn.Sequential(*layers, nn.Flatten(), linear).double()
    torch.testing.assert_close(networks.forward(drawn, batch), reference(batch))


def test_per_task_parameters_are_mapped_over():
    drawn = parameters(20)
    batches = torch.rand(3, 4, 3, 20, 20, dtype=torch.float64)
    each = {name: torch.stack([value, 1.1 * value, 0.9 * value]) for name, value in drawn.items()}
    one_by_one = [networks.forward({name: value[i] for name, value in each.items()}, batches[i]) for i in range(3)]
    torch.testing.assert_close(torch.vmap(networks.forward)(each, batches), torch.stack(one_by_one))


def test_derivatives_are_those_of_finite_differences():
    drawn, batch = parameters(16, ways=2, channels=1), images(3, 16, channels=1)
    names = list(drawn)

    def logits(*values):
        return networks.forward(dict(zip(names, values, strict=True)), batch)

    assert_gradients_match(logits, *drawn.values(), order=2, modes=("reverse", "forward"))


def test_only_with_support_statistics_is_a_query_classified_on_its_own():
    drawn, support, queries = parameters(20), images(5, 20), images(4, 20)
    statistics = networks.batch_statistics(drawn, support)
    together = networks.forward(drawn, queries, statistics)
    torch.testing.assert_close(networks.forward(drawn, queries[:1], statistics), together[:1])
    torch.testing.assert_close(networks.forward(drawn, support, statistics), networks.forward(drawn, support))
    assert (networks.forward(drawn, queries)[:1] - together[:1]).abs().max() > 0.01


def test_the_size_of_the_images_chooses_the_network():
    strided, wide = (networks.initialize(5, 1, side, torch.Generator().manual_seed(1)) for side in (28, 32))
    assert strided.keys() == network.initialize(5, 1, torch.Generator()).keys()
    assert strided["linear.weight"].shape == (5, 256)
    assert wide["linear.weight"].shape == (5, 128)
    batch = torch.rand(3, 1, 28, 28)
    assert networks.forward(strided, batch).equal(network.forward(strided, batch))
    own = network.batch_statistics(strided, batch)
    assert all(a.mean.equal(b.mean) for a, b in zip(networks.batch_statistics(strided, batch), own, strict=True))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3, 64, 64\].*sides from 80 to 95 pixels only"):
        networks.forward(parameters(84), images(2, 64))
    with pytest.raises(ValueError, match=r"15x15 pixels have no pixel left.*at least 16x16"):
        networks.initialize(5, 3, 15, torch.Generator())
