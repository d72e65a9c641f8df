"""Proof on the CPU that an accelerator would not be waited for."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What hands a value of the device to the host, or makes a shape of values. Indexing with a mask is `nonzero` as well.
ASKING = {
    *("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select"),
    *("aten._unique", "aten._unique2", "aten.unique_dim", "aten.unique_consecutive", "aten.bincount"),
}
INDEXING = ("aten.index", "aten.index_put", "aten.index_put_")
# What lays numbers of the host out as a tensor: on a device that is a copy, which is waited for. On a CPU it is none,
# so that no operation tells of it; hence by name.
LAYING_OUT = ("tensor", "as_tensor", "asarray", "from_numpy")
# Methods that are no operation either, or none on a CPU.
METHODS = ("new_tensor", "tolist", "numpy", "cpu")


class HostAskedError(AssertionError):
    """A device would have been waited for."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rpartition(".")[0]
        asked = name in ASKING
        if name in INDEXING:
            asked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        out = func(*args, **(kwargs or {}))
        if name in ("aten._to_copy", "aten.copy_"):
            asked = len({t.device for t in (*args, out) if isinstance(t, Tensor)}) > 1
        if asked:
            raise HostAskedError(f"{name} waits for the device")
        return out


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise `HostAskedError` where a device would be waited for, in backward passes as well."""

    def refused(*args, **kwargs):
        raise HostAskedError("numbers go from the host to a tensor or back, and on a device that is waited for")

    with pytest.MonkeyPatch.context() as patch, _Watch():
        for name in LAYING_OUT:
            patch.setattr(torch, name, refused)
        for name in METHODS:
            patch.setattr(Tensor, name, refused)
        yield
