"""One run in several processes: ``torchrun --nproc-per-node=N -m applications.imaml train ...``.

All processes hold the same meta-parameters, draw the same tasks from the same stream of random numbers, and take the
same steps. Each differentiates only its share of the tasks of a meta-step: the meta-gradient over T tasks is
1/T sum_i g_i = sum_p (T_p/T) m_p, where m_p is the mean over the T_p tasks of process p, and it is the one thing that
is sent around. Shares differ by one task at most. Batch normalisation sees the images of one task, so nothing else ties
tasks together, and a run is the same for every N up to T but for rounding.

The first process alone touches the folder of the run. What it finds there, or fails at, it hands to the others, so that
all go on or all end, and it is the one that tells why. One that dies closes its connections, which ends the others; one
that hangs does so after ``TIMEOUT``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from applications.imaml.config import Config, ConfigError
from applications.imaml.run_folder import RunError

T = TypeVar("T")

# Longer than the first process takes for a checkpoint and a picture on a slow disk.
TIMEOUT = timedelta(minutes=5)


class FirstFailedError(RunError):
    """The first process has failed, and tells why."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them. Where there is one only, everything here does nothing.

    Args:
        rank: number of this process, from 0.
        count: how many there are.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads, writes and shows."""
        return self.rank == 0

    def check(self, config: Config) -> None:
        """Refuse settings that several processes cannot have.

        Args:
            config: of the run.

        Raises:
            ConfigError: if there are more of them than tasks, or they have no device each.
        """
        if self.count == 1:
            return
        if config.tasks < self.count:
            raise ConfigError(
                f"tasks={config.tasks} cannot be shared by {self.count} processes, some of which would have no task; "
                f"pass tasks={self.count} or more, or start {config.tasks} at most."
            )
        if ":" in config.device:
            raise ConfigError(
                f"device={config.device!r} is one device for {self.count} processes; pass auto, cuda or cpu, and each "
                f"takes its own."
            )
        devices = torch.cuda.device_count()
        if config.device != "cpu" and devices and self.local_rank >= devices:
            raise ConfigError(
                f"process {self.local_rank} of this machine has no device of its own, there are {devices}; pass "
                f"--nproc-per-node={devices}, or device='cpu'."
            )

    def share(self, tasks: int) -> slice:
        """The part of a batch that is this process's.

        Args:
            tasks: in the batch.

        Returns:
            Their places; as many as any other process has, or one more or less.
        """
        return slice(tasks * self.rank // self.count, tasks * (self.rank + 1) // self.count)

    def average(self, tasks: int, *tensors: Tensor) -> None:
        """Make means over this process's share of a batch the means over the whole, in one message.

        Args:
            tasks: in the batch; each process's mean counts as many times as it has tasks.
            *tensors: means over the share, of one dtype and device, of the same shapes in all processes. What is the
                same in all of them stays that, but for rounding.
        """
        if self.count == 1:
            return
        share = self.share(tasks)
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        flat *= (share.stop - share.start) / tasks
        self.add_up(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def average_gradients(self, tasks: int, parameters: Iterable[Tensor]) -> None:
        """Make the gradients of the shares that of the whole.

        Args:
            tasks: in the batch.
            parameters: whose ``grad`` is that of the mean over this process's tasks; those without one are the same in
                every process.
        """
        self.average(tasks, *(value.grad for value in parameters if value.grad is not None))

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes.

        Args:
            tensor: of the same shape in all of them.
        """
        if self.count > 1:
            with _told():
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process. Asked on the CPU, so that no accelerator is waited for.

        Args:
            flag: whether it is so in this one.

        Returns:
            The same in all of them.
        """
        if self.count == 1:
            return flag
        votes = torch.tensor(int(flag))
        self.add_up(votes)
        return bool(votes)

    def from_first(self, make: Callable[[], T]) -> T:
        """Do something in the first process alone.

        Args:
            make: what to do.

        Returns:
            What it returned there, in all of them.

        Raises:
            Exception: what it raised, in the first process.
            FirstFailedError: in the others.
        """
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        with _told():
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        error = outcome[1]
        if error is None:
            return outcome[0]
        if self.is_first:
            raise error
        raise FirstFailedError(str(error)) from error

    def alike(self, make: Callable[[], T]) -> T:
        """Do something in every process that succeeds or fails in all of them, as a rule, and have a failure told once.

        Args:
            make: what to do.

        Returns:
            What it returned in this one.

        Raises:
            Exception: what it raised in this one.
            FirstFailedError: in the others if it failed in the first.
        """
        if self.count == 1:
            return make()
        try:
            made = make()
        except Exception as error:
            self.from_first(partial(_fail, error))
            raise
        self.from_first(lambda: None)
        return made


@contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started; without it there is one.

    Args:
        timeout: how long to wait for another process before the run ends.

    Raises:
        RunError: if they cannot be reached.
    """
    # Some clusters say how many there are, but not which one this is, in places where nothing was started together.
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1:
        yield Processes()
        return
    processes = Processes(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    devices = torch.cuda.device_count()
    if processes.local_rank < devices:
        # From here on "cuda" means this one.
        torch.cuda.set_device(processes.local_rank)
    with _told():
        dist.init_process_group("cpu:gloo,cuda:nccl" if devices else "gloo", timeout=timeout)
    yield processes
    # Not after an error: leaving in order would wait for the others, who may be gone.
    dist.destroy_process_group()


def _fail(error: Exception) -> None:
    raise error


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another process of this run has ended or doesn't answer ({str(error).splitlines()[0]}); the last "
            f"checkpoint is whole, so continue with --resume, in any number of processes."
        ) from error
