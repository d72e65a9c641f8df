"""Arrays and plain containers out of a pickle that nobody vouches for.

A pickle is a program: reading one with ``pickle.load`` runs whatever its author wished. Here every name that it asks
for is refused but the few that numpy writes for an array, and even those are not numpy's: what they stand for is built
from checked numbers and bytes, since numpy's own rebuilding trusts a dtype to say where pointers lie.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applications.datasets.recognition import START, recognised

_BROKEN = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError),
    *(MemoryError, OverflowError, RecursionError),
)
_KINDS = ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain values, containers and arrays of numbers, in any protocol, also one of Python 2.

    Args:
        path: the file.

    Returns:
        Its content, arrays as ``numpy.ndarray``. Strings of Python 2 are read as Latin-1.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged or asks for anything but arrays and plain containers.
    """
    try:
        with path.open("rb") as file:
            if found := recognised(file.peek(START)):
                raise pickle.UnpicklingError(f"it {found}")
            return _with_arrays(_Reader(file, encoding="latin1").load())
    except _RefusedError as error:
        raise ValueError(
            f"{path} asks for {error}, and a file of images needs nothing but arrays and plain containers: reading on "
            f"could run any program; fetch the file from its publisher, or convert it where you trust it."
        ) from error
    except _BROKEN as error:
        raise ValueError(
            f"{path} is a truncated or corrupt pickle ({type(error).__name__}: {error}); fetch it again and look at "
            f"the file's size."
        ) from error


class _RefusedError(Exception):
    """A name that no array needs."""


class _Dtype:
    """What ``numpy.dtype(code, align, copy)`` and its state come to: a kind of number and a byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if text not in _KINDS:
            raise _RefusedError(f"an array of {text!r}")
        self.numpy = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.numpy = self.numpy.newbyteorder(order)


class _Array:
    """What ``numpy.ndarray`` comes to, once its state is known."""

    numpy: NDArray[Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.numpy = _array(content, dtype, shape, "F" if fortran else "C")


def _reconstruct(kind: Any, _shape: Any, _code: Any) -> _Array:
    if kind is not _Array:
        raise _RefusedError("an array of another class than numpy's")
    return _Array()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array.numpy = _array(content, dtype, shape, order)
    return array


def _array(content: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if isinstance(content, str):
        # The bytes of Python 2 are its strings.
        content = content.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray | memoryview):
        raise _RefusedError("an array whose content is no block of numbers")
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f"an array cannot have shape {shape!r}")
    return np.frombuffer(content, dtype.numpy).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2, ``codecs.encode``, with the one encoding that this needs."""
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"the codec {encoding!r}")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    """How Python 3 writes empty bytes for Python 2, ``bytes()``; with a length it would fill the memory."""
    if arguments:
        raise _RefusedError("bytes of a length")
    return b""


_NUMPY_CORES = ("numpy.core", "numpy._core")
_ADMITTED: Mapping[tuple[str, str], Callable[..., Any]] = MappingProxyType(
    {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _latin1,
        ("__builtin__", "bytes"): _no_bytes,
        ("builtins", "bytes"): _no_bytes,
        ("collections", "OrderedDict"): OrderedDict,
        **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in _NUMPY_CORES},
        **{(f"{core}.numeric", "_frombuffer"): _from_buffer for core in _NUMPY_CORES},
    }
)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any, /) -> Any:
        raise _RefusedError("an object kept elsewhere")


def _with_arrays(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.numpy
    if isinstance(value, dict):
        return {_with_arrays(key): _with_arrays(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_with_arrays, value))
    return value
