"""`check_layer(batched=True)`: what belongs to an element of a batch, and what to all of them."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from implicitlayers.testing import GradientMismatch, check_layer, strategies

F64 = torch.float64
BATCHES = strategies.tensors((3, 2))
OPTIONS: dict[str, Any] = {"modes": ("reverse",), "batched": True, "max_examples": 3}


def test_integer_labels_are_cut_with_their_elements():
    inputs = BATCHES.map(lambda x: (x, torch.tensor([0, 1, 1])))
    assert check_layer(lambda x, y: F.cross_entropy(x, y, reduction="none"), inputs, **OPTIONS).examples == 3


def test_frozen_data_are_cut_with_their_elements():
    frozen = torch.arange(6.0, dtype=F64).reshape(3, 2)
    inputs = BATCHES.map(lambda x: (x.requires_grad_(), frozen))
    assert check_layer(lambda x, w: (x * w).sin(), inputs, **OPTIONS).examples == 3


def test_parameters_belong_to_all_elements():
    torch.manual_seed(0)
    # As many rows as there are elements.
    assert check_layer(nn.Linear(2, 3).double(), BATCHES, **OPTIONS).examples == 3


def test_a_number_without_dimensions_belongs_to_all_elements():
    inputs = st.tuples(BATCHES, st.just(torch.tensor(2.0, dtype=F64)))
    assert check_layer(lambda x, t: {"p": (x / t).softmax(-1), "n": x.sum(1)}, inputs, **OPTIONS).examples == 3


def test_a_batch_normalized_by_its_size_is_caught():
    class Normalized(nn.Linear):
        def forward(self, x):
            return super().forward(x) / len(x)

    with pytest.raises(GradientMismatch, match="batch"):
        check_layer(Normalized(2, 2).double(), BATCHES, **OPTIONS)


def test_an_output_without_the_batch_is_named():
    with pytest.raises(GradientMismatch, match=r"output \[\] does not have the batch of 3"):
        check_layer(lambda x: x.sin().sum(), BATCHES, **OPTIONS)


def test_what_would_compare_nothing_is_refused():
    with pytest.raises(ValueError, match="batch of 1; draw batches of"):
        check_layer(torch.sin, strategies.tensors((1, 2)), **OPTIONS)
    with pytest.raises(ValueError, match="batch of 0"):
        check_layer(torch.sin, strategies.tensors(()), **OPTIONS)
    with pytest.raises(ValueError, match=r'add "reverse"'):
        check_layer(torch.sin, BATCHES, modes=("forward",), batched=True)
