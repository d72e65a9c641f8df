"""A stand-in for a CUDA graph on the CPU: the operations of a step, run again at the same addresses without Python."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from applications.imaml.captured import WARM_UP, Recorder


class _Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class OperationTape(Recorder):
    """Does what a CUDA graph does: numbers of the host are what they were, tensors are read and written where they lay.

    What was allocated while recording stays allocated, and every operation of a replay writes its result there. So what
    Python would have decided, counted or made anew shows as a difference from the eager step.
    """

    def __init__(self):
        self.recorded = self.warmed_up = 0

    def warm_up(self, function):
        for _ in range(WARM_UP):
            function()
            self.warmed_up += 1

    def record(self, function, generator):
        # A CUDA graph is recorded without being run.
        before = {name: value.detach().clone() for name, value in function.tensors().items()}
        with _Log() as log:
            function()
        function.restore(before)
        self.recorded += 1
        return lambda: replay(log.calls)


@torch.no_grad()
def replay(calls):
    for func, args, kwargs, out in calls:
        again = func(*args, **kwargs)
        for new, old in zip(pytree.tree_leaves(again), pytree.tree_leaves(out), strict=True):
            # Views, and results of operations in place, are there already.
            if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                old.copy_(new)
