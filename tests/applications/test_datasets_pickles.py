"""Pickles of arrays are read, in every protocol and from every numpy; any other name in one is refused, not run."""

import collections
import os
import pickle
import struct

import numpy as np
import pytest

from applications.datasets.pickles import read_pickle

CONTENT = {
    "image_data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "class_dict": collections.OrderedDict([("n01", [0, 1]), ("n02", (2,))]),
    "floats": np.asfortranarray(np.random.default_rng(0).random((3, 2))),
    "swapped": np.arange(3, dtype=">i4"),
    "empty": np.empty((0, 5), np.int64),
    "text": "ä",
    "number": 1.5,
    "none": None,
    "bytes": b"\x00\xff",
}


def assert_same(found):
    assert found.keys() == CONTENT.keys()
    for name, value in CONTENT.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(tmp_path, protocol):
    (tmp_path / "it.pkl").write_bytes(pickle.dumps(CONTENT, protocol))
    assert_same(read_pickle(tmp_path / "it.pkl"))


@pytest.mark.parametrize("protocol", [0, 2, 3])
def test_names_of_an_older_numpy(tmp_path, protocol):
    content = pickle.dumps(CONTENT, protocol).replace(b"cnumpy._core.", b"cnumpy.core.")
    assert b"cnumpy.core.multiarray" in content
    (tmp_path / "it.pkl").write_bytes(content)
    assert_same(read_pickle(tmp_path / "it.pkl"))


def test_pickle_of_python_2(tmp_path):
    """Protocol 2 as Python 2 writes it: names and the bytes of an array are both strings of bytes."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR(K\x01(K\x02K\x02t"
    array += dtype + b"\x89" + text(b"\x00\x7f\x80\xff") + b"tb"
    (tmp_path / "it.pkl").write_bytes(b"\x80\x02}" + text(b"image_data") + array + b"s.")
    found = read_pickle(tmp_path / "it.pkl")["image_data"]
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 127], [128, 255]]


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Evil(os.mkdir, "PLACE"), "mkdir"),
        (Evil(eval, "__import__('os').mkdir('PLACE')"), "eval"),
        (Evil(np.load, "PLACE"), "load"),
        (Evil(getattr, "text", "upper"), "getattr"),
        (np.ma.masked_array([1]), "numpy.ma"),
        (np.array([object()]), "'O8'"),
        (np.zeros(1, dtype=[("a", "u1")]), "'V1'"),
        (np.array(["text"]), "'U4'"),
        (np.float64(1.0), "scalar"),
        (Evil(bytes, 10), "bytes of a length"),
        (print, "print"),
    ],
)
def test_anything_else_is_refused(tmp_path, monkeypatch, thing, name, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.pkl").write_bytes(pickle.dumps({"image_data": thing}, protocol))
    with pytest.raises(ValueError, match=r"it\.pkl asks for .*could run any program; fetch the file") as caught:
        read_pickle(tmp_path / "it.pkl")
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["it.pkl"]


def test_other_codecs_and_objects_elsewhere_are_refused(tmp_path):
    path = tmp_path / "it.pkl"
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(ValueError, match="asks for the codec 'rot13'"):
        read_pickle(path)
    path.write_bytes(b"\x80\x02K\x01Q.")
    with pytest.raises(ValueError, match="asks for an object kept elsewhere"):
        read_pickle(path)


DAMAGE = {
    "short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a page": lambda content: b"<!DOCTYPE html><html>Quota exceeded</html>",
    "a zip": lambda content: b"PK\x03\x04" + content,
    "rubbish": lambda content: bytes(range(256)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "it.pkl"
    path.write_bytes(DAMAGE[damage](pickle.dumps(CONTENT)))
    with pytest.raises(ValueError, match=r"it\.pkl is a truncated or corrupt pickle .*fetch it again") as caught:
        read_pickle(path)
    assert ("HTML page" in str(caught.value)) == (damage == "a page")


@pytest.mark.parametrize("shape", [(5,), (-1,), (2, 3), ("4",)])
def test_an_array_of_another_size_than_its_bytes_is_refused(tmp_path, shape):
    class Lying:
        def __reduce__(self):
            reconstruct, arguments, state = np.zeros(4, np.uint8).__reduce__()
            return reconstruct, arguments, (state[0], shape, *state[2:])

    (tmp_path / "it.pkl").write_bytes(pickle.dumps(Lying(), 2))
    with pytest.raises(ValueError, match="truncated or corrupt pickle"):
        read_pickle(tmp_path / "it.pkl")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "nowhere.pkl")
