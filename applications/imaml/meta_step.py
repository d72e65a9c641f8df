"""One meta-step: all that training computes, on the device and without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from applications.imaml.algorithms import meta_loss
from applications.imaml.config import Config
from applications.imaml.criterion import criterion_of
from applications.imaml.episodes import Tasks
from applications.imaml.families import Sampler
from applications.imaml.metrics import Meter
from applications.imaml.networks import Parameters
from applications.imaml.processes import Processes

_ADAM = ("step", "exp_avg", "exp_avg_sq")


class MetaStep:
    """Sample tasks, differentiate the meta-loss, step Adam, gather the metrics.

    What one step hands to the next is the state of the random numbers and tensors that are made once and changed in
    place: the meta-parameters, Adam's moments and count, the sums of the metrics. So a step can be recorded and
    replayed, undone, saved and gone on from.

    Args:
        theta: meta-parameters, leaves that require a gradient.
        sampler: draws the tasks.
        config: of the run.
        processes: those that share the tasks of a meta-step, this one among them.
        capturable: whether Adam keeps its rate on the device as well, where a recorded step finds it. It rounds
            otherwise than on the host, so it must be the same throughout a run, recorded or not.
    """

    def __init__(
        self, theta: Parameters, sampler: Sampler, config: Config, processes: Processes, *, capturable: bool
    ) -> None:
        self.theta, self.generator = theta, sampler.generator
        self._sampler, self._tasks, self._processes = sampler, config.tasks, processes
        self._meta_loss = meta_loss(config)
        like = next(iter(theta.values()))
        self.meter = Meter(like.device, criterion_of(config))
        # Fused, since PyTorch would choose by the device, and what a CPU tests be another path than what a GPU runs.
        self._optimizer = torch.optim.Adam(theta.values(), lr=config.meta_lr, capturable=capturable, fused=True)
        self._capturable = capturable
        if capturable:
            # Not handed over above, where Adam would ask the device whether it is positive.
            for group in self._optimizer.param_groups:
                group["lr"] = torch.full((), config.meta_lr, dtype=like.dtype, device=like.device)

    def __call__(self) -> None:
        """Take the step."""
        share = self._processes.share(self._tasks)
        tasks = Tasks(*(part[share] for part in self._sampler.sample(self._tasks)))
        outcome = self._meta_loss(self.theta, tasks)
        self._optimizer.zero_grad()
        outcome.loss.backward()
        self._processes.average_gradients(self._tasks, self.theta.values())
        self._optimizer.step()
        self.meter.add(outcome)

    def set_rate(self, rate: float) -> None:
        """Set Adam's learning rate for the steps to come, recorded ones as well.

        Args:
            rate: the learning rate.
        """
        for group in self._optimizer.param_groups:
            if self._capturable:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as it lies there; ``restore`` takes it back.

        Returns:
            The tensors by name; Adam has none for a parameter that has had no gradient yet.
        """
        found = {f"theta.{name}": value for name, value in self.theta.items()}
        for name, value in self.theta.items():
            found |= {f"adam.{name}.{key}": moment for key, moment in self._optimizer.state.get(value, {}).items()}
        return found | {"training_tasks": self.generator.get_state(), "meter": self.meter.sums}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back, or on, to a state; every tensor that there is stays where it is.

        Args:
            tensors: as ``tensors`` had them, on any device; others are left alone.
        """
        with torch.no_grad():
            for name, value in self.theta.items():
                value.copy_(tensors[f"theta.{name}"])
                self._restore_adam(value, {key: tensors.get(f"adam.{name}.{key}") for key in _ADAM})
        self.generator.set_state(tensors["training_tasks"])
        self.meter.sums.copy_(tensors["meter"])

    def _restore_adam(self, parameter: Tensor, saved: Mapping[str, Tensor | None]) -> None:
        state = self._optimizer.state[parameter]
        for key, value in saved.items():
            if key not in state and value is not None:
                state[key] = value.to(parameter.device, copy=True)
            elif key in state and value is not None:
                state[key].copy_(value)
            elif key in state:
                # Adam starts from zeros.
                state[key].zero_()
