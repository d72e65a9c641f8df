"""The network as a pure function: its size, its mathematics against torch.nn, its two ways to normalise queries."""

import pytest
import torch
from torch import nn

from applications.imaml.algorithms import query_logits
from applications.imaml.episodes import Tasks
from applications.imaml.network import EPSILON, batch_statistics, forward, initialize


@pytest.fixture
def parameters():
    drawn = initialize(5, 1, torch.Generator().manual_seed(1))
    for name, value in drawn.items():
        if name.startswith("normalization"):
            value += 0.1 * torch.randn(value.shape)
    return {name: value.double() for name, value in drawn.items()}


def images(count):
    return torch.rand(count, 1, 28, 28, dtype=torch.float64)


@pytest.mark.parametrize(("ways", "numbers"), [(5, 113_221), (20, 113_221 + 15 * 257)])
def test_number_of_parameters(ways, numbers):
    assert sum(value.numel() for value in initialize(ways, 1, torch.Generator()).values()) == numbers


def test_initialisation_is_a_function_of_the_seed_and_keeps_its_bounds():
    first, again, other = (initialize(5, 1, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])
    bound = 1.73 * (6 / (9 * (64 + 64))) ** 0.5
    weight, bias = first["convolution2.weight"], first["convolution2.bias"]
    assert 0.99 * bound < weight.abs().max() <= bound
    assert 0 <= bias.min() < bias.max() <= 0.05


def reference(parameters):
    """The same network made of torch.nn's modules, in training mode, where BatchNorm2d uses batch statistics."""
    layers = []
    for block in range(4):
        convolution = nn.Conv2d(1 if block == 0 else 64, 64, 3, stride=2, padding=1)
        normalization = nn.BatchNorm2d(64, eps=EPSILON)
        for module, one, other in ((convolution, "weight", "bias"), (normalization, "scale", "shift")):
            name = "convolution" if module is convolution else "normalization"
            weight = parameters[f"{name}{block}.{one}"]
            # Channels last here, [height, width, in, out]; channels first there.
            module.weight.data = weight.permute(3, 2, 0, 1) if module is convolution else weight
            module.bias.data = parameters[f"{name}{block}.{other}"]
        layers += [convolution, normalization, nn.ReLU(), *([nn.ZeroPad2d((0, 1, 0, 1))] if block == 1 else [])]
    linear = nn.Linear(256, 5)
    features = parameters["linear.weight"].reshape(5, 2, 2, 64).permute(0, 3, 1, 2).reshape(5, 256)
    linear.weight.data, linear.bias.data = features, parameters["linear.bias"]
    return nn.Sequential(*layers, nn.Flatten(), linear).double()


def test_same_logits_as_torch_modules(parameters):
    batch = images(6)
    torch.testing.assert_close(forward(parameters, batch), reference(parameters)(batch))


def test_per_task_parameters_are_mapped_over(parameters):
    batches = torch.rand(3, 4, 1, 28, 28, dtype=torch.float64)
    each = {name: torch.stack([value, 1.1 * value, 0.9 * value]) for name, value in parameters.items()}
    one_by_one = [forward({name: value[i] for name, value in each.items()}, batches[i]) for i in range(3)]
    torch.testing.assert_close(torch.vmap(forward)(each, batches), torch.stack(one_by_one))


def test_only_with_support_statistics_is_a_query_classified_on_its_own(parameters):
    support, queries = images(5), images(4)
    statistics = batch_statistics(parameters, support)
    together = forward(parameters, queries, statistics)
    torch.testing.assert_close(forward(parameters, queries[:1], statistics), together[:1])
    assert (forward(parameters, queries)[:1] - forward(parameters, queries[:1])).abs().max() > 0.01


def test_a_batch_normalised_by_its_own_statistics_handed_over_is_the_same(parameters):
    batch = images(5)
    torch.testing.assert_close(
        forward(parameters, batch, batch_statistics(parameters, batch)), forward(parameters, batch)
    )


def test_other_image_sizes_are_refused_by_name(parameters):
    with pytest.raises(ValueError, match=r"\[2, 1, 84, 84\].*resized to \[batch, channels, 28, 28\]"):
        forward(parameters, torch.rand(2, 1, 84, 84, dtype=torch.float64))


@pytest.mark.parametrize("batch_norm", ["transductive", "support"])
def test_each_query_set_is_normalised_by_itself(parameters, batch_norm):
    labels = torch.zeros(0, dtype=torch.int64)
    support, first, second = images(5), images(5), images(5)
    alone = [query_logits(parameters, Tasks(support, labels, q, labels), batch_norm) for q in (first, second)]
    both = Tasks(support, labels, torch.cat([first, second]), labels)
    torch.testing.assert_close(query_logits(parameters, both, batch_norm, 2), torch.cat(alone))
    mixed = query_logits(parameters, both, batch_norm) - torch.cat(alone)
    assert (mixed.abs().max() > 0.01) == (batch_norm == "transductive")
