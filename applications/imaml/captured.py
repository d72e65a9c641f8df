"""The whole meta-step as one CUDA graph: recorded once, then replayed by a single call.

A meta-step is thousands of small kernels, and on a GPU Python takes longer to launch them than they take to run. A
graph launches them all at once, at the addresses that they were recorded with. That is why a `MetaStep` changes its
tensors in place, keeps Adam's rate and count on the device, and never asks it anything. The sampler's random numbers
are registered with the graph, which moves their state on by as much as the recorded draws did: a replayed step draws
the same tasks as an eager one, and a checkpoint finds the same state.

See "CUDA Graphs" in the notes on CUDA semantics of PyTorch's documentation (whole-network capture).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from applications.imaml.config import Config, ConfigError
from applications.imaml.meta_step import MetaStep
from applications.imaml.processes import Processes
from applications.imaml.run_folder import RunError

# Libraries choose and allocate what they need in the first steps, and Adam makes its moments in the first.
WARM_UP = 3
# Those that run a fixed number of steps and look at nothing. A line search looks at its trials; what a class of
# torch.optim does is its own affair.
CAPTURABLE = ("gradient", "adam")


class Recorder(ABC):
    """Records what a function does on a device."""

    @abstractmethod
    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function as it will be recorded, without recording it.

        Args:
            function: what will be recorded.
        """

    @abstractmethod
    def record(self, function: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        """Record the function without running it.

        Args:
            function: what to record; its tensors stay where they are as long as the recording is used.
            generator: that it draws random numbers from.

        Returns:
            Does again what the function did.
        """


class CudaGraph(Recorder):
    """Records as a CUDA graph.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def warm_up(self, function: Callable[[], None]) -> None:
        with torch.cuda.device(self._device):
            # Recording takes place beside the default stream, so this does.
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(beside)

    def record(self, function: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph):
                function()
        return graph.replay


class CapturedStep:
    """A meta-step that is recorded when it is first taken, and replayed every time.

    Args:
        step: the step, capturable.
        recorder: how to record it.
    """

    def __init__(self, step: MetaStep, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Take the step.

        Raises:
            RunError: if it cannot be recorded.
        """
        if self._replay is None:
            before = {name: value.detach().clone() for name, value in self._step.tensors().items()}
            self._recorder.warm_up(self._step)
            self._step.restore(before)
            try:
                self._replay = self._recorder.record(self._step, self._step.generator)
            except RuntimeError as error:
                raise RunError(
                    f"the meta-step could not be recorded as a CUDA graph ({error}); pass graph=False."
                ) from error
        self._replay()


def check_capturable(config: Config, device: torch.device, processes: Processes) -> None:
    """Refuse a graph where there can be none.

    Args:
        config: of the run.
        device: where it computes.
        processes: those that share its tasks.

    Raises:
        ConfigError: if the device has no graphs, the inner solver asks the device, or there are several processes.
    """
    if not config.graph:
        return
    if device.type != "cuda":
        raise ConfigError(
            f"graph=True cannot be on {device.type}: a CUDA graph needs a CUDA device; pass graph=False, or a device "
            f"that is one."
        )
    if config.inner not in CAPTURABLE:
        raise ConfigError(
            f"graph=True cannot be with inner={config.inner!r}, which asks the device how it went before it goes on, "
            f"and a graph has no choices; pass graph=False, or inner={' or '.join(map(repr, CAPTURABLE))}."
        )
    if processes.count > 1:
        raise ConfigError(
            f"graph=True cannot be with {processes.count} processes, which exchange the meta-gradient in the middle of "
            f"a step; pass graph=False, or start one process."
        )
