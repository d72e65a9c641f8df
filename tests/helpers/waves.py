"""Regression of sine waves as the tests know it: a small run, and the network written out."""

from torch.nn import functional as F

from applications.imaml.config import Config

WAVES = Config(
    data="sinusoid", shots=5, queries=6, inner_lr=0.02, inner_steps=3, tasks=4, meta_steps=6, log_every=2,
    validate_every=4, validation_tasks=6, device="cpu", schedule="constant",
)  # fmt: skip


def plain(parameters, inputs):
    x = inputs
    for layer in range(2):
        x = F.relu(x @ parameters[f"hidden{layer}.weight"].T + parameters[f"hidden{layer}.bias"])
    return x @ parameters["linear.weight"].T + parameters["linear.bias"]


def mean_squared_error(parameters, inputs, targets):
    return (plain(parameters, inputs) - targets).square().mean()
