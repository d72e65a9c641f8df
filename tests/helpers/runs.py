"""Settings of a training run that takes seconds."""

from applications.imaml.config import Config

SMALL = Config(
    tasks=4, meta_steps=12, inner_steps=5, cg_steps=1, meta_lr=5e-3, log_every=4, validate_every=12,
    validation_tasks=2, device="cpu",
)  # fmt: skip
